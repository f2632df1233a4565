"""Padding and packing are one thing: rows that hold documents, found by ``document_ids``.

``document_ids [B, T]`` int: equal numbers mark the tokens of one document, -1 a pad. Positions count from a document's
first token, so each document is brought to a row of its own, right-padded, and attended there; what follows a
document's last token cannot reach it. No backend knows about pads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

PAD = -1
T = TypeVar("T")


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
    for known in _LAST.get(document_ids):
        return known
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
    return _LAST.put(found, document_ids)


class LastResult(Generic[T]):
    """The answer for the tensors asked about last: every layer of a forward pass asks about the same ones, and each
    answer takes a device synchronisation. Tensors are told apart by identity and count of writes."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._tensors: list[weakref.ref[Tensor]] = []
        self._value: list[T] = []

    def get(self, *tensors: Tensor | None) -> list[T]:
        """The value stored for these tensors in a list, or an empty list."""
        alive = all(reference() is not None for reference in self._tensors)
        return self._value if alive and self._key is not None and self._key == _identity(tensors) else []

    def put(self, value: T, *tensors: Tensor | None) -> T:
        self._key, self._value = _identity(tensors), [value]
        self._tensors = [weakref.ref(x) for x in tensors if x is not None]
        return value


def _identity(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
    """None where writes are not counted, as for inference tensors: then nothing is remembered."""
    if any(x is not None and x.is_inference() for x in tensors):
        return None
    return tuple(None if x is None else (id(x), x._version) for x in tensors)


_LAST: LastResult[list[Document]] = LastResult()


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
