"""Records -> one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from lrsa.results.diffs import shown, told_apart
from lrsa.results.figures.frames import styles_of
from lrsa.results.figures.style import COLOURS, MARKERS, ArmStyle, arm_styles
from lrsa.results.grids import NothingToShow
from lrsa.results.keys import flat
from lrsa.results.record import Record
from lrsa.results.report.charts import HEIGHT, LEFT, RIGHT, WIDTH, Chart
from lrsa.results.report.sections import (
    PlainTable,
    TableView,
    data_view,
    diff_view,
    duration,
    environment,
    metrics_view,
    run_views,
    table_views,
)
from lrsa.results.report.views import charts_of, losses
from lrsa.results.retention import build_retention
from lrsa.results.statistics import RESAMPLES
from lrsa.results.store import Setting
from lrsa.results.tables import METRICS, ResultTable, build_table


@dataclass(frozen=True)
class Part:
    """Results in one metric. `problem`: why there is no table."""

    name: str
    title: str
    tables: list[TableView]
    charts: list[Chart]
    notes: tuple[str, ...] = ()
    problem: str = ""


def build_report(
    records: Sequence[Record],
    *,
    title: str | None = None,
    arms: Sequence[str] = (),
    tasks: Sequence[str] = (),
    compressions: Sequence[float] = (),
    reference: str | Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    metrics: Sequence[str] = (),
    n_resamples: int = RESAMPLES,
    more: Sequence[PlainTable] = (),
    command: str = "lrsa-report",
) -> str:
    """The page, as text. `records`: finished, failed and unfinished ones: `load_records(..., unfinished=True)`.

    `arms`, `tasks`, `compressions`, `reference` and `names` as `tables.build_table` takes them; `metrics`: of
    `METRICS`, default: the scores that were measured, and where there are none the likelihood. Arms that hold several
    experiments are told apart by what differs in their configs. A table that cannot be built says why in its place.
    `more`: further tables, of what is not scored, such as speed.

    Raises ValueError for an unknown metric, and without records.
    """
    if not records:
        raise ValueError(
            "no records: run lrsa-train or lrsa-eval first, or name the folder that holds their run folders"
        )
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    apart, names = told_apart(records), dict(names or {})
    families = {new.arm: old.arm for new, old in zip(apart, records, strict=True) if new.arm != old.arm}
    names |= {new: names[old] + new.removeprefix(old) for new, old in families.items() if old in names}
    records, finished = apart, [record for record in apart if record.status == "finished"]
    measuring = sorted({record.arm for record in finished if record.cells}, key=_by_number)
    asked = [[new for new in measuring if families.get(new) == arm] or [arm] for arm in arms]
    arms = [arm for some in asked for arm in some] or measuring
    measured = [name for name in METRICS if any(name in cell for record in finished for cell in record.cells)]
    wanted: dict[str, Any] = {
        "arms": arms,
        "tasks": tasks,
        "compressions": compressions,
        "reference": reference,
        "names": names,
        "n_resamples": n_resamples,
    }
    parts, styles = [], arm_styles(names.get(arm, arm) for arm in arms)
    for metric in metrics or [name for name in measured if name != "nll"] or measured:
        part, found = _part(finished, metric, wanted, families)
        parts.append(part)
        styles = found or styles
    training: list[Chart] = []
    with contextlib.suppress(NothingToShow):
        training.append(losses(finished, names, styles))
    others = metrics_view(records, names)
    studies = ", ".join(dict.fromkeys(record.study for record in records))
    page = {
        "title": title or f"Study {studies}",
        "studies": studies,
        "command": command,
        "parts": parts,
        "training": training,
        "more": [*([others] if others else []), *more],
        "runs": run_views(records, names),
        "diff": diff_view(records, names),
        "environment": environment(records),
        "data": data_view(records),
        "protocols": _protocols(records),
        "facts": _facts(records, finished, names),
        "problems": sum(record.status != "finished" for record in records),
    }
    return _render(page)


def _part(
    records: Sequence[Record], metric: str, wanted: Mapping[str, Any], families: Mapping[str, str]
) -> tuple[Part, dict[str, ArmStyle] | None]:
    scored = METRICS[metric]
    prose = any("positions" in cell for record in records for cell in record.cells)
    own = dict(wanted)
    if metric == "nll" and prose and own["reference"] is None:
        own["reference"] = "full"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            table = build_table(records, metric=metric, **own)
        except ValueError as error:
            return Part(metric, scored.title, [], [], problem=str(error)), None
        retention = _retention(records, metric, wanted) if scored.higher_is_better else None
    said = [str(item.message) for item in caught]
    notes = tuple(dict.fromkeys([*table.notes, *(retention.notes if retention else ()), *said]))
    views = table_views(table) + (table_views(retention) if retention else [])
    charts = charts_of(records, table, retention, families)
    named = [Chart(f"{metric}-{c.name}", c.title, c.x_label, c.y_label, c.caption, c.panels) for c in charts]
    return Part(metric, table.metric.title, views, named, notes), styles_of(table)


def _by_number(name: str) -> list[Any]:
    """`lag_size=64` before `lag_size=128`."""
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in re.split(r"(\d+\.?\d*)", name)]


def _retention(records: Sequence[Record], metric: str, wanted: Mapping[str, Any]) -> ResultTable | None:
    """Of the arms whose floor and full cache were measured; None where there is none."""
    compressed = [factor for factor in wanted["compressions"] if factor != 1]
    settings: dict[str, set[str]] = {}
    for record in records:
        settings.setdefault(record.arm, set()).update(Setting.of(cell).label for cell in record.cells)
    arms = [arm for arm in wanted["arms"] if {"floor", "full"} <= settings.get(arm, set())]
    if not arms:
        return None
    try:
        return build_retention(
            records, metric=metric, **{**wanted, "compressions": compressed, "arms": arms, "reference": {}}
        )
    except ValueError:
        return None


def _facts(records: Sequence[Record], finished: Sequence[Record], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """What was run, in numbers."""
    tasks = dict.fromkeys(cell["task"] for record in finished for cell in record.cells)
    seconds = sum(record.wall_s or 0.0 for record in records)
    seeds = sorted({record.seed for record in records})
    arms = dict.fromkeys(record.arm for record in records)
    days = sorted({(record.finished or record.started)[:10] for record in records})
    counts = {status: sum(r.status == status for r in records) for status in ("finished", "failed", "running")}
    words = {"running": "unfinished"}
    return [
        ("runs", ", ".join(f"{count} {words.get(status, status)}" for status, count in counts.items() if count)),
        ("arms", f"{len(arms)}"),
        ("tasks", ", ".join(names.get(task, task) for task in tasks) or "none"),
        ("model", _values(records, "model.name")),
        ("context, tokens", _values(records, "evaluation.length")),
        ("seeds", ", ".join(map(str, seeds))),
        ("device", _few(dict.fromkeys(str(record.hardware.get("device", "unknown")) for record in records))),
        ("time of all runs", duration(seconds)),
        ("ended", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"),
    ]


def _values(records: Sequence[Record], key: str) -> str:
    """What the configs hold under a dotted key, as far as they have it."""
    leaves = [flat(record.config) for record in records]
    return _few(dict.fromkeys(shown(leaf[key]) for leaf in leaves if leaf.get(key) is not None)) or "–"


def _few(values: Iterable[str]) -> str:
    """The first three, and how many more."""
    found = list(values)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _protocols(records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
    """How answers were made, each way once, with the arms it was."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for record in records:
        if record.protocol:
            found.setdefault(repr(record.protocol), (record.protocol, []))[1].append(record.arm)
    return [
        (", ".join(dict.fromkeys(arms)), [(key, str(value)) for key, value in protocol.items()])
        for protocol, arms in found.values()
    ]


def _render(page: Mapping[str, Any]) -> str:
    folder = resources.files("lrsa.results.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = folder.joinpath("page.html").read_text(encoding="utf-8")
    # names of arms, messages of errors and all of a config are other people's text: everything is escaped
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["symbol"] = lambda style: MARKERS.index(style.marker)
    environment.filters["capital"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["hue"] = lambda style: COLOURS.index(style.colour)
    return environment.from_string(source).render(
        **page,
        style=style,
        script=script,
        script_hash=digest,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
    )
