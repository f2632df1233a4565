"""The rules that rank a partition's tokens, by name. A new one: a file here, a line in `SCORERS`, a YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lrsa.attention.scorers.base import Partitions, Scorer
from lrsa.attention.scorers.lag_relative import LagRelative
from lrsa.attention.scorers.random import Random
from lrsa.attention.scorers.recency import Recency
from lrsa.attention.scorers.tova import Tova

SCORERS: dict[str, type[Scorer]] = {
    "lag_relative": LagRelative,
    "random": Random,
    "recency": Recency,
    "tova": Tova,
}


def build_scorer(name: str, args: Mapping[str, Any]) -> Scorer:
    """The scorer registered under ``name`` with its arguments.

    Raises:
        ValueError: an unknown scorer, or an argument that it does not take; both list the valid ones.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer={name!r} is unknown: choose one of {', '.join(sorted(SCORERS))}")
    scorer = SCORERS[name]
    valid = [f.name for f in fields(scorer)]
    unknown = sorted(set(args) - set(valid))
    if unknown:
        raise ValueError(f"scorer {name!r} takes no {unknown}: its scorer_args are {valid or 'none'}")
    return scorer(**args)


__all__ = ["SCORERS", "Partitions", "Scorer", "build_scorer"]
