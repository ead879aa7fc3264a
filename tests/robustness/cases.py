"""Rows 1 to 63b of bad_inputs.md, and those of 64 to 97 that are answered without torch, as one table.

Every case is a folder to build and a command to run in it. The good world is a recipe, data and a pico base; a case
changes one thing. Paths are relative, so that the expected lines can be written out.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = (
    "model: {base: base, max_length: 16}\n"
    "data: {source: data.csv}\n"
    "training: {max_steps: 1, batch_size: 4}\n"
    "output: {dir: run}\n"
)
HEADER = "text,label\n"
DATA = HEADER + "".join(f"text {i},{'ham' if i % 2 else 'spam'}\n" for i in range(40))
TRAIN = ("train", "recipe.yaml")

Build = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One row, one way of being wrong.

    Attributes:
        row: Row of bad_inputs.md.
        expected: A regular expression for each line of stderr, in order; empty where the input is accepted.
        build: Changes the good world in the folder given.
        command: Words after ``toolkit``.
        environment: Variables to set.
        code: Exit code.
    """

    row: str
    expected: Sequence[str]
    build: Build = lambda folder: None
    command: Sequence[str] = TRAIN
    environment: tuple[tuple[str, str], ...] = ()
    code: int = 2


def write_world(folder: Path, base: Path) -> None:
    """Write the good world."""
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "data.csv").write_text(DATA)
    shutil.copytree(base, folder / "base")


def recipe(text: str | bytes) -> Build:
    return lambda folder: (folder / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def file(name: str, content: str | bytes, *, source: bool = True) -> Build:
    """Write a data file and make the recipe read it."""

    def build(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if source:
            (folder / "recipe.yaml").write_text(RECIPE.replace("data.csv", name))

    return build


def several(*builds: Build) -> Build:
    def build(folder: Path) -> None:
        for one in builds:
            one(folder)

    return build


def config(**changes: Any) -> Build:
    """Change config.json of the base."""

    def build(folder: Path) -> None:
        path = folder / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return build


def set_to(**values: str) -> str:
    """Return the recipe with a section's value replaced by another mapping, each given as flow YAML."""
    lines = [line for line in RECIPE.splitlines() if line.split(":")[0] not in values]
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in values.items())]) + "\n"


def with_data(extra: str) -> str:
    return set_to(data="{source: data.csv, " + extra + "}")


def npy(values: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=pickled)
    return buffer.getvalue()


# The recipe without its training section has three lines: what set_to adds stands on line 4.
def training(row: str, value: str, *expected: str) -> Case:
    return Case(row, [rf"recipe\.yaml:4:\d+: training\.{line}" for line in expected], recipe(set_to(training=value)))


RECIPES = [
    Case("1", [r"recip\.yaml: no such file \(did you mean recipe\.yaml\?\)"], command=("train", "recip.yaml")),
    Case("2", [r"base: is a directory \(the path of a YAML recipe\)"], command=("train", "base")),
    Case("3", [r"recipe\.yaml: empty file \("], recipe("")),
    Case(
        "4",
        [rf"recipe\.yaml: not UTF-8 at byte {len(RECIPE) + 5} \(save it as UTF-8\)"],
        recipe(RECIPE.encode() + b"# caf\xe9\n"),
    ),
    Case("5", [rf"recipe\.yaml: NUL byte at offset {len(RECIPE)} \("], recipe(RECIPE.encode() + b"\0")),
    Case("6", [r"recipe\.yaml:2:1: not valid YAML: .*\(indent with spaces, not tabs\)"], recipe("model:\n\tbase: x\n")),
    Case("7", [r"recipe\.yaml: the top level is a list \("], recipe("- model\n")),
    Case("8", [r"recipe\.yaml:1:5: not valid YAML: mapping values"], recipe("a: b: c\n")),
    Case("9", [r"recipe\.yaml:5:1: data: duplicate key, also on line 2 \("], recipe(RECIPE + "data: {source: x}\n")),
    Case(
        "10",
        [r"recipe\.yaml:3:3: model\.base: duplicate key, also on line 2"],
        recipe("model:\n  base: a\n  base: b\n"),
    ),
    training("11", "{learnig_rate: 1}", r"learnig_rate: unknown key \(did you mean learning_rate\?\)"),
    Case(
        "12",
        [r"recipe\.yaml:1:8: model: tag .*\(plain values; tags are never run\)"],
        recipe("model: !!python/object:os.system {}\n"),
    ),
    Case(
        "12",
        [r"recipe\.yaml:1:8: model: tag .*\(plain values; tags are never run\)"],
        recipe("model: !!python/object/apply:os.system [touch owned]\n"),
    ),
    Case("13", [r"recipe\.yaml:1:4: a: anchor &a .*refused"], recipe("a: &a [x, x]\nb: [*a, *a]\nc: [*a, *a]\n")),
    Case("13", [r"recipe\.yaml:1:4: a: anchor &a"], recipe("a: &a [*a]\n")),
    Case("14", [r"recipe\.yaml: larger than 1 MiB \("], recipe(RECIPE + "#" * (1 << 20))),
    Case("15", [r"recipe\.yaml:1:8: model\.base: missing \("], recipe("model: {}\ndata: {source: data.csv}\n")),
    training("17", "{learning_rate: abc}", r'learning_rate: "abc" is not allowed \(a number > 0\)'),
    *[
        training("18", f"{{learning_rate: {value}}}", r"learning_rate: .* \(a number > 0\)")
        for value in ("0", "-1e-4", ".nan", ".inf", "true")
    ],
    *[
        training("19", f"{{batch_size: {value}}}", r"batch_size: .* \(an integer >= 1\)")
        for value in ("0", "-1", "2.5")
    ],
    training("20", '{batch_size: "8"}', r'batch_size: "8" is not allowed \(an integer >= 1\)'),
    *[training("21", f"{{epochs: {value}}}", r"epochs: .*integer >= 1") for value in (0, -1)],
    *[
        training("22", f"{{gradient_accumulation_steps: {value}}}", r"gradient_accumulation_steps: .*>= 1")
        for value in (0, -2)
    ],
    Case(
        "23",
        [
            r"recipe\.yaml:4:\d+: evaluation\.every: 0 .*",
            r"recipe\.yaml:5:\d+: output\.save_every: 0 .*>= 1\)",
            r"recipe\.yaml:5:\d+: output\.log_every: -5 .*",
        ],
        recipe(set_to(evaluation="{every: 0}", output="{dir: run, save_every: 0, log_every: -5}")),
    ),
    *[
        training("24", f"{{seed: {value}}}", r"seed: .*\(an integer >= 0 and <= 4294967295\)")
        for value in ("-1", "1.5", str(2**40))
    ],
    training("25", "{scheduler: linaer}", r"scheduler: .*\(did you mean linear\?; one of linear, cosine, constant\)"),
    training("26", "{optimizer: lion}", r"optimizer: .*one of adamw, adamw_8bit, paged_adamw_8bit, sgd\)"),
    training("27", '{bf16: "no"}', r"bf16: unknown key \(here it is called precision\)"),
    training("28", "{weight_decay: -0.1, max_grad_norm: -1}", r"weight_decay: -0\.1 .*>= 0", "max_grad_norm: -1 .*> 0"),
    Case("29", [r"recipe\.yaml:5:\d+: method\.r: 0 .*\(an integer >= 1\)"], recipe(RECIPE + "method: {r: 0}\n")),
    Case(
        "30",
        [r"recipe\.yaml:5:\d+: method\.lora_dropout: 1\.0 .*< 1"],
        recipe(RECIPE + "method: {lora_dropout: 1.0}\n"),
    ),
    Case(
        "31",
        [r"recipe\.yaml:5:26: method\.target_modules: c_atn matches no layer \(did you mean c_attn\? "],
        recipe(RECIPE + "method: {target_modules: [c_atn]}\n"),
    ),
    Case(
        "31",
        [r"command line: method\.target_modules=\[q\]: method\.target_modules: q matches no layer \(candidates: "],
        command=(*TRAIN, "method.target_modules=[q]"),
    ),
    Case(
        "32",
        [r"recipe\.yaml:5:\d+: quantization\.bits: \[4, 8\] .*\(one of 4, 8\)"],
        recipe(RECIPE + "quantization: {bits: [4, 8]}\n"),
    ),
    Case(
        "34", [r"recipe\.yaml:4:\d+: data\.labels: a label is listed twice \("], recipe(with_data("labels: [a, b, a]"))
    ),
    Case("35", [r"recipe\.yaml:4:\d+: data\.labels: .*\(a list of at least 2"], recipe(with_data("labels: [a]"))),
    Case(
        "36",
        [r"base: model\.max_length: 49 tokens, but the model has 48 positions \(at most 48\)"],
        recipe(set_to(model="{base: base, max_length: 49}")),
    ),
    Case(
        "37",
        [r"recipe\.yaml:4:\d+: training\.max_steps: epochs and max_steps are both set"],
        recipe(set_to(training="{epochs: 1, max_steps: 5}")),
    ),
    Case(
        "all together",
        [
            r"recipe\.yaml:4:\d+: training\.batch_size: 0",
            r"recipe\.yaml:4:\d+: training\.seed: -1",
            r"command line: evaluation\.every=0: evaluation\.every: 0",
        ],
        recipe(set_to(training="{batch_size: 0, seed: -1}")),
        (*TRAIN, "evaluation.every=0"),
    ),
]

PARTS = recipe(set_to(data="{train: train.csv, test: test.csv}"))
# Rows that only a validation of recipe, data and base meets; nothing is trained.
ACCEPTED = [
    Case("16", [], recipe(set_to(training="{max_steps: 1, learning_rate: 1e-4}"))),
    Case(
        "33",
        [],
        several(
            recipe(with_data("labels: [no, yes]")),
            file("data.csv", DATA.replace(",ham", ",no").replace(",spam", ",yes"), source=False),
        ),
    ),
    Case("50", [], file("data.csv", "\ufeff" + DATA.replace("\n", "\r\n").replace("text 7,", '"text\n7",'))),
    Case("50", [], file("data.csv", DATA.replace("\n", "\r"))),
    Case("51", [], file("data.csv", DATA + "".join(f"{text},ham\n" for text in ("NA", "null", "007", "1e5", "True")))),
    Case("60", [], file("data.csv", DATA + "text 7,spam\n")),
]

DATA_FILES = [
    Case("38", [r"dta\.csv: no such file \(did you mean data\.csv\?\)"], recipe(RECIPE.replace("data.csv", "dta.csv"))),
    Case("39", [r"data\.csv: the file is empty"], file("data.csv", "")),
    Case("40", [r"data\.csv: there are no rows"], file("data.csv", HEADER)),
    Case(
        "41",
        [
            r"data\.csv:1: data\.text_column: .*\(the columns are 'hello', 'ham'; is the header line missing\?\)",
            r"data\.csv:1: data\.label_column: .*",
        ],
        file("data.csv", "hello,ham\nfree,spam\n"),
    ),
    Case(
        "42",
        [r"data\.csv:1: header: the fields are separated by a semicolon, expected a comma \("],
        file("data.csv", DATA.replace(",", ";")),
    ),
    Case(
        "43",
        [r"data\.csv:1: data\.label_column: no column 'label' \(the columns are 'text', 'labels'; did you mean"],
        file("data.csv", DATA.replace("label", "labels", 1)),
    ),
    Case("44", [r"data\.csv:1: header: column 'text' occurs twice"], file("data.csv", "text,label,text\na,ham,b\n")),
    Case(
        "45", [r"data\.csv:42: too many fields: 3 fields, the header has 2"], file("data.csv", DATA + "one, two,ham\n")
    ),
    Case("46", [r"data\.csv:42: label: the field is missing"], file("data.csv", DATA + "lost\n")),
    Case("47", [r"data\.csv:42: .*a quote opens in this line"], file("data.csv", DATA + '"open,ham\nx,spam\n')),
    Case(
        "48",
        [r"data\.csv:2: not UTF-8 at byte offset 14"],
        file("data.csv", "text,label\ncafé,ham\n".encode("latin-1")),
    ),
    Case("48", [r"data\.csv:1: UTF-16 text"], file("data.csv", DATA.encode("utf-16"))),
    Case("49", [r"data\.csv:2: a NUL byte at offset 12"], file("data.csv", b"text,label\na\0b,ham\n")),
    Case(
        "52",
        [r"data\.csv:42: text: the text is empty", r"data\.csv:43: text: only white space"],
        file("data.csv", DATA + ",ham\n  ,ham\n"),
    ),
    Case("53", [r"data\.csv:42: label: the label is missing"], file("data.csv", DATA + "x,\n")),
    Case(
        "54",
        [r"data\.csv:42: label: 'Spam' is not one of the labels \(one of ham, spam; did you mean spam\?\)"],
        several(recipe(with_data("labels: [ham, spam]")), file("data.csv", DATA + "x,Spam\n", source=False)),
    ),
    Case(
        "55",
        [r"test\.csv: data\.test: label 'eggs' occurs in test but never in train \("],
        several(PARTS, file("train.csv", DATA, source=False), file("test.csv", HEADER + "new,eggs\n", source=False)),
    ),
    Case(
        "56",
        [r"data\.csv: data\.train: every training row has the label 'ham' \("],
        several(
            recipe(with_data("labels: [ham, spam]")), file("data.csv", DATA.replace(",spam", ",ham"), source=False)
        ),
    ),
    Case("57", [r"data\.csv:42: a field of more than"], file("data.csv", DATA + "x" * 1_000_001 + ",ham\n")),
    Case(
        "59",
        [r"train\.csv:9: data\.duplicates: 2 rows of data\.train have a text that is also in data\.test \("],
        several(
            PARTS,
            file("train.csv", DATA, source=False),
            file("test.csv", HEADER + "text 7,ham\ntext 8,spam\n", source=False),
        ),
    ),
    Case(
        "61",
        [r"data\.csv: data\.train: 2 training rows for 3 labels"],
        several(
            recipe(with_data("labels: [a, b, c], split: {train: 1.0, validation: 0.0, test: 0.0}")),
            file("data.csv", HEADER + "x,a\ny,b\n", source=False),
        ),
    ),
    Case("62", [r"data\.jsonl:2: not JSON at column"], file("data.jsonl", '{"text": "a", "label": "x"}\n{"text": \n')),
    Case("63", [r"data\.csv: the content is gzip, not text"], file("data.csv", gzip.compress(DATA.encode()))),
    Case("63b", [r"data\.npy: token ids: an array of shape \(6,\) \("], file("data.npy", npy(np.arange(6)))),
    Case("63b", [r"data\.npy: token ids: an array of float64"], file("data.npy", npy(np.ones((4, 3))))),
    Case("63b", [r"data\.npy: an object array"], file("data.npy", npy(np.array([[None]]), pickled=True))),
    Case(
        "63b",
        [r"data\.npy:14: token ids: token id 99999 is outside the vocabulary; 1 ids are \(ids from 0 to"],
        file("data.npy", npy(np.array([[i + 5, 99_999 if i == 13 else i + 6, i % 2] for i in range(40)]))),
    ),
]


def replace_weights(header: bytes, data: bytes = b"") -> Build:
    content = len(header).to_bytes(8, "little") + header + data
    return lambda folder: (folder / "base" / "model.safetensors").write_bytes(content)


def only_pickle(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_index(name: str, *, link: bool = False) -> Build:
    def build(folder: Path) -> None:
        weights = folder / "base" / "model.safetensors"
        weights.rename(folder / "outside.safetensors")
        if link:
            (folder / "base" / name).symlink_to(folder / "outside.safetensors")
        index = {"weight_map": {"transformer.wte.weight": name}}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))

    return build


def manifest(labels: list[str] | None, digest: str | None) -> Build:
    files = {} if digest is None else {"model.safetensors": {"sha256": digest}}
    text = json.dumps({"labels": labels, "files": files})
    return lambda folder: (folder / "base" / "manifest.json").write_text(text)


REMOVE: dict[str, Build] = {
    "base": lambda folder: shutil.rmtree(folder / "base"),
    "config": lambda folder: (folder / "base" / "config.json").unlink(),
    "weights": lambda folder: (folder / "base" / "model.safetensors").unlink(),
    "tokenizer": lambda folder: (folder / "base" / "tokenizer.json").unlink(),
}
AB = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}

MODELS = [
    Case("64", [r"bases/x/y: model\.base: no such folder \("], recipe(set_to(model="{base: bases/x/y}"))),
    Case("64", [r"data\.csv: not a folder"], recipe(set_to(model="{base: data.csv}"))),
    Case("65", [r"base: config\.json: missing \("], REMOVE["config"]),
    Case("65", [r"base/config\.json: not valid JSON"], lambda folder: (folder / "base/config.json").write_text("{")),
    Case(
        "66",
        [r"base/config\.json: model_type: 'gpt' is not supported \(supported: distilbert, gpt2; did you mean gpt2"],
        config(model_type="gpt"),
    ),
    Case(
        "67",
        [r"base/config\.json: auto_map: asks for code from the model folder, which is never run"],
        config(auto_map={"AutoModel": "evil.Model"}),
    ),
    Case("68", [r"base: no weights \(a model\.safetensors\)"], REMOVE["weights"]),
    Case("69", [r"base: only pytorch_model\.bin, which is never unpickled \("], only_pickle),
    Case("70", [r"base/model\.safetensors: truncated: \d+ bytes for \d+"], truncate),
    Case("71", [r"base/model\.safetensors: its checksum differs from the manifest"], manifest(None, "0" * 64)),
    Case(
        "72",
        [r"base/model\.safetensors: not valid JSON: the key a is there twice"],
        replace_weights(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    ),
    Case(
        "72",
        [r"base/model\.safetensors: a header of 1152921504606846976 bytes \(at most"],
        lambda folder: (folder / "base/model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
    ),
    Case(
        "75",
        [r'base/manifest\.json: labels: \["a", "b", "c"\] differ from config\.json'],
        several(config(**AB), manifest(["a", "b", "c"], None)),
    ),
    Case(
        "77",
        [r"base/.*index\.json: \.\./outside\.safetensors: is not a plain \.safetensors file name"],
        shard_index("../outside.safetensors"),
    ),
    Case(
        "77",
        [r"base/.*index\.json: /etc/x\.safetensors: is not a plain \.safetensors file name"],
        shard_index("/etc/x.safetensors"),
    ),
    Case(
        "77",
        [r"base/model-1\.safetensors: is a symlink out of the model folder"],
        shard_index("model-1.safetensors", link=True),
    ),
    Case("78", [r"base/config\.json: id2label: its ids have gaps"], config(id2label={"0": "a", "2": "b"})),
    Case("78", [r"base/config\.json: id2label: a label is there twice"], config(id2label={"0": "a", "1": "a"})),
    Case(
        "78", [r"base/config\.json: label2id: disagrees with id2label"], config(**AB | {"label2id": {"a": 1, "b": 0}})
    ),
    Case("79", [r"base: tokenizer: missing \("], REMOVE["tokenizer"]),
    Case("79", [r"base: tokenizer: \d+ token ids, but the embeddings have 7 rows"], config(vocab_size=7)),
    Case(
        "81",
        [r"base: adapter_config\.json: this is an adapter \("],
        lambda folder: (folder / "base/adapter_config.json").write_text("{}"),
    ),
]


def full_output(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("mine")


OFFLINE = (("HF_HUB_OFFLINE", "1"),)

COMMANDS = [
    Case("96", [r"toolkit: No such option: --lerning-rate.*\(toolkit --help"], command=(*TRAIN, "--lerning-rate", "1")),
    Case("96", [r"toolkit: No such command 'trian'.*"], command=("trian", "recipe.yaml")),
    Case("96", [r"toolkit: Missing argument 'RECIPE'.*"], command=("train",)),
    Case("96", [r"toolkit: Invalid value for '--batch-size'.*"], command=("predict", "run", "--batch-size", "0")),
    Case("96", [r"stdin: is empty \(a text a line\)"], command=("predict", "run", "-")),
    Case("96", [r"run: output\.dir: holds other files and no run \("], full_output),
    Case("96", [r"run: output\.dir: is a file \("], lambda folder: (folder / "run").write_text("mine")),
    Case("96", [r"data\.csv/run: output\.dir: .*data\.csv is a file \("], command=(*TRAIN, "output.dir=data.csv/run")),
    Case(
        "96",
        [r"command line: output\.dir=base/run: output\.dir: .*base/run and the input base lie in each other"],
        command=(*TRAIN, "output.dir=base/run"),
    ),
    Case("96", [r"nothing: no such folder \(a run folder"], command=("merge", "nothing", "-o", "merged")),
    Case(
        "96",
        [r"base: manifest\.json: missing \(a model that toolkit train or merge wrote"],
        command=("predict", "base", "texts.txt"),
        build=file("texts.txt", "hello\n", source=False),
    ),
    Case(
        "97",
        [r"somebody/model: model\.base: cannot be reached: HF_HUB_OFFLINE is set .*\(set model\.offline_base"],
        recipe(set_to(model="{base: somebody/model}")),
        environment=OFFLINE,
    ),
    Case(
        "97",
        [r"recipe\.yaml:5:\d+: quantization: quantised weights cannot be trained \(method lora"],
        recipe(RECIPE + "quantization: {bits: 4}\nmethod: {name: head}\n"),
    ),
    Case(
        "97",
        [r"base/config\.json: quantization_config: the weights are quantised already"],
        config(quantization_config={"load_in_4bit": True}),
    ),
    Case(
        "97",
        [r"recipe\.yaml:5:\d+: method\.n: 3 blocks, but the base has 2 \(1 to 2\)"],
        recipe(RECIPE + "method: {name: last_n, n: 3}\n"),
    ),
]

LIGHT = [*RECIPES, *DATA_FILES, *MODELS, *COMMANDS]


def case_id(case: Case) -> str:
    return f"row{case.row}"
