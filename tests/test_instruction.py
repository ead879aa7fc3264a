"""Prompts and responses: from a table to a model that stock libraries load, equal to their own arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from pico import pico_cache
from safetensors.torch import load_file
from trained import build_run

from toolkit import runtime
from toolkit.cli import main
from toolkit.config.load import load_recipe
from toolkit.config.schema import HeadMethod
from toolkit.data.pairs import PairTable
from toolkit.data.tokenize import load_tokenizer
from toolkit.errors import DataError, InputError, RecipeError
from toolkit.finetune import finetune, read_inputs
from toolkit.inference.generate import Generator, Sampling
from toolkit.listener import SILENT
from toolkit.memory.measure import MemoryWatch
from toolkit.memory.plan import plan_memory
from toolkit.tasks import Setup, build_task
from toolkit.training.checkpoint import steps_on_disk

__all__ = ["pico_cache"]

LORA = "method: {name: lora, r: 4, lora_dropout: 0.0}"
RUNS = {
    "lora": LORA,
    "dora": "method: {name: lora, variant: dora, r: 4, target_modules: all-linear}",
    "nf4": f"{LORA}\nquantization: {{bits: 4}}",
    "int8": f"{LORA}\nquantization: {{bits: 8}}",
    "full": "method: {name: full}",
}
PROMPTS = ["free prize call", "see you", "are we still on", "dinner tonight", "you are a winner of a cash award"]


def pairs(folder: Path, count: int = 40) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"{PROMPTS[i % 5]} {i}", "response": "yes" if i % 2 else "no, see you then"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write(tmp_path: Path, pico_cache):
    """Write a recipe of a few steps on a pico GPT-2."""

    def write(extra: str = LORA, family: str = "gpt2") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"objective: instruction\nmodel: {{base: '{pico_cache(family)}', max_length: 40}}\n"
            f"data: {{source: '{pairs(tmp_path)}'}}\ninstruction: {{template: \"Q {{prompt}}\\n\"}}\n"
            f"training: {{max_steps: 9, batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 1e-2}}\n"
            f"evaluation: {{every: 3}}\n"
            f"output: {{dir: '{tmp_path / 'run'}', save_every: 2, keep: 9, log_every: 1}}\n{extra}\n"
        )
        return path

    return write


def task_of(path: Path, *overrides: str) -> Any:
    recipe = load_recipe(path, overrides)
    data, base = read_inputs(recipe)
    device = torch.device("cpu")
    accelerator = runtime.build_accelerator(device=device, precision="fp32", tracker=None, logging_dir=path.parent)
    tokenizer = load_tokenizer(base.path, kind="bpe")
    return build_task(Setup(recipe, data, base, tokenizer, accelerator, "default", SILENT, MemoryWatch(device)))


def stock(run: Path) -> tuple[Any, Any]:
    """Return what stock peft or transformers make of a run, and the tokenizer."""
    from peft import PeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if (run / "model").exists():
        folder = run / "model"
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    stored = json.loads((run / "result.json").read_text())["quantization"]
    options = {}
    if stored is not None:
        bits = {"load_in_8bit": True} if stored["bits"] == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        double = {} if stored["bits"] == 8 else {"bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**bits, **double, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    model = PeftModelForCausalLM.from_pretrained(model, run / "adapter")
    return model.eval(), AutoTokenizer.from_pretrained(run / "adapter")


def test_a_row_is_template_prompt_response_and_end(write):
    task = task_of(write())
    table = task.tables["train"]
    assert isinstance(table, PairTable)
    tokenizer = load_tokenizer(task._base.path, kind="bpe")
    data, _ = read_inputs(load_recipe(write()))
    for row in range(len(table)):
        prompt, response = data.train.texts[row].as_py(), data.train.responses[row].as_py()
        ids, before = table[row].tolist(), int(table.prompts[row])
        assert tokenizer.decode(ids[:before]) == f"Q {prompt}\n"
        assert tokenizer.decode(ids[before:-1]) == response
        assert ids[-1] == tokenizer.special["eos"]
        source = json.loads((Path(data.origins[0].served)).read_text().splitlines()[data.train.row_numbers[row]])
        assert source == {"prompt": prompt, "response": response}
    assert table.targets.tolist() == (table.lengths - table.prompts).tolist()


@pytest.mark.parametrize("method", ["lora", "full", "nf4"])
def test_loss_and_gradients_are_those_of_stock_transformers_on_the_response(write, method):
    """The plain twin: padded, every position projected, prompts masked by -100, transformers' own loss."""
    task = task_of(write(RUNS[method]))
    table, model = task.tables["train"], task.model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    rows = np.array([3, 0, 7, 5, 1])
    batch = task.objective.batch(rows, step=0)
    weight = task.objective.weight(batch)
    assert weight == table.targets[rows].sum()
    (task.objective(batch) / weight).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        loss = float(task.objective(batch)) / weight
    model.zero_grad()
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    for place, row in enumerate(rows):
        labels[place, : table.prompts[row]] = -100
    twin = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, use_cache=False)
    twin.loss.backward()
    assert loss == pytest.approx(twin.loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6, rtol=1e-4), name


def test_an_evaluation_in_pieces_is_the_whole(write, monkeypatch):
    task = task_of(write())
    whole = task.judge("test")
    monkeypatch.setattr("toolkit.training.instruction.TARGETS_AT_ONCE", 3)
    assert task.judge("test") == pytest.approx(whole, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", RUNS)
def test_from_recipe_to_answer(write, tmp_path, capsys, name):
    record = finetune(load_recipe(write(RUNS[name])))
    run = tmp_path / "run"
    kind = "model" if name == "full" else "adapter"
    assert record["artifact"]["kind"] == kind
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(loss for loss in losses if loss is not None)
    assert record["metrics"]["test"]["loss"] < first
    memory = record["memory"]
    assert memory["predicted_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.25)

    # Stock libraries load it, and give the logits of the toolkit's own reading.
    texts = ["Q free prize 3\n", "Q are we still on 8\nno"]
    own = Generator.load(run, device="cpu")
    model, tokenizer = stock(run)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits
        found = own._model(**batch).logits
    real = batch["attention_mask"].bool()
    # A stock 4-bit layer computes with bf16 scales on some CPUs, an 8-bit one rounds its input as well.
    close = 2e-2 * float(expected.abs().max()) if name in ("nf4", "int8") else 1e-5
    assert torch.allclose(found[real], expected[real], atol=close)

    # A merge is proven, and answers alike.
    greedy = own.generate("free prize 3", max_new_tokens=6)
    if kind == "adapter":
        assert main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
        merged = Generator.load(tmp_path / "merged", device="cpu")
        assert merged.template == own.template == "Q {prompt}\n"
        if name != "int8":  # An 8-bit layer rounds its activations too.
            assert merged.generate("free prize 3", max_new_tokens=6) == greedy
    else:
        assert main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 2
        assert "has no adapter to merge" in capsys.readouterr().err

    capsys.readouterr()
    assert main(["generate", str(run), "free prize 3", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == greedy + "\n"
    texts_file = tmp_path / "texts.txt"
    texts_file.write_text("one text\n")
    assert main(["predict", str(run), str(texts_file)]) == 2
    assert "a language model does not classify" in capsys.readouterr().err

    # Measured on a file of its test rows, it is what the run said.
    data, _ = read_inputs(load_recipe(run / "recipe.yaml"), split=run / "split.json")
    rows = zip(data.test.texts.to_pylist(), data.test.responses.to_pylist(), strict=True)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": one, "response": other}) + "\n" for one, other in rows))
    assert main(["evaluate", str(run), "--data", str(held_out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(record["metrics"]["test"]["loss"], rel=1e-5)
    assert figures["rows"] == record["data"]["rows"]["test"]


@pytest.mark.parametrize("name", ["lora", "nf4", "int8", "full"])
def test_resumed_it_ends_bit_equal(write, tmp_path, name):
    path = write(RUNS[name].replace("lora_dropout: 0.0", "lora_dropout: 0.1"))
    finetune(load_recipe(path, [f"output.dir={tmp_path / 'whole'}"]))
    run = tmp_path / "cut"
    finetune(load_recipe(path, [f"output.dir={run}"]))
    kind = "model" if name == "full" else "adapter"
    # What a kill after the save of step 4 leaves.
    (run / "result.json").unlink()
    for step in steps_on_disk(run / "checkpoints"):
        if step > 4:
            for file in sorted((run / "checkpoints" / f"step-{step}").iterdir()):
                file.unlink()
            (run / "checkpoints" / f"step-{step}").rmdir()
    one = {file.name: load_file(file) for file in (tmp_path / "whole" / kind).glob("*.safetensors")}
    for file in (run / kind).glob("*.safetensors"):
        file.unlink()
    heard: list[str] = []
    listener = type("Hears", (type(SILENT),), {"say": lambda self, text: heard.append(text)})()
    finetune(load_recipe(path, [f"output.dir={run}"]), listener=listener)
    assert "resuming after step 4" in heard
    for file, tensors in one.items():
        again = load_file(run / kind / file)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_accumulation_and_checkpointing_change_no_weight(write, tmp_path, pico_cache):
    # Masks of dropout would depend on how a batch is cut.
    base = tmp_path / "no-dropout"
    shutil.copytree(pico_cache("gpt2"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
    cuts = {
        "a": ["training.batch_size=8", "training.gradient_accumulation_steps=1"],
        "b": ["training.batch_size=2", "training.gradient_accumulation_steps=4"],
        "c": ["training.gradient_checkpointing=true"],
    }
    for name, settings in cuts.items():
        fixed = [f"model.base={base}", "training.learning_rate=1e-3", f"output.dir={tmp_path / name}"]
        finetune(load_recipe(write(), [*settings, *fixed]))
    first, *others = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in cuts]
    for other in others:
        for key, tensor in first.items():
            assert torch.allclose(tensor, other[key], atol=2e-5), key


@pytest.fixture
def trained(write, tmp_path) -> Path:
    finetune(load_recipe(write(RUNS["full"])))
    return tmp_path / "run"


def test_generation_is_that_of_stock_transformers(trained):
    model, tokenizer = stock(trained)
    own = Generator.load(trained, device="cpu")
    prompt = tokenizer("Q see you 6\n", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    heard: list[str] = []
    assert own.generate("see you 6", max_new_tokens=8, heard=heard.append) == expected
    assert "".join(heard) == expected
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ids = model.generate(
            **prompt, max_new_tokens=8, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, pad_token_id=0
        )
    sampled = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    state = torch.random.get_rng_state()
    assert own.generate("see you 6", max_new_tokens=8, sampling=Sampling(0.8, 0.9, seed=5)) == sampled
    assert torch.equal(torch.random.get_rng_state(), state)
    others = {own.generate("see you 6", max_new_tokens=8, sampling=Sampling(2.0, seed=seed)) for seed in range(4)}
    assert len(others) > 1


def test_a_language_model_goes_on_with_a_text_as_it_is(write, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"see you at the station {i}\n" for i in range(40)))
    changes = ["objective=language_modeling", "method={name: full}", f"data.source={texts}", "training.max_steps=2"]
    finetune(load_recipe(write(), changes))
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "see you", "--max-new-tokens", "5"]) == 0
    model, tokenizer = stock(tmp_path / "run")
    prompt = tokenizer("see you", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("family", "line"), [("gpt2", "a classifier does not write"), ("distilbert", "does not write")]
)
def test_a_classifier_is_asked_nothing(tmp_path, pico_cache, capsys, family, line):
    run = build_run(tmp_path / "run", pico_cache(family), method=HeadMethod(name="head"))
    assert main(["generate", str(run), "hello"]) == 2
    assert line in capsys.readouterr().err


def test_generation_stops_at_the_end_of_text(trained):
    own = Generator.load(trained, device="cpu")
    with torch.no_grad():
        # An output layer that knows one token: the end of text, id 0.
        own._model.transformer.ln_f.weight.zero_()
        own._model.transformer.ln_f.bias.copy_(own._model.transformer.wte.weight[0] * 100)
    assert own.generate("see you", max_new_tokens=20) == ""


def test_a_prompt_that_fills_the_positions_is_refused(trained, capsys):
    own = Generator.load(trained, device="cpu")
    with pytest.raises(InputError, match="fill the model's 48 positions"):
        own.generate("see you " * 60)
    assert main(["generate", str(trained), "  "]) == 2
    assert "prompt: is empty (a text to answer)" in capsys.readouterr().err
    # What is asked for beyond the positions is not written.
    assert len(own.generate("free prize call now", max_new_tokens=500)) < 500


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["method={name: head}"], "method: instruction trains adapters or every weight"),
        (["method={name: prefix}"], "method: instruction trains adapters or every weight"),
        (["method={name: lora, variant: eva}"], "eva starts from the tokens that texts are classified by"),
        (["method={name: full}", "quantization={bits: 4}"], "quantised weights cannot be trained"),
        (["data.labels=[yes, no]"], "a language model has no labels"),
        (["data.balance=undersample"], "a language model has no labels"),
        (["training.loss={focal_gamma: 2}"], "a language model has no labels to weigh"),
        (["evaluation.metric=accuracy"], "a language model is judged by its loss"),
        (["model.random_init=true", "method={name: full}"], "random weights know no language to answer in"),
        (["instruction.template=no place"], "instruction.template: {prompt} does not stand in it once"),
        (["instruction.template='{prompt} {prompt}'"], "instruction.template: {prompt} does not stand in it once"),
    ],
)
def test_recipe_rules(write, overrides, line):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(), overrides)
    assert line in str(caught.value)


def test_a_model_that_fills_gaps_is_refused(write, capsys):
    for command in ("validate", "train"):
        assert main([command, str(write(family="distilbert"))]) == 2
        assert "objective: instruction needs a model that writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("p.jsonl", '{"prompt": "a"}\n', "p.jsonl:1: data.response_column: no column 'response'"),
        ("p.jsonl", '{"response": "a"}\n', "p.jsonl:1: data.prompt_column: no column 'prompt'"),
        ("p.csv", "prompt,response\na,\n", "p.csv:2: response: the text is empty"),
        ("p.csv", "prompt,answer\na,b\n", "data.response_column: no column 'response'"),
        ("p.txt", "a line\n", "a .txt file has no columns for prompts and responses"),
    ],
)
def test_bad_pairs_get_their_line(write, tmp_path, capsys, name, text, line):
    (tmp_path / name).write_text(text)
    assert main(["train", str(write()), f"data.source={tmp_path / name}"]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_room_for_its_response_is_refused_and_a_long_response_is_cut(write, tmp_path, capsys):
    rows = [{"prompt": f"see you {i}", "response": "dinner tonight " * (20 if i == 3 else 1)} for i in range(30)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = finetune(load_recipe(write(), [f"data.source={path}", "training.max_steps=2"]))
    assert record["data"]["truncated"] == 1
    assert any("texts were cut to 40 tokens" in warning for warning in record["data"]["warnings"])
    rows[5]["prompt"] = "see you " * 40
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"1 prompts leave no room for a response: that of row 6 and its template"):
        finetune(load_recipe(write(), [f"data.source={path}", f"output.dir={tmp_path / 'none'}"]))
    assert not (tmp_path / "none").exists()


def test_the_plan_counts_the_logits_of_responses(write):
    recipe = load_recipe(write())
    small = plan_memory(recipe, device="cpu")
    assert small.estimate.breakdown["logits"] > 0
    assert small.estimate.breakdown["gradients"] < 1 << 20
    fits = plan_memory(load_recipe(write(RUNS["full"])), budget=1 << 20, device="cpu")
    assert fits.fits is False
    assert not [line for line in fits.advice if "method.name=head" in line or "last_n" in line]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_snippet_of_the_card_answers_as_the_toolkit_does(write, tmp_path, monkeypatch, capsys):
    from toolkit.report.model_card import loading_snippet

    for name in ("nf4", "lora", "full"):
        record = finetune(load_recipe(write(RUNS[name]), [f"output.dir={tmp_path / name}"]))
        monkeypatch.chdir(tmp_path / name)
        capsys.readouterr()
        exec(compile(loading_snippet(record), "README.md", "exec"), {})
        shown = capsys.readouterr().out.removesuffix("\n")
        assert name == "nf4" or shown == Generator.load(tmp_path / name, device="cpu").generate(
            "A prompt", max_new_tokens=32
        )
        card = (tmp_path / name / "README.md").read_text()
        assert "classification head" not in card
        assert "toolkit generate" in card


def test_the_figures_are_those_of_torch_alone(write):
    """One row at a time: the mean of -log p over responses and ends."""
    task = task_of(write(RUNS["full"]))
    table, total = task.tables["test"], 0.0
    with torch.no_grad():
        for row in range(len(table)):
            ids = torch.from_numpy(table[row].astype(np.int64))
            logs = functional.log_softmax(task.model.eval()(ids[None]).logits[0], dim=-1)
            total -= sum(float(logs[place - 1, ids[place]]) for place in range(int(table.prompts[row]), len(ids)))
    mean = total / table.targets.sum()
    assert task.judge("test") == pytest.approx({"loss": mean, "perplexity": np.exp(mean)}, rel=1e-5)
