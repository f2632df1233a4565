"""Where blocks of tokens go in a context, and the joining of pieces into one sample."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from lrsa.data.tokens import Ids


class Joiner:
    """Token ids in order of `add`, and the half-open ranges of those added as targets."""

    def __init__(self) -> None:
        self.parts: list[Ids] = []
        self.size = 0
        self.context = 0  # of these, before the first question
        self.spans: list[tuple[int, int]] = []

    def add(self, *parts: Ids, target: bool = False) -> None:
        """Append ids; `target`: all of `parts` together are one span."""
        start = self.size
        self.parts.extend(parts)
        self.size += sum(len(part) for part in parts)
        if target:
            self.spans.append((start, self.size))

    def ids(self) -> list[int]:
        """All ids joined."""
        return np.concatenate(self.parts).tolist() if self.parts else []


def shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """A permutation of range(size), drawn as far as it is read."""
    moved: dict[int, int] = {}
    for position in range(size):
        other = rng.randrange(position, size)
        yield moved.get(other, other)
        moved[other] = moved.get(position, position)


def place(background: list[Ids], gold: list[Ids], depths: list[float]) -> tuple[list[Ids], list[float]]:
    """Put each gold block into the gap of `background` nearest to its depth, 0 (start) to 1 (end).

    Returns all blocks in order, and where each gold block starts as a fraction of all tokens, in the order of `gold`.
    """
    edges = np.cumsum([0, *(len(block) for block in background)], dtype=np.int64)
    total = int(edges[-1]) + sum(len(block) for block in gold)
    gaps = [int(np.abs(edges - depth * edges[-1]).argmin()) for depth in depths]
    blocks: list[Ids] = []
    fell = [0.0] * len(gold)
    before = position = 0
    for which in sorted(range(len(gold)), key=lambda k: (gaps[k], depths[k], k)):
        blocks += [*background[position : gaps[which]], gold[which]]
        position = gaps[which]
        fell[which] = (int(edges[position]) + before) / max(total, 1)
        before += len(gold[which])
    return blocks + background[position:], fell
