"""Inputs and comparisons shared by the tests of the attention.

B batch, Hq query heads, H key/value heads, T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig, sparse_attention
from lrsa.attention.scorers import SCORERS

LOCAL = sorted(name for name, scorer in SCORERS.items() if not scorer.reads_future)  # have all forms, and are causal
COMPARABLE = sorted(name for name, scorer in SCORERS.items() if scorer.comparable)
# (scorer, backend): every rule in every form on the CPU that it has.
FORMS = [(name, backend) for name in sorted(SCORERS) for backend in ("reference", "gather")[: 1 + (name in LOCAL)]]


def prompt(scorer: str, lengths: int | Tensor) -> dict[str, int | Tensor]:
    """``prompt_lengths`` for a rule that asks for them."""
    return {"prompt_lengths": lengths} if SCORERS[scorer].reads_future else {}


def random_inputs(
    batch: int, query_heads: int, heads: int, tokens: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, Hq, T, D]``, key and value ``[B, H, T, D]``, standard normal, the same for a seed in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, tokens, dim) for n in (query_heads, heads, heads)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def forward_and_gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 1) -> list[Tensor]:
    """Output, then the gradient of each input, for a random direction that no symmetry hides."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def attend(config: SparseAttentionConfig, backend: str, **options) -> Callable[..., Tensor]:
    return lambda q, k, v: sparse_attention(q, k, v, config, backend=backend, **options)


def assert_no_worse(
    fast: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], factor: float = 2.0
) -> None:
    """``fast`` errs against ``exact`` (float64) at most ``factor`` times as much as ``plain`` does, plus rounding.

    The floor is a few units in the last place of the largest entry: where ``plain`` happens to be exact.
    """
    for name, f, p, e in zip(("output", "d query", "d key", "d value"), fast, plain, exact, strict=True):
        assert f.dtype == p.dtype and f.shape == p.shape == e.shape, name
        assert f.isfinite().all(), f"{name}: not finite"
        floor = 8 * torch.finfo(p.dtype).eps * e.abs().max().item()
        allowed = factor * (p.double() - e).abs().max().item() + floor
        error = (f.double() - e).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def naive_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What low precision costs anyone: products and weights in the inputs' dtype, softmax in float32."""
    q = query.unflatten(1, (key.shape[1], -1))
    logits = (q @ key[:, :, None].mT * query.shape[-1] ** -0.5).masked_fill(~mask[:, :, None], -torch.inf)
    return (logits.float().softmax(-1).to(query.dtype) @ value[:, :, None]).flatten(1, 2)


def packed_ids(*rows: Sequence[tuple[int, int]]) -> Tensor:
    """``document_ids`` from runs of (id, length)."""
    return torch.tensor([[i for i, length in row for _ in range(length)] for row in rows])
