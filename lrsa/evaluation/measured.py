"""What caches really held after their prompts, added up over the batches of a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Cache

from lrsa.cache import SparseKVCache


class MeasuredCache:
    """Means over prompts of what `SparseKVCache.report` counts, and the same for an ordinary cache, which keeps all."""

    def __init__(self) -> None:
        self.total = dict.fromkeys(("prompts", "tokens", "slots", "bytes", "buffer_bytes"), 0.0)

    def add(self, counts: Mapping[str, float]) -> None:
        """One more batch, as `count_cache` counted it."""
        for name in self.total:
            self.total[name] += counts[name]

    def facts(self) -> dict[str, Any]:
        """Fields of a record's cell, {} where nothing was counted.

        cache_slots: keys a head holds, mean over layers and prompts; cache_ratio: full cache / held; cache_bytes: of
        those slots in all heads and layers, a prompt; cache_buffer_bytes: allocated beyond them (pads, room for more).
        """
        prompts = self.total["prompts"]
        if not prompts:
            return {}
        return {
            "cache_slots": self.total["slots"] / prompts,
            "cache_ratio": self.total["tokens"] / self.total["slots"] if self.total["slots"] else 1.0,
            "cache_bytes": self.total["bytes"] / prompts,
            "cache_buffer_bytes": self.total["buffer_bytes"] / prompts,
        }


def count_cache(cache: Cache, tokens: Sequence[int]) -> dict[str, float]:
    """What `cache` holds, which has read prompts of `tokens` tokens (a row each) and nothing else: sums over rows."""
    rows, total = len(tokens), sum(tokens)
    if isinstance(cache, SparseKVCache):
        report = cache.report()
        slots, held, buffers = report.slots, report.bytes, report.buffer_bytes
    else:
        stored = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
        allocated = sum(x.nbytes for pair in stored for x in pair)
        columns = sum(keys.shape[0] * keys.shape[2] for keys, _ in stored)
        real = sum(min(length, keys.shape[2]) for keys, _ in stored for length in tokens)  # pads hold memory too
        held = allocated * real // columns if columns else 0
        slots, buffers = real / rows / max(len(stored), 1), allocated - held
    return {"prompts": rows, "tokens": total, "slots": slots * rows, "bytes": held, "buffer_bytes": buffers}
