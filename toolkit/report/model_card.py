"""README.md of a run: a model card in Hugging Face form, with a loading snippet that runs as it stands."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from toolkit.durable import write_file_atomically
from toolkit.report.render import render
from toolkit.report.run_record import RunRecord

# As stated on the models' own cards on the hub.
LICENCES = {
    "openai-community/gpt2": "mit",
    "openai-community/gpt2-medium": "mit",
    "openai-community/gpt2-large": "mit",
    "openai-community/gpt2-xl": "mit",
    "distilbert/distilgpt2": "apache-2.0",
    "distilbert/distilbert-base-cased": "apache-2.0",
    "distilbert/distilbert-base-uncased": "apache-2.0",
    "distilbert/distilbert-base-multilingual-cased": "apache-2.0",
    "gpt2-mini": "apache-2.0",
    "distilbert-mini": "apache-2.0",
}
# Figures that stand in a card's head, by the names that the hub has for them.
METRICS = {
    "single_label_classification": {"accuracy": "accuracy", "f1_macro": "f1", "mcc": "matthews_correlation"},
    "multi_label_classification": {"accuracy": "accuracy", "f1_macro": "f1", "hamming_loss": "hamming_loss"},
    "regression": {"mse": "mse", "mae": "mae", "spearman": "spearmanr"},
}
# What turns logits into answers, as a stock pipeline picks it by config.json.
HEADS = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none"}
OUTPUTS = {"softmax": ".softmax(-1)", "sigmoid": ".sigmoid()", "none": ""}
HEAD_LAYERS = ("score", "pre_classifier", "classifier")
LANGUAGE_TASKS = {"gpt2": "text-generation", "distilbert": "fill-mask"}


def write_model_card(record: RunRecord, path: pathlib.Path, *, recipe: str) -> None:
    """Write the model card.

    Args:
        record: The run.
        path: The README.md to write.
        recipe: The resolved recipe as YAML.

    Raises:
        OSError: If the file cannot be written.
    """
    extra = {"front_matter": front_matter(record), "snippet": loading_snippet(record)}
    card = render("model_card.md.j2", record=record, recipe=recipe, extra=extra)
    # A part that is left out leaves its blank lines behind.
    write_file_atomically(path, re.sub(r"\n{3,}", "\n\n", card))


def front_matter(record: RunRecord) -> str:
    """Return the YAML that the hub reads (huggingface.co/docs/hub/model-cards), without its ``---`` fences."""
    from huggingface_hub import ModelCardData

    base, adapter = record["base"], record["artifact"]["kind"] == "adapter"
    family = base["model_type"]
    classifies = bool(record["data"]["labels"])
    data = ModelCardData(
        license=LICENCES.get(base["used"]),
        # The hub refuses a card whose base_model is a local path.
        base_model=base["name_or_path"] if _is_hub_id(base["name_or_path"]) else None,
        library_name="classifier-toolkit" if record["artifact"]["head"] else "peft" if adapter else "transformers",
        pipeline_tag="text-classification" if classifies else LANGUAGE_TASKS[family],
        tags=[family, record["method"]["name"], *(["peft"] if adapter else [])],
        metrics=list(METRICS[record["problem_type"]].values()) if classifies else ["perplexity"],
        model_name=record["name"],
        eval_results=_results(record),
    )
    return str(data.to_yaml()).strip()


def loading_snippet(record: RunRecord) -> str:
    """Return Python that loads the artifact, with stock libraries if they can, to be run inside the run folder."""
    folder, base = record["artifact"]["folder"], record["base"]
    labels = record["data"]["labels"]
    if record["artifact"].get("template") is not None:
        return _answer_snippet(record)
    if not labels:
        kind = "AutoModelForCausalLM" if base["model_type"] == "gpt2" else "AutoModelForMaskedLM"
        return _lines(
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
            f"model = {kind}.from_pretrained({json.dumps(folder)})",
        )
    if record["artifact"]["head"]:
        return _lines(
            "from toolkit import Classifier",
            "",
            f"classifier = Classifier.load({json.dumps(folder)})",
            'print(classifier.predict(["A text to classify"]))',
        )
    if record["artifact"]["kind"] == "model":
        return _lines(
            "from transformers import pipeline",
            "",
            f'classify = pipeline("text-classification", {json.dumps(folder)}, top_k=None)',
            f'print(classify(["A text to classify"], truncation=True, max_length={record["artifact"]["max_length"]}))',
        )
    return _adapter_snippet(record)


def _answer_snippet(record: RunRecord) -> str:
    base, adapter = record["base"]["name_or_path"], record["artifact"]["kind"] == "adapter"
    folder, quantised = json.dumps(record["artifact"]["folder"]), record["quantization"]
    source = json.dumps(base, ensure_ascii=False) if adapter else folder
    template = json.dumps(record["artifact"]["template"], ensure_ascii=False)
    return _lines(
        "import torch",
        *(["from peft import PeftModel"] if adapter else []),
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if quantised else ''}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        "model = AutoModelForCausalLM.from_pretrained(",
        f"    {source},",
        "    dtype=torch.float32,",
        *_quantization_lines(quantised, skip=("lm_head",)),
        ")",
        *([f"model = PeftModel.from_pretrained(model, {folder})"] if adapter else []),
        "",
        f"template = {template}",
        'prompt = tokenizer(template.replace("{prompt}", "A prompt"), return_tensors="pt")',
        "ids = model.eval().generate(",
        "    **prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id",
        ")",
        'print(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    )


def _adapter_snippet(record: RunRecord) -> str:
    base, labels = record["base"], record["data"]["labels"]
    quantised, folder = record["quantization"], json.dumps(record["artifact"]["folder"])
    head = HEADS[record["problem_type"]]
    found = "numbers" if head == "none" else "probabilities"
    fitted = ((record["metrics"] or {}).get("test") or {}).get("calibrated")
    logits = f"(model(**batch).logits / {fitted['temperature']!r})" if fitted else "model(**batch).logits"
    imports = "AutoModelForSequenceClassification, AutoTokenizer" + (", BitsAndBytesConfig" if quantised else "")
    return _lines(
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {imports}",
        "",
        f"base = {json.dumps(base['name_or_path'], ensure_ascii=False)}",
        f"labels = {json.dumps(labels, ensure_ascii=False)}",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        "model = AutoModelForSequenceClassification.from_pretrained(",
        "    base,",
        "    num_labels=len(labels),",
        "    id2label=dict(enumerate(labels)),",
        "    label2id={label: i for i, label in enumerate(labels)},",
        *([] if head == "softmax" else [f"    problem_type={json.dumps(record['problem_type'])},"]),
        "    pad_token_id=tokenizer.pad_token_id,",
        "    dtype=torch.float32,",
        *_quantization_lines(quantised),
        ")",
        f"model = PeftModel.from_pretrained(model, {folder}).eval()",
        "",
        'texts = ["A text to classify", "Another one"]',
        "batch = tokenizer(",
        f'    texts, padding=True, truncation=True, max_length={record["artifact"]["max_length"]}, return_tensors="pt"',
        ")",
        "with torch.inference_mode():",
        f"    {found} = {logits}{OUTPUTS[head]}",
        f"for text, row in zip(texts, {found}):",
        "    print(text, {label: round(p, 4) for label, p in zip(labels, row.tolist())})",
    )


def _quantization_lines(quantization: dict[str, Any] | None, *, skip: tuple[str, ...] = HEAD_LAYERS) -> list[str]:
    if quantization is None:
        return []
    arguments = ["load_in_8bit=True"]
    if quantization["bits"] == 4:
        arguments = [
            "load_in_4bit=True",
            f"bnb_4bit_quant_type={json.dumps(quantization['quant_type'])}",
            f"bnb_4bit_use_double_quant={quantization['double_quant']}",
            "bnb_4bit_compute_dtype=torch.float32",
        ]
    # Without the skip list stock transformers would quantise DistilBERT's head as well.
    arguments.append(f"llm_int8_skip_modules={json.dumps(skip)}")
    return [
        "    quantization_config=BitsAndBytesConfig(",
        *(f"        {argument}," for argument in arguments),
        "    ),",
    ]


def _results(record: RunRecord) -> list[Any] | None:
    from huggingface_hub import EvalResult

    test = record["metrics"]["test"]
    if not test or not record["data"]["labels"]:
        return None
    names = sorted({origin["name"] for origin in record["data"]["origins"]})
    figures = {kind: test[name] for name, kind in METRICS[record["problem_type"]].items()}
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=re.sub(r"[^\w./-]+", "-", names[0]),
            dataset_name=", ".join(names),
            dataset_split="test",
            metric_type=kind,
            metric_name="macro F1" if kind == "f1" else None,
            metric_value=round(value, 6),
        )
        for kind, value in figures.items()
    ]


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not pathlib.Path(name).exists()


def _lines(*lines: str) -> str:
    return "\n".join(lines)
