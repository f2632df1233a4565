"""KeyDiff: keep the keys that are least like the others (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine similarity of a key to the mean of the partition's normalised keys.

    Published with the mean over all that is cached, block by block; here over the partition, which decides alone.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"

    def __call__(self, partitions: Partitions) -> Tensor:
        key = partitions.key.float()
        anchor = normalize(key, dim=-1).mean(-2, keepdim=True)
        return -cosine_similarity(key, anchor, dim=-1)
