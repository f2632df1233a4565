"""Expected attention: what queries like the lag's may be expected to attend to (kvpress, arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer
from lrsa.attention.scorers.observed import query_logits


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Softmax of mean + variance / 2 of the logits that the lag's queries have with a key (a Gaussian's expected
    exponential); mean over the group's query heads, plus ``epsilon``, times the value's norm.

    Published with the statistics of the whole prompt's queries before RoPE, turned to the mean of the coming positions;
    here with the lag's queries, which stand at the positions that come next. The variance of k . q over the queries is
    k's quadratic form with their covariance.
    """

    epsilon: float = 0.0
    use_covariance: bool = True
    reads_query: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"

    def __call__(self, partitions: Partitions) -> Tensor:
        weights = query_logits(partitions, self._expected)
        return (weights + self.epsilon) * partitions.value.float().norm(dim=-1)

    def _expected(self, logits: Tensor) -> Tensor:
        """``[B, H, p, G, W, L]`` -> ``[B, H, p, L]``."""
        expected = logits.mean(-2)
        if self.use_covariance:
            expected = expected + logits.var(-2, correction=0) / 2
        return expected.softmax(-1).mean(-2)
