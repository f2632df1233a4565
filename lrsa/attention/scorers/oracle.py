"""Oracle: keep what the rest of the prompt will attend to. A yardstick for the rules that cannot know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa.attention.scorers import observed
from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class Oracle(Scorer):
    """Attention weight that a token gets from the prompt's queries behind its partition's lag, summed over them, mean
    over the group's query heads; softmax over all keys before a query, as if nothing had been dropped.

    Those queries are the ones that can only see what was kept. Where the prompt ends before them, the queries from the
    partition's end on stand in; where it ends before those too, all scores are 0. The answer is never looked at.
    """

    reads_query: ClassVar[bool] = True
    reads_future: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    proportional: ClassVar[bool] = True

    def __call__(self, partitions: Partitions) -> Tensor:
        assert partitions.prompt is not None
        query, key, lengths = partitions.prompt.query, partitions.prompt.key.float(), partitions.prompt.lengths
        length = partitions.positions.shape[1]
        ends = partitions.positions[:, -1] + 1
        behind = ends + length  # the lag, which comes first
        # [B, 1, 1, P * L]: the first query that counts for a token.
        start = torch.where(behind < lengths[:, None], behind, ends).repeat_interleave(length, 1)[:, None, None]
        stop = lengths[:, None, None, None]

        batch, heads, group, tokens, _ = query.shape
        ranked = slice(int(ends[0]) - length, int(ends[-1]))
        scores = torch.zeros((batch, heads, ranked.stop - ranked.start), device=key.device)
        step = max(1, observed.MOST_LOGITS // (batch * heads * group * tokens))
        for first in range(int(ends[0]), min(int(lengths.max()), tokens), step):
            at = torch.arange(first, min(first + step, tokens), device=key.device)
            logits = (query[..., at, :].flatten(2, 3).float() @ key.mT).unflatten(2, (group, -1)) * partitions.scale
            logits.masked_fill_(torch.arange(tokens, device=key.device) > at[:, None], -torch.inf)
            weights = logits.softmax(-1)[..., ranked].mean(2)  # [B, H, queries, P * L]
            at = at[:, None]
            scores += weights.masked_fill_((at < start) | (at >= stop), 0).sum(2)
        return scores.unflatten(-1, partitions.positions.shape)
