"""How much goes into a context, where its blocks of tokens stand, and the joining of pieces into one sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

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


def largest_size(tokens: Callable[[int], int], least: int, room: int) -> int:
    """A size >= `least` that takes at most `room` tokens while the next one takes more; `least` where even that does.

    `tokens` is about linear, and slow: the search extrapolates until it is too much, then interpolates, and halves
    every third time.
    """
    low, taken = least, tokens(least)
    if taken > room:
        return least
    high = 2 * low + 8
    while (found := tokens(high)) <= room:
        rate = max(found - taken, 1) / (high - low)
        low, taken = high, found
        high = min(low + 1 + int(1.01 * (room - taken) / rate), 8 * low)
    too_many, tries = found, 0
    while high - low > 1:
        tries += 1
        step = (high - low) // 2 if tries % 3 == 0 else (high - low) * (room - taken) // (too_many - taken)
        middle = min(low + max(step, 1), high - 1)
        found = tokens(middle)
        if found <= room:
            low, taken = middle, found
        else:
            high, too_many = middle, found
    return low


def place(
    background: list[Ids], gold: list[Ids], depths: list[float], apart: bool = False
) -> tuple[list[Ids], list[float]]:
    """Put each gold block into the gap of `background` nearest to its depth, 0 (start) to 1 (end); `apart`: into one of
    its own, with a block after it, where there are enough.

    Returns all blocks in order, and where each gold block starts as a fraction of all tokens, in the order of `gold`.
    """
    edges = np.cumsum([0, *(len(block) for block in background)], dtype=np.int64)
    total = int(edges[-1]) + sum(len(block) for block in gold)
    gaps = [int(np.abs(edges - depth * edges[-1]).argmin()) for depth in depths]
    if apart and len(gold) <= len(background):
        _spread(gaps, depths, len(background))
    blocks: list[Ids] = []
    fell = [0.0] * len(gold)
    before = position = 0
    for which in sorted(range(len(gold)), key=lambda k: (gaps[k], depths[k], k)):
        blocks += [*background[position : gaps[which]], gold[which]]
        position = gaps[which]
        fell[which] = (int(edges[position]) + before) / max(total, 1)
        before += len(gold[which])
    return blocks + background[position:], fell


def _spread(gaps: list[int], depths: list[float], stop: int) -> None:
    """Different gaps below `stop`, in the same order and as near as that leaves them."""
    order = sorted(range(len(gaps)), key=lambda k: (gaps[k], depths[k], k))
    for before, which in pairwise(order):
        gaps[which] = max(gaps[which], gaps[before] + 1)
    for which in reversed(order):
        gaps[which] = min(gaps[which], stop - 1)
        stop = gaps[which]
