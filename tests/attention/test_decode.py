"""Attention of one query over a cache: PyTorch's path and the Triton kernel against a float64 softmax.

Without a GPU the kernel runs in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/attention/test_decode.py`, or by
itself in a process of its own. Neither works without the package triton, which a CPU build of torch does not bring.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrsa.attention import decode
from tests.attention.interpreter import HAS_TRITON, on_gpu, run_in_a_process_of_its_own, skip_without

AWKWARD = [  # B, Hq, H, N, D
    (3, 1, 1, 1, 16),
    (3, 6, 2, 63, 64),
    (3, 4, 1, 777, 80),
    (2, 9, 1, 777, 16),
    (3, 4, 4, 130, 128),
]
MASKS = ["all", "valid", "filled", "both"]


def inputs(
    batch: int, query_heads: int, heads: int, slots: int, dim: int, masks: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Query, key, value, valid, filled; one row has nothing filled, one a single slot; what does not count is large."""
    generator = torch.Generator().manual_seed(slots + dim)
    query = torch.randn(batch, query_heads, 1, dim, generator=generator)
    key, value = (torch.randn(batch, heads, slots, dim, generator=generator) for _ in range(2))
    valid = torch.rand(batch, slots, generator=generator) < 0.6 if masks in ("valid", "both") else None
    filled = torch.tensor([slots, 0, 1][:batch], dtype=torch.int32) if masks in ("filled", "both") else None
    hidden = ~counting(batch, slots, valid, filled)[:, None, :, None]
    key, value = key.masked_fill(hidden, 3e4), value.masked_fill(hidden, -3e4)
    moved = (None if x is None else x.to(device) for x in (valid, filled))
    return (*(x.to(device, dtype) for x in (query, key, value)), *moved)  # type: ignore[return-value]


def counting(batch: int, slots: int, valid: Tensor | None, filled: Tensor | None) -> Tensor:
    """bool ``[B, N]``: the slots that count."""
    result = torch.ones(batch, slots, dtype=torch.bool) if valid is None else valid.cpu()
    return result if filled is None else result & (torch.arange(slots) < filled.cpu()[:, None])


def softmax(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, filled: Tensor | None, scale: float
) -> Tensor:
    """The definition, in float64, head by head."""
    seen = counting(key.shape[0], key.shape[2], valid, filled)
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            q = query[row, head, 0].double().cpu()
            k, v = (x[row, head // group].double().cpu()[seen[row]] for x in (key, value))
            if len(k):
                out[row, head, 0] = ((k @ q) * scale).softmax(0) @ v
    return out


def assert_exact(found: Tensor, expected: Tensor) -> None:
    """float32 tolerance: only rounding differs."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_pytorchs_path_is_the_softmax_over_the_slots_that_count(shape, masks):
    given = inputs(*shape, masks, torch.float32)
    assert_exact(decode.attend(*given, 0.3), softmax(*given, 0.3))
    exact = tuple(x.double() for x in given[:3])
    torch.testing.assert_close(decode.attend(*exact, *given[3:], 0.3), softmax(*given, 0.3), rtol=1e-12, atol=1e-12)


def test_views_of_a_larger_storage_are_read_in_place():
    storage = torch.randn(2, 50, 3, 32, generator=torch.Generator().manual_seed(0))  # [B, N, H, D]
    query = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    key, value = (storage[:, start : start + 20].transpose(1, 2) for start in (5, 25))
    assert_exact(decode.attend(query, key, value, None, None, 1.0), softmax(query, key, value, None, None, 1.0))


def test_no_slots_at_all_give_zeros():
    query, empty = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 0, 8)
    assert not decode.attend(query, empty, empty, None, None, 1.0).any()


# ---------------------------------------------------------------- the kernel, interpreted


def small() -> Tensor:
    return decode.attend(*inputs(1, 1, 1, 1, 16, "all", torch.float32), 1.0, backend="triton")


@pytest.fixture
def interpreter():
    skip_without(small)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_interpreted_kernel_is_the_softmax(shape, masks, interpreter):
    given = inputs(*shape, masks, torch.float32)
    assert_exact(decode.attend(*given, 0.3, backend="triton"), softmax(*given, 0.3))


@pytest.mark.parametrize("masks", ["all", "both"])
def test_interpreted_kernel_in_half_precision(masks, interpreter):
    """float16: the interpreter multiplies bfloat16 wrongly, its bits taken for integers."""
    given = inputs(3, 6, 2, 300, 64, masks, torch.float16)
    plain = decode.attend(*given, 0.125, backend="sdpa")
    assert_low_precision(decode.attend(*given, 0.125, backend="triton"), plain, softmax(*given, 0.125))


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
def test_interpreted_shares_merge_whatever_their_number(splits, interpreter, monkeypatch):
    from lrsa.attention import decode_kernel

    monkeypatch.setattr(decode_kernel, "choose_splits", lambda *shape: splits)
    given = inputs(3, 6, 2, 300, 64, "both", torch.float32)  # 5 blocks: most of 40 shares are empty
    assert_exact(decode.attend(*given, 0.3, backend="triton"), softmax(*given, 0.3))


def test_interpreted_kernel_reads_views_in_place(interpreter):
    storage = torch.randn(2, 50, 3, 32, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    key, value = (storage[:, start : start + 20].transpose(1, 2) for start in (5, 25))
    valid = (torch.rand(20, 2, generator=torch.Generator().manual_seed(2)) < 0.5).T
    given = (query, key, value, valid, None, 1.0)
    assert_exact(decode.attend(*given, backend="triton"), softmax(*given))


def test_the_kernel_in_a_process_of_its_own():
    run_in_a_process_of_its_own(Path(__file__))


# ---------------------------------------------------------------- the kernel, on a GPU


def assert_low_precision(found: Tensor, plain: Tensor, expected: Tensor) -> None:
    """A kernel may err at most twice as much as PyTorch's own attention in this dtype, or a few roundings."""
    error, allowed = (float((x.double().cpu() - expected).norm() / expected.norm()) for x in (found, plain))
    assert error <= max(2 * allowed, 4 * torch.finfo(found.dtype).eps)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", [*AWKWARD, (2, 32, 8, 5000, 128), (2, 4, 2, 300, 256)], ids=str)
def test_compiled_kernel(shape, masks, dtype):
    given = inputs(*shape, masks, dtype, "cuda")
    assert decode.choose_backend("auto", *given[:2]) == "triton"
    found, expected = decode.attend(*given, 0.3), softmax(*given, 0.3)
    if dtype == torch.float32:
        assert_exact(found, expected)
    else:
        assert_low_precision(found, decode.attend(*given, 0.3, backend="sdpa"), expected)


@on_gpu
def test_one_captured_graph_serves_every_length():
    query, key, value, valid, filled = inputs(3, 6, 2, 777, 64, "both", torch.float32, "cuda")
    given = (query, key, value, valid, filled)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode.attend(*given, 0.3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.attend(*given, 0.3)
    for lengths in ([777, 0, 1], [5, 64, 700], [128, 129, 777]):
        filled.copy_(torch.tensor(lengths))
        graph.replay()
        assert_exact(out, softmax(*given, 0.3))


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("rows", [1, 3, 8, 24, 96, 512, 3000])
@pytest.mark.parametrize("blocks", [1, 19, 512])
def test_shares_fill_the_device_and_are_never_more_than_there_are_blocks(rows, blocks):
    if not HAS_TRITON:
        pytest.skip("the decode kernel is NOT tested here: the package triton is not installed")
    from lrsa.attention.decode_kernel import MAX_SPLITS, RESIDENT, choose_splits

    splits, resident = choose_splits(rows, blocks, 132), RESIDENT * 132
    assert 1 <= splits <= min(blocks, MAX_SPLITS)
    if blocks > 1 and rows * min(blocks, MAX_SPLITS) >= resident:
        rounds = -(-rows * splits // resident)
        assert rows * splits / (rounds * resident) > 0.85


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.zeros(1, 2, 1, 16, dtype=torch.float64), "float64"),
        (torch.zeros(1, 2, 1, 512), "512"),
        (torch.zeros(1, 128, 1, 16), "128"),
    ],
    ids=["dtype", "head-dimension", "group"],
)
def test_obstacles_name_the_reason(query, reason, monkeypatch):
    monkeypatch.setattr(decode, "has_triton", lambda: True)
    monkeypatch.setattr(decode, "interpreted", lambda: True)
    key = query[:, :1]
    assert reason in decode.obstacle(query, key)
    assert decode.choose_backend("auto", query, key) == "sdpa"
    with pytest.raises(ValueError, match=reason):
        decode.attend(query, key, key, None, None, 1.0, backend="triton")


def test_an_explicit_kernel_without_triton_or_cuda_says_so(monkeypatch):
    query = torch.zeros(1, 2, 1, 16)
    monkeypatch.setattr(decode, "interpreted", lambda: False)
    monkeypatch.setattr(decode, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed; use 'sdpa' or 'auto'"):
        decode.attend(query, query, query, None, None, 1.0, backend="triton")
    monkeypatch.setattr(decode, "has_triton", lambda: True)
    with pytest.raises(ValueError, match="runs on CUDA, the tensors are on cpu"):
        decode.attend(query, query, query, None, None, 1.0, backend="triton")
    with pytest.raises(ValueError, match="'fast' is unknown: choose one of auto, triton, sdpa"):
        decode.attend(query, query, query, None, None, 1.0, backend="fast")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 16)}, "one token a row"),
        ({"query": torch.zeros(1, 3, 1, 16)}, "multiple of H"),
        ({"value": torch.zeros(1, 2, 4, 16)}, "key and value"),
        ({"value": torch.zeros(1, 2, 5, 16).double()}, "one dtype"),
        ({"key": torch.zeros(1, 2, 16, 5).transpose(2, 3)}, "contiguous"),
        ({"valid": torch.zeros(1, 5)}, "bool"),
        ({"filled": torch.zeros(2, dtype=torch.int32)}, "filled"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    block = torch.zeros(1, 2, 5, 16)
    given = {"query": torch.zeros(1, 4, 1, 16), "key": block, "value": block, "valid": None, "filled": None} | changed
    with pytest.raises(ValueError, match=message):
        decode.attend(**given, scale=1.0)
