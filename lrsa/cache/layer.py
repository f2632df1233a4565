"""One layer of the recurrent form: keys and values that are compressed as they come.

B rows, H key/value heads, Hq query heads, D head dimension; N slots, in no order that attention would care for:

    slot      0                W           W+S                W+S+nK
              |  ring of raw   |  S sinks  |  kept, n times K |  spare ...
              token p >= S in (p - S) mod W

Nothing is moved when a token comes or a partition is compressed: the K kept tokens are copied from the ring to the end,
and the ring's slots are written over in time. A query-based scorer has a ring for queries too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig, decode
from lrsa.attention.api import attend_selected, choose_backend
from lrsa.attention.dense import attend_dense
from lrsa.attention.gather import attend_block
from lrsa.attention.selection import select
from lrsa.cache.base import AttendingLayer
from lrsa.cache.step import DENSE, Group, Slots, Step, region_size, ring_size

Rows = slice | Tensor
GROWTH = 1.5  # of the storage where `max_tokens` was not given: each growth copies it once


class SparseLayer(AttendingLayer):
    """A layer under the chunked schedule."""

    stored = ("keys", "values", "queries", "kept_positions")

    def __init__(self, config: SparseAttentionConfig | None, layer_idx: int, max_tokens: int | None) -> None:
        super().__init__(config, layer_idx, max_tokens)
        self.geometry = DENSE if config is None else config.geometry
        self.ring = ring_size(self.geometry)
        self.queries: Tensor | None = None  # [B, Hq, W + S, D]
        self.kept_positions: Tensor | None = None  # int32 [B, H, spare and all], of the slots after the sinks
        self.capacity = 0  # slots after the ring

    # ---- storage

    @property
    def _stores(self) -> list[Tensor]:
        return [x for x in (self.keys, self.values, self.queries) if x is not None]

    def reserve(self, query: Tensor, key: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Make or grow the storage for rows that come to ``after`` tokens.

        Raises:
            ValueError: more tokens than ``max_tokens``, or another batch size, dtype or device than so far.
        """
        longest = max(after)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise ValueError(
                f"a row comes to {longest} tokens, but the cache was made with max_tokens={self.max_tokens}: "
                "raise it, or leave it out and let the storage grow"
            )
        batch, heads, _, dim = key.shape
        empty = not any(before)
        if self.keys is not None:
            known, now = (self.keys.shape[0], self.keys.dtype, self.keys.device), (batch, key.dtype, key.device)
            if known != now and not empty:
                raise ValueError(
                    f"a batch of {now} after one of {known} (rows, dtype, device): reset() the cache first"
                )
            if known != now:
                self.release()
        need = region_size(self.geometry, longest)
        if need <= self.capacity and self.keys is not None:
            return
        ahead = self.max_tokens or longest + max(256, longest // 8)
        wanted = max(region_size(self.geometry, ahead), int(self.capacity * GROWTH) if self.capacity else 0)
        size = self.ring + wanted
        old = [] if self.keys is None or empty else [*self._stores[:2], self.kept_positions]
        # Slots that hold nothing are masked, but 0 * NaN is NaN: they must be finite.
        self.keys, self.values = (key.new_zeros((batch, heads, size, dim)) for _ in range(2))
        kept = max(0, wanted - self.geometry.sink)
        self.kept_positions = torch.empty((batch, heads, kept), dtype=torch.int32, device=key.device)
        for new, x in zip((self.keys, self.values, self.kept_positions), old, strict=False):
            assert x is not None
            new[:, :, : x.shape[2]] = x
        if self.reads_query and self.queries is None:
            self.queries = query.new_zeros((batch, query.shape[1], self.ring + self.geometry.sink, dim))
        self.capacity = wanted
        self.is_initialized = True

    def release(self) -> None:
        """Give the memory back."""
        self.keys = self.values = self.queries = self.kept_positions = None
        self.capacity, self.is_initialized = 0, False

    # ---- attention

    def attend(self, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str) -> Tensor:
        self.reserve(query, key, step.before, step.after)
        if step.single:
            filled = max(region_size(self.geometry, t + 1) for t in step.before)
            slots = step.slots(self.geometry, key.device, self.ring + filled)
            out = self.decode(slots, query, key, value, scale)
            self.compress_due(step, scale)
            return out
        if step.real is None and len(groups := step.groups()) == 1:
            return self._extend(groups[0], query, key, value, scale, backend)
        out = torch.zeros_like(query)
        for group in step.groups():
            members = range(len(step.before)) if group.rows is None else group.rows
            row = torch.tensor(members, device=key.device)[:, None]
            column = torch.stack([step.columns(member) for member in members]).to(key.device)  # [b, T'] of the block
            q, k, v = (x.transpose(1, 2)[row, column].transpose(1, 2) for x in (query, key, value))
            out.transpose(1, 2)[row, column] = self._extend(group, q, k, v, scale, backend).transpose(1, 2)
        return out

    def decode(self, slots: Slots, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One token a row, ``[B, heads, 1, D]``: device arithmetic alone, so that a CUDA graph can hold it."""
        row = torch.arange(key.shape[0], device=key.device)
        for store, x in zip(self._stores, (key, value, query), strict=False):
            store[row, :, slots.write] = x[:, :, 0]
        seen = slots.valid.shape[1]
        keys, values = self._stores[0][:, :, :seen], self._stores[1][:, :, :seen]
        return decode.attend(query, keys, values, slots.valid, slots.filled, scale)

    def _extend(self, group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str) -> Tensor:
        """A block for rows of equal length, ``[b, heads, T, D]``: attended in the parallel form, then taken in."""
        geometry, (_, before, after), rows = self.geometry, group, self._rows(group)
        n0, n1 = geometry.held_partitions(before), geometry.held_partitions(after)
        origin = geometry.raw_start(n0) if n0 else 0
        raw = [x for _, x in zip(self._stores, (key, value, query), strict=False)]
        if before:  # what is there of positions [origin, before), then the block
            past = (self._raw(store, rows, origin, before) for store in self._stores)
            raw = [torch.cat(pair, 2) for pair in zip(past, raw, strict=True)]
        index = self._select(raw, n0, n1, origin, scale)
        kept = [_pick(x, index - origin) for x in raw[:2]]
        seen = geometry.selected_partitions(after)  # by the block's last query; what is due after it may be more
        if before:
            buffers = [
                torch.cat([self._buffer(store, rows, x, n0), new], 2)
                for store, x, new in zip(self._stores[:2], raw[:2], kept, strict=True)
            ]
            out = attend_block(query, raw[0], raw[1], buffers[0], buffers[1], geometry, before, origin, scale)
        elif seen:
            index_seen, chosen = index[..., : seen * geometry.kept], choose_backend(backend, query)
            out = attend_selected(query, key, value, index_seen, geometry, scale, chosen)
        else:
            out = attend_dense(query, key, value, scale)
        for store, x in zip(self._stores, raw, strict=True):
            self._write_sinks(store, rows, x, before, after)
            self._write_ring(store, rows, x, max(before, geometry.raw_start(n1)), after, origin)
        self._write_kept(rows, kept, index, n0, n1)
        return out

    def compress_due(self, step: Step, scale: float) -> None:
        """Compress what ``step`` completed, from the ring."""
        for group in step.due(self.geometry):
            n0, n1 = self.geometry.held_partitions(group.before), self.geometry.held_partitions(group.after)
            rows = self._rows(group)
            raw, origin = self._lags(rows, n0, n1)
            index = self._select(raw, n0, n1, origin, scale)
            self._write_kept(rows, [_pick(x, index - origin) for x in raw[:2]], index, n0, n1)

    def held(self, lengths: Sequence[int]) -> list[int]:
        return [self.geometry.held(t) for t in lengths]

    def kept(self, row: int, tokens: int, scale: float) -> Tensor:
        """What `lrsa.attention.kept_tokens` says; where C = L, what is held."""
        geometry = self.geometry
        n0, n1 = geometry.held_partitions(tokens), geometry.compressed(tokens)
        rows = torch.tensor([row], device=self._stores[0].device)
        assert self.kept_positions is not None
        chosen = self.kept_positions[row, :, : n0 * geometry.kept].long()
        if n1 > n0:
            raw, origin = self._lags(rows, n0, n1)
            chosen = torch.cat([chosen, self._select(raw, n0, n1, origin, scale)[0]], -1)
        sinks = min(tokens, geometry.sink)
        always = torch.arange(sinks), torch.arange(min(max(geometry.raw_start(n1), sinks), tokens), tokens)
        first, last = (x.expand(chosen.shape[0], -1) for x in always)
        return torch.cat([first, chosen.cpu(), last], -1)

    # ---- parts. `stores` are keys, values and, for a rule that reads them, queries; `raw` the same of some positions

    def _rows(self, group: Group) -> Rows:
        return slice(None) if group.rows is None else torch.tensor(group.rows, device=self._stores[0].device)

    def _lags(self, rows: Rows, n0: int, n1: int) -> tuple[list[Tensor], int]:
        """Partitions n0 to n1 and the last one's lag, raw, out of the ring; and the position of their first token."""
        origin = self.geometry.raw_start(n0)
        return [self._ring(store, rows, origin, self.geometry.raw_start(n1 + 1)) for store in self._stores], origin

    def _select(self, raw: list[Tensor], n0: int, n1: int, origin: int, scale: float) -> Tensor:
        """Positions kept of partitions n0 to n1, ``[b, H, (n1 - n0) K]``."""
        key, value, *query = raw
        if n1 == n0:
            return torch.empty((*key.shape[:2], 0), dtype=torch.int64, device=key.device)
        assert self.config is not None
        q = query[0] if query else None
        where: dict[str, int] = {"layer_idx": self.layer_idx, "first": n0, "origin": origin}
        return select(key, value, self.config, n1 - n0, query=q, scale=scale, **where)

    def _ring(self, store: Tensor, rows: Rows, start: int, stop: int) -> Tensor:
        """Raw tokens ``[start, stop)``: ``[b, heads, stop - start, D]``."""
        slot = self._ring_slots(start, stop, store.device)
        return store[:, :, slot] if isinstance(rows, slice) else store[rows[:, None], :, slot].transpose(1, 2)

    def _ring_slots(self, start: int, stop: int, device: torch.device) -> Tensor:
        return torch.remainder(torch.arange(start, stop, device=device) - self.geometry.sink, self.ring)

    def _raw(self, store: Tensor, rows: Rows, start: int, stop: int) -> Tensor:
        """The same, with the sinks where ``start`` is 0: nothing is compressed yet."""
        sinks = min(stop, self.geometry.sink)
        if start >= sinks:
            return self._ring(store, rows, start, stop)
        first = store[rows, :, self.ring + start : self.ring + sinks]
        return first if stop == sinks else torch.cat([first, self._ring(store, rows, sinks, stop)], 2)

    def _buffer(self, store: Tensor, rows: Rows, raw: Tensor, partitions: int) -> Tensor:
        """``[sinks | kept]`` so far; before the first compression the sinks are among the raw tokens."""
        if partitions == 0:
            return raw[:, :, : self.geometry.sink]
        return store[rows, :, self.ring : self.ring + self.geometry.buffer_size(partitions)]

    def _write_sinks(self, store: Tensor, rows: Rows, raw: Tensor, before: int, after: int) -> None:
        stop = min(after, self.geometry.sink)
        if before < stop:
            store[rows, :, self.ring + before : self.ring + stop] = raw[:, :, before:stop]

    def _write_ring(self, store: Tensor, rows: Rows, raw: Tensor, start: int, stop: int, origin: int) -> None:
        start = max(start, self.geometry.sink)
        if start >= stop:
            return
        slot, new = self._ring_slots(start, stop, raw.device), raw[:, :, start - origin : stop - origin]
        if isinstance(rows, slice):
            store[:, :, slot] = new
        else:
            store[rows[:, None], :, slot] = new.transpose(1, 2)

    def _write_kept(self, rows: Rows, kept: list[Tensor], index: Tensor, n0: int, n1: int) -> None:
        first, last = n0 * self.geometry.kept, n1 * self.geometry.kept
        if first == last:
            return
        begin = self.ring + self.geometry.sink
        for store, new in zip(self._stores[:2], kept, strict=True):
            store[rows, :, begin + first : begin + last] = new
        assert self.kept_positions is not None
        self.kept_positions[rows, :, first:last] = index.to(torch.int32)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``x [b, H, T, D]`` at ``index [b, H, M]``: ``[b, H, M, D]``."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
