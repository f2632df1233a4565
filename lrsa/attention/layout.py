"""The geometry of sparse attention, as plain integer arithmetic on positions.

Positions count from a document's first token. S sinks, partitions of L tokens, K of them kept, chunks of C tokens.

    position   0        S          S+L        S+2L                          t
               | sinks  | part. 0  | part. 1  | ...   | part. n  | n+1 ...  |
                        '--- K kept of each L, n of them ---'    '- raw: between L and 2L tokens, plus a chunk

Everything here depends on the config and a position alone, never on how tokens are fed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Queries ``[start, stop)`` that see the same compressed past: ``partitions`` of them, then the raw keys."""

    start: int
    stop: int
    partitions: int


class PromptGeometry(NamedTuple):
    """A prompt that schedule ``prefill_once`` compresses: ``length`` tokens, the first ``sink`` of them sinks, then
    ``ranked`` of which ``kept`` stay, then the lag.

        position   0        S                               n - W            n
                   | sinks  | ranked: K of p stay           | lag            | what follows, never compressed
    """

    length: int
    sink: int
    ranked: int
    kept: int

    @property
    def lag_start(self) -> int:
        """First position that is kept without being ranked; what is too short for a lag has no token before it."""
        return self.sink + self.ranked

    @property
    def held(self) -> int:
        """Keys that a head holds of the prompt: S + K + W, or all n where nothing is ranked."""
        return self.length - self.ranked + self.kept


@dataclass(frozen=True)
class Geometry:
    """S, L, K, C: tokens (``sink``, ``lag``), kept tokens a partition (``kept``), tokens a chunk (``chunk``)."""

    sink: int
    lag: int
    kept: int
    chunk: int

    @property
    def first_chunk(self) -> int:
        """Tokens of the first chunk, S + 2L: until then nothing can have been compressed."""
        return self.sink + 2 * self.lag

    def compressed(self, tokens: int) -> int:
        """n(t): partitions that are compressed once ``tokens`` came before. Partition p needs all of p + 1."""
        return max(0, (tokens - self.sink) // self.lag - 1)

    def chunk_start(self, position: int) -> int:
        """c(i): first position of the chunk that holds ``position``."""
        if position < self.first_chunk:
            return 0
        return self.first_chunk + (position - self.first_chunk) // self.chunk * self.chunk

    def raw_start(self, partitions: int) -> int:
        """First position after ``partitions`` compressed partitions: keys from here on are all there."""
        return self.sink + partitions * self.lag

    def buffer_size(self, partitions: int) -> int:
        """Entries of the buffer ``[sinks | kept]`` that stand for ``partitions`` compressed partitions."""
        return self.sink + partitions * self.kept

    def slots(self, tokens: int) -> int:
        """Keys a head holds after ``tokens`` tokens, all that is due compressed: S + nK + (t - S - nL)."""
        return self._slots(tokens, self.compressed(tokens))

    def held_partitions(self, tokens: int) -> int:
        """n(c(t)): partitions that the next query, at position ``tokens``, finds compressed."""
        return self.compressed(self.chunk_start(tokens))

    def held(self, tokens: int) -> int:
        """Keys that a cache must hold after ``tokens`` tokens: `slots` where C = L; where not, a chunk under way still
        sees what it began with, so what came due inside it waits for its end."""
        return self._slots(tokens, self.held_partitions(tokens))

    def _slots(self, tokens: int, n: int) -> int:
        return tokens if n == 0 else self.buffer_size(n) + tokens - self.raw_start(n)

    @property
    def ring(self) -> int:
        """Most raw tokens after the sinks that are held at once: up to L + (L - gcd) old ones and a chunk."""
        return 2 * self.lag - math.gcd(self.chunk, self.lag) + self.chunk

    def selected_partitions(self, tokens: int) -> int:
        """Partitions whose selection some query among the first ``tokens`` positions uses."""
        return self.compressed(self.chunk_start(tokens - 1)) if tokens > 0 else 0

    def spans(self, tokens: int, longest: int, start: int = 0) -> Iterator[Span]:
        """Cut ``[start, tokens)`` into spans of one compressed past, at most ``longest`` queries each.

        Chunks that see the same partitions (C < L) share a span, so that a small chunk costs nothing.
        """
        while start < tokens:
            n = self.compressed(self.chunk_start(start))
            stop = self._past_changes(start, n)
            while start < min(stop, tokens):
                end = min(stop, tokens, start + longest)
                yield Span(start, end, n)
                start = end

    def _past_changes(self, position: int, partitions: int) -> int:
        """First chunk start after ``position`` that has more than ``partitions`` compressed."""
        complete = self.sink + (partitions + 2) * self.lag  # tokens after which one more is compressed
        beyond = max(0, complete - self.first_chunk)
        return self.first_chunk + -(-beyond // self.chunk) * self.chunk

    def pairs(self, tokens: int) -> int:
        """Query-key pairs that ``tokens`` tokens attend, a head: what the arithmetic of a perfect kernel is."""
        total = 0
        for start, stop, n in self.spans(tokens, tokens):
            past = 0 if n == 0 else self.buffer_size(n) - self.raw_start(n)
            total += sum(past + i + 1 for i in (start, stop - 1)) * (stop - start) // 2
        return total
