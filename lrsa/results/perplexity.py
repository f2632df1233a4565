"""Perplexity: a table of likelihoods as people quote them, e^NLL, with what sets arms apart in percent of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lrsa.results.record import Record
from lrsa.results.statistics import Interval
from lrsa.results.tables import Cell, Metric, ResultTable, Row, build_table

NAME = "perplexity"
PERPLEXITY = Metric(NAME, "perplexity", "%", higher_is_better=False)


def build_perplexity(records: Sequence[Record], **options: Any) -> ResultTable:
    """e to the mean NLL a token over examples and seeds; a difference d in nats is 100 (e^d - 1), how many percent more
    the arm's perplexity is than the reference's. Intervals are those of the NLL, paired by example, carried over.

    options: as `tables.build_table`, but for `metric`. Raises what it raises.
    """
    table = build_table(records, metric="nll", **options)
    said = f"{table.metric.title[:1].upper()}{table.metric.title[1:]}"
    first, *others = table.notes
    more = "Perplexity: e to the mean NLL a token; differences are in percent of the perplexity compared with."
    return replace(
        table,
        metric=PERPLEXITY,
        rows=_of(table.rows, math.exp),
        differences=_of(table.differences, lambda nats: 100 * math.expm1(nats)),
        notes=(first.replace(said, "Perplexity", 1), *others, more),
    )


def _of(rows: Iterable[Row], function: Callable[[float], float]) -> tuple[Row, ...]:
    def carried(cell: Cell) -> Cell:
        found: Interval | None = cell.interval
        if found is None:
            return cell
        mean, low, high = map(function, (found.mean, found.low, found.high))
        return replace(cell, interval=replace(found, mean=mean, low=low, high=high))

    return tuple(replace(row, cells=tuple(map(carried, row.cells))) for row in rows)
