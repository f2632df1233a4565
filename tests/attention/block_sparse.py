"""A slow stand-in for flash-attn-4 on any device and dtype: it reads the very lists and the mask that the kernels get,
and computes what they list, block by block. The functions are those of `lrsa.attention.flash4_kernels`, and in `HOPPER`
those of `lrsa.attention.hopper`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from lrsa.attention.blocks import KEY_BLOCK, Layout, Lists, Mask, visible


def listed(lists: Lists, line: int) -> Iterator[tuple[int, bool]]:
    """Blocks that one block meets, in the kernels' order, and whether they are under the mask."""
    for count, index, masked in (
        (lists.partial_count, lists.partial_index, True),
        (lists.full_count, lists.full_index, False),
    ):
        assert count.dtype == index.dtype == torch.int32
        assert count.shape[:2] == index.shape[:2] == (1, 1) and count.shape[2] == index.shape[2]
        for block in index[0, 0, line, : int(count[0, 0, line])].tolist():
            yield block, masked


def computed(lists: Lists, mask: Mask, line_size: int, size: int, rows: int, keys: int, transposed: bool) -> Tensor:
    """int64 ``[rows, keys]``: how often each pair is computed. Lines are blocks of rows, of keys if ``transposed``."""
    result = torch.zeros(rows, keys, dtype=torch.int64)
    for line in range(lists.partial_count.shape[2]):
        for block, masked in listed(lists, line):
            first, second = line * line_size, block * size
            if transposed:
                first, second, line_rows, columns = second, first, size, line_size
            else:
                line_rows, columns = line_size, size
            part = slice(first, min(first + line_rows, rows)), slice(second, second + columns)
            row, column = torch.arange(rows)[part[0], None], torch.arange(keys)[None, part[1]]
            assert row.numel() and column.numel() == columns, "a block that is not there"
            result[part] += visible(row, column, **mask._asdict()) if masked else 1
    return result


def pairs_forward(layout: Layout, rows: int) -> Tensor:
    return computed(layout.forward, layout.mask, layout.query_block, KEY_BLOCK, rows, layout.length, False)


def pairs_backward(layout: Layout, rows: int, head: int = 0) -> Tensor:
    """``[rows, pieces + keys]``, of one head of a group."""
    keys = layout.mask_backward.skipped + layout.length
    lists = of_head(layout.backward, head, -(-rows // layout.query_block))
    return computed(lists, layout.mask_backward, KEY_BLOCK, layout.query_block, rows, keys, True)


def of_head(lists: Lists, head: int, count: int) -> Lists:
    """One head's part of the lists of a group, whose heads have ``count`` blocks of queries each."""
    found = []
    for counts, index in (lists[:2], lists[2:]):
        mine = (torch.arange(index.shape[3]) < counts[..., None]) & (index // count == head)
        order = mine.int().sort(dim=-1, descending=True, stable=True).indices
        found += [mine.sum(-1, dtype=torch.int32), (index % count).gather(-1, order)]
    return Lists(*found)


def forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, layout: Layout, scale: float, *, with_log_sum: bool
) -> Tensor | None:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    pairs = pairs_forward(layout, q.shape[2])
    logits = _logits(q, k, pairs, scale)
    log_sum = logits.logsumexp(-1)
    out.copy_(_ungrouped((logits - log_sum[..., None]).exp() @ v[:, :, None]).transpose(1, 2))
    return log_sum.flatten(1, 2) if with_log_sum else None


def backward(
    query: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sum: Tensor,
    layout: Layout,
    scale: float,
) -> None:
    """Column by column of blocks of keys, as the kernel does."""
    heads = key.shape[2]
    q, o, do = (x.transpose(1, 2).unflatten(1, (heads, -1)) for x in (query, out, grad_out))  # [B, H, G, R, D]
    k, v = (x.transpose(1, 2)[:, :, None] for x in (key, value))
    log_sum, delta = log_sum.unflatten(1, (heads, -1))[..., None], (do * o).sum(-1, keepdim=True)
    pairs = pairs_backward(layout, q.shape[3])
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for column in range(layout.backward.partial_count.shape[2]):
        keys = slice(column * KEY_BLOCK, (column + 1) * KEY_BLOCK)
        for block, _ in listed(layout.backward, column):
            rows = slice(block * layout.query_block, (block + 1) * layout.query_block)
            weights = (q[..., rows, :] @ k[..., keys, :].mT * scale - log_sum[..., rows, :]).exp() * pairs[rows, keys]
            grad_weights = do[..., rows, :] @ v[..., keys, :].mT
            grad_logits = weights * (grad_weights - delta[..., rows, :]) * scale
            grad_v[..., keys, :] += (weights.mT @ do[..., rows, :]).sum(2, keepdim=True)
            grad_k[..., keys, :] += (grad_logits.mT @ q[..., rows, :]).sum(2, keepdim=True)
            grad_q[..., rows, :] += grad_logits @ k[..., keys, :]
    grad_query.copy_(grad_q.flatten(1, 2).transpose(1, 2))
    key.copy_(grad_k[:, :, 0].transpose(1, 2))
    value.copy_(grad_v[:, :, 0].transpose(1, 2))


def hopper_forward(
    query: Tensor,
    buffer: tuple[Tensor, Tensor],
    raw: tuple[Tensor, Tensor],
    out: Tensor,
    layout: Layout,
    scale: float,
    *,
    with_log_sum: bool,
) -> Tensor | None:
    """As `lrsa.attention.hopper.forward`: raw keys are not in the buffer, and what is beyond them reads as zeros."""
    return forward(query, *_joined(buffer, raw, layout, 0), out, layout, scale, with_log_sum=with_log_sum)


def _joined(buffer: tuple[Tensor, Tensor], raw: tuple[Tensor, Tensor], layout: Layout, skipped: int) -> list[Tensor]:
    """One tensor of rows each, of keys and of values."""
    rows = []
    for kept, rest in zip(buffer, raw, strict=True):
        assert kept.shape[1] == skipped + layout.mask.raw_offset
        tail = rest.new_zeros((len(rest), skipped + layout.length - kept.shape[1] - rest.shape[1], *rest.shape[2:]))
        rows.append(torch.cat([kept, rest, tail], 1))
    return rows


def hopper_backward(
    query: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    buffer: tuple[Tensor, Tensor],
    raw: tuple[Tensor, Tensor],
    grad_raw: tuple[Tensor, Tensor],
    log_sum: Tensor,
    layout: Layout,
    scale: float,
) -> None:
    """As `lrsa.attention.hopper.backward`: the lists hold a group's heads one after the other."""
    heads, count = raw[0].shape[2], -(-query.shape[1] // layout.query_block)
    assert layout.group == query.shape[2] // heads
    for x in grad_raw:  # as the tensor copy engine writes
        size = x.element_size()
        assert x.stride(-1) == 1 and all(s and s * size % 16 == 0 for s in x.stride()[:-1]), x.stride()
    rows = _joined(buffer, raw, layout, layout.mask_backward.skipped)
    sums = [torch.zeros_like(x) for x in rows]
    for head in range(query.shape[2] // heads):
        q, o, do, grad_q = (x.unflatten(2, (heads, -1))[:, :, :, head] for x in (query, out, grad_out, grad_query))
        made = [x.clone() for x in rows]
        lists = layout._replace(backward=of_head(layout.backward, head, count))
        backward(q, o, do, grad_q, *made, log_sum.unflatten(1, (heads, -1))[:, :, head], lists, scale)
        for total, one in zip(sums, made, strict=True):
            total += one
    for total, kept, rest in zip(sums, buffer, grad_raw, strict=True):
        kept.copy_(total[:, : kept.shape[1]])
        rest.copy_(total[:, kept.shape[1] : kept.shape[1] + rest.shape[1]])


HOPPER = SimpleNamespace(forward=hopper_forward, backward=hopper_backward)


def _logits(q: Tensor, k: Tensor, pairs: Tensor, scale: float) -> Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1))
    return (grouped @ k[:, :, None].mT * scale).masked_fill(pairs == 0, -torch.inf)


def _ungrouped(x: Tensor) -> Tensor:
    return x.flatten(1, 2)
