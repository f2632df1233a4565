"""Value norm: a token whose value is small adds little, whatever attention it gets (arXiv 2406.12335)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer, to_eleven_bits


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """The L1 norm of the value, to eleven bits: the factor by which the paper (VATP) multiplies an attention score."""

    proportional: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.12335"

    def __call__(self, partitions: Partitions) -> Tensor:
        return to_eleven_bits(partitions.value.float().abs().sum(-1))
