"""How much of the full cache's gain over the floor is left under compression: a table of shares, with what was kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lrsa.results.join import BY_ARM, EVERYWHERE, Joined
from lrsa.results.notes import Seeds, notes_of
from lrsa.results.pivot import COLUMNS, Pivot
from lrsa.results.record import Record, RecordError
from lrsa.results.statistics import RESAMPLES
from lrsa.results.tables import EACH, METRICS, Cell, Column, Metric, ResultTable, Row, columns_of, select
from lrsa.results.where import Where

RETENTION_OF = {"own": "the same model's full score", "reference": "the reference's full score"}


def build_retention(
    records: Sequence[Record],
    *,
    of: str = "own",
    title: str = "Retention under compression",
    arms: Sequence[str] = (),
    tasks: Sequence[str] = (),
    compressions: Sequence[float] = (),
    reference: str | Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    metric: str = "exact",
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    rebuild: str = "lrsa-table",
    seeds: Seeds = (),
    where: Where = EVERYWHERE,
    pivot: Pivot = BY_ARM,
    draws: str = EACH,
) -> ResultTable:
    """(score - floor) / (full - floor), each with its own floor, the same model without the context.

    of: whose full score a share is of: the model's `own`, or that of its `reference` arm (of itself where it has none).
    Other arguments as `build_table`. A cell is `unclear` where full - floor is not clear of 0; the notes then print
    that difference with its n.

    Raises what `build_table` raises; ValueError for an unknown `of`; RecordError where no floor or full was measured.
    """
    if of not in RETENTION_OF:
        raise ValueError(f"unknown retention '{of}'; choose from {', '.join(RETENTION_OF)}")
    if pivot.columns != COLUMNS:
        raise ValueError(f"retention is of compressions: columns={list(pivot.columns)} has to be {list(COLUMNS)}")
    chosen = select(records, metric, arms, tasks, (), reference, n_resamples, seed, where, pivot, draws)
    joined, scored = chosen.joined, METRICS[metric]
    labels = {column.label for column in columns_of(joined)}
    for label, fix in (("floor", "evaluation.floor=true"), ("full", "1 among evaluation.compressions")):
        if label not in labels:
            raise RecordError(f"retention needs the {label} column, and no record holds it: evaluate with {fix}")
    idle = {"floor"} | ({"full"} if of == "own" else set())  # 0 and 1 by definition
    columns = tuple(
        column
        for column in columns_of(joined)
        if column.label not in idle and (not compressions or column.setting.compression in compressions)
    )
    if not columns:
        raise RecordError(
            f"nothing compressed was measured (compressions={list(compressions)}), so nothing is retained"
        )
    others = {arm: chosen.references.get(arm, arm) if of == "reference" else arm for arm in chosen.arms}
    rows = []
    for task in chosen.tasks:
        for arm, other in others.items():
            cells = []
            for column in columns:
                key = (arm, task, column.setting)
                found = joined.retention(key, other, scored.higher_is_better)
                ratio = joined.cells[key].ratio if key in joined.cells else None
                unclear = found.whole if found is not None and found.share is None else None
                cells.append(Cell(found.share if found else None, ratio, unclear=unclear))
            rows.append(Row(task, arm, tuple(cells)))
    table = ResultTable(
        title=title,
        metric=Metric(f"retention of {metric}", f"retention of {scored.title.split(', ')[0]}, %", "points", 100.0, 1),
        columns=columns,
        rows=tuple(rows),
        reference=chosen.reference,
        names=dict(names or {}),
        rebuild=rebuild,
        rows_title=pivot.title,
    )
    return replace(table, notes=(*notes_of(table, joined, seeds), *_notes(table, joined, of, others, scored)))


def _notes(table: ResultTable, joined: Joined, of: str, others: Mapping[str, str], metric: Metric) -> Iterable[str]:
    yield (
        f"Retention: (score - floor) / (full - floor), 100 where everything is retained, against {RETENTION_OF[of]}; "
        "each with its own floor, the model without the context; paired by example."
    )
    if of == "reference":
        yield "Against: " + "; ".join(f"{table.name(a)}, that of {table.name(b)}" for a, b in others.items()) + "."
    kept = [text for column in table.columns if (text := _kept(joined, column))]
    if kept:
        yield f"Held after a prompt, slots a KV head (mean over layers) and bytes of the cache: {'; '.join(kept)}."
    for row in table.rows:
        found = next((cell.unclear for cell in row.cells if cell.unclear is not None), None)
        if found is not None:
            yield (
                f"Unclear, {table.name(row.task)} of {table.name(row.arm)}: full - floor of "
                f"{table.name(others[row.arm])} is {found.text(metric.scale, metric.digits)}, not clear of 0, so there "
                "is nothing to retain a share of."
            )


def _kept(joined: Joined, column: Column) -> str:
    held = [kept for key, cell in joined.cells.items() if key[2] == column.setting for kept in cell.kept.values()]
    slots = _range([f"{kept[0]:,.0f}" for kept in held])
    return f"{column.label} {slots} slots, {_range([f'{kept[1] / 2**20:.3g}' for kept in held])} MiB" if held else ""


def _range(texts: Sequence[str]) -> str:
    found = sorted(set(texts), key=lambda text: float(text.replace(",", "")))
    return " to ".join(found[:1] + found[1:][-1:])
