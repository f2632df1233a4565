"""Padding and packing are one thing: rows that hold documents, found by ``document_ids``.

``document_ids [B, T]`` int: equal numbers mark the tokens of one document, -1 a pad. Positions count from a document's
first token, so each document is brought to a row of its own, right-padded, and attended there; what follows a
document's last token cannot reach it. No backend knows about pads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PAD = -1


@dataclass(frozen=True)
class Document:
    """Tokens ``[start, start + length)`` of batch row ``row``."""

    row: int
    start: int
    length: int


def find_documents(document_ids: Tensor) -> list[Document]:
    """The documents of a batch, in reading order.

    Raises:
        ValueError: ids that are not ``[B, T]`` integers, or a document whose tokens do not stand side by side.
    """
    if document_ids.ndim != 2 or document_ids.is_floating_point() or document_ids.dtype == torch.bool:
        raise ValueError(
            f"document_ids must be integers [B, T] (-1 for a pad), not {document_ids.dtype} {tuple(document_ids.shape)}"
        )
    cached = _LAST.get(document_ids)
    if cached is not None:
        return cached
    ids = document_ids.cpu()
    found: list[Document] = []
    for row in range(ids.shape[0]):
        values, lengths = torch.unique_consecutive(ids[row], return_counts=True)
        seen: set[int] = set()
        start = 0
        for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
            if value != PAD:
                if value < 0 or value in seen:
                    reason = "is negative" if value < 0 else "comes back after another document or a pad"
                    raise ValueError(f"document_ids row {row}: id {value} at token {start} {reason}; pads are -1")
                seen.add(value)
                found.append(Document(row, start, length))
            start += length
    _LAST.put(document_ids, found)
    return found


class _LastResult:
    """The answer for the tensor asked about last: every layer of a forward pass asks about the same one, and each
    answer takes a device synchronisation."""

    def __init__(self) -> None:
        self._key: tuple[weakref.ref[Tensor], int] | None = None
        self._value: list[Document] = []

    def get(self, tensor: Tensor) -> list[Document] | None:
        if self._key is None or self._key[0]() is not tensor or self._key[1] != _version(tensor):
            return None
        return self._value

    def put(self, tensor: Tensor, value: list[Document]) -> None:
        version = _version(tensor)
        self._key, self._value = (None, value) if version is None else ((weakref.ref(tensor), version), value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # inference tensors keep no count of writes


_LAST = _LastResult()


def grouped(documents: list[Document]) -> Iterator[list[Document]]:
    """Groups of similar length, so that padding one to another's length at most doubles the work."""
    group: list[Document] = []
    for document in sorted(documents, key=lambda d: -d.length):
        if group and 2 * document.length < group[0].length:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def per_document(
    attend: Callable[..., Tensor], document_ids: Tensor, *tensors: Tensor | None, fill: float | bool = 0
) -> Tensor:
    """Apply ``attend(*rows)``, written for one document a row, to documents that share rows.

    Args:
        tensors: ``[B, H, T, ...]`` each, or None; ``attend`` gets ``[N, H, T', ...]`` of N documents, or None.
        fill: the result at pads.

    Returns:
        What ``attend`` returned for each document (``[N, H', T', ...]``), put back: ``[B, H', T, ...]``.
    """
    batch, length = document_ids.shape
    result: Tensor | None = None
    for group in grouped(find_documents(document_ids)):
        longest = group[0].length
        starts = torch.tensor([d.row * length + d.start for d in group])
        lengths = torch.tensor([d.length for d in group])
        steps = torch.arange(longest)
        # Past its end a document repeats its last token: any finite value would do, and a pad's may not be one.
        source = (starts[:, None] + steps.minimum(lengths[:, None] - 1)).to(document_ids.device)
        inside = (steps < lengths[:, None]).to(document_ids.device)
        out = attend(*(None if x is None else _rows(x)[source].transpose(1, 2) for x in tensors))
        if result is None:
            result = out.new_full((batch * length, out.shape[1], *out.shape[3:]), fill)
        result = result.index_put((source[inside],), out.transpose(1, 2)[inside])
    if result is None:
        raise ValueError("document_ids holds pads alone: a batch needs at least one token")
    return result.unflatten(0, (batch, length)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[B, H, T, ...]`` -> ``[B * T, H, ...]``."""
    return x.transpose(1, 2).flatten(0, 1)


def positions(document_ids: Tensor) -> Tensor:
    """``[B, T]`` int64 position of each token in its document; 0 at pads."""
    result = torch.zeros(document_ids.shape, dtype=torch.int64)
    for document in find_documents(document_ids):
        result[document.row, document.start : document.start + document.length] = torch.arange(document.length)
    return result.to(document_ids.device)
