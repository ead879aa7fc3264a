"""Shows a memory plan: the predicted peak by part, what was changed for a budget, or why nothing fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from toolkit.console import OUT, human_bytes

if TYPE_CHECKING:
    from toolkit.memory.plan import Change, MemoryPlan

BAR = 30


def print_plan(plan: MemoryPlan) -> None:
    """Print the breakdown with bars, the changes and the advice."""
    predicted = plan.estimate
    OUT.print(
        f"predicted peak {human_bytes(predicted.peak_bytes)} on {plan.device} with {plan.base} ({predicted.moment}, "
        f"{predicted.rows} texts of {predicted.tokens:,} tokens)",
        markup=False,
        soft_wrap=True,
    )
    OUT.print(_breakdown(predicted.breakdown, total=predicted.peak_bytes))
    for line in plan.notes:
        OUT.print(line, markup=False, soft_wrap=True)
    if plan.budget_bytes is None:
        return
    verdict = "fits" if plan.fits else "does not fit"
    written = "as written" if not plan.changes else "with these changes"
    OUT.print(f"{verdict} into {human_bytes(plan.budget_bytes)}, {written}", markup=False, soft_wrap=True)
    if plan.changes:
        OUT.print(changes_table(plan.changes))
        OUT.print(f"as written the peak is {human_bytes(plan.written.peak_bytes)}", markup=False, soft_wrap=True)
    for line in plan.advice:
        OUT.print(line, markup=False, soft_wrap=True)


def _breakdown(breakdown: dict[str, int], *, total: int) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="cyan")
    largest = max(breakdown.values())
    for part, size in breakdown.items():
        if size:
            table.add_row(part, human_bytes(size), "█" * max(1, round(BAR * size / largest)) + f" {size / total:.0%}")
    return table


def changes_table(changes: tuple[Change, ...]) -> Table:
    """Return a row for each change: what it saves, costs and alters."""
    table = Table(box=None)
    for name in ("change", "was", "saves", "time", "result"):
        # A setting is there to be copied: it goes on in the next line instead of ending in dots.
        table.add_column(name, overflow="fold")
    for change in changes:
        sign = "" if change.saves_bytes >= 0 else "-"
        table.add_row(
            " ".join(f"{name}={_plain(value)}" for name, value in change.settings.items()),
            " ".join(_plain(value) for value in change.before.values()),
            sign + human_bytes(abs(change.saves_bytes)),
            "not measured" if change.time_factor is None else f"about x{change.time_factor:.2f}",
            "same to rounding" if change.exact else "other arithmetic",
        )
    return table


def _plain(value: Any) -> str:
    """Return a value as YAML spells it."""
    return "null" if value is None else str(value).lower()
