"""One forward pass over a cache, as integers: which rows read how many tokens, and where they go.

Rows of a batch are independent: row b has read t_b tokens, pads not counted, and everything follows from t_b. N slots
of storage: a ring of W for raw tokens, then S sinks, then kept tokens (see `lrsa.cache.layer`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lrsa.attention.layout import Geometry

# Dense layers are sparse ones whose sinks never end: no ring, nothing is compressed.
DENSE = Geometry(sink=1 << 40, lag=1, kept=1, chunk=1)


def ring_size(geometry: Geometry) -> int:
    """W: slots for raw tokens."""
    return 0 if geometry == DENSE else geometry.ring


def region_size(geometry: Geometry, tokens: int) -> int:
    """Slots after the ring that are in use once ``tokens`` were read: sinks and kept tokens."""
    n = geometry.held_partitions(tokens)
    return min(tokens, geometry.sink) if n == 0 else geometry.buffer_size(n)


class Slots(NamedTuple):
    """Where one token a row is written, and what its query sees. Tensors on the layer's device."""

    write: Tensor  # int64 [B]
    valid: Tensor  # bool [B, N]: the slots that hold a visible key, the new one included
    filled: Tensor  # int32 [B]: no slot from here on does


def decode_slots(geometry: Geometry, tokens: Tensor, partitions: Tensor, size: int) -> Slots:
    """`Slots` for rows that have read ``tokens`` int64 ``[B]`` and compressed ``partitions`` int64 ``[B]``.

    Arithmetic on the device alone, so that a CUDA graph can hold it. ``size``: N, slots to describe.
    """
    ring, sink, lag, kept = ring_size(geometry), geometry.sink, geometry.lag, geometry.kept
    slot = torch.arange(size, device=tokens.device)
    t, n = tokens[:, None], partitions[:, None]
    region = torch.where(n == 0, (t + 1).clamp(max=sink), sink + n * kept)
    valid = slot - ring < region
    write = tokens + ring
    if ring:
        age = torch.remainder(t - sink - slot, ring)  # of what a ring slot holds, the new token being 0 old
        valid = torch.where(slot < ring, t - age >= sink + n * lag, valid)
        write = torch.where(tokens < sink, write, torch.remainder(tokens - sink, ring))
    return Slots(write, valid, (region[:, 0] + ring).to(torch.int32))


class Group(NamedTuple):
    """Rows that do the same: ``rows`` of the batch (None: all of them), each from ``before`` tokens to ``after``."""

    rows: tuple[int, ...] | None
    before: int
    after: int


@dataclass
class Step:
    """``tokens`` columns fed to rows that had read ``before``; ``real`` bool ``[B, T]``, on the CPU; None: no pads."""

    before: tuple[int, ...]
    tokens: int
    real: Tensor | None
    in_prompt: bool = False  # of a cache that compresses once, at the end of the prompt
    ends_prompt: bool = False
    attended: set[int] = field(default_factory=set)  # layers that are through
    _slots: dict[tuple[Geometry, torch.device, int], Slots] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = [self.tokens] * len(self.before) if self.real is None else self.real.sum(-1).tolist()
        self.after = tuple(t + n for t, n in zip(self.before, counts, strict=True))

    @property
    def single(self) -> bool:
        """One token in every row: what decoding does, all rows at once however ragged."""
        return self.tokens == 1 and self.real is None

    def groups(self) -> list[Group]:
        """Rows with something to read, those of equal lengths together."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, lengths in enumerate(zip(self.before, self.after, strict=True)):
            if lengths[1] > lengths[0]:
                found[lengths].append(row)
        every = len(found) == 1 and len(next(iter(found.values()))) == len(self.before)
        return [Group(None if every else tuple(rows), *lengths) for lengths, rows in found.items()]

    def columns(self, row: int) -> Tensor:
        """Columns of the block that hold row ``row``'s tokens, int64."""
        return torch.arange(self.tokens) if self.real is None else self.real[row].nonzero()[:, 0]

    def due(self, geometry: Geometry) -> list[Group]:
        """Rows of which this step completes a chunk that lets partitions be compressed."""
        return [
            group
            for group in self.groups()
            if geometry.held_partitions(group.after) > geometry.held_partitions(group.before)
        ]

    def slots(self, geometry: Geometry, device: torch.device, size: int) -> Slots:
        """`decode_slots` of this step, made once for all layers."""
        key = geometry, device, size
        if key not in self._slots:
            partitions = [geometry.held_partitions(t) for t in self.before]
            tokens, held = torch.tensor([self.before, partitions], device=device)
            self._slots[key] = decode_slots(geometry, tokens, held, size)
        return self._slots[key]
