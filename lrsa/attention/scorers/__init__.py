"""The rules that rank a partition's tokens, by name. A new one: a file here, a line in `SCORERS`, a YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lrsa.attention.scorers.base import Partitions, Prompt, Scorer
from lrsa.attention.scorers.expected_attention import ExpectedAttention
from lrsa.attention.scorers.h2o import H2O
from lrsa.attention.scorers.key_norm import KeyNorm
from lrsa.attention.scorers.keydiff import KeyDiff
from lrsa.attention.scorers.lag_relative import LagRelative
from lrsa.attention.scorers.oracle import Oracle
from lrsa.attention.scorers.random import Random
from lrsa.attention.scorers.recency import Recency
from lrsa.attention.scorers.snapkv import SnapKV
from lrsa.attention.scorers.tova import Tova
from lrsa.attention.scorers.uniform import Uniform
from lrsa.attention.scorers.value_norm import ValueNorm

SCORERS: dict[str, type[Scorer]] = {
    "expected_attention": ExpectedAttention,
    "h2o": H2O,
    "key_norm": KeyNorm,
    "keydiff": KeyDiff,
    "lag_relative": LagRelative,
    "oracle": Oracle,
    "random": Random,
    "recency": Recency,
    "snapkv": SnapKV,
    "tova": Tova,
    "uniform": Uniform,
    "value_norm": ValueNorm,
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


__all__ = ["SCORERS", "Partitions", "Prompt", "Scorer", "build_scorer"]
