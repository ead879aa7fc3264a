"""Every recipe in the repository: valid, short, its header true, and one real step on a small model."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pico import pico_cache

from toolkit.config.chain import names_recipe, recipe_before
from toolkit.config.load import load_recipe, recipe_schema
from toolkit.config.schema import ModelSettings
from toolkit.data.pairs import load_rows
from toolkit.data.tokenize import load_tokenizer
from toolkit.finetune import finetune
from toolkit.models.base import resolve_base

__all__ = ["pico_cache"]

ROOT = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name not in ("accelerate", "sweep"))
ACCELERATE = sorted((ROOT / "accelerate").glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_recipes_for_the_whole_ladder():
    assert {path.stem for path in RECIPES} >= {
        "gpt2_zero_shot", "gpt2_features", "distilbert_features",
        "gpt2_lora", "gpt2_qlora_4bit", "gpt2_lora_8bit", "gpt2_full", "gpt2_last_block", "gpt2_head",
        "distilbert_lora", "distilbert_qlora_4bit", "distilbert_full", "distilbert_last_block",
        "gpt2_gradual", "gpt2_bias", "gpt2_rslora", "gpt2_dora", "gpt2_pissa", "gpt2_eva", "gpt2_lora_plus",
        "gpt2_lora_fa", "gpt2_lora_last_blocks", "gpt2_adalora", "gpt2_vera", "gpt2_ia3", "gpt2_prefix",
        "gpt2_ln_tuning", "distilbert_gradual", "distilbert_bias", "distilbert_qdora_4bit", "distilbert_ia3",
        "distilbert_full_layer_decay", "distilbert_sentiment_npy", "gpt2_medium_qlora", "gpt2_mini", "distilbert_mini",
        "gpt2_sms", "gpt2_adapted", "gpt2_instruction_lora", "gpt2_instruction_qlora",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_header_points_the_editor_and_gives_the_command(path):
    lines = path.read_text().splitlines()
    schema = path.parent / lines[0].partition("$schema=")[2]
    assert schema.resolve() == ROOT / "schema.json"
    commands = [line.removeprefix("#").strip() for line in lines if line.startswith("#   ")]
    launches = [command for command in commands if command.startswith("accelerate launch")]
    assert [shlex.split(command)[-1] for command in launches] == [str(path.relative_to(ROOT.parent))]


def test_schema_file_is_the_schema():
    assert json.loads((ROOT / "schema.json").read_text()) == recipe_schema()


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.csv"
    path.write_text("label,text\n" + "".join(f"{'ham' if i % 2 else 'spam'},some words {i}\n" for i in range(60)))
    return str(path)


@pytest.fixture
def token_ids(tmp_path: Path) -> str:
    array = np.random.default_rng(0).integers(5, 40, size=(60, 12)).astype(np.int32)
    array[::3, 8:-1] = 0
    array[:, -1] = np.arange(60) % 2
    np.save(tmp_path / "tokens.npy", array)
    return str(tmp_path / "tokens.npy")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"words {i}", "response": "some"}) + "\n" for i in range(60)))
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_one_step_of_every_recipe(path, tmp_path, pico_cache, texts, token_ids, pairs):
    recipe = load_recipe(path)
    named = f"{recipe.model.base} {recipe.model.offline_base}"
    family = "distilbert" if "distilbert" in named else "gpt2"
    source = token_ids if (recipe.data.source or "").endswith(".npy") else texts
    if (recipe.data.source or "").startswith("recipes/data/"):
        source = str(ROOT.parent / str(recipe.data.source))
    overrides = [
        f"model.base={pico_cache(family)}", "model.max_length=16", f"data.source={source}",
        "data.split={train: 0.6, validation: 0.2, test: 0.2}", "training.max_steps=1", "training.batch_size=4",
        f"output.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    if recipe.model.embeddings_from is not None:
        overrides.append("model.embeddings_from=null")
    if recipe.objective == "instruction":
        overrides += [f"data.source={pairs}", "instruction.template='{prompt}:'"]
    # The small models have two blocks.
    if recipe.method.name == "gradual":
        overrides.append("method.blocks=2")
    if getattr(recipe.method, "layers", "all") != "all":
        overrides.append("method.layers=last_1")
    if recipe.method.name == "zero_shot":  # The small vocabulary lacks the words.
        overrides += ["model.base=gpt2-mini", "model.max_length=64"]
    record = finetune(load_recipe(path, overrides))
    assert record["steps"] == 1
    assert record["method"]["name"] == recipe.method.name
    assert record["quantization"] == (None if recipe.quantization is None else recipe.quantization.model_dump())


@pytest.mark.parametrize("path", [path for path in RECIPES if names_recipe(load_recipe(path).model)], ids=name_of)
def test_the_recipe_that_makes_a_base_is_there(path, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    assert recipe_before(load_recipe(path).model) is not None


@pytest.mark.parametrize("path", ACCELERATE, ids=name_of)
def test_accelerate_reads_every_launch_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision == "no"


@pytest.mark.parametrize("path", sorted((ROOT / "data").iterdir()), ids=name_of)
def test_the_data_of_a_recipe_can_be_read(path):
    users = [recipe for recipe in map(load_recipe, RECIPES) if recipe.data.source == f"recipes/data/{path.name}"]
    assert users
    for recipe in users:
        settings = recipe.data.model_copy(update={"source": str(path)})
        assert not load_rows(settings, objective=recipe.objective).warnings


def test_the_readme_lists_every_recipe():
    text = (ROOT / "README.md").read_text()
    for path in RECIPES:
        assert f"({path.relative_to(ROOT)})" in text, path
    for path in ACCELERATE:
        assert f"`{path.stem}`" in text, path


def test_the_shape_of_gpt2_has_its_size_and_tokenizer(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "shape"
    script = ROOT.parent / "scripts" / "make_gpt2_shape.py"
    subprocess.run([sys.executable, str(script), str(folder)], cwd=ROOT.parent, check=True, stdout=subprocess.DEVNULL)
    base = resolve_base(ModelSettings(base=str(folder), max_length=1024, random_init=True))
    assert load_tokenizer(base.path, kind=base.family.tokenizer).vocab_size == 50257
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    # The published count of GPT-2's parameters.
    assert model.num_parameters() == 124_439_808
