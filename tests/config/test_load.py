"""Recipes in: every wrong one gets its line, every right one its exact values."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from toolkit.config.load import DEFAULT_EPOCHS, dump_recipe, load_recipe, recipe_schema
from toolkit.config.schema import Recipe
from toolkit.errors import RecipeError

GOOD = "model: {base: gpt2-mini}\ndata: {source: sms_spam}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def lines_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "FILE").splitlines()


# Row of bad_inputs.md, recipe text, pattern of the one line.
BAD = [
    (3, "", r"FILE: empty file"),
    (3, "# only a comment\n", r"FILE: empty file"),
    (4, GOOD.encode() + b"# caf\xe9\n", r"FILE: not UTF-8 at byte 55"),
    (5, GOOD.encode() + b"\0", r"FILE: NUL byte at offset 50"),
    (6, "model:\n\tbase: x\n", r"FILE:2:1: not valid YAML: .*tabs"),
    (7, "- model\n- data\n", r"FILE: the top level is a list"),
    (7, "hello\n", r"FILE: the top level is a single value"),
    (8, "a: b: c\n", r"FILE:1:5: not valid YAML: mapping values"),
    (9, GOOD + "data: {source: x}\n", r"FILE:3:1: data: duplicate key, also on line 2"),
    (10, "model:\n  base: a\n  base: b\n", r"FILE:3:3: model.base: duplicate key, also on line 2"),
    (11, GOOD + "training: {learnig_rate: 1}\n", r"FILE:3:26: training.learnig_rate: unknown key .* learning_rate\?"),
    (11, GOOD + "training: {lr: 1}\n", r"unknown key \(here it is called learning_rate\)"),
    (11, GOOD + "qqq: 1\n", r"FILE:3:6: qqq: unknown key \(one of objective, model"),
    (12, "model: !!python/object:os.system {}\n", r"FILE:1:8: model: tag .*never run"),
    (12, "model: !!python/name:os.system\n", r"FILE:1:8: model: tag"),
    (13, "a: &a [x]\nb: [*a, *a]\n", r"FILE:1:4: a: anchor &a .*aliases are refused"),
    (13, "a: &a [*a]\n", r"FILE:1:4: a: anchor &a"),
    (13, "a: " + "[" * 5000, r"FILE: nested too deeply"),
    (14, GOOD + "#" * (1 << 20), r"FILE: larger than 1 MiB"),
    (15, "data: {source: x}\n", r"FILE: model: missing"),
    (15, "model: {}\ndata: {source: x}\n", r"FILE:1:8: model.base: missing \(text"),
    (15, "model: {base: x}\ndata: {}\n", r"FILE:2:7: data.source: no data"),
    (17, GOOD + "training: {learning_rate: abc}\n", r'training.learning_rate: "abc" is not allowed \(a number > 0\)'),
    *[
        (18, GOOD + f"training: {{learning_rate: {value}}}\n", r"training.learning_rate: .* \(a number > 0\)")
        for value in ("0", "-1e-4", ".nan", ".inf", "true")
    ],
    *[
        (19, GOOD + f"training: {{batch_size: {value}}}\n", r"training.batch_size: .* \(an integer >= 1\)")
        for value in ("0", "-1", "2.5", "true")
    ],
    (20, GOOD + 'training: {batch_size: "8"}\n', r'training.batch_size: "8" is not allowed \(an integer >= 1\)'),
    *[(21, GOOD + f"training: {{epochs: {value}}}\n", r"training.epochs: .*integer >= 1") for value in (0, -1)],
    (22, GOOD + "training: {gradient_accumulation_steps: 0}\n", r"gradient_accumulation_steps: 0 .*integer >= 1"),
    (23, GOOD + "output: {save_every: 0}\n", r"output.save_every: 0 .*one of epoch, end or an integer >= 1"),
    (23, GOOD + "output: {log_every: -5}\n", r"output.log_every: -5"),
    (23, GOOD + "evaluation: {every: 0}\n", r"evaluation.every: 0"),
    *[
        (24, GOOD + f"training: {{seed: {value}}}\n", r"training.seed: .*integer >= 0 and <= 4294967295")
        for value in ("-1", "1.5", str(2**40))
    ],
    (25, GOOD + "training: {scheduler: linaer}\n", r"did you mean linear\?; one of linear, cosine, constant"),
    (26, GOOD + "training: {optimizer: lion}\n", r"one of adamw, adamw_8bit, paged_adamw_8bit, sgd"),
    (27, GOOD + 'training: {bf16: "no"}\n', r"training.bf16: unknown key \(here it is called precision\)"),
    (27, GOOD + 'training: {precision: "no"}\n', r"one of auto, fp32, bf16, fp16"),
    (28, GOOD + "training: {weight_decay: -0.1}\n", r"training.weight_decay: -0.1 .*number >= 0"),
    (28, GOOD + "training: {max_grad_norm: -1}\n", r"training.max_grad_norm: -1 .*number > 0 or null"),
    (29, GOOD + "method: {name: lora, r: 0}\n", r"FILE:3:25: method.r: 0 .*integer >= 1"),
    (30, GOOD + "method: {name: lora, lora_dropout: 1.0}\n", r"method.lora_dropout: 1.0 .*>= 0 and < 1"),
    (32, GOOD + "quantization: {bits: [4, 8]}\n", r"quantization.bits: \[4, 8\] .*one of 4, 8"),
    (32, GOOD + "quantization: {load_in_4bit: true, bits: 8}\n", r"here it is called bits"),
    (34, GOOD.replace("sms_spam", "x, labels: [a, b, a]"), r"data.labels: a label is listed twice"),
    (35, GOOD.replace("sms_spam", "x, labels: [a]"), r"data.labels: .*a list of at least 2"),
    (37, GOOD + "training: {epochs: 1, max_steps: 5}\n", r"training.max_steps: epochs and max_steps are both set"),
    (0, GOOD + "method: {name: haed}\n", r"method: unknown method 'haed' \(did you mean head\?\)"),
    (0, GOOD + "method: lora\n", r"FILE:3:9: method"),
    (0, GOOD + "method: {name: head, r: 8}\n", r"method.r: unknown key"),
    (0, GOOD + "method: {name: full}\nquantization: {bits: 4}\n", r"quantization: quantised weights cannot be trained"),
    (0, GOOD.replace("sms_spam", "x, split: {train: 0.9}"), r"data.split: .* do not add up to 1"),
    (0, GOOD.replace("source: sms_spam", "source: a, train: b"), r"data.train: source and train are both set"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text", "pattern"), BAD, ids=[f"row{row}-{i}" for i, (row, _, _) in enumerate(BAD)])
def test_each_wrong_recipe_gets_one_line(write, row, text, pattern):
    lines = lines_of(write(text))
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]


def test_missing_file_names_the_nearest(write, tmp_path):
    write(GOOD, "gpt2_lora.yaml")
    assert lines_of(tmp_path / "gpt2_lroa.yaml")[0].endswith("no such file (did you mean gpt2_lora.yaml?)")


def test_directory(tmp_path):
    assert lines_of(tmp_path) == ["FILE: is a directory (the path of a YAML recipe)"]


def test_all_problems_are_reported_together_each_with_its_place(write):
    text = GOOD + "method: {name: lora, r: 0}\ntraining:\n  batch_size: 0\n  scheduler: x\n  seed: -1\n"
    lines = lines_of(write(text), "evaluation.every=0")
    assert [line.split(": ")[0] for line in lines[:4]] == ["FILE:3:25", "FILE:5:15", "FILE:6:14", "FILE:7:9"]
    assert lines[4].startswith("command line: evaluation.every=0: evaluation.every: 0 is not allowed")


def test_floats_and_words_mean_what_they_say(write):
    text = "model: {base: x}\ndata: {source: s, labels: [no, yes]}\ntraining: {learning_rate: 1e-4, weight_decay: 0}\n"
    recipe = load_recipe(write(text))
    assert recipe.training.learning_rate == 1e-4
    assert isinstance(recipe.training.learning_rate, float)
    assert recipe.data.labels == ["no", "yes"]


def test_numeric_labels_are_texts(write):
    assert load_recipe(write("model: {base: x}\ndata: {source: s, labels: [0, 1]}\n")).data.labels == ["0", "1"]


def test_bom_and_crlf_are_accepted(write):
    assert load_recipe(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())).model.base == "gpt2-mini"


def test_defaults_are_the_contract(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.model.max_length == 256
    assert recipe.data.split.model_dump() == {
        "train": 0.7, "validation": 0.1, "test": 0.2, "seed": 123, "stratify": True,
        "group_column": None, "time_column": None, "folds": None, "fold": 1,
    }  # fmt: skip
    assert recipe.method.model_dump() == {
        "name": "lora", "variant": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_plus_ratio": 1.0,
            "target_modules": "auto", "layers": "all",
    }  # fmt: skip
    assert recipe.quantization is None
    training = recipe.training
    assert (training.epochs, training.max_steps, training.batch_size) == (DEFAULT_EPOCHS, None, 8)
    assert (training.learning_rate, training.weight_decay, training.warmup_ratio) == (2e-4, 0.01, 0.06)
    assert (recipe.evaluation.every, recipe.evaluation.metric) == ("epoch", "accuracy")
    assert (recipe.output.dir, recipe.output.keep, recipe.output.overwrite) == ("runs/recipe", 2, False)


def test_overrides_are_yaml_values_at_dotted_paths(write):
    path = write(GOOD + "training: {epochs: 3}\n")
    recipe = load_recipe(
        path,
        [
            "training.learning_rate=1e-3",
            "data.source=null",
            "data.train=a.csv",
            "method={name: last_n, n: 2}",
            "data.labels=[no, yes]",
            "output.overwrite=true",
        ],
    )
    assert recipe.training.learning_rate == 1e-3
    assert (recipe.data.source, recipe.data.train) == (None, "a.csv")
    assert recipe.method.model_dump() == {"name": "last_n", "n": 2, "layer_decay": 1.0}
    assert recipe.data.labels == ["no", "yes"]
    assert recipe.output.overwrite is True


def test_on_the_command_line_one_of_an_exclusive_pair_replaces_the_other(write):
    path = write(GOOD + "training: {epochs: 3}\n")
    recipe = load_recipe(path, ["training.max_steps=7"])
    assert (recipe.training.epochs, recipe.training.max_steps) == (None, 7)
    assert load_recipe(path, ["data.train=a.csv"]).data.source is None
    assert "both set" in lines_of(path, "training.max_steps=7", "training.epochs=2")[0]


@pytest.mark.parametrize("override", ["training.seed", "=3", "training.seed=[", "training.seed=&a 1"])
def test_a_wrong_override_is_named(write, override):
    lines = lines_of(write(GOOD), override)
    assert lines[0].startswith(f"command line: {override}")


def test_method_without_a_name_is_lora(write):
    assert load_recipe(write(GOOD + "method: {r: 4}\n")).method.model_dump()["r"] == 4


def test_language_modeling_needs_no_method_and_is_judged_by_loss(write):
    recipe = load_recipe(write(GOOD + "objective: language_modeling\n"))
    assert (recipe.method.name, recipe.evaluation.metric) == ("full", "loss")
    assert "leave method out" in lines_of(write(GOOD + "objective: language_modeling\nmethod: {name: lora}\n"))[0]


def test_a_dumped_recipe_loads_equal(write):
    recipe = load_recipe(write(GOOD + "method: {name: head}\nquantization: null\ndata_: 1\n".replace("data_: 1\n", "")))
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert again == recipe


def test_a_recipe_is_frozen(write):
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.seed = 1  # type: ignore[misc]


def test_schema_describes_every_key():
    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            assert "description" in field or "const" in field, name
    assert set(schema["properties"]) == set(Recipe.model_fields)
