"""The same method by hand: the Trainer of transformers, with peft where adapters train, on the very rows of a recipe.

    python benchmarks/by_hand.py RECIPE OUT.json

Reads a recipe of the toolkit for its rows and settings, and nothing else of the toolkit takes part. Writes the answers
to the test rows, the peak of the process up to the end of training, and the seconds of the training call.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np
import peers
import torch
import transformers
from peft import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from toolkit import runtime
from toolkit.config.load import load_recipe
from toolkit.data.load import load_data

ATTENTION = {"gpt2": ["c_attn"], "distilbert": ["q_lin", "v_lin"]}
LINEAR = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}
BLOCKS = {"gpt2": ("transformer.h", "h"), "distilbert": ("distilbert.transformer.layer", "layer")}
HEADS = {"gpt2": ("score",), "distilbert": ("pre_classifier", "classifier")}
NORMS = {"gpt2": ["ln_1", "ln_2", "ln_f"], "distilbert": ["LayerNorm", "sa_layer_norm", "output_layer_norm"]}


def adapter_config(method: Any, family: str, blocks: int, steps: int) -> Any:
    """Return peft's config, as its documentation would have it for a classifier."""
    heads = list(HEADS[family])
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": heads}
    if method.name == "prefix":
        return PrefixTuningConfig(**common, num_virtual_tokens=method.num_virtual_tokens)
    if method.name == "ln_tuning":
        return LNTuningConfig(**common, target_modules=NORMS[family])
    if method.name == "ia3":
        keys = {"gpt2": ["attn.c_attn", "mlp.c_proj"], "distilbert": ["k_lin", "v_lin", "lin2"]}[family]
        down = {"gpt2": ["mlp.c_proj"], "distilbert": ["lin2"]}[family]
        return IA3Config(**common, target_modules=keys, feedforward_modules=down, fan_in_fan_out=family == "gpt2",
                         exclude_modules=heads)  # fmt: skip
    targets = LINEAR[family] if method.target_modules == "all-linear" else ATTENTION[family]
    common |= {"target_modules": targets, "exclude_modules": heads, "fan_in_fan_out": family == "gpt2"}
    if method.name == "vera":
        del common["exclude_modules"]
        return VeraConfig(**common, r=method.r, d_initial=method.d_initial, vera_dropout=method.vera_dropout)
    common |= {"lora_alpha": method.lora_alpha, "lora_dropout": method.lora_dropout}
    if method.name == "adalora":
        return AdaLoraConfig(**common, init_r=method.init_r, target_r=method.target_r, deltaT=method.every,
                             tinit=int(method.start_ratio * steps), tfinal=int(method.final_ratio * steps),
                             total_step=steps, orth_reg_weight=method.orthogonal_weight)  # fmt: skip
    if method.layers != "all":
        last = int(method.layers.removeprefix("last_"))
        common |= {"layers_to_transform": list(range(blocks - last, blocks)), "layers_pattern": BLOCKS[family][1]}
    if method.variant == "eva":
        common |= {"init_lora_weights": "eva", "eva_config": EvaConfig(use_label_mask=False)}
    if method.variant == "pissa":
        common |= {"init_lora_weights": "pissa"}
    return LoraConfig(**common, r=method.r, use_rslora=method.variant == "rslora", use_dora=method.variant == "dora")


def freeze(model: Any, method: Any, family: str, blocks: int) -> Any:
    """Leave what a method without adapters trains."""
    last = [f"{BLOCKS[family][0]}.{block}." for block in range(blocks - getattr(method, "n", 0), blocks)]
    trained = (*HEADS[family], *last, *(["transformer.ln_f"] if last and family == "gpt2" else []))
    for name, parameter in model.named_parameters():
        chosen = name.startswith(trained) or (method.name == "bias" and name.endswith(".bias"))
        parameter.requires_grad_(method.name == "full" or chosen)
    return model


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, part: Any, tokenizer: Any, max_length: int) -> None:
        texts = [str(text) for text in part.texts.to_pylist()]
        self.encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.labels = part.labels

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.encoded[row], "labels": int(self.labels[row])}


class CutRanks(transformers.TrainerCallback):
    """What peft's documentation asks of a loop that trains AdaLoRA, before gradients are let go."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)


def build(recipe: Any, base: pathlib.Path, labels: int, rows: Rows, tokenizer: Any) -> Any:
    method = recipe.method
    options: dict[str, Any] = {"dtype": torch.float32}
    if recipe.quantization is not None:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.float32}  # fmt: skip
        kind = four if recipe.quantization.bits == 4 else {"load_in_8bit": True}
        skip = ["classifier", "pre_classifier", "score"]
        options["quantization_config"] = transformers.BitsAndBytesConfig(**kind, llm_int8_skip_modules=skip)
    torch.manual_seed(recipe.training.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    family = model.config.model_type
    if family == "gpt2":
        model.config.use_cache = False
    blocks = len(list(model.get_submodule(BLOCKS[family][0])))
    if method.name in ("full", "head", "last_n", "bias"):
        return freeze(model, method, family, blocks)
    if recipe.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # Left on, an evaluation repacks 4-bit weights and training cannot go on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, adapter_config(method, family, blocks, recipe.training.max_steps))
    if getattr(method, "variant", "") == "eva":
        loader = torch.utils.data.DataLoader(rows, batch_size=16, collate_fn=lambda b: collate(b, tokenizer))
        initialize_lora_eva_weights(model, loader)
    return model


def collate(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
    return peers.collate(rows, tokenizer.pad_token_id)


def optimizer_of(model: Any, recipe: Any) -> Any:
    method, training = recipe.method, recipe.training
    if getattr(method, "variant", "") == "lora_fa":
        return create_lorafa_optimizer(model, r=method.r, lora_alpha=method.lora_alpha, lr=training.learning_rate,
                                       weight_decay=training.weight_decay)  # fmt: skip
    if getattr(method, "lora_plus_ratio", 1.0) != 1.0:
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=training.learning_rate,
                                         loraplus_lr_ratio=method.lora_plus_ratio,
                                         loraplus_weight_decay=training.weight_decay)  # fmt: skip
    return None


def fit(recipe: Any, base: pathlib.Path, rows: dict[str, Rows], tokenizer: Any) -> dict[str, Any]:
    """Method features: hidden states of the stock body, and scikit-learn's classifier on them."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    body = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    started = time.perf_counter()
    features = {}
    for name in ("train", "test"):
        loader = torch.utils.data.DataLoader(rows[name], batch_size=32, collate_fn=lambda b: collate(b, tokenizer))
        parts = []
        for batch in loader:
            with torch.no_grad():
                hidden = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            last = batch["attention_mask"].sum(1) - 1 if body.config.model_type == "gpt2" else 0
            parts.append(hidden[torch.arange(len(hidden)), last].numpy())
        features[name] = np.concatenate(parts)
    method = recipe.method
    if method.classifier == "random_forest":
        forest = RandomForestClassifier(n_estimators=method.n_estimators, max_depth=method.max_depth,
                                        min_samples_leaf=method.min_samples_leaf, random_state=0)  # fmt: skip
        classifier: Any = forest
    else:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=method.C, max_iter=2_000))
    classifier.fit(features["train"], rows["train"].labels)
    seconds = time.perf_counter() - started
    right = classifier.predict(features["test"]) == rows["test"].labels
    peak = runtime.peak_memory(torch.device("cpu"))["rss"]
    fitted = [] if method.classifier == "random_forest" else [classifier[-1].coef_, classifier[-1].intercept_]
    weights = sum(part.size for part in fitted)
    return {"right": right.astype(int).tolist(), "seconds": seconds, "peak_bytes": peak, "trainable": weights}


def ask(recipe: Any, base: pathlib.Path, data: Any, tokenizer: Any) -> dict[str, Any]:
    """Method zero_shot: the stock language model's logits of the labels' words behind each prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    words = [recipe.method.words.get(name, name) for name in data.label_map.names]
    ids = [tokenizer(f" {word}")["input_ids"][0] for word in words]
    either = ", ".join(words[:-1]) + f" or {words[-1]}"
    question = recipe.method.prompt.replace("{words}", either)
    room = recipe.model.max_length - len(tokenizer(question.replace("{text}", ""))["input_ids"])
    started, right = time.perf_counter(), []
    texts = data.test.texts.to_pylist()
    for first in range(0, len(texts), 32):
        cut = tokenizer(texts[first : first + 32], truncation=True, max_length=room)["input_ids"]
        prompts = [question.replace("{text}", text) for text in tokenizer.batch_decode(cut)]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model.transformer(**batch).last_hidden_state
            last = hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(1) - 1]
            answers = model.lm_head(last)[:, ids].argmax(-1).numpy()
        right.extend(answers == data.test.labels[first : first + 32])
    peak = runtime.peak_memory(torch.device("cpu"))["rss"]
    return {
        "right": np.array(right).astype(int).tolist(), "seconds": time.perf_counter() - started, "peak_bytes": peak,
        "trainable": 0,
    }  # fmt: skip


def train(recipe: Any, folder: pathlib.Path) -> dict[str, Any]:
    from toolkit.models.base import resolve_base

    data, training = load_data(recipe.data), recipe.training
    base = resolve_base(recipe.model).path
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = {name: Rows(part, tokenizer, recipe.model.max_length) for name, part in data.parts.items()}
    device = torch.device("cpu")
    runtime.reset_peak_memory(device)
    if recipe.method.name == "features":
        return fit(recipe, base, rows, tokenizer)
    assert data.label_map is not None
    if recipe.method.name == "zero_shot":
        return ask(recipe, base, data, tokenizer)
    model = build(recipe, base, len(data.label_map.names), rows["train"], tokenizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=training.max_steps, per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=32, learning_rate=training.learning_rate, weight_decay=training.weight_decay,
        warmup_steps=training.warmup_ratio, lr_scheduler_type="linear", optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length", save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, seed=training.seed, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows["train"], data_collator=lambda b: collate(b, tokenizer),
        optimizers=(optimizer_of(model, recipe), None), callbacks=[CutRanks(model)] * (recipe.method.name == "adalora"),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    peak = runtime.peak_memory(device)["rss"]
    # Grouped, the test rows would come in another order.
    trainer.args.train_sampling_strategy = "random"
    logits = trainer.predict(rows["test"]).predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    predicted = np.asarray(logits).argmax(axis=-1)
    counts = [p.numel() for p in model.parameters() if p.requires_grad]
    return {
        "right": (predicted == data.test.labels).astype(int).tolist(),
        "seconds": seconds,
        "peak_bytes": peak,
        "trainable": sum(counts),
    }


if __name__ == "__main__":
    [recipe_file, out] = sys.argv[1:]
    peers.quiet()
    with tempfile.TemporaryDirectory() as work:
        found = train(load_recipe(recipe_file), pathlib.Path(work))
    pathlib.Path(out).write_text(json.dumps(found))
