"""The flash-attn-4 backend: all but its kernels on the CPU, under a slow stand-in for them, and all of it on a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrsa.attention import (
    SparseAttentionConfig,
    blocks,
    flash4,
    flex,
    gather,
    kept_tokens,
    sparse_attention,
    visibility_mask,
)
from lrsa.attention.api import choose_backend
from lrsa.attention.blocks import Walk
from lrsa.attention.layout import Geometry
from lrsa.attention.selection import kept_index
from tests.attention import block_sparse
from tests.attention.tensors import assert_no_worse, forward_and_gradients, naive_attention, random_inputs

WALKS = {"whole": Walk(0, False), "whole-last-first": Walk(0, True), "cut-last-first": Walk(1, True)}
# B, Hq, H, T, D; S, L, K, C
CASES = {
    "T500-published-r4": ((1, 4, 2, 500, 16), (16, 128, 32, 128)),
    "T777-9-over-3-heads-r8": ((1, 9, 3, 777, 16), (16, 128, 16, 128)),
    "T513-no-sinks-r2": ((2, 2, 2, 513, 16), (0, 128, 64, 128)),
    "T640-C-2L-K-not-a-multiple-of-16": ((1, 2, 1, 640, 16), (16, 64, 37, 128)),
    "T700-C-3L": ((1, 3, 1, 700, 8), (0, 64, 9, 192)),
    "T333-C-below-L": ((2, 2, 1, 333, 16), (5, 48, 12, 7)),
    "T600-nothing-kept": ((1, 2, 1, 600, 16), (4, 64, 0, 64)),
    "T600-nothing-kept-no-sinks": ((1, 2, 1, 600, 16), (0, 64, 0, 64)),
    "T560-more-sinks-than-a-block": ((1, 2, 2, 560, 16), (150, 64, 30, 64)),
    "T40-shorter-than-a-block": ((2, 4, 1, 40, 16), (2, 8, 3, 8)),
}  # fmt: skip
MISSING = "needs a GPU of compute capability 9 or 10 and flash-attn-4"
READY = torch.cuda.is_available() and flash4.obstacle(torch.zeros(1, 1, 1, 64).cuda().bfloat16()) is None
on_gpu = pytest.mark.skipif(not READY, reason=MISSING)


def config_of(rule: tuple[int, int, int, int], **options) -> SparseAttentionConfig:
    sink, lag, kept, chunk = rule
    return SparseAttentionConfig(sink_size=sink, lag_size=lag, top_k=kept, chunk_size=chunk, **options)


@pytest.fixture(params=[True, False], ids=["hopper", "elsewhere"])
def stand_in(monkeypatch, request):
    monkeypatch.setattr(flash4, "kernels", lambda: block_sparse)
    monkeypatch.setattr(flash4, "hopper_kernels", lambda: block_sparse.HOPPER)
    monkeypatch.setattr(flash4, "_chip", lambda device: flash4.Chip(128, 132, request.param))
    monkeypatch.setattr(flash4, "suits_hopper", lambda *_: True)  # lists can say more than its kernels compute


def runner(config: SparseAttentionConfig, kept: Tensor, walk: Walk = blocks.WALK, scale: float = 0.2):
    """The backend as `sparse_attention` calls it once it has chosen it."""
    geometry, index = config.geometry, index_of(config, kept)
    return lambda q, k, v: flash4.attend(q, k, v, index, geometry, scale, walk=walk)


def index_of(config: SparseAttentionConfig, kept: Tensor) -> Tensor:
    return kept_index(kept, config.geometry, config.geometry.selected_partitions(kept.shape[-1]))


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize(("shape", "rule"), CASES.values(), ids=CASES)
def test_equals_the_mask_form_forward_and_gradients(shape, rule, walk, stand_in):
    """In float64, so that a pair too many or too few shows, however small its weight."""
    config, inputs = config_of(rule), random_inputs(*shape, dtype=torch.float64)
    kept = kept_tokens(*inputs[1:], config)
    ours = forward_and_gradients(runner(config, kept, walk), *inputs)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, config, kept=kept, scale=0.2, backend="reference")

    assert not kept.all()
    for name, a, b in zip(
        ("out", "query", "key", "value"), ours, forward_and_gradients(reference, *inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("rule", "group", "expected"),
    [
        ((16, 128, 32, 128), 4, True),
        ((0, 256, 128, 512), 2, True),
        ((16, 128, 0, 128), 3, True),  # the sinks are in the buffer
        ((0, 128, 0, 128), 3, False),  # nothing is
        ((16, 128, 32, 128), 1, False),
        ((16, 128, 32, 128), 12, False),
        ((16, 64, 32, 128), 4, False),
        ((16, 128, 32, 64), 4, False),
    ],
)
def test_which_kernels_compute_it_on_hopper(rule, group, expected, monkeypatch):
    query, key = torch.zeros(1, 12, 1500, 64), torch.zeros(1, 12 // group, 1500, 64)
    for hopper in (True, False):
        monkeypatch.setattr(flash4, "_chip", lambda device, hopper=hopper: flash4.Chip(128, 132, hopper))
        layout = flash4.layout_of(query, key, Geometry(*rule))
        assert layout.group == (group if hopper and expected else None)
        assert flash4.layout_of(query[..., :40], key[..., :40], Geometry(*rule)).group is None


def test_blocks_of_256_queries(monkeypatch):
    """As Blackwell's forward kernel wants them."""
    monkeypatch.setattr(flash4, "kernels", lambda: block_sparse)
    monkeypatch.setattr(flash4, "_chip", lambda device: flash4.Chip(256, 148, False))
    test_equals_the_mask_form_forward_and_gradients((1, 4, 2, 777, 16), (16, 128, 32, 128), Walk(1), None)


@pytest.mark.parametrize("layout", ["transposed", "expanded gradient"])
def test_views(layout, stand_in):
    """transformers hands over transposed views, and a sum's gradient has stride 0."""
    config, inputs = config_of((16, 64, 16, 64)), random_inputs(2, 4, 2, 333, 16, dtype=torch.float64)
    run = runner(config, kept_tokens(*inputs[1:], config))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "transposed" else x for x in inputs]
    leaves = [[x.detach().requires_grad_() for x in group] for group in (inputs, views)]
    for group in leaves:
        out = run(*group)
        (out.sum() if layout == "expanded gradient" else out.square().sum()).backward()
    plain = forward_and_gradients(run, *inputs)[0]
    torch.testing.assert_close(run(*views), plain)
    ones = torch.autograd.grad((run(*leaves[0]) * torch.ones_like(plain)).sum(), leaves[0])
    for a, b, c in zip(*leaves, ones, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        if layout == "expanded gradient":
            torch.testing.assert_close(a.grad, c)


@pytest.mark.parametrize("odd", ["heads", "batch"])
def test_a_dimension_of_size_1_of_any_stride(odd, stand_in):
    """What such a stride is says nothing, and `empty_like` keeps it; the copy engine refuses 0 and odd ones."""
    config, inputs = config_of((16, 64, 16, 64)), random_inputs(1, 2, 1, 333, 16, dtype=torch.float64)

    def view(x: Tensor) -> Tensor:
        batch, heads, tokens, _ = x.stride()
        strides = (0, heads, tokens, 1) if odd == "batch" or x.shape[1] > 1 else (batch, 1, tokens, 1)
        return x.as_strided(x.shape, strides)

    run = runner(config, kept_tokens(*inputs[1:], config))
    for a, b in zip(forward_and_gradients(run, *map(view, inputs)), forward_and_gradients(run, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gate_of_straight_through(stand_in):
    config, inputs = config_of((5, 64, 16, 64)), random_inputs(1, 2, 1, 400, 16, dtype=torch.float64)
    index = index_of(config, kept_tokens(*inputs[1:], config))
    direction = random_inputs(1, 2, 1, 400, 16, seed=3, dtype=torch.float64)[0]
    found = []
    for backend in (flash4, gather):
        gate = torch.ones(index.shape, dtype=torch.float64).requires_grad_()
        out = backend.attend(*inputs, index, config.geometry, 0.2, gate)
        found.append((out.detach(), *torch.autograd.grad(out, gate, direction)))
    assert found[0][1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


def test_backward_twice_gives_the_same_and_leaves_the_inputs_alone(stand_in):
    """Gradients of the rows of keys take the rows' place, never the keys' own."""
    config, inputs = config_of((5, 64, 16, 64)), random_inputs(1, 4, 2, 400, 16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = runner(config, kept_tokens(*inputs[1:], config), Walk(1))(*leaves).square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, leaves), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, inputs, strict=True))


def test_no_more_is_saved_than_dense_attention_saves(stand_in):
    """Queries, keys, values, output, a number a row; here the positions too."""
    config, inputs = config_of((16, 64, 16, 64)), random_inputs(1, 4, 2, 2000, 32)
    kept, saved = kept_tokens(*inputs[1:], config), {}
    leaves = [x.requires_grad_() for x in inputs]

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = runner(config, kept)(*leaves)
    positions = index_of(config, kept).nbytes
    assert sum(saved.values()) <= sum(x.nbytes for x in (*inputs, out)) + 4 * 4 * 2000 + positions


def test_without_gradients_no_log_sum_is_asked_for(stand_in, monkeypatch):
    asked = []
    monkeypatch.setattr(
        block_sparse, "forward", lambda *x, with_log_sum: asked.append(with_log_sum) or x[3].fill_(0).sum()
    )
    config, inputs = config_of((5, 64, 16, 64)), random_inputs(1, 2, 1, 400, 16)
    run = runner(config, kept_tokens(*inputs[1:], config))
    run(*inputs)
    run(inputs[0].requires_grad_(), *inputs[1:])
    assert asked == [False, True]


def test_lengths_and_compressions_share_what_is_compiled():
    """Length and K are numbers that the mask is handed; lag and chunk alone are compiled in."""
    masks = [
        blocks.layout(Geometry(16, 128, kept, 128), tokens, torch.device("cpu"), Walk(), 1.0).mask
        for kept in (16, 64)
        for tokens in (1000, 5000)
    ]
    assert len(set(masks)) == 4
    assert len({(mask.lag, mask.chunk) for mask in masks}) == 1


# ------------------------------------------------------------------ where it cannot run


def found_as(monkeypatch, version: str | None) -> None:
    monkeypatch.setattr(flash4, "_installed", lambda: version)


@pytest.mark.parametrize(
    ("version", "query", "words"),
    [
        (None, torch.zeros(1, 1, 4, 64), "pip install 'flash-attn-4[cu13]>=4.0.0b36'"),
        ("4.0.0b12", torch.zeros(1, 1, 4, 64), "flash-attn-4 is 4.0.0b12, and too old: pip install -U"),
        ("4.0.0b36", torch.zeros(1, 1, 4, 64), "the tensors are on cpu"),
        ("4.1.0", torch.zeros(1, 1, 4, 64, device="meta"), "the tensors are on meta"),
    ],
)
def test_obstacles_name_the_reason_and_the_way_out(version, query, words, monkeypatch):
    found_as(monkeypatch, version)
    assert words in flash4.obstacle(query)
    with pytest.raises(ValueError, match="backend='flash4' cannot run here") as error:
        choose_backend("flash4", query)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "strict", "words"),
    [
        (torch.float32, 64, (9, 0), False, "torch.float32"),
        (torch.bfloat16, 256, (9, 0), False, "this is 256"),
        (torch.bfloat16, 20, (9, 0), False, "this is 20"),
        (torch.bfloat16, 40, (9, 0), False, "head dimensions of 64 and 128, this is 40"),
        (torch.bfloat16, 64, (8, 0), False, "this GPU has 8.0"),
        (torch.bfloat16, 64, (12, 0), False, "this GPU has 12.0"),
        (torch.bfloat16, 64, (9, 0), True, "use_deterministic_algorithms"),
        (torch.bfloat16, 64, (9, 0), False, None),
        (torch.float16, 128, (10, 0), False, None),
    ],
)
def test_obstacles_on_a_gpu(dtype, dim, capability, strict, words, monkeypatch):
    found_as(monkeypatch, "4.0.0b36")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: not strict)

    @dataclasses.dataclass
    class Query:
        dtype: torch.dtype
        shape: tuple[int, ...]
        device: torch.device

    reason = flash4.obstacle(Query(dtype, (1, 2, 3, dim), torch.device("cuda", 0)))
    assert reason is None if words is None else words in reason


def test_auto_picks_it_where_its_work_outlasts_its_launches(monkeypatch, caplog):
    """B, Hq, T, D; experiments/benchmark has what is measured of them."""

    def auto(*shape: int, **given: Any) -> str:
        return choose_backend("auto", torch.zeros(1).expand(shape), **given)

    assert auto(1, 32, 8192, 128) == "gather", "on a CPU"
    monkeypatch.setattr(flex, "obstacle", lambda query: None)
    monkeypatch.setattr(flash4, "obstacle", lambda query: "flash-attn-4 is not installed")
    assert auto(1, 32, 8192, 128) == "flex"
    monkeypatch.setattr(flash4, "obstacle", lambda query: None)
    caplog.set_level("DEBUG", "lrsa.attention.api")
    assert auto(1, 32, 8192, 128) == auto(1, 9, 32768, 64) == "flash4"
    assert "auto picked flash4: B Hq T T D = 6e+11" in caplog.text
    assert auto(8, 9, 4096, 64) == auto(1, 9, 8192, 64) == auto(1, 32, 4096, 128) == "flex", "the library's kernels"
    monkeypatch.setattr(flash4, "_chip", lambda device: flash4.Chip(128, 132, True))
    ours = {"config": config_of((16, 128, 32, 128)), "heads": 8}
    assert auto(1, 32, 4096, 128, **ours) == "flash4"
    assert auto(1, 32, 2048, 128, **ours) == auto(1, 9, 8192, 64, config=ours["config"], heads=3) == "flex"
    assert auto(1, 32, 4096, 128, config=ours["config"], heads=2) == "flex", "a group of 16"
    assert auto(1, 32, 4096, 128, config=config_of((16, 96, 24, 96)), heads=8) == "flex", "no whole blocks"
    assert auto(1, 32, 8192, 128, document_ids=torch.zeros(1, 8192, dtype=torch.int64)) == "gather"
    with torch.no_grad():
        assert auto(64, 32, 1000, 128) == "gather", "a short prompt"
    assert choose_backend("flash4", torch.zeros(1, 1, 4, 64)) == "flash4"


# ------------------------------------------------------------------ with the package


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs flash-attn-4's compiler")
@pytest.mark.parametrize("rule", [(16, 128, 32, 128), (5, 48, 12, 7), (0, 64, 9, 192)], ids=str)
def test_the_mask_as_cute_compiles_it(rule):
    """CuTe compiles for the CPU too: every pair of the mask in its language, against the same formula on tensors."""
    from tests.attention.cute_mask import evaluate

    sink, lag, kept, chunk = rule
    tokens = 3 * lag + sink + chunk + 130
    mask = blocks.layout(Geometry(*rule[:2], kept, chunk), tokens, torch.device("cpu"), Walk(), 1.0).mask
    rows, keys = tokens - sink, mask.raw_offset + tokens - sink
    expected = blocks.visible(torch.arange(rows)[:, None], torch.arange(keys)[None], **mask._asdict())
    assert torch.equal(evaluate(mask, rows, keys), expected)


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs flash-attn-4's compiler")
@pytest.mark.parametrize("rule", [(16, 128, 16, 128), (0, 128, 64, 256), (7, 256, 51, 256), (16, 128, 0, 128)], ids=str)
def test_hoppers_mask_as_cute_compiles_it(rule):
    """Each pair of each block that the lists put under the mask, of both passes, against the formula on tensors."""
    from tests.attention.cute_mask import evaluate_on_hopper

    tokens = 5 * rule[1] + rule[0] + rule[3] + 130
    layout = blocks.layout(Geometry(*rule), tokens, torch.device("cpu"), Walk(1), 1.0, group=2)
    rows = tokens - rule[0]
    for lists, mask, by_row, column_blocks in (
        (layout.forward, layout.mask, True, layout.length // 128),
        (layout.backward, layout.mask_backward, False, (layout.mask_backward.skipped + layout.length) // 128),
    ):
        keys = column_blocks * 128
        expected = blocks.visible(torch.arange(rows)[:, None], torch.arange(keys)[None], **mask._asdict())
        found = evaluate_on_hopper(mask, rows, keys)[0 if by_row else 1]
        listed, count = 0, -(-rows // 128)
        for line in range(lists.partial_count.shape[2]):
            for other in lists.partial_index[0, 0, line, : int(lists.partial_count[0, 0, line])].tolist():
                tile, column = (line, other) if by_row else (other % count, line)
                pairs = slice(tile * 128, (tile + 1) * 128), slice(column * 128, (column + 1) * 128)
                assert torch.equal(found[pairs], expected[pairs]), (tile, column)
                listed += 1
        assert listed


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs flash-attn-4's compiler")
@pytest.mark.parametrize(("buffered", "mixed"), [(4, 0), (4, 11), (7, 18), (1, 6), (1, None), (8, None)])
def test_each_column_of_hoppers_backward_pass_has_a_program(buffered, mixed):
    """Raw columns, ``buffered`` and later ones, take turns with the first, then come these, then the other raw ones."""
    from lrsa.attention.hopper.backward import mixed_columns
    from tests.attention.cute_mask import places

    columns, groups, batch = 10, 3, 2
    if mixed is None:
        mixed = mixed_columns(columns, buffered) * groups * batch
        assert 0 < mixed <= groups * batch * min(buffered, columns - buffered)
    found = places(columns, groups, batch, buffered, mixed).tolist()
    assert sorted(found) == sorted([c, g, b] for c in range(columns) for g in range(groups) for b in range(batch))
    raw = [column >= buffered for column, _, _ in found]
    first = buffered * groups * batch
    assert raw == [False, True] * mixed + [False] * (first - mixed) + [True] * (len(found) - first - mixed)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs flash-attn-4's compiler")
def test_the_kernels_compile_and_are_shared_by_lengths_and_compressions():
    """Without a GPU, for Hopper: two geometries of one head size and lag are one pair of kernels, the library's alone
    and ours."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.attention.compile_flash4"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2", "2"]


GPU_CASES = {
    "D64-9-over-3-heads": ((2, 9, 3, 1500, 64), (16, 128, 32, 128)),
    "D128-32-over-8-heads": ((1, 32, 8, 1700, 128), (16, 128, 16, 128)),
    "D128-28-over-4-heads-no-sinks-aligned": ((1, 28, 4, 2048, 128), (0, 256, 128, 256)),
    "D128-K-not-a-multiple-of-16-C-2L": ((1, 8, 2, 1301, 128), (16, 128, 37, 256)),
    "D64-MHA-C-below-L": ((1, 4, 4, 777, 64), (5, 48, 12, 7)),
    "D64-nothing-kept": ((2, 6, 2, 900, 64), (4, 64, 0, 64)),
    "D128-more-sinks-than-a-block": ((1, 4, 1, 1111, 128), (150, 64, 30, 64)),
    "D64-shorter-than-a-block": ((1, 4, 2, 100, 64), (2, 8, 3, 8)),
    # Whole blocks, which are Hopper's own kernels.
    "D64-nothing-kept-whole-blocks": ((2, 6, 2, 900, 64), (4, 128, 0, 128)),
    "D128-more-sinks-than-a-block-whole-blocks": ((1, 4, 1, 1111, 128), (150, 128, 30, 128)),
    "D128-odd-sinks-whole-blocks": ((2, 8, 2, 1111, 128), (7, 128, 51, 256)),
}  # fmt: skip


@on_gpu
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "rule"), GPU_CASES.values(), ids=GPU_CASES)
def test_kernels_are_as_good_as_naive_low_precision(shape, rule, dtype, walk):
    """Forward and all three gradients against float64, with memory that was not written full of NaN (conftest)."""
    config = config_of(rule)
    inputs = [x.cuda() for x in random_inputs(*shape, dtype=dtype)]
    direction = random_inputs(*shape, seed=1, dtype=dtype)[0].cuda()
    kept = kept_tokens(*inputs[1:], config)
    mask = visibility_mask(kept, config)

    def gradients(function, *tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(out.dtype))]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, config, kept=kept, backend="reference")

    exact = gradients(reference, *(x.double() for x in inputs))
    naive = gradients(lambda q, k, v: naive_attention(q, k, v, mask), *inputs)
    run = runner(config, kept, walk, shape[-1] ** -0.5)
    assert_no_worse(gradients(run, *inputs), naive, exact)


@on_gpu
@pytest.mark.parametrize("layout", ["packed", "odd offset", "gradient of stride 0", "one head of stride 1", "gate"])
def test_views_on_the_gpu(layout):
    """As contiguous ones, but for the order in which gradients of queries are added up."""
    heads = (4, 1) if layout.startswith("one head") else (8, 2)
    config, shape = config_of((16, 128, 37, 128)), (1, *heads, 1111, 64)
    inputs = [x.cuda() for x in random_inputs(*shape, dtype=torch.bfloat16)]
    index = index_of(config, kept_tokens(*inputs[1:], config))
    gate = torch.rand(index.shape, device="cuda") if layout == "gate" else None
    direction = torch.ones_like(inputs[0]) if layout == "gradient of stride 0" else torch.randn_like(inputs[0])

    def results(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, attend=flash4.attend) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value, *([] if gate is None else [gate]))]
        out = attend(*leaves[:3], index, config.geometry, 0.2, *leaves[3:])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    views, grad = list(inputs), direction
    if layout == "packed":
        packed = torch.cat([x.transpose(1, 2) for x in inputs], 2)
        views = [x.transpose(1, 2) for x in packed.split([x.shape[1] for x in inputs], 2)]
    elif layout == "odd offset":
        views = [x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in inputs]
    elif layout == "gradient of stride 0":
        grad = direction.new_ones(()).expand_as(direction)
    elif layout.startswith("one head"):
        views[1:] = [x[:, 0][..., None].permute(0, 3, 1, 2) for x in inputs[1:]]
    expected = results(*inputs, direction, attend=gather.attend) if layout == "gate" else results(*inputs, direction)
    for name, a, b in zip(("out", "query", "key", "value", "gate"), results(*views, grad), expected, strict=False):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < 2e-2, f"{name}: {error:.1e}"


@on_gpu
def test_another_length_and_compression_compile_nothing_anew():
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    from lrsa.attention.hopper import launch

    def compiled() -> int:
        caches = _flash_attn_fwd.compile_cache, _flash_attn_bwd.compile_cache, *map(launch.cache, launch.NAMES)
        return sum(len(cache.cache) for cache in caches)

    counts = []
    for tokens, kept in ((2000, 32), (3333, 16), (5000, 64)):
        leaves = [x.cuda().bfloat16().requires_grad_() for x in random_inputs(1, 4, 2, tokens, 64)]
        sparse_attention(*leaves, config_of((16, 128, kept, 128)), backend="flash4").sum().backward()
        counts.append(compiled())
    assert counts[0] == counts[1] == counts[2]


@on_gpu
def test_packed_documents_on_the_gpu():
    ids = torch.tensor([[0] * 700 + [1] * 500 + [-1] * 33]).cuda()
    config = config_of((16, 64, 16, 64))
    inputs = [x.cuda().bfloat16() for x in random_inputs(1, 4, 2, 1233, 64)]
    fast = sparse_attention(*inputs, config, document_ids=ids, backend="flash4")
    plain = sparse_attention(*inputs, config, document_ids=ids, backend="reference")
    torch.testing.assert_close(fast.float(), plain.float(), rtol=2e-2, atol=2e-2)
