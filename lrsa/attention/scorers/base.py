"""The contract of a scorer: what it may read and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """The whole document, for a rule that looks ahead; letters as in `Partitions`, T tokens.

    Attributes:
        query: ``[B, H, G, T, D]``.
        key: ``[B, H, T, D]``, after RoPE.
        lengths: ``[B]`` int64, n: the prompt is the document's first n tokens, its answer the others.
    """

    query: Tensor
    key: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Partitions:
    """P partitions and, for each, what comes after it: its lag. B batch, H key/value heads, G query heads a KV head.

    Chunked, the lag is the next partition: W = L. Compressed once, a prompt is one partition of all that is ranked:
    P = 1, and W, the end of the prompt, is another number than L.

    Attributes:
        key, value: ``[B, H, P, L, D]``, the tokens that are ranked; keys after RoPE, in the model's dtype.
        lag_key, lag_value: ``[B, H, P, W, D]``, the next W tokens.
        lag_query: ``[B, H, G, P, W, D]``, the queries of those next tokens; None unless the scorer ``reads_query``.
        positions: ``[P, L]`` int64, of the ranked tokens within their document.
        layer_idx: the layer's index.
        scale: of the attention logits, 1/sqrt(D) unless the model says otherwise.
        kept: K, tokens of each partition that will be kept.
        prompt: the whole document; None unless the scorer ``reads_future``.
    """

    key: Tensor
    value: Tensor
    lag_key: Tensor
    lag_value: Tensor
    lag_query: Tensor | None
    positions: Tensor
    layer_idx: int
    scale: float
    kept: int
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Scorer(ABC):
    """Ranks the tokens of each partition from that partition and its lag alone.

    So, chunked, a token's fate is settled L to 2L tokens after it was read, and training, prefill and decode agree on
    it.
    Scores carry no gradient. A subclass's dataclass fields are its ``scorer_args``.

    A subclass says what it is:
        reads_query: it needs the lag's queries.
        reads_future: it is given ``Partitions.prompt`` and looks beyond the lag: mask form and evaluation alone.
        comparable: a score means the same in every head of a layer, so that heads may share a budget by it.
        proportional: a score is an amount, 0 or more, of which twice as much counts twice: what noise in training
            multiplies. Others are ranks, of any sign.
    """

    reads_query: ClassVar[bool] = False
    reads_future: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    proportional: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def best(
        self, key: Tensor, value: Tensor, length: int, partitions: int, begin: int, count: int, position: int
    ) -> Tensor | None:
        """The whole selection, where a kernel does it in one go; None: score, then sort.

        Args:
            key, value: ``[B, H, T, D]``.
            length: L.
            partitions: P.
            begin: index of the first partition's first token.
            count: K.
            position: of that token in its document.

        Returns:
            int64 ``[B, H, P * K]`` positions, ascending.
        """
        return None

    @abstractmethod
    def __call__(self, partitions: Partitions) -> Tensor:
        """``[B, H, P, L]`` float32 scores; the K highest are kept, the earlier position where two are equal."""


def to_eleven_bits(x: Tensor) -> Tensor:
    """float32 ``x`` rounded to a mantissa of eleven bits, float16's, at float32's range.

    For rules under which tokens are equal that the last bits tell apart: a token that comes twice has one norm in the
    first layer (RoPE is a rotation), and all keys have one where the model normalises them. Unrounded, how a matrix
    product was cut up would decide between them: a prompt read whole would keep other tokens than one read in blocks.
    """
    dropped = 13  # of float32's 24
    bits = x.contiguous().view(torch.int32) + (1 << (dropped - 1))
    return (bits & -(1 << dropped)).view(torch.float32)
