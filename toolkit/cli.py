"""The commands. Each parses its arguments, calls one function of the toolkit, and prints."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from toolkit.cli_experiments import AsJson, Debug, Overrides, RecipeFile, compare, resample, sweep
from toolkit.console import OUT, TerminalListener, print_error, print_metrics, print_result
from toolkit.errors import ToolkitError
from toolkit.lean import keep_compiler_out

app = typer.Typer(
    name="toolkit",
    help="Fine-tune text classifiers on little memory: a recipe in, a classifier stock libraries load out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# They answer in under a second, and write nothing that a library would finish when Python shuts down.
QUICK = ("validate", "schema", "--help")

Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option("--precision", help="Of matrix products; auto: bf16 or fp16 on CUDA, fp32 elsewhere."),
]
Folder = Annotated[pathlib.Path, typer.Argument(metavar="DIR", help="Run, adapter or model folder.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, debug: Debug = False) -> None:
    """Train what a recipe describes; go on where an interrupted run stopped."""
    from toolkit.config.load import load_recipe, pointing_into
    from toolkit.runtime import end_with_launcher, process_rank

    end_with_launcher()
    checked = load_recipe(recipe, overrides or [])
    from toolkit.finetune import finetune
    from toolkit.listener import SILENT

    main = process_rank() == 0
    with pointing_into(recipe, overrides or []):
        record = finetune(checked, listener=TerminalListener() if main else SILENT)
    if main:
        print_result(record, pathlib.Path(str(checked.output.dir)))


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check a recipe and its files without loading a model."""
    from toolkit.config.chain import names_recipe
    from toolkit.config.load import load_recipe, pointing_into
    from toolkit.finetune import describe_inputs, read_inputs

    checked = load_recipe(recipe, overrides or [])
    if names_recipe(checked.model):
        validate(checked.model.base)
    with pointing_into(recipe, overrides or []):
        inputs = read_inputs(checked)
    for line in describe_inputs(*inputs):
        OUT.print(line, markup=False, soft_wrap=True)
    OUT.print(f"{recipe}: valid", markup=False, soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory to stay within, for example 4GiB.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where the run will be; auto: here.")
    ] = "auto",
    write: Annotated[
        pathlib.Path | None, typer.Option("--write", metavar="FILE", help="New file for the changed recipe.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Predict a run's memory without loading a model; with a budget, find the fastest settings that fit."""
    from toolkit.config.load import load_recipe, pointing_into
    from toolkit.console_plan import print_plan
    from toolkit.memory.plan import plan_memory, write_recipe

    checked = load_recipe(recipe, overrides or [])
    with pointing_into(recipe, overrides or []):
        found = plan_memory(checked, budget=budget, device=device)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict()) + "\n")
    else:
        print_plan(found)
    if write is not None:
        write_recipe(found, write)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes."""
    from toolkit.config.load import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")


@app.command()
def merge(
    run: Folder,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="New folder for the merged model.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--dtype", help="Storage type of the merged weights.")
    ] = "fp32",
    base: Annotated[str | None, typer.Option("--base", help="Base to merge into, where it has moved.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Merge into another base; recorded in the output.")] = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: one standalone safetensors model, proven equal."""
    from toolkit.export.mergeable import find_mergeable
    from toolkit.runtime import import_models

    # Said before torch is imported.
    quantised = find_mergeable(run, output).manifest.quantization is not None
    import_models(adapters=True, quantised=quantised)
    from toolkit.export.merge import merge_adapter

    report = merge_adapter(run, output, dtype=dtype, base=base, force=force)
    OUT.print(str(report), markup=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Folder,
    data: Annotated[str, typer.Option("--data", help="Labelled csv, tsv, jsonl, parquet or npy file; or of pairs.")],
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", help="Default: label; of several labels or numbers: a column for each."),
    ] = None,
    label_separator: Annotated[str, typer.Option("--label-separator", help="Between the labels of a list.")] = "|",
    prompt_column: Annotated[str, typer.Option("--prompt-column", help="Of an instruction run.")] = "prompt",
    response_column: Annotated[str, typer.Option("--response-column", help="Of an instruction run.")] = "response",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    precision: Precision = "fp32",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a trained classifier on a labelled file, or an instruction run on prompts and responses."""
    from toolkit.inference.evaluate import answers, evaluate_answers
    from toolkit.inference.evaluate import evaluate as evaluate_file

    if answers(model):
        columns = {"prompt_column": prompt_column, "response_column": response_column}
        figures = evaluate_answers(model, data, **columns, batch_size=batch_size)
        shown = f"rows {figures['rows']:,}  loss {figures['loss']:.4f}  perplexity {figures['perplexity']:.2f}"
        sys.stdout.write((json.dumps(figures) if as_json else shown) + "\n")
        return
    metrics = evaluate_file(
        model,
        data,
        text_column=text_column,
        label_column=label_column,
        label_separator=label_separator,
        batch_size=batch_size,
        precision=precision,
    )
    if as_json:
        sys.stdout.write(json.dumps(metrics) + "\n")
    else:
        print_metrics(metrics)


@app.command()
def predict(
    model: Folder,
    source: Annotated[str, typer.Argument(metavar="[FILE|-]", help="Texts, a line each; - reads stdin.")] = "-",
    text_column: Annotated[str, typer.Option("--text-column", help="Column of a csv, tsv, jsonl file.")] = "text",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    precision: Precision = "fp32",
    debug: Debug = False,
) -> None:
    """Classify texts; prints one JSON line each: text with label and scores, labels and scores, or values."""
    from toolkit.inference.predict import predict_lines

    for line in predict_lines(model, source, text_column=text_column, batch_size=batch_size, precision=precision):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@app.command()
def generate(
    model: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to answer; put into the run's template.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop at the latest here.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; without it the likeliest is taken.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="With --sample: nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --sample: the same seed, the same text.")] = 0,
    debug: Debug = False,
) -> None:
    """Answer a prompt with what an instruction or causal language_modeling run trained."""
    from toolkit.inference.generate import Generator, Sampling

    def heard(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p, seed) if sample else None
    Generator.load(model).generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, heard=heard)
    sys.stdout.write("\n")


for experiment in (compare, sweep, resample):
    app.command()(experiment)


class _Terminated(BaseException):
    """SIGTERM, where no training is under way that would save first."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: what is half-written is taken away on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: Words after the program's name; None takes them from ``sys.argv``.
    """
    try:
        with _terminable():
            return _main(arguments)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except _Terminated:
        print_error("terminated")
        return 143


def _main(arguments: list[str] | None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        words = ["--help"]
    try:
        result = app(words, standalone_mode=False, prog_name="toolkit")
        # Here, where a reader that has gone is noticed, and not while Python shuts down.
        sys.stdout.flush()
        if result == 130:
            # What typer makes of Ctrl-C.
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except typer.TyperException as error:
        print_error(f"toolkit: {_one_line(error)} (toolkit --help lists the commands and their options)")
        return 2
    except typer.Abort:
        raise KeyboardInterrupt from None
    except (BrokenPipeError, SystemExit) as error:
        # typer and rich answer a broken pipe with an exit code of 1.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader has gone; Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ToolkitError as error:
        if "--debug" in words:
            traceback.print_exc()
        print_error(str(error))
        return error.exit_code


def _one_line(error: typer.TyperException) -> str:
    format_message = getattr(error, "format_message", error.__str__)
    return " ".join(str(format_message()).split())


def run() -> None:
    """Entry point of the ``toolkit`` console script."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    keep_compiler_out()
    if command == "train":
        from toolkit.runtime import use_huge_pages

        use_huge_pages()
    if command not in QUICK:
        sys.exit(main())
    # Looking for garbage while libraries are imported, and taking them apart at the end, is half of these commands'
    # time (validate: 1.4 s -> 0.8 s) and frees nothing that the end of the process would not.
    gc.disable()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
