"""The Triton kernels of the selection, of the rows of keys and of the sinks, against their PyTorch versions.

Without a GPU they run in Triton's interpreter: see `tests.attention.interpreter`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig, kept_tokens, rows, selection
from lrsa.attention.blocks import KEY_BLOCK
from lrsa.attention.dense import attend_dense
from lrsa.attention.rows import Plan
from lrsa.attention.scorers.lag_relative import lag_deviation
from tests.attention.interpreter import on_gpu, run_in_a_process_of_its_own, skip_without

# Partitions of a power of two and not, of one block of a program and of several, heads that are no power of two
SHAPES = [(1, 2, 3, 16, 16), (2, 1, 2, 37, 24), (1, 1, 2, 300, 64)]  # B, H, P, L, D
LARGE = [(2, 3, 31, 128, 64), (1, 2, 5, 1024, 128), (1, 3, 4, 777, 80)]
PLANS = {  # T, S, L, K, the first raw row's token, again
    "again": (700, 16, 128, 37, 16, (128, 128)),
    "raw rows of all tokens": (500, 16, 128, 32, 0, ()),
    "nothing kept": (600, 0, 64, 0, 0, ()),
    "more sinks than a block": (560, 150, 64, 30, 150, (256,)),
    "one token kept": (333, 5, 48, 1, 5, ()),
}
SINKS = [(2, 4, 2, 1, 16), (1, 6, 2, 5, 24), (2, 3, 3, 16, 64), (1, 4, 1, 64, 128)]  # B, Hq, H, S, D


def small() -> Tensor:
    from lrsa.attention import selection_kernel

    return selection_kernel.best_positions(torch.ones(1, 1, 1, 16), 1, 0)


@pytest.fixture
def interpreter():
    skip_without(small)


def tokens_of(shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Keys and values of 7 tokens, the partitions, the last one's lag and 5 more; a channel that is constant."""
    batch, heads, partitions, length, dim = shape
    generator = torch.Generator().manual_seed(length)
    tokens = 7 + (partitions + 1) * length + 5
    key = torch.randn(batch, heads, tokens, dim, generator=generator)
    value = torch.randn(batch, tokens, heads, dim, generator=generator).transpose(1, 2)
    key[..., 3] = 0.5
    return [x.to(device, dtype) for x in (key, value)]


def check_deviations(shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """And that what is kept by them is what PyTorch keeps by the shares that they make."""
    from lrsa.attention import selection_kernel

    partitions, length = shape[2:4]
    key, value = tokens_of(shape, device, dtype)
    found = selection_kernel.deviations(key, value, length, partitions, 7)
    for deviation, x in zip(found, (key, value), strict=True):
        part, lag = (
            x[:, :, start : start + partitions * length].unflatten(2, (partitions, length)) for start in (7, 7 + length)
        )
        share = deviation.softmax(-1)
        torch.testing.assert_close(share, lag_deviation(part.double(), lag.double()).float(), rtol=1e-5, atol=1e-9)
    for weight in (1.0, 0.0, 0.3):
        kept = selection_kernel.lag_best(key, value, length, partitions, 7, length // 3, 100, weight)
        shares = found.softmax(-1)
        expected = selection.best_positions((shares[0] + weight * shares[1]).cpu(), length // 3, 100)
        assert (kept.cpu() != expected).float().mean() < 0.01, "near ties alone"


def check_best(scores: Tensor) -> None:
    from lrsa.attention import selection_kernel

    length = scores.shape[-1]
    starts = 7 + torch.arange(scores.shape[-2], device=scores.device)[:, None] * length
    for count in {1, length // 4, length - 1, length}:
        expected = (selection.best(scores, count) + starts).flatten(-2)
        assert torch.equal(selection_kernel.best_positions(scores, count, 7), expected)


def scores_of(shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    plain = torch.randn(shape[:-1], generator=torch.Generator().manual_seed(0)).to(device)
    tied = (2 * plain).round()
    tied[..., 2], tied[..., 4], tied[..., 6] = torch.nan, -torch.inf, -0.0
    return [plain, tied, torch.ones_like(plain), plain.transpose(0, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_deviations(shape, interpreter):
    check_deviations(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_best(shape, interpreter):
    for scores in scores_of(shape):
        check_best(scores)


def rows_case(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Plan]:
    tokens, sink, lag, kept, raw_start, again = PLANS[name]
    batch, heads, dim, partitions = 2, 3, 24, (tokens - sink) // lag - 1
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.rand(batch, heads, partitions, lag, generator=generator)
    starts = sink + lag * torch.arange(partitions)[:, None]
    index = (noise.argsort(-1)[..., :kept].sort(-1).values + starts).flatten(-2)
    raw_offset = -(-(sink + partitions * kept) // KEY_BLOCK) * KEY_BLOCK
    length = raw_offset + -(-(tokens - raw_start) // KEY_BLOCK) * KEY_BLOCK
    plan = Plan(tokens, sink, lag, kept, partitions, raw_offset, raw_start, length, again)
    key = torch.randn(batch, tokens, heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
    value = torch.randn(batch, heads, tokens, dim, generator=generator).to(device, dtype)
    return key, value, index.to(device), plan


def check_rows(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, *, channels_apart: bool = False
) -> None:
    """Rows to the bit; their gradients as float64 has them, rounded once, laid out as keys and values are."""
    from lrsa.attention import rows_kernel

    key, value, index, plan = rows_case(name, device, dtype)
    if channels_apart:
        key = key.mT.contiguous().mT
    made = rows_kernel.gather(key, value, index, plan)
    for found, x in zip(made, (key, value), strict=True):
        assert torch.equal(found, rows.gather_one(x, index, plan))
    gradients = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype) for x in made]
    # As much again from elsewhere, which stands there already; rows that it is not of are not read.
    back = [torch.ones_like(x if x.stride(-1) == 1 else x.contiguous()) for x in (key, value)]
    for x in back:
        x[:, :, : plan.raw_start] = torch.nan if plan.raw_start == plan.sink else 0
    exact = [x.double() for x in back]
    rows_kernel.add(*gradients, *back, index, plan)
    for found, grad, expected in zip(back, gradients, exact, strict=True):
        rows.add_one(grad.double(), expected, index, plan)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(found.double(), expected, **tolerance)


def check_sinks(
    shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32, *, channels_apart: bool = False
) -> None:
    """Against float64, rounded once; of longer rows, whose other tokens are left alone."""
    from lrsa.attention import sinks_kernel

    batch, query_heads, heads, sink, dim = shape
    generator = torch.Generator().manual_seed(sink)

    def noise(count: int) -> Tensor:
        return torch.randn(batch, sink + 3, count, dim, generator=generator).to(device, dtype).transpose(1, 2)

    query, key, value, grad = noise(query_heads), noise(heads), noise(heads), noise(query_heads)
    if channels_apart:
        key, grad = (x.mT.contiguous().mT for x in (key, grad))
    made = [noise(n) for n in (query_heads, query_heads, heads, heads)]  # output, and gradients
    before = [x.clone() for x in made]
    sinks_kernel.attend(query, key, value, made[0], sink, 0.2)
    sinks_kernel.backward(grad, query, key, value, *made[1:], sink, 0.2)

    leaves = [x[:, :, :sink].double().requires_grad_() for x in (query, key, value)]
    out = attend_dense(*leaves, 0.2)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad[:, :, :sink].double())]
    for found, old, expected, add in zip(made, before, exact, (False, False, True, True), strict=True):
        if add:
            expected = expected + old[:, :, :sink].double()
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(found[:, :, :sink].double(), expected, **tolerance)
        assert torch.equal(found[:, :, sink:], old[:, :, sink:])


@pytest.mark.parametrize("shape", SINKS, ids=str)
def test_interpreted_sinks(shape, interpreter):
    check_sinks(shape)


def test_interpreted_sinks_of_channels_that_lie_apart(interpreter):
    check_sinks(SINKS[1], channels_apart=True)


@pytest.mark.parametrize("name", PLANS)
def test_interpreted_rows(name, interpreter):
    check_rows(name)


def test_interpreted_rows_of_channels_that_lie_apart(interpreter):
    check_rows("again", channels_apart=True)


def test_the_kernels_in_a_process_of_their_own():
    run_in_a_process_of_its_own(Path(__file__))


@pytest.mark.parametrize("name", PLANS)
def test_the_way_back_is_the_gradient_of_the_way_there(name):
    """The PyTorch versions, by which the kernels are judged: against autograd's own gradient."""
    key, value, index, plan = rows_case(name, dtype=torch.float64)
    gate = torch.rand(index.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [x.clone().requires_grad_() for x in (key, value, gate)]
    made = rows.gather(leaves[0], leaves[1], index, plan, leaves[2])
    gradients = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in made]
    expected = torch.autograd.grad(made, leaves, gradients)
    for found, exact in zip(rows.scatter(*gradients, key, value, index, plan, gate), expected, strict=True):
        torch.testing.assert_close(found, exact)


# ---------------------------------------------------------------- on a GPU


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_deviations_on_a_gpu(shape, dtype):
    check_deviations(shape, "cuda", dtype)


@on_gpu
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_best_on_a_gpu(shape):
    for scores in scores_of(shape, "cuda"):
        check_best(scores)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_rows_on_a_gpu(name, dtype):
    check_rows(name, "cuda", dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SINKS, ids=str)
def test_sinks_on_a_gpu(shape, dtype):
    check_sinks(shape, "cuda", dtype)


@on_gpu
def test_a_partition_is_ranked_alike_whatever_stands_beside_it():
    """Read whole, in blocks and token by token a prompt keeps the same tokens, to the bit."""
    config = SparseAttentionConfig(sink_size=4, lag_size=64)
    key, value = (torch.randn(2, 3, 700, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    whole = selection.select(key, value, config, 9)
    for first in range(9):
        origin = config.geometry.raw_start(first)
        k, v = (x[:, :, origin : origin + 128].contiguous() for x in (key, value))
        alone = selection.select(k, v, config, 1, first=first, origin=origin)
        assert torch.equal(alone, whole[..., first * 16 : first * 16 + 16])


@on_gpu
def test_what_is_kept_is_what_pytorch_keeps():
    config = SparseAttentionConfig(sink_size=16, lag_size=128)
    key, value = (torch.randn(2, 3, 4096, 64, device="cuda") for _ in range(2))
    kept = kept_tokens(key, value, config)
    exact = kept_tokens(key.cpu().double(), value.cpu().double(), config)
    assert (kept.cpu() != exact).float().mean() < 1e-4, "near ties alone"
