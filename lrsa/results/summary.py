"""A run in numbers: what its record and an experiment tracker list, and the one that a sweep maximises."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lrsa.results.store import Setting
from lrsa.results.tables import METRICS

BOUNDS = ("exact_low", "exact_high", "nll_low", "nll_high")
MEASURED = ("measured_ratio", "n", "cache_ratio", "tokens_per_second")
SCORE = "score"  # what a sweep maximises: `headline`


def summary_metrics(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of a record: `exact/<task>/<column>` (a fraction) and `nll/<task>/<column>`, of generated answers
    `exact_match/...`, `f1/...`, `rouge_l/...` and `string_match/...`; with columns floor, full, 2x, 4x, ...
    """
    return {
        f"{name}/{cell['task']}/{Setting.of(cell).label}": cell[name]
        for cell in cells
        for name in METRICS
        if cell.get(name) is not None
    }


def headline(cells: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean exact match over compressed cells, else over full ones: one number for a sweeper to maximise. None where
    nothing is answered: prose, or no tasks.
    """
    answered = [cell for cell in cells if cell["compression"] is not None and cell.get("exact") is not None]
    chosen = [cell["exact"] for cell in answered if cell["compression"] > 1] or [cell["exact"] for cell in answered]
    return sum(chosen) / len(chosen) if chosen else None


class TrackedName(NamedTuple):
    """A number of a cell as a tracker lists it, `eval/<task>/<column>/<metric>`: `eval/needles/4x/exact`. Sorted, the
    numbers of a cell stand together, and a pattern such as `eval/needles/.*/exact` draws what a table row holds.
    """

    task: str
    column: str  # floor, gold, full, 2x, 4x, ...
    metric: str  # one of METRICS as a record has it (a fraction), its bounds, or what was measured of the cache

    def __str__(self) -> str:
        return f"eval/{self.task}/{self.column}/{self.metric}"

    @classmethod
    def parse(cls, name: str) -> TrackedName | None:
        """The parts of such a name, of another one None. A task may hold slashes."""
        match = re.fullmatch(r"eval/(.+)/([^/]+)/([^/]+)", name)
        return cls(*match.groups()) if match else None


def tracked_metrics(cells: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The cells' numbers by `TrackedName`, and the `headline` as `score`.

    `metrics`: further ones of a record, `<task>/<metric>/<column>`, as lm-eval's tasks have them.
    """
    names = (*METRICS, *BOUNDS, *MEASURED)
    found: dict[str, Any] = {
        str(TrackedName(cell["task"], Setting.of(cell).label, name)): cell[name]
        for cell in cells
        for name in names
        if cell.get(name) is not None
    }
    for name, value in (metrics or {}).items():
        task, metric, column = name.rsplit("/", 2)
        found[str(TrackedName(task, column, metric))] = value
    score = headline(cells)
    return found if score is None else {**found, SCORE: score}


def training_totals(training: Mapping[str, Any] | None) -> dict[str, float]:
    """What a record's post-training took, as a tracker lists it: `cost/seconds`, `cost/step_ms_median`,
    `cost/tokens_per_second` (both of the steady state), `cost/tokens` and `cost/peak_memory_gib`.
    """
    if training is None:
        return {}
    names = ("seconds", "step_ms_median", "tokens_per_second", "tokens")
    found = {f"cost/{name}": training[name] for name in names if training.get(name) is not None}
    if training.get("peak_memory_bytes"):
        found["cost/peak_memory_gib"] = training["peak_memory_bytes"] / 2**30
    return found
