"""The story: a recipe goes in, a trained classifier comes out. Read it from top to bottom.

Nothing above ``_train`` imports torch: what is wrong with the input is said within a second, and nothing is written
before recipe, data and base have been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import sys
import types
from typing import Any

from toolkit.adapters.fit import check_method
from toolkit.config.chain import recipe_before
from toolkit.config.load import pointing_into
from toolkit.config.methods import ZeroShotMethod, leaves_adapter
from toolkit.config.schema import OutputSettings, Recipe
from toolkit.config.training import no_offload
from toolkit.data.pairs import load_rows
from toolkit.data.parts import LoadedData
from toolkit.data.prompt import build_prompt
from toolkit.data.splits import save_split
from toolkit.data.tokenize import load_tokenizer
from toolkit.errors import OutputError, Problem, RecipeError
from toolkit.evaluation.decision import check_decision
from toolkit.export.staging import check_space
from toolkit.listener import SILENT, Listener
from toolkit.models.base import Base, give_forest, resolve_base
from toolkit.models.heads import own_head
from toolkit.report.metrics_log import MetricsLog
from toolkit.report.run_record import RunRecord, read_run_record
from toolkit.report.wording import OWN_HEAD, head_sentence, memory_sentence
from toolkit.resident import map_tensors, return_freed_memory
from toolkit.run_folder import RunFolder
from toolkit.runtime import memory_errors, process_rank

# scikit-learn and the table of 20,000 short texts took 215 MiB with six labels.
BASELINE_BYTES = 256 << 20


def finetune(recipe: Recipe, *, listener: Listener = SILENT) -> RunRecord:
    """Train what ``recipe`` describes and return its record, which also stands in ``result.json``.

    An unfinished run goes on from its newest valid checkpoint; a finished one is not run again. Where ``model.base`` is
    a recipe, its run comes first, in the same way.

    Args:
        recipe: From ``load_recipe``.
        listener: Hears of decisions, steps and evaluations.

    Raises:
        InputError: If recipe, data, base or run folder are wrong; nothing was written.
        DivergedError: On a non-finite loss, gradient or weight.
        OutOfMemoryError: When a step does not fit in its smallest form, or the model itself.
        StoppedError: After SIGINT or SIGTERM, once a checkpoint was saved.
    """
    folder = RunFolder(pathlib.Path(str(recipe.output.dir)))
    state = folder.state(recipe)
    if state == "finished":
        listener.say(f"{folder.path} is finished; output.overwrite=true starts anew")
        return read_run_record(folder.result)
    split = folder.split if state == "unfinished" else None
    if (before := recipe_before(recipe.model)) is not None:
        # What is wrong with this recipe is said before hours of the one that makes its base.
        read_inputs(recipe, split=split)
        listener.say(f"{recipe.model.base}: makes the base")
        with pointing_into(recipe.model.base):
            finetune(before, listener=listener)
    data, base = read_inputs(recipe, split=split)
    for line in describe_inputs(data, base):
        listener.say(line)
    # One process owns the folder; the others of the same launch only read it.
    with folder.claimed(recipe) if process_rank() == 0 else contextlib.nullcontext():
        if process_rank() == 0 and data.split is not None:
            save_split(folder.split, data.split)
        with memory_errors(
            lambda: "out of memory (toolkit plan RECIPE --budget 2GiB says what fits; nothing saved is lost)"
        ):
            return _train(recipe, folder=folder, data=data, base=base, listener=listener)


def read_inputs(recipe: Recipe, *, split: pathlib.Path | None = None) -> tuple[LoadedData, Base]:
    """Read the rows and find the base, without torch and without writing.

    Args:
        recipe: From ``load_recipe``.
        split: The split file of the run that is continued.

    Raises:
        InputError: If the data or the base are wrong.
    """
    data = load_rows(recipe.data, objective=recipe.objective, split_file=split)
    base = give_forest(resolve_base(recipe.model), recipe.method)
    check_fit(recipe, data, base)
    return data, base


def check_fit(recipe: Recipe, data: LoadedData, base: Base) -> None:
    """Refuse what is right in the recipe, the data and the base alone, and wrong in all three together.

    Raises:
        InputError: Targets or blocks that the base lacks, a prefix it cannot take, more or fewer class weights than
            labels, nothing to fit a threshold on, token ids outside its vocabulary, or an output folder around or
            inside the inputs.
    """
    if recipe.objective == "instruction" and base.family.tokenizer != "bpe":
        wrong = f"instruction needs a model that writes, and {base.family.model_type} fills gaps"
        raise RecipeError(Problem("", "objective", wrong, "a GPT-2 base"))
    weights, labels = recipe.training.loss.class_weights, data.label_map
    count = len(labels.names) if labels is not None else 2
    check_method(recipe.method, base.family, config=base.config, max_length=recipe.model.max_length, labels=count)
    if isinstance(weights, list) and labels is not None and len(weights) != len(labels.names):
        right = f"one for each of {', '.join(labels.names[:20])}"
        raise RecipeError(Problem("", "training.loss.class_weights", f"{len(weights)} weights", right))
    check_decision(recipe, validation=len(data.validation), labels=0 if labels is None else len(labels.names))
    if isinstance(recipe.method, ZeroShotMethod) and labels is not None:
        if data.train.token_ids is not None:
            wrong = "zero_shot puts a prompt around texts, and the data are token ids"
            raise RecipeError(Problem("", "method.name", wrong, "a table of texts, or another method"))
        tokenizer = load_tokenizer(base.path, kind=base.family.tokenizer)
        build_prompt(recipe.method, labels.names, tokenizer, max_length=recipe.model.max_length)
    for name, part in data.parts.items():
        if part.token_ids is not None:
            where = getattr(recipe.data, name) or recipe.data.source or recipe.data.train
            part.token_ids.check_vocabulary(base.config["vocab_size"], where=str(where), row_numbers=part.row_numbers)
    output = pathlib.Path(str(recipe.output.dir)).resolve()
    for given in (base.path, *(pathlib.Path(origin.served) for origin in data.origins)):
        place = given.resolve()
        if given.exists() and (output == place or output in place.parents or place in output.parents):
            raise OutputError(Problem("", "output.dir", f"{output} and the input {given} lie in each other", "apart"))


def describe_inputs(data: LoadedData, base: Base) -> list[str]:
    """Return a line for each thing that was read, and each warning."""
    lines = [f"base: {base.used}" + (f" (instead of {base.requested}, out of reach)" if base.offline else "")]
    for origin in data.origins:
        lines.append(f"data: {origin.name}, {origin.rows:,} rows from {origin.served}, sha256 {origin.sha256[:12]}")
    described = own_head(base.head, base.config) if data.label_map else None
    if described is not None:
        lines.append(f"{head_sentence(described)} Stock transformers has none such: the toolkit alone will load it.")
    if base.family.pooling == "first" and not base.family.pools_one:
        lines.append("warning: model.head.pooling is first, and the first token of GPT-2 has seen no other")
    lines.append("split: " + ", ".join(f"{name} {len(part):,}" for name, part in data.parts.items()))
    return lines + [f"warning: {warning}" for warning in data.warnings]


def _train(recipe: Recipe, *, folder: RunFolder, data: LoadedData, base: Base, listener: Listener) -> RunRecord:
    from toolkit import runtime

    runtime.import_models(adapters=leaves_adapter(recipe.method), quantised=recipe.quantization is not None)
    from toolkit.adapters.apply import parameter_report
    from toolkit.adapters.rates import rate_scales
    from toolkit.adapters.schedule import build_schedule
    from toolkit.memory.measure import MemoryWatch, predict_run
    from toolkit.outcome import build_record, environment, write_reports
    from toolkit.tasks import Setup, build_task
    from toolkit.training.gemm import choose_gemm
    from toolkit.training.head_fit import build_trainer
    from toolkit.training.optim import build_optimizer
    from toolkit.training.plan import build_plan
    from toolkit.training.resume import resume_newest
    from toolkit.training.run_log import RunLog
    from toolkit.training.shortage import recipe_lines

    # The machine.
    settings = recipe.training
    device = runtime.choose_device()
    compact = map_tensors(settings.compact and device.type == "cpu")
    precision = runtime.choose_precision(settings.precision, device)
    gemm = choose_gemm(settings.gemm, device)
    accelerator = runtime.build_accelerator(
        device=device, precision=precision, tracker=recipe.output.tracker, logging_dir=folder.path
    )
    main = accelerator.is_main_process
    runtime.seed_everything(settings.seed)
    memory = MemoryWatch(device)

    # Tokens, model, method, objective.
    tokenizer = load_tokenizer(base.path, kind=base.family.tokenizer)
    task = build_task(Setup(recipe, data, base, tokenizer, accelerator, gemm, listener, memory))
    return_freed_memory()
    parameters = parameter_report(task.model)
    lengths = task.tables["train"].lengths
    plan = build_plan(settings, lengths=lengths, processes=accelerator.num_processes, labels=data.train.labels)
    for line in describe_training(parameters, plan, lengths.mean(), task.truncated):
        listener.say(line)
    listener.say(
        f"machine: {device}, {precision}, {accelerator.num_processes} process(es), matrix products: {gemm}"
        + (f", allocator: {'compact' if compact else 'fast'}" if device.type == "cpu" else "")
    )
    if settings.activation_offload and not settings.offloads(device.type):
        listener.say(f"warning: {no_offload(device.type)}")

    # Training.
    check_space(folder.path, needed=disk_estimate(parameters, settings=recipe.output, folder=folder))
    log = RunLog(MetricsLog(folder.metrics), recipe=recipe, accelerator=accelerator, listener=listener)
    trainer = build_trainer(
        objective=task.objective,
        optimizer=build_optimizer(
            task.model,
            settings,
            embeddings=base.family.embeddings,
            scale_of=rate_scales(recipe.method, base.family, blocks=base.config[base.family.layers_key]),
        ),
        schedule=build_schedule(
            task.model,
            recipe.method,
            family=base.family,
            total_steps=plan.total_steps,
            processes=accelerator.num_processes,
        ),
        accelerator=accelerator,
        plan=plan,
        recipe=recipe,
        checkpoints=folder.checkpoints,
        inputs=_hashes(data, base, tokenizer.sha256),
        evaluate=task.validate if len(task.tables["validation"]) else None,
        observer=log,
    )
    resume_newest(trainer, folder.checkpoints, listener)
    log.begin(trainer.progress.step)
    memory.enter("train")
    listener.begin(total=plan.total_steps, done=trainer.progress.step)
    try:
        progress = trainer.fit()
    finally:
        listener.end()

    # Evaluation, export, report.
    if accelerator.num_processes == 1:
        # The optimizer's state is not needed any more.
        trainer.release()
        accelerator.free_memory()
        return_freed_memory()
    memory.enter("evaluate")
    metrics: dict[str, Any] = {part: task.judge(part) for part in ("validation", "test") if len(task.tables[part])}
    if not main:
        trainer.release()
        runtime.end_processes(accelerator)
        return read_run_record(folder.result)
    memory.enter("export")
    artifact = task.save(folder.path)
    if base.family.own_head and data.label_map:
        listener.say(OWN_HEAD)
    if recipe.evaluation.baselines and "test" in metrics:
        memory.enter("baselines")
        if runtime.available_bytes() < BASELINE_BYTES:
            listener.say("warning: no baselines: scikit-learn and its tables want 256 MiB, and less is free")
        else:
            metrics["baselines"] = task.baselines()
    memory.end()
    log.phases(memory.phases, step=progress.step)
    predicted = predict_run(
        recipe, tables=task.tables, data=data, base=base, accelerator=accelerator, found=memory.found
    )
    used = memory.record(predicted, shortage=recipe_lines(settings, progress))
    listener.say(memory_sentence(used))
    record = build_record(
        recipe,
        folder=folder,
        data=data,
        base=base,
        truncated=task.truncated,
        parameters=parameters,
        artifact=artifact,
        progress=progress,
        epochs=plan.epoch_of(progress.step),
        metrics=metrics,
        memory=used,
        prefix_cache=task.prefix_cache,
        environment=environment(device, precision=precision, processes=accelerator.num_processes, gemm=gemm),
    )
    write_reports(record, recipe=recipe, folder=folder, data=data, task=task)
    trainer.release()
    runtime.end_processes(accelerator)
    return record


def describe_training(parameters: Any, plan: Any, mean_length: float, truncated: int) -> list[str]:
    """Return the derived numbers of a run, a line each."""
    share = parameters.trainable / parameters.total
    return [
        f"parameters: {parameters.trainable:,} of {parameters.total:,} train ({share:.2%})",
        f"texts: {plan.rows:,} rows of {mean_length:.0f} tokens on average, {truncated:,} cut to max_length",
        f"steps: {plan.describe()}",
    ]


def disk_estimate(parameters: Any, *, settings: OutputSettings, folder: RunFolder) -> int:
    """Return the bytes that checkpoints and artifact will still need, at most."""
    from toolkit.training.checkpoint import steps_on_disk

    # A checkpoint holds a weight and Adam's two moments of it in fp32; the best and the one being saved come on top.
    checkpoints = max(1, settings.keep + 2 - len(steps_on_disk(folder.checkpoints)))
    return int(checkpoints * 12 * parameters.trainable + 4 * parameters.total)


def _hashes(data: LoadedData, base: Base, tokenizer: str) -> dict[str, str]:
    files = {f"data {origin.name}": origin.sha256 for origin in data.origins}
    # The fingerprint leaves out what a classifier's answers don't depend on; training depends on the dropout there too.
    config = hashlib.sha256(json.dumps(base.config, sort_keys=True).encode()).hexdigest()
    return {"base": base.fingerprint, "base config.json": config, "base tokenizer": tokenizer, **files}


class _Story(types.ModuleType):
    """This module and its function share a name: ``from toolkit import finetune`` may find either, and calls both."""

    def __call__(self, recipe: Recipe, *, listener: Listener = SILENT) -> RunRecord:
        return finetune(recipe, listener=listener)


sys.modules[__name__].__class__ = _Story
