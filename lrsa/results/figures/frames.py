"""What figures read of a table and its records: a row a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lrsa.results.figures.style import ArmStyle, arm_styles
from lrsa.results.record import Record
from lrsa.results.store import cells_frame
from lrsa.results.tables import ResultTable

COLUMNS = [
    *("task", "arm", "key", "partner", "column", "compression", "measured_ratio"),
    *("n", "seeds", "mean", "low", "high"),
]


def table_frame(table: ResultTable) -> pd.DataFrame:
    """The measured cells of any metric, seeds joined: `task`, `arm` (as displayed) and `key` (as recorded), `column`,
    `compression`, `measured_ratio`, `n`, `seeds`, and `mean`, `low`, `high` in the metric's printed unit. Without prose
    by position. `partner` of an arm that is another's own reference: that other.
    """
    partners = partners_of(table)
    scale = table.metric.scale
    rows = [
        {
            "task": table.name(row.task),
            "arm": table.name(row.arm),
            "key": row.arm,
            "partner": partners.get(table.name(row.arm), ""),
            "column": column.label,
            "compression": column.setting.compression,
            "measured_ratio": cell.measured_ratio,
            "n": cell.interval.n,
            "seeds": cell.interval.seeds,
            "mean": scale * cell.interval.mean,
            "low": scale * cell.interval.low,
            "high": scale * cell.interval.high,
        }
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell.interval is not None and row.positions is None
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame[["compression", "measured_ratio"]] = frame[["compression", "measured_ratio"]].astype("float64")
    return frame


def partners_of(table: ResultTable) -> dict[str, str]:
    """Displayed names: of an arm that is another's own reference, that other."""
    own = table.differences if table.reference is None else ()
    return {table.name(row.reference): table.name(row.arm) for row in own if row.reference is not None}


def styles_of(table: ResultTable, records: Sequence[Record] = ()) -> dict[str, ArmStyle]:
    """The style of each arm of a table, by its displayed name: the same in every figure. Of `records` whose arms are
    not the table's rows, for it was pivoted, those of their own.
    """
    rows = dict.fromkeys(table.name(row.arm) for row in table.rows)
    arms = dict.fromkeys(table.name(record.arm) for record in records)
    return arm_styles(rows if set(arms) <= set(rows) else arms, partners_of(table))


def held_frame(records: Sequence[Record], names: Mapping[str, str]) -> pd.DataFrame:
    """What is held after a prompt by `task`, `arm` (as displayed) and `column`: `kv_bytes`, all layers' keys and
    values, as a cache measured it or else by the closed form, and `bytes_per_token`, the same for each token of the
    prompt. Means over runs; cells that say no bytes are left out.
    """
    cells = cells_frame(records)
    for name in ("cache_bytes", "kv_bytes_per_layer", "length"):
        if name not in cells:
            cells[name] = None
    closed = cells["kv_bytes_per_layer"].map(lambda layers: sum(layers) if isinstance(layers, list) else None)
    cells["kv_bytes"] = cells["cache_bytes"].astype("float64").fillna(closed.astype("float64"))
    cells["bytes_per_token"] = cells["kv_bytes"] / cells["length"].astype("float64")
    cells["task"] = cells["task"].map(lambda task: names.get(task, task))
    cells["arm"] = cells["arm"].map(lambda arm: names.get(arm, arm))
    held = cells[(cells["context"] == "full") & cells["bytes_per_token"].notna()]
    return held.groupby(["task", "arm", "column"], as_index=False)[["kv_bytes", "bytes_per_token"]].mean()


def kept_frame(records: Sequence[Record], names: Mapping[str, str]) -> pd.DataFrame:
    """`held_frame` with `kept`: the share of the bytes that the same task and arm hold with the full cache. Without
    tasks and arms that no full cache was measured of.
    """
    held = held_frame(records, names)
    full = held.loc[held["column"] == "full", ["task", "arm", "kv_bytes"]]
    both = held.merge(full, on=["task", "arm"], suffixes=("", "_full"))
    return both.assign(kept=both["kv_bytes"] / both["kv_bytes_full"])


def sizes(frame: pd.DataFrame) -> str:
    """`n: Needles 320 × 3 seeds, XQuAD 1,190`: examples and seeds of the tasks of a frame."""
    parts = []
    for task, cells in frame.groupby("task", sort=False):
        n, seeds = sorted(set(cells["n"])), sorted(set(cells["seeds"]))
        examples = f"{n[0]:,}" if len(n) == 1 else f"{n[0]:,} to {n[-1]:,}"
        runs = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        parts.append(f"{task} {examples}" + ("" if seeds[-1] == 1 else f" × {runs} seeds"))
    return f"n: {', '.join(parts)}"
