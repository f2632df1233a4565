"""Key norm: keys of low norm get high attention (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer, to_eleven_bits


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Minus the L2 norm of the key, to eleven bits: low-norm keys stay. RoPE, a rotation, does not change it.

    Says little where the model normalises its keys (Qwen3, Gemma 3): then all norms are alike but for a learned factor.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"

    def __call__(self, partitions: Partitions) -> Tensor:
        return -to_eleven_bits(partitions.key.float().norm(dim=-1))
