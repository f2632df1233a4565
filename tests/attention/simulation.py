"""An oracle of its own: caches that are fed token by token, as lists of positions, one KV head at a time.

It knows the rule's text alone (partitions, lag, chunks), no geometry or selection code of lrsa, and is slow on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NEAR_TIE = 1e-5  # two scores closer than this (relative) may be ranked either way by float32 arithmetic


@dataclass(frozen=True)
class Rule:
    """S sinks, L tokens a partition, K of them kept, C tokens a chunk after the first one."""

    sink: int
    lag: int
    kept: int
    chunk: int


@dataclass
class Simulated:
    """What one document gave. Hq query heads, H KV heads, T tokens, D head dimension."""

    output: np.ndarray  # float64 [Hq, T, D]
    attended: list[list[list[int]]]  # [H][T] -> positions seen, ascending
    held: list[list[list[int]]]  # [H][T + 1] -> positions held after t tokens, everything due compressed
    near_tie: bool  # a selection that rounding could turn: not a fair test case


def simulate(query, key, value, rule: Rule, scores, scale: float | None = None) -> Simulated:
    """Feed ``query [Hq, T, D]``, ``key``, ``value [H, T, D]`` (float64 numpy) token by token.

    ``scores(head, members, lag)`` ranks the positions ``members`` of a partition given the positions ``lag``.
    """
    kv_heads, tokens, dim = key.shape
    group = query.shape[0] // kv_heads
    scale = dim**-0.5 if scale is None else scale
    result = Simulated(np.zeros_like(query), [], [], False)
    for head in range(kv_heads):
        cache = _Head(rule, lambda members, lag, head=head: scores(head, members, lag))
        attended: list[list[int]] = []
        # What queries see lags behind what is due, by at most a chunk; a second cache compresses after every token.
        eager = _Head(rule, lambda members, lag, head=head: scores(head, members, lag))
        held = [[]]
        for i in range(tokens):
            if _starts_chunk(i, rule):
                cache.compress()
            cache.append(i)
            attended.append(sorted(cache.slots))
            for member in range(group):
                at = head * group + member
                logits = key[head, attended[-1]] @ query[at, i] * scale
                weights = np.exp(logits - logits.max())
                result.output[at, i] = weights / weights.sum() @ value[head, attended[-1]]
            eager.append(i)
            eager.compress()
            held.append(sorted(eager.slots))
        result.attended.append(attended)
        result.held.append(held)
        result.near_tie |= cache.near_tie or eager.near_tie
    return result


class _Head:
    def __init__(self, rule: Rule, scores) -> None:
        self.rule, self.scores = rule, scores
        self.slots: list[int] = []
        self.seen = 0
        self.done = 0  # partitions compressed so far
        self.near_tie = False

    def append(self, position: int) -> None:
        self.slots.append(position)
        self.seen += 1

    def compress(self) -> None:
        """Compress every partition whose lag has been read to its end."""
        lag = self.rule.lag
        while True:
            start = self.rule.sink + self.done * lag
            members = list(range(start, start + lag))
            reference = list(range(start + lag, start + 2 * lag))
            if reference[-1] >= self.seen:
                return
            assert set(members + reference) <= set(self.slots), "a partition is ranked against its whole, raw lag"
            ranked = [float(s) for s in self.scores(members, reference)]
            order = sorted(range(lag), key=lambda j: (-ranked[j], j))
            if 0 < self.rule.kept < lag:
                last, first = ranked[order[self.rule.kept - 1]], ranked[order[self.rule.kept]]
                self.near_tie |= 0 < abs(last - first) <= NEAR_TIE * max(abs(last), abs(first))
            drop = {members[j] for j in order[self.rule.kept :]}
            self.slots = [position for position in self.slots if position not in drop]
            self.done += 1


def _starts_chunk(position: int, rule: Rule) -> bool:
    first = rule.sink + 2 * rule.lag
    return position == 0 or (position >= first and (position - first) % rule.chunk == 0)


def lag_relative_scores(key, value, value_weight: float = 1.0):
    """LagKV's score in plain loops (arXiv 2504.04704); float64 inputs ``[H, T, D]``."""

    def deviations(x, members, lag) -> list[float]:
        channels = range(x.shape[-1])
        low = [min(x[j, d] for j in lag) for d in channels]
        high = [max(x[j, d] for j in lag) for d in channels]
        result = []
        for j in members:
            scaled = [(x[j, d] - low[d]) / (high[d] - low[d]) if high[d] > low[d] else 0.0 for d in channels]
            mean = sum(scaled) / len(scaled)
            result.append(math.sqrt(sum((s - mean) ** 2 for s in scaled) / (len(scaled) - 1)))
        return result

    def softmax(x: list[float]) -> list[float]:
        total = [math.exp(v - max(x)) for v in x]
        return [v / sum(total) for v in total]

    def scores(head: int, members, lag) -> list[float]:
        of_keys = softmax(deviations(key[head], members, lag))
        of_values = softmax(deviations(value[head], members, lag))
        return [k + value_weight * v for k, v in zip(of_keys, of_values, strict=True)]

    return scores


def tova_scores(query, key, scale: float | None = None):
    """TOVA's score: what the lag's last query attends to, over partition and lag, averaged over the group."""
    group = query.shape[0] // key.shape[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def scores(head: int, members, lag) -> list[float]:
        seen = [*members, *lag]
        total = [0.0] * len(members)
        for member in range(group):
            logits = [float(query[head * group + member, lag[-1]] @ key[head, j]) * scale for j in seen]
            weights = [math.exp(x - max(logits)) for x in logits]
            for j in range(len(members)):
                total[j] += weights[j] / sum(weights) / group
        return total

    return scores


def recency_scores(head: int, members, lag) -> list[float]:
    return [float(j) for j in members]
