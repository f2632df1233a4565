"""What a reader must know of a table: its numbers, its brackets, and its gaps by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lrsa.results.join import Joined, TableWarning
from lrsa.results.record import Record
from lrsa.results.setting import Setting

if TYPE_CHECKING:
    from lrsa.results.tables import ResultTable

Seeds = Sequence[int] | Mapping[str, Sequence[int]]


def notes_of(table: ResultTable, joined: Joined, seeds: Seeds = ()) -> tuple[str, ...]:
    """What a reader must know of the numbers, the brackets and the gaps."""
    cells = [cell for row in table.rows for cell in row.cells]
    over = "examples and seeds" if any(c.weight and c.weight.seeds > 1 for c in cells) else "examples"
    notes = [f"{table.metric.title[:1].upper()}{table.metric.title[1:]}, with its 95% interval over {over}."]
    if joined.pool is not None:
        notes.append("Its bounds come from one resampling of examples that all cells share.")
    if any(column.measured for column in table.columns):
        notes.append("In brackets after a compression: the measured ratio, full cache / kept.")
    labels = {column.label for column in table.columns}
    if "floor" in labels:
        notes.append("Floor: the same model without the context.")
    if "gold" in labels:
        notes.append("Gold: the same model with the gold documents alone, full cache.")
    if any(row.positions for row in table.rows):
        notes.append("Prose by position in its window, n windows; the measured ratio is that at a row's last token.")
    if any(cell.best for cell in cells):
        notes.append("Bold: better than every other arm, each paired interval clear of 0.")
    notes += _budgets(table, joined)
    missing = sum(cell.weight is None for cell in cells)
    if missing:
        notes.append(f"{missing} of {len(cells)} cells are missing: no finished record holds them.")
    for arm, absent in missing_seeds(table, joined, seeds).items():
        notes.append(f"Missing of {table.name(arm)}: {'; '.join(absent)}; no finished record holds them.")
        warnings.warn(notes[-1], TableWarning, stacklevel=3)
    prints: dict[tuple[str, Setting], set[str]] = {}
    for (_, task, setting), measured in joined.cells.items():
        prints.setdefault((task, setting), set()).update(measured.fingerprints)
    for (task, setting), found in prints.items():
        if len(found) > 1:
            where = f"{task} at {setting.label}"
            notes.append(f"The prompts of {where} were not the same in all runs: {len(found)} data fingerprints.")
            warnings.warn(notes[-1], TableWarning, stacklevel=3)
    return tuple(notes)


def _budgets(table: ResultTable, joined: Joined) -> Iterator[str]:
    """Which arms were compressed by which budget, where those of one column were not by the same."""
    order = list(dict.fromkeys(row.arm for row in table.rows))
    arms_of: dict[str, set[str]] = {}
    of_column: dict[tuple[str, Setting], set[str]] = {}
    for (arm, task, column), cell in joined.cells.items():
        if cell.setting.context != "full" or cell.setting.compression in (None, 1) or arm not in order:
            continue
        for record in cell.sources.values():
            budget = _budget_of(record)
            if budget is not None and record.arm == arm:  # rows of other keys say themselves in what they differ
                arms_of.setdefault(budget, set()).add(arm)
                of_column.setdefault((task, column), set()).add(budget)
    if any(len(budgets) > 1 for budgets in of_column.values()):
        places = {budget: sorted(map(order.index, arms)) for budget, arms in arms_of.items()}
        said = (
            f"{budget[:1].upper()}{budget[1:]}: {'; '.join(table.name(order[place]) for place in places[budget])}."
            for budget in sorted(places, key=places.__getitem__)
        )
        yield f"Tested at different budgets. {' '.join(said)}"


def _budget_of(record: Record) -> str | None:
    """`uniform`, `concentrated on layers 18, 23`; None where another's cache compressed, or nothing did."""
    attention = (record.config.get("evaluation") or {}).get("attention") or {}
    if not attention or attention.get("scorer") == "dense" or (record.config.get("generate") or {}).get("peer"):
        return None
    budget, layers = attention.get("budget") or "uniform", list(attention.get("dense_layers") or ())
    if not layers:
        return str(budget)
    ordered = budget == "concentrated"  # the order says which of them are dense
    named = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers if ordered else sorted(layers)))}"
    windows = ", windows elsewhere" if attention.get("equal_bytes_at") else ""
    return f"concentrated on {named}{windows}" if ordered else f"{budget}, {named} dense"


def missing_seeds(table: ResultTable, joined: Joined, seeds: Seeds) -> dict[str, list[str]]:
    """What of the `seeds` that an arm is to have is not there: `seed 2`, or `seed 2 of Needles at 4x, 8x`.

    Raises ValueError for seeds of an arm that is not in the table.
    """
    arms = list(dict.fromkeys(row.arm for row in table.rows))
    expected = seeds if isinstance(seeds, Mapping) else dict.fromkeys(arms, seeds)
    for arm in expected:
        if arm not in arms:
            raise ValueError(f"seeds names the arm '{arm}', which is not among the table's: {', '.join(arms)}")
    tasks = list(dict.fromkeys(row.task for row in table.rows))
    found: dict[str, list[str]] = {}
    for arm, wanted in expected.items():
        for seed in wanted:
            gaps = {
                task: [
                    column.label
                    for column in table.columns
                    if (cell := joined.cells.get((arm, task, column.setting))) is None or seed not in cell.values
                ]
                for task in tasks
            }
            if all(len(gap) == len(table.columns) for gap in gaps.values()):
                found.setdefault(arm, []).append(f"seed {seed}")
            elif partly := [f"{table.name(task)} at {', '.join(gap)}" for task, gap in gaps.items() if gap]:
                found.setdefault(arm, []).append(f"seed {seed} of {' and '.join(partly)}")
    return found
