"""How many blocks of keys a query attends, and which number of them equals a given number of pairs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """``count`` blocks of ``size`` keys a query, its own one among them."""

    count: int
    size: int

    def __str__(self) -> str:
        return f"{self.count}x{self.size}"

    def pairs(self, tokens: int) -> int:
        """Query-key pairs of a head over ``tokens`` tokens: whole past blocks, and the own up to the query."""
        total = 0
        for block, start in enumerate(range(0, tokens, self.size)):
            rows = min(self.size, tokens - start)
            total += rows * min(self.count - 1, block) * self.size + rows * (rows + 1) // 2
        return total


def match(
    pairs: int, tokens: int, sizes: Iterable[int], most: Callable[[int], int], of: Callable[[Blocks], int]
) -> Blocks:
    """The first of ``sizes`` for which at most ``most(size)`` blocks come as close to ``pairs`` as blocks can.

    Args:
        of: pairs of a setting over ``tokens`` tokens, growing with the count.

    Raises:
        ValueError: no size does.
    """
    tried = []
    for size in sizes:
        counts = range(2, -(-tokens // size))  # a block less than dense attention has
        if not counts:
            continue
        above = counts[min(bisect_left(counts, pairs, key=lambda n: of(Blocks(n, size))), len(counts) - 1)]
        near = [Blocks(n, size) for n in (above - 1, above) if n in counts]
        best = min(near, key=lambda b: abs(of(b) - pairs))
        if best.count <= most(size):
            return best
        tried.append(f"{best} (at most {most(size)})")
    raise ValueError(
        f"{pairs / tokens:,.0f} keys a query at {tokens:,} tokens would take {', '.join(tried) or 'no whole block'}: "
        "choose another compression or length, or say the blocks (nsa/16x64)"
    )
