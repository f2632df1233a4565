"""Row state on the device, for decoding steps that a CUDA graph replays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa.attention.layout import Geometry
from lrsa.cache.layer import SparseLayer
from lrsa.cache.step import Slots, Step, decode_slots


class StaticRows:
    """Tokens read and partitions compressed of each row, as device tensors that stay where they are.

    A captured step reads them; `follow` brings them up to date between replays.
    """

    def __init__(self, layers: Sequence[SparseLayer], lengths: Sequence[int]) -> None:
        self._rows: dict[tuple[Geometry, torch.device], tuple[Tensor, Tensor]] = {}
        for layer in layers:
            if _key(layer) not in self._rows:
                held = [layer.geometry.held_partitions(t) for t in lengths]
                tokens, partitions = torch.tensor([list(lengths), held], device=_key(layer)[1])
                self._rows[_key(layer)] = tokens.clone(), partitions.clone()
        self._made: dict[tuple[Geometry, torch.device], Slots] = {}
        self._seen: set[int] = set()

    def slots(self, layer: SparseLayer) -> Slots:
        """Made once a forward pass; one begins with a layer that was seen already."""
        if layer.layer_idx in self._seen:
            self._seen, self._made = set(), {}
        self._seen.add(layer.layer_idx)
        if _key(layer) not in self._made:
            assert layer.keys is not None
            self._made[_key(layer)] = decode_slots(layer.geometry, *self._rows[_key(layer)], layer.keys.shape[2])
        return self._made[_key(layer)]

    def follow(self, step: Step) -> None:
        """``step`` was taken."""
        for (geometry, _), (tokens, partitions) in self._rows.items():
            tokens.add_(1)
            if step.due(geometry):
                partitions.copy_(torch.tensor([geometry.held_partitions(t) for t in step.after]))
        self._made, self._seen = {}, set()


def _key(layer: SparseLayer) -> tuple[Geometry, torch.device]:
    assert layer.keys is not None
    return layer.geometry, layer.keys.device
