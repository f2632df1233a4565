"""One layer of a cache that is compressed once, when its prompt has been read: schedule ``prefill_once``.

B rows, H key/value heads, Hq query heads, D head dimension; N slots, in the order of their positions, the newest last.
Until the prompt ends these are its columns; then what is held of it, rows that hold less filled up on the left; each
column that follows adds one. The prompt is attended densely, one layer's keys and values of it whole at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.dense import attend_last
from lrsa.attention.once import held_positions, pick
from lrsa.cache.base import AttendingLayer
from lrsa.cache.step import Step

NOTHING = -1  # position of a slot that holds a pad, or nothing


class OnceLayer(AttendingLayer):
    """See `lrsa.attention.once` for the rule."""

    stored = ("keys", "values", "queries", "positions")

    def __init__(self, config: SparseAttentionConfig | None, layer_idx: int, max_tokens: int | None) -> None:
        super().__init__(config, layer_idx, max_tokens)
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None  # [B, H, N, D]
        self.queries: Tensor | None = None  # [B, Hq, W, D], the newest, while the prompt is read
        self.positions: Tensor | None = None  # int32 [B, H, N]
        self.is_initialized = False
        self.full = True  # each slot of each row holds a token; known without asking the device

    def reset(self) -> None:
        super().reset()
        self._clear()

    def attend(self, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str) -> Tensor:
        if self.max_tokens is not None and max(step.after) > self.max_tokens:
            raise ValueError(
                f"a row comes to {max(step.after)} tokens, but the cache was made with max_tokens={self.max_tokens}: "
                "raise it, or leave it out"
            )
        self._append(step, query, key, value)
        assert self.keys is not None and self.values is not None and self.positions is not None
        real = None if self.full else self.positions[:, 0] != NOTHING
        out = attend_last(query, self.keys, self.values, scale, real)
        if step.ends_prompt and self.config is not None:
            self._compress(step.after, scale)
        return out

    def _append(self, step: Step, query: Tensor, key: Tensor, value: Tensor) -> None:
        real = torch.ones((len(step.before), step.tokens), dtype=torch.bool) if step.real is None else step.real
        counted = torch.tensor(step.before)[:, None] + real.cumsum(-1) - 1
        positions = counted.masked_fill(~real, NOTHING).to(torch.int32).to(key.device)
        positions = positions[:, None].expand(*key.shape[:3])
        self.full = self.full and step.real is None
        self.keys, self.values = _cat(self.keys, key), _cat(self.values, value)
        self.positions = _cat(self.positions, positions)
        if self.reads_query and step.in_prompt:
            assert self.config is not None
            self.queries = _cat(self.queries, query)[:, :, -self.config.lag_size :]
        self.is_initialized = True

    def _compress(self, lengths: Sequence[int], scale: float) -> None:
        """Keep of the prompt, which is all that is there, what the rule says."""
        assert self.keys is not None and self.values is not None and self.config is not None
        groups: dict[int, list[int]] = defaultdict(list)  # rows of equal length
        for row, length in enumerate(lengths):
            groups[length].append(row)
        batch, heads, _, dim = self.keys.shape
        slots = max(self.config.held(length) for length in groups)
        new = [self.keys.new_zeros((batch, heads, slots, dim)) for _ in range(2)]
        positions = torch.full((batch, heads, slots), NOTHING, dtype=torch.int32, device=self.keys.device)
        for length, rows in groups.items():
            if length == 0:
                continue
            key, value = (x[rows, :, -length:] for x in (self.keys, self.values))  # pads are on the left
            query = None if self.queries is None else self.queries[rows]
            index = held_positions(key, value, self.config, query=query, layer_idx=self.layer_idx, scale=scale)
            own = slots - index.shape[-1]
            for store, x in zip(new, (key, value), strict=True):
                store[rows, :, own:] = pick(x, index)
            positions[rows, :, own:] = index.to(torch.int32)
        self.keys, self.values, self.positions, self.queries = *new, positions, None
        self.full = len({self.config.held(length) for length in groups}) == 1

    def held(self, lengths: Sequence[int]) -> list[int]:
        assert self.positions is not None
        return (self.positions[:, 0] != NOTHING).sum(-1).tolist()

    def kept(self, row: int, tokens: int, scale: float) -> Tensor:
        assert self.positions is not None
        return self.positions[row][:, self.positions[row, 0] != NOTHING].long().cpu()

    def take_back(self, columns: int) -> None:
        super().take_back(columns)
        if self.keys is not None:
            assert self.values is not None and self.positions is not None
            self.keys, self.values = (x[:, :, :-columns] for x in (self.keys, self.values))
            self.positions = self.positions[:, :, :-columns]


def _cat(old: Tensor | None, new: Tensor) -> Tensor:
    """A copy in any case: the new keys carry their cache along (`SparseKVCache.update`)."""
    return torch.cat([new] if old is None else [old, new], 2)
