"""Stochastic top-K: Gumbel noise on the scores of a selection, in training alone.

The K highest of ``log(score) + Gumbel`` are K draws without replacement, each in proportion to the scores that are
left: Kool, van Hoof & Welling (arXiv 1903.06059). It belongs to a forward pass, not to a config: nothing that is
saved, cached or evaluated knows of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lrsa.attention.scorers import Scorer


class _Noise:
    """Fresh noise for each selection, layer after layer. Its generators are its own: activation checkpointing, which
    selects once and not again, would otherwise leave dropout with other numbers in the backward pass."""

    def __init__(self, scale: float, seed: int) -> None:
        self.scale, self.seed = scale, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, scores: Tensor, scorer: Scorer) -> Tensor:
        generator = self._generators.get(scores.device)
        if generator is None:
            generator = self._generators[scores.device] = torch.Generator(scores.device).manual_seed(self.seed)
        gumbel = torch.empty_like(scores, memory_format=torch.contiguous_format).exponential_(generator=generator)
        gumbel = gumbel.log_().neg_()
        return gumbel if math.isinf(self.scale) else logits(scores, scorer).add(gumbel, alpha=self.scale)


_ACTIVE: list[_Noise] = []  # empty but inside `noisy_selection`


@contextlib.contextmanager
def noisy_selection(scale: float, seed: int) -> Iterator[None]:
    """Inside, every selection of the ``lrsa`` attention ranks scores with Gumbel noise, whatever the backend.

    Args:
        scale: of the noise. 0: none. 1: a token is kept in proportion to its score. ``math.inf``: the scores do not
            count, every K tokens of a partition are as likely, as under the scorer ``random``.
        seed: of the noise, which differs from one selection to the next: layers, partitions, heads and rows.

    Raises:
        ValueError: a scale below 0.
    """
    if not scale >= 0:
        raise ValueError(f"scale={scale}: at least 0 (no noise), math.inf to keep tokens at random")
    if scale == 0:
        yield
        return
    noise = _Noise(scale, seed)
    _ACTIVE.append(noise)
    try:
        yield
    finally:
        _ACTIVE.remove(noise)


def active() -> bool:
    """Whether a selection would be made with noise now."""
    return bool(_ACTIVE)


def blind() -> bool:
    """Whether what is kept does not depend on the scores now, which need not be computed."""
    return active() and math.isinf(_ACTIVE[-1].scale)


def perturbed(scores: Tensor, scorer: Scorer) -> Tensor:
    """Called by the selection: ``scores [..., L]`` float32 as they are ranked, with noise inside `noisy_selection`."""
    return _ACTIVE[-1](scores, scorer) if _ACTIVE else scores


def logits(scores: Tensor, scorer: Scorer) -> Tensor:
    """What the noise is added to: the logarithm of scores that are amounts (`Scorer.proportional`); of others the
    distance from the partition's mean in standard deviations, for they have no zero to be in proportion to."""
    if scorer.proportional:
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    deviation, mean = torch.std_mean(scores, -1, keepdim=True)
    return (scores - mean) / deviation.clamp_min(torch.finfo(scores.dtype).tiny)
