"""What a method cannot be combined with is said before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toolkit.adapters.fit import check_method
from toolkit.config.load import load_recipe
from toolkit.config.methods import AdaloraMethod, GradualMethod, LastNMethod, LoraMethod, PrefixMethod
from toolkit.errors import RecipeError
from toolkit.families import FAMILIES

CONFIG = {"n_layer": 2, "n_positions": 48, "n_layers": 2, "max_position_embeddings": 48}


def refused(tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: gpt2-mini}\ndata: {source: sms_spam}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method={name: lora, variant: dora}", "quantization={bits: 8}"], "method.variant: dora needs the norms"),
        (["method={name: lora, variant: pissa}", "quantization={bits: 4}"], "method.variant: pissa takes its start"),
        (["method={name: bias}", "quantization={bits: 4}"], "quantization: quantised weights cannot be trained"),
        (["method={name: gradual}", "quantization={bits: 4}"], "quantization: quantised weights cannot be trained"),
        (["method={name: adalora, init_r: 8, target_r: 8}"], "method.target_r: adalora cuts ranks"),
        (
            ["method={name: adalora, start_ratio: 0.5, final_ratio: 0.5}"],
            "method.final_ratio: start_ratio and final_ratio",
        ),
        (
            ["method={name: gradual, epochs_per_block: plateau}", "evaluation.every=end"],
            "method.epochs_per_block: plateau needs evaluations",
        ),
        (
            ["method={name: prefix}", "training.gradient_checkpointing=true"],
            "training.gradient_checkpointing: recomputed blocks would lose the prefix",
        ),
        (["method={name: prefix}", "model.random_init=true"], "model.random_init: a prefix cannot be merged"),
        (["training.loss={focal_gamma: 2, label_smoothing: 0.1}"], "training.loss.label_smoothing: a focal loss looks"),
        (["training.loss={class_weights: [1, 2, 3]}", "data.labels=[a, b]"], "class_weights: the number of weights"),
        (["training.loss={class_weights: [1]}"], "training.loss.class_weights: [1] is not allowed (balanced or a list"),
        (["method={name: lora, variant: qlora}"], "method.variant: "),
        (["method={name: lora, lora_plus_ratio: 0}"], "method.lora_plus_ratio: "),
        (["method={name: full, layer_decay: 1.5}"], "method.layer_decay: "),
        (["method={name: ia3, r: 4}"], "method.r: unknown key"),
    ],
)
def test_one_line_names_the_field(tmp_path: Path, overrides: list[str], said: str) -> None:
    [line] = refused(tmp_path, *overrides)
    assert said in line
    assert line.endswith(")")


@pytest.mark.parametrize(
    ("method", "family", "said"),
    [
        (
            PrefixMethod(name="prefix"),
            "distilbert",
            "method.name: prefix tunes keys and values .* distilbert takes none",
        ),
        (
            PrefixMethod(name="prefix", num_virtual_tokens=20),
            "gpt2",
            r"method.num_virtual_tokens: 20 tokens before .* \(at most 16",
        ),
        (GradualMethod(name="gradual", blocks=3), "gpt2", r"method.blocks: 3 blocks, but the base has 2 \(1 to 2\)"),
        (LastNMethod(name="last_n", n=3), "distilbert", r"method.n: 3 blocks, but the base has 2 \(1 to 2\)"),
        (LoraMethod(layers="last_3"), "gpt2", r"method.layers: last_3 of 2 blocks \(last_1 to last_2"),
        (
            AdaloraMethod(name="adalora", target_modules=["q_lin"]),
            "gpt2",
            "method.target_modules: q_lin matches no layer",
        ),
    ],
)
def test_a_base_that_cannot_take_it_is_named(method: Any, family: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_method(method, FAMILIES[family], config=CONFIG, max_length=32)
