from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from toolkit.adapters.configs import peft_config
from toolkit.adapters.methods import target_modules
from toolkit.config.schema import LoraMethod
from toolkit.errors import RecipeError
from toolkit.families import FAMILIES, Family

GPT2, DISTILBERT = FAMILIES["gpt2"], FAMILIES["distilbert"]


def test_the_recipe_is_carried_over() -> None:
    method = LoraMethod(r=4, lora_alpha=12.0, lora_dropout=0.2)
    config = peft_config(method, GPT2, base_name="owner/base", blocks=12)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12.0, 0.2)
    assert (config.task_type, config.bias, config.base_model_name_or_path) == ("SEQ_CLS", "none", "owner/base")
    assert config.modules_to_save == ["score"]
    assert config.fan_in_fan_out is True
    assert peft_config(method, DISTILBERT, base_name="x", blocks=6).fan_in_fan_out is False


@pytest.mark.parametrize(
    ("family", "wanted", "found"),
    [
        (GPT2, "auto", ["c_attn"]),
        (DISTILBERT, "auto", ["q_lin", "v_lin"]),
        (GPT2, "all-linear", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        (DISTILBERT, ["lin2", "q_lin", "lin2"], ["lin2", "q_lin"]),
        (GPT2, ["mlp.c_proj", "transformer.h.0.attn.c_attn"], ["mlp.c_proj", "transformer.h.0.attn.c_attn"]),
    ],
)
def test_targets(family: Family, wanted: Any, found: list[str]) -> None:
    assert target_modules(LoraMethod(target_modules=wanted), family) == found


@pytest.mark.parametrize("name", ["q_line", "classifier", "pre_classifier", "c_attn", ".*"])
def test_targets_that_match_nothing_list_the_candidates(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        peft_config(LoraMethod(target_modules=["q_lin", name]), DISTILBERT, base_name="x", blocks=6)
    [problem] = caught.value.problems
    assert problem.field == "method.target_modules"
    assert problem.wrong == f"{name} matches no layer"
    assert "candidates: k_lin, lin1, lin2, out_lin, q_lin, v_lin" in problem.right
    assert ("did you mean q_lin?" in problem.right) == (name == "q_line")
