"""What the lag's queries make of a partition's tokens: shared by the rules that look at attention.

B batch, H key/value heads, G query heads a KV head, P partitions of L tokens, W queries (at most the lag's tokens, of
which there are L unless a prompt is compressed once), D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrsa.attention.scorers.base import Partitions

# Logits held at once, 256 MiB of float32: all queries of a long lag against a long prompt would be gigabytes.
MOST_LOGITS = 1 << 26


def attention_received(partitions: Partitions, window: int) -> Tensor:
    """Attention weight that each token gets from the lag's last ``window`` queries, mean over them and over the group:
    ``[B, H, P, L]`` float32. Softmax over the keys of partition and lag, causal within the lag.
    """
    length, lag = partitions.key.shape[-2], partitions.lag_key.shape[-2]
    window = min(window, lag)

    def weigh(query: Tensor, part: slice) -> Tensor:
        keys = torch.cat([partitions.key[:, :, part], partitions.lag_key[:, :, part]], -2)
        logits = _logits(query, keys, partitions.scale)
        position = torch.arange(lag, device=keys.device)
        ahead = position > position[lag - window :, None]
        logits[..., length:].masked_fill_(ahead, -torch.inf)
        return logits.softmax(-1)[..., :length].mean((3, 4))

    return _in_parts(partitions, window, length + lag, weigh)


def query_logits(partitions: Partitions, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``reduce`` of all the lag's queries' logits with the partition's keys, ``[B, H, p, G, W, L]`` (queries, then
    keys) to ``[B, H, p, L]``, a part of the partitions at a time: ``[B, H, P, L]``."""

    def apply(query: Tensor, part: slice) -> Tensor:
        return reduce(_logits(query, partitions.key[:, :, part], partitions.scale))

    return _in_parts(partitions, partitions.lag_key.shape[-2], partitions.key.shape[-2], apply)


def _in_parts(partitions: Partitions, window: int, keys: int, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """``function(queries [B, H, p, G, W, D], part)`` over parts of the partitions, put together again."""
    assert partitions.lag_query is not None
    query = partitions.lag_query[..., -window:, :].movedim(2, 3)
    rows = query.shape[0] * query.shape[1] * query.shape[3] * window * keys
    step = max(1, MOST_LOGITS // max(rows, 1))
    starts = range(0, query.shape[2], step)
    return torch.cat([function(query[:, :, s : s + step], slice(s, s + step)) for s in starts], 2)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """``[B, H, p, G, W, D]`` with ``[B, H, p, N, D]`` -> ``[B, H, p, G, W, N]`` float32: a group's heads are further
    rows, so that keys are not copied for each."""
    logits = query.flatten(3, 4).float() @ key.float().mT * scale
    return logits.unflatten(3, query.shape[3:5])
