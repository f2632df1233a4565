"""What recorded selections say: how much of the answers survives, and how far two selections agree.

Y compressed layers, H key/value heads, M tokens that are looked for, Q questions they belong to, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrsa.evaluation.scoring import Outcome
from lrsa.results.statistics import Interval, bootstrap_mean, paired_difference

DEPTHS = 5  # equal parts of the context


@dataclass(frozen=True)
class Wanted:
    """Tokens that are looked for, those of an occurrence side by side, as are a question's occurrences: int ``[M]``.

    depth: float ``[Q]``, where in the context the question's first one stands, 0 to 1.
    """

    question: NDArray[np.int64]
    occurrence: NDArray[np.int64]
    depth: NDArray[np.float64]

    @property
    def n(self) -> int:
        return len(self.depth)

    def part(self, tokens: NDArray[np.int64]) -> Wanted:
        """Of some questions alone: all their `tokens`, in order."""
        question = self.question[tokens]
        return Wanted(question, self.occurrence[tokens], self.depth[np.unique(question)])


def survival(
    held: NDArray[np.bool_], wanted: Wanted, base: NDArray[np.float64], resamples: int
) -> dict[str, Any] | None:
    """How much of what is `wanted` is still held when its question is answered; None where nothing is wanted.

    Args:
        held: bool ``[Y, M, H]``.
        base: float ``[Y]``, the share of all compressed tokens that is held: what chance would give.

    Returns:
        n: questions; survival: share of their tokens that a head holds, mean over tokens, heads, layers and questions,
        with its interval; enrichment: that over the base rate; the same by layer, by layer and head, by depth of the
        passage. `whole`: the share of questions of which an occurrence is held token for token, by the heads of a layer
        together: by_layer, `through`: in every layer up to it, in_a_layer: in one at least; anywhere: by all layers'
        heads together.
    """
    if not wanted.n:
        return None
    tokens, occurrences = _starts(wanted.question), _starts(wanted.occurrence)
    sizes = np.diff([*tokens, len(wanted.question)])
    share = np.add.reduceat(held, tokens, axis=1, dtype=np.float64) / sizes[:, None]  # [Y, Q, H]
    of_question = _starts(wanted.question[occurrences])

    def whole(found: Any) -> NDArray[np.bool_]:
        """``[..., M]`` -> ``[..., Q]``: all tokens of an occurrence."""
        complete = np.logical_and.reduceat(found, occurrences, axis=-1)
        return np.asarray(np.logical_or.reduceat(complete, of_question, axis=-1))

    by_layer = whole(np.any(held, axis=-1))
    return {
        "n": wanted.n,
        "tokens": len(wanted.question),
        **_stated("survival", bootstrap_mean(share.mean((0, 2)), resamples)),
        "base": float(base.mean()),
        "enrichment": float(share.mean() / base.mean()),
        "by_layer": share.mean((1, 2)).tolist(),
        "base_by_layer": base.tolist(),
        "enrichment_by_layer": (share.mean((1, 2)) / base).tolist(),
        "by_layer_and_head": share.mean(1).tolist(),
        "by_depth": _by_depth(share.mean((0, 2)), wanted.depth),
        "whole": {
            "by_layer": by_layer.mean(1).tolist(),
            "through": np.logical_and.accumulate(by_layer, axis=0).mean(1).tolist(),
            "in_a_layer": float(by_layer.any(0).mean()),
            "anywhere": float(whole(np.any(held, axis=(0, 2))).mean()),
        },
    }


def _starts(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of equal labels begins."""
    return np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))


def _by_depth(values: NDArray[np.float64], depth: NDArray[np.float64]) -> list[dict[str, Any]]:
    part = np.minimum((depth * DEPTHS).astype(int), DEPTHS - 1)
    return [
        {"from": k / DEPTHS, "to": (k + 1) / DEPTHS, "n": int((part == k).sum()), "survival": float(of.mean())}
        for k in range(DEPTHS)
        if len(of := values[part == k])
    ]


def agreement(common: NDArray[np.float64], ranked: NDArray[np.float64], resamples: int) -> dict[str, Any]:
    """How far two selections of as many tokens agree, a head at a time.

    Args:
        common: kept tokens among the compressed ones ``[3, Y, N, H]``: in common, of the one, and of the other.
        ranked: compressed tokens ``[N]``, positive.

    Returns:
        n: samples; shared: share of one's tokens that the other keeps, with its interval; chance: that of two
        selections that know nothing of each other, K / L; jaccard: common tokens of all that either keeps; each also by
        layer.
    """
    both, mine, theirs = common
    # an adaptive budget may leave a head nothing, which then has nothing in common
    shared, jaccard = both / np.maximum(mine, 1), both / np.maximum(mine + theirs - both, 1)
    chance = theirs / ranked[:, None]
    return {
        "n": both.shape[1],
        **_stated("shared", bootstrap_mean(shared.mean((0, 2)), resamples)),
        "chance": float(chance.mean()),
        "jaccard": float(jaccard.mean()),
        "by_layer": shared.mean((1, 2)).tolist(),
        "chance_by_layer": chance.mean((1, 2)).tolist(),
        "jaccard_by_layer": jaccard.mean((1, 2)).tolist(),
    }


SCORES = ("exact", "nll")
Pair = tuple[str, str]
# What the one model has over the other by its weights and selection, by its selection alone, and by its weights, the
# use that it makes of the selection: minuend and subtrahend, each (weights, selection).
EFFECTS: dict[str, tuple[Pair, Pair]] = {
    "both": (("own", "own"), ("against", "against")),
    "selection_under_own_weights": (("own", "own"), ("own", "against")),
    "selection_under_against_weights": (("against", "own"), ("against", "against")),
    "use_of_own_selection": (("own", "own"), ("against", "own")),
    "use_of_against_selection": (("own", "against"), ("against", "against")),
}


def swap(scored: dict[Pair, Sequence[Outcome]], resamples: int) -> dict[str, Any]:
    """Scores of four (weights, selection), each `own` or `against`, and the paired differences that `EFFECTS` names.

    Returns:
        ids of the questions; cells: weights, selection, exact (a fraction) and nll (nats a token) with intervals and
        each question's value in the order of ids; effects: the differences of both with intervals.
    """
    ids = [outcome.id for outcome in scored["own", "own"]]
    values = {
        pair: {name: [float(getattr(outcome, name)) for outcome in found] for name in SCORES}
        for pair, found in scored.items()
    }
    cells = [
        {"weights": weights, "selection": selection, "values": of}
        | _all_stated({name: bootstrap_mean(of[name], resamples) for name in SCORES})
        for (weights, selection), of in values.items()
    ]

    def difference(name: str, more: Pair, less: Pair) -> Interval:
        a, b = (dict(zip(ids, values[pair][name], strict=True)) for pair in (more, less))
        return paired_difference(a, b, resamples)

    effects = {
        effect: _all_stated({name: difference(name, *pairs) for name in SCORES}) for effect, pairs in EFFECTS.items()
    }
    return {"n": len(ids), "ids": ids, "cells": cells, "effects": effects}


def _all_stated(intervals: dict[str, Interval]) -> dict[str, float]:
    return {key: value for name, interval in intervals.items() for key, value in _stated(name, interval).items()}


def _stated(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
