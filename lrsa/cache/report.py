"""What a cache holds, counted: slots, bytes, and the same for a dense cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrsa.cache.base import AttendingLayer


@dataclass(frozen=True)
class LayerReport:
    """One layer, all rows and heads. Bytes are of keys and values.

    slots: keys a head holds, mean over rows: S + nK + (t - S - nL), sinks and tail included.
    bytes: of those slots. buffer_bytes: allocated beyond them: the ring's free slots, spare slots, positions, queries.
    dense_bytes: of a cache that keeps every token.
    """

    kind: str  # sparse, dense, sliding
    slots: float
    bytes: int
    buffer_bytes: int
    dense_bytes: int


def layer_report(layer: Any, lengths: tuple[int, ...]) -> LayerReport:
    """What ``layer``, of any kind, holds of rows that have read ``lengths`` tokens."""
    if layer.keys is None:
        return LayerReport("sparse" if getattr(layer, "config", None) else "dense", 0.0, 0, 0, 0)
    slot_bytes = 2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size()
    dense = slot_bytes * sum(lengths)
    if not isinstance(layer, AttendingLayer):
        held = layer.keys.shape[2]
        return LayerReport("sliding", held, slot_bytes * held * len(lengths), 0, dense)
    slots = layer.held(lengths)
    kind = "dense" if layer.config is None else "sparse"
    held_bytes = slot_bytes * sum(slots)
    return LayerReport(kind, sum(slots) / len(slots), held_bytes, layer.nbytes - held_bytes, dense)


@dataclass(frozen=True)
class CacheReport:
    """`SparseKVCache.report()`: ``tokens`` that each row has read, pads not counted, and a `LayerReport` a layer."""

    tokens: tuple[int, ...]
    layers: tuple[LayerReport, ...]

    @property
    def slots(self) -> float:
        """Mean over layers and rows."""
        return sum(layer.slots for layer in self.layers) / len(self.layers)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def buffer_bytes(self) -> int:
        return sum(layer.buffer_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Slots of a dense cache / slots held: the measured compression."""
        held = self.slots
        return sum(self.tokens) / len(self.tokens) / held if held else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a record."""
        totals = {name: getattr(self, name) for name in ("slots", "ratio", "bytes", "buffer_bytes", "dense_bytes")}
        return {"tokens": list(self.tokens), **totals, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        tokens = f"{min(self.tokens)}" if len(set(self.tokens)) == 1 else f"{min(self.tokens)} to {max(self.tokens)}"
        lines = [
            f"{len(self.tokens)} rows of {tokens} tokens: {self.slots:,.1f} slots a head, {self.ratio:.2f}x compressed",
            f"{'layers':>9}  {'kind':8}{'slots':>10}{'held MB':>10}{'buffers MB':>12}{'dense MB':>10}",
        ]
        start = 0
        for stop in range(1, len(self.layers) + 1):
            if stop < len(self.layers) and self.layers[stop] == self.layers[start]:
                continue
            name = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
            lines.append(_line(name, self.layers[start].kind, self.layers[start].slots, self.layers[start:stop]))
            start = stop
        lines.append(_line("all", "", self.slots, self.layers))
        return "\n".join(lines)


def _line(name: str, kind: str, slots: float, layers: tuple[LayerReport, ...]) -> str:
    held, buffers, dense = (sum(getattr(x, f) for x in layers) / 1e6 for f in ("bytes", "buffer_bytes", "dense_bytes"))
    return f"{name:>9}  {kind:8}{slots:>10,.1f}{held:>10,.2f}{buffers:>12,.2f}{dense:>10,.2f}"
