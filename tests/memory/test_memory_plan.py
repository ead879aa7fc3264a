"""A budget: settings of the same effective batch that fit, or what would."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pico import TEXTS, write_tokenizer

from toolkit import plan_memory
from toolkit.config.load import load_recipe
from toolkit.console_plan import changes_table
from toolkit.errors import InputError, OutputError
from toolkit.memory.inputs import parse_bytes
from toolkit.memory.plan import Change, write_recipe
from toolkit.training.gemm_choice import remember_gemm

MIB = 2**20


@pytest.fixture
def written(tmp_path):
    """A recipe on a base that has a config and a tokenizer, and no weights."""
    base = tmp_path / "base"
    vocabulary = write_tokenizer(base, "gpt2")
    config = {
        "model_type": "gpt2", "vocab_size": vocabulary, "n_positions": 512, "n_embd": 512, "n_layer": 8, "n_head": 8,
        "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    rows = [f"{'ham' if i % 2 else 'spam'},{' '.join([TEXTS[i % 4]] * (1 + i % 9))} {i}" for i in range(120)]
    (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: '{base}'}}\ndata: {{source: '{tmp_path / 'data.csv'}'}}\nevaluation: {{every: end}}\n"
        "method: {name: full}\ntraining: {epochs: 2, batch_size: 8, gradient_accumulation_steps: 2}\n"
    )
    return path


def test_the_parts_add_up_and_larger_batches_need_more(written):
    small, large = (plan_memory(load_recipe(written, [f"training.batch_size={n}"]), device="cpu") for n in (4, 32))
    assert sum(small.estimate.breakdown.values()) == small.estimate.peak_bytes < large.estimate.peak_bytes
    assert small.fits is None


def test_a_plan_knows_which_library_will_multiply(written, tmp_path, monkeypatch):
    """oneDNN's rows are filled up; a machine on which it won is one where ``auto`` does so, too."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    wanted = ("default", "onednn", "auto")
    recipes = {gemm: load_recipe(written, [f"training.gemm={gemm}"]) for gemm in wanted}
    default, filled, guessed = (plan_memory(recipes[gemm], device="cpu").estimate for gemm in wanted)
    assert default.allocated_bytes < filled.allocated_bytes
    assert guessed == default
    remember_gemm("onednn", threads=2)
    assert plan_memory(recipes["auto"], device="cpu").estimate == filled


def test_a_budget_is_met_at_the_same_effective_batch(written):
    recipe = load_recipe(written, ["training.batch_size=32", "data.split.validation=0", "data.split.train=0.8"])
    free = plan_memory(recipe, device="cpu")
    found = plan_memory(recipe, budget=free.estimate.peak_bytes - 60 * MIB, device="cpu")
    assert found.fits
    assert found.estimate.peak_bytes <= found.budget_bytes
    training = found.recipe.training
    assert training.batch_size * training.gradient_accumulation_steps == 64
    assert all(change.exact for change in found.changes)
    saved = sum(change.saves_bytes for change in found.changes)
    assert saved == free.estimate.peak_bytes - found.estimate.peak_bytes


def test_what_the_heap_keeps_is_given_up_before_anything_slower(written):
    # A budget of tokens leaves the batches as they are.
    changes = [
        "method={name: lora}",
        "training.max_tokens_per_batch=300",
        "data.split.validation=0",
        "data.split.train=0.8",
    ]
    recipe = load_recipe(written, changes)
    free = plan_memory(recipe, device="cpu")
    kept = free.estimate.breakdown["allocator"]
    assert kept > 4 * MIB
    found = plan_memory(recipe, budget=free.estimate.peak_bytes - kept // 3, device="cpu")
    [change] = found.changes
    assert change.settings == {"training.allocator": "compact"}
    assert change.before == {"training.allocator": "auto"}
    assert change.exact
    assert found.estimate.allocated_bytes == free.estimate.allocated_bytes
    assert plan_memory(recipe, device="cuda").estimate.breakdown["allocator"] == 0


@pytest.mark.parametrize(
    ("changes", "compact"),
    [
        ([], False),
        (["quantization={bits: 8}", "training.gradient_checkpointing=true"], True),
        (["training.gradient_checkpointing=true"], True),
        (["training.gradient_checkpointing=2"], True),
        (["quantization={bits: 8}"], False),
        (["training.allocator=compact"], True),
        (["training.allocator=fast", "training.gradient_checkpointing=true", "quantization={bits: 4}"], False),
    ],
)
def test_memory_is_compact_where_the_recipe_pays_time_for_it(written, changes, compact):
    recipe = load_recipe(written, ["method={name: lora}", *changes])
    other = load_recipe(
        written, ["method={name: lora}", *changes, f"training.allocator={'fast' if compact else 'compact'}"]
    )
    assert recipe.training.compact is compact
    assert other.training.compact is not compact
    kept = [plan_memory(one, device="cpu").estimate.breakdown["allocator"] for one in (recipe, other)]
    assert (kept[0] < kept[1]) is compact


def test_gradients_find_no_place_among_activations_of_many_sizes(written):
    """One batch: they lie where its activations were. Many: beside the room that these take."""
    settings = ["training.gradient_accumulation_steps=1", "training.allocator=fast", "training.batch_size=4"]

    def free(*more):
        return plan_memory(load_recipe(written, [*settings, *more]), device="cpu").estimate.breakdown["allocator"]

    # A step of one epoch, and a batch of all rows, come in one size.
    assert free() - free("training.max_steps=1", "training.epochs=null") > 8 * MIB
    assert free("training.batch_size=120") == free("training.batch_size=120", "training.epochs=1")
    whole, one = ["training.allocator=compact"], ["training.max_steps=1", "training.epochs=null"]
    assert free(*whole) == free(*whole, *one)


def test_kept_states_of_frozen_blocks_are_proposed(written):
    recipe = load_recipe(written, ["method={name: last_n, n: 1}", "training.prefix_cache.enabled=false"])
    smallest = plan_memory(recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 1})}))
    found = plan_memory(recipe, budget=smallest.estimate.peak_bytes - 30 * MIB, device="cpu")
    assert found.fits
    assert found.recipe.training.prefix_cache.enabled
    [change] = [change for change in found.changes if "training.prefix_cache.enabled" in change.settings]
    assert change.saves_bytes > 0
    assert not change.exact
    write_recipe(found, written.with_name("kept.yaml"))
    assert load_recipe(written.with_name("kept.yaml")) == found.recipe


def test_activations_leave_a_gpu_where_nothing_that_was_measured_fits(written):
    # A budget of tokens leaves the batches as they are.
    given = ["method={name: lora}", "training.max_tokens_per_batch=8192", "training.gradient_accumulation_steps=1"]
    recomputing = plan_memory(load_recipe(written, [*given, "training.gradient_checkpointing=true"]), device="cuda")
    recipe = load_recipe(written, given)
    roomy = plan_memory(recipe, budget=recomputing.estimate.peak_bytes, device="cuda")
    assert roomy.recipe.training.gradient_checkpointing is True
    assert not roomy.recipe.training.activation_offload
    assert roomy.notes == ()
    tight = plan_memory(recipe, budget=recomputing.estimate.peak_bytes - 1, device="cuda")
    assert tight.fits
    assert tight.recipe.training.activation_offload
    assert tight.recipe.training.optimizer == "adamw"
    assert tight.recipe.quantization is None
    [change] = [change for change in tight.changes if "training.activation_offload" in change.settings]
    assert (change.time_factor, change.exact) == (None, True)
    assert change.saves_bytes > 10 * MIB
    assert "not measured" in tight.notes[0]
    write_recipe(tight, written.with_name("moved.yaml"))
    assert load_recipe(written.with_name("moved.yaml")) == tight.recipe


def test_activations_stay_in_the_plan_of_a_cpu(written):
    plain, moved = (
        plan_memory(load_recipe(written, [f"training.activation_offload={value}"]), budget="4GiB", device="cpu")
        for value in ("false", "true")
    )
    assert moved.estimate == plain.estimate
    assert moved.notes == ("training.activation_offload does nothing on cpu, whose memory is the machine's",)
    assert not any("training.activation_offload" in change.settings for change in moved.changes)


def test_a_gpu_keeps_an_operation_and_what_is_small(written):
    plain, moved = (
        plan_memory(
            load_recipe(written, ["method={name: lora}", f"training.activation_offload={value}"]), device="cuda"
        ).estimate
        for value in ("false", "true")
    )
    assert moved.breakdown["weights"] == plain.breakdown["weights"]
    kept = [sum(size for part, size in one.breakdown.items() if "activations" in part) for one in (plain, moved)]
    assert kept[1] < kept[0] / 5


def test_the_table_gives_no_time_that_was_not_measured():
    moved = Change({"training.activation_offload": True}, {"training.activation_offload": False}, MIB, None, True)
    smaller = Change({"training.batch_size": 4}, {"training.batch_size": 8}, MIB, 1.25, True)
    times = next(column for column in changes_table((moved, smaller)).columns if column.header == "time")
    assert list(times.cells) == ["not measured", "about x1.25"]


def test_what_cannot_fit_is_explained(written):
    head = plan_memory(load_recipe(written, ["method={name: head}"]), device="cpu")
    found = plan_memory(load_recipe(written), budget=head.estimate.peak_bytes + 30 * MIB, device="cpu")
    assert found.fits is False
    assert not found.changes
    assert "the least this recipe needs" in found.advice[0]
    assert any("method.name=head fits" in line for line in found.advice)


def test_the_written_recipe_is_the_plan(written, tmp_path):
    found = plan_memory(load_recipe(written), budget="4GiB", device="cpu")
    write_recipe(found, tmp_path / "planned.yaml")
    assert load_recipe(tmp_path / "planned.yaml") == found.recipe
    with pytest.raises(OutputError, match="exists already"):
        write_recipe(found, tmp_path / "planned.yaml")


def test_the_command_prints_json_without_torch(written):
    code = (
        "import sys; from toolkit.cli import main\n"
        f"code = main(['plan', {str(written)!r}, '--json', '--device', 'cpu', '--budget', '4GiB'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {"peak_bytes", "breakdown", "fits", "budget_bytes", "changes"} <= found.keys()
    assert found["fits"] is True


@pytest.mark.parametrize(("text", "size"), [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("2GB", 2 * 10**9), ("77", 77)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "0", "4 TiBs", "nan", "inf GiB"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(InputError, match="--budget"):
        parse_bytes(text)


def test_kernels_are_counted_by_the_sizes_of_batches(written):
    def framework(*changes):
        recipe = load_recipe(written, ["method={name: lora}", *changes])
        return plan_memory(recipe, device="cpu").estimate.breakdown["framework"]

    plain, one, many = (
        framework(*changes)
        for changes in (
            ["training.gemm=default"],
            ["training.gemm=onednn", "training.epochs=null", "training.max_steps=1"],
            ["training.gemm=onednn", "training.epochs=8"],
        )
    )
    assert plain < one < many
    quantised = [framework("quantization={bits: 4}", f"training.gemm={gemm}") for gemm in ("default", "onednn")]
    assert quantised[0] < quantised[1]
