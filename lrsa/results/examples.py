"""Example by example: which ones one arm answers and another loses."""

from __future__ import annotations

import pandas as pd

_KEYS = ["task", "column", "compression", "id"]


def compare_examples(outcomes: pd.DataFrame, arm: str, other: str, metric: str = "exact") -> pd.DataFrame:
    """A row an example and column that both arms were asked, of `store.outcomes_frame`.

    Columns: task, column, compression, id, one an arm with its value (mean over seeds), and `change`, of `arm` beside
    `other`: `won`, `lost`, or where they are equal `both` (1), `neither` (0) or `equal`.

    Raises ValueError for an arm or metric that the outcomes do not hold, and for arms with no example in common.
    """
    there = list(dict.fromkeys(outcomes["arm"]))
    for name in (arm, other):
        if name not in there:
            raise ValueError(f"no outcome of arm '{name}'; arms there: {', '.join(map(str, there)) or 'none'}")
    if metric not in outcomes or metric in _KEYS:
        raise ValueError(f"the outcomes hold no '{metric}'; they hold {', '.join(outcomes.columns)}")
    values = outcomes.assign(**{metric: outcomes[metric].astype("float64")})
    mine, theirs = (
        values[values["arm"] == name].groupby(_KEYS, sort=False, dropna=False)[metric].mean().rename(name).reset_index()
        for name in (arm, other)
    )
    both = mine.merge(theirs, on=_KEYS)
    if both.empty:
        raise ValueError(f"arms '{arm}' and '{other}' were asked no example in common")
    tie = both[arm].map({1.0: "both", 0.0: "neither"}).fillna("equal")
    change = tie.mask(both[arm] > both[other], "won").mask(both[arm] < both[other], "lost")
    return both.assign(change=change)
