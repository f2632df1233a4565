"""What of the FlexAttention form can be tested without a GPU: block mask, rows, and the two together, eagerly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsa.attention import SparseAttentionConfig, flex, kept_tokens, sparse_attention, visibility_mask
from lrsa.attention.flex import BLOCK, _layout, _Rows
from lrsa.attention.layout import Geometry
from lrsa.attention.selection import select
from tests.attention.tensors import random_inputs

CPU = torch.device("cpu")
GEOMETRIES = {
    "published": (Geometry(16, 128, 32, 128), 1000),
    "blocks-aligned": (Geometry(0, 128, 32, 128), 1024),
    "blocks-aligned-all-kept": (Geometry(128, 128, 128, 128), 1100),
    "nothing-kept-no-sinks": (Geometry(0, 64, 0, 64), 600),
    "nothing-kept": (Geometry(4, 64, 0, 64), 600),
    "many-changes-a-block": (Geometry(3, 8, 2, 8), 300),
    "C-below-L": (Geometry(16, 48, 12, 7), 500),
    "C1": (Geometry(0, 40, 10, 1), 400),
    "C-above-L": (Geometry(16, 32, 8, 200), 900),
    "long-lag": (Geometry(16, 300, 75, 300), 1500),
    "buffer-beyond-a-block": (Geometry(100, 64, 60, 64), 1000),
    "first-chunk-and-one": (Geometry(16, 128, 32, 128), 273),
    "partition-of-one": (Geometry(0, 1, 0, 1), 200),
}  # fmt: skip


@pytest.fixture
def uncompiled(monkeypatch):
    flex._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    yield
    flex._compiled.cache_clear()


def layout_of(geometry: Geometry, tokens: int) -> tuple[flex.Layout, int, int]:
    """The layout as `flex.attend` asks for it: (layout, used buffer entries, padded length)."""
    used = geometry.sink + geometry.selected_partitions(tokens) * geometry.kept
    padded = -(-tokens // BLOCK) * BLOCK
    return _layout(geometry, padded, used, CPU), used, padded


def blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """bool ``[rows, columns]`` of the blocks that are listed; each at most once."""
    result = torch.zeros(counts.shape[-1], columns, dtype=torch.int64)
    for row, count in enumerate(counts[0, 0].tolist()):
        result[row].index_add_(0, indices[0, 0, row, :count].long(), torch.ones(count, dtype=torch.int64))
    assert result.max() <= 1, "a block is listed twice"
    return result.bool()


def expected_visibility(geometry: Geometry, tokens: int, used: int, raw_offset: int, padded: int) -> Tensor:
    """bool ``[tokens, raw_offset + padded]`` by the rule, query by query: buffer entries, then raw keys."""
    result = torch.zeros(tokens, raw_offset + padded, dtype=torch.bool)
    for i in range(tokens):
        start = 0
        if i >= geometry.sink + 2 * geometry.lag:
            first = geometry.sink + 2 * geometry.lag
            start = first + (i - first) // geometry.chunk * geometry.chunk
        n = max(0, (start - geometry.sink) // geometry.lag - 1)
        if n:
            result[i, : geometry.sink + n * geometry.kept] = True
        band = 0 if n == 0 else geometry.sink + n * geometry.lag
        result[i, raw_offset + band : raw_offset + i + 1] = True
    assert not result[:, used:raw_offset].any()
    return result


def assert_layout(geometry: Geometry, tokens: int) -> None:
    layout, used, padded = layout_of(geometry, tokens)
    raw_offset, mask = layout.raw_offset, layout.mask
    assert raw_offset % BLOCK == 0 and raw_offset >= used
    assert mask.seq_lengths == (padded, raw_offset + padded)

    q, k = torch.arange(padded)[:, None], torch.arange(raw_offset + padded)[None]
    zero = torch.zeros((), dtype=torch.int64)
    allowed = mask.mask_mod(zero, zero, q, k)
    expected = expected_visibility(geometry, tokens, used, raw_offset, padded)
    assert torch.equal(allowed[:tokens], expected), "mask_mod is not the rule"
    assert not allowed[:, used:raw_offset].any(), "the gap between buffer and raw keys is seen"
    assert allowed.any(-1).all(), "a padded query that sees nothing divides by zero"

    columns = (raw_offset + padded) // BLOCK
    partial = blocks(mask.kv_num_blocks, mask.kv_indices, columns)
    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    by_block = allowed.view(padded // BLOCK, BLOCK, columns, BLOCK).transpose(1, 2).flatten(2)
    assert not (partial & full).any(), "a block is both partial and full"
    assert by_block[full].all(), "a full block has hidden pairs"
    assert not by_block[~(partial | full)].any(), "a block that is not listed has visible pairs"
    assert by_block[partial].any(-1).all(), "an empty block is computed"
    assert not by_block[partial].all(-1).any(), "a full block is computed with a mask"

    # The backward pass walks the transpose.
    assert torch.equal(blocks(mask.q_num_blocks, mask.q_indices, padded // BLOCK), partial.T)
    assert torch.equal(blocks(mask.full_q_num_blocks, mask.full_q_indices, padded // BLOCK), full.T)


@pytest.mark.parametrize(("geometry", "tokens"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_block_mask_is_the_rule(geometry, tokens):
    assert_layout(geometry, tokens)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_the_block_mask_is_the_rule_for_random_geometries(data):
    lag = data.draw(st.sampled_from([1, 3, 16, 37, 64, 100, 128, 200]), "lag")
    geometry = Geometry(
        sink=data.draw(st.sampled_from([0, 1, 16, 128, 150]), "sink"),
        lag=lag,
        kept=data.draw(st.integers(0, lag), "kept"),
        chunk=data.draw(st.sampled_from([1, lag, lag + 5, 128, 300]), "chunk"),
    )
    first = geometry.sink + 2 * lag
    # `flex.attend` is asked only where something is compressed.
    tokens = data.draw(st.integers(first + geometry.chunk, first + geometry.chunk + 600), "tokens")
    if geometry.selected_partitions(tokens):
        assert_layout(geometry, tokens)


def test_buffer_and_raw_keys_show_exactly_what_the_visibility_mask_shows():
    """Through the selection: a query's allowed entries, read back as positions, are the mask form's."""
    config = SparseAttentionConfig(sink_size=5, lag_size=20, top_k=6, chunk_size=13)
    query, key, value = random_inputs(1, 1, 1, 250, 16)
    geometry = config.geometry
    index = select(key, value, config, geometry.selected_partitions(250), query=query)
    layout, used, padded = layout_of(geometry, 250)
    entries = torch.full((layout.raw_offset + padded,), -1)
    entries[: geometry.sink] = torch.arange(geometry.sink)
    entries[geometry.sink : used] = index[0, 0]
    entries[layout.raw_offset : layout.raw_offset + 250] = torch.arange(250)
    zero = torch.zeros((), dtype=torch.int64)
    allowed = layout.mask.mask_mod(zero, zero, torch.arange(padded)[:, None], torch.arange(len(entries))[None])
    visible = visibility_mask(kept_tokens(key, value, config), config)[0, 0]
    for i in range(250):
        seen = entries[allowed[i]]
        assert torch.equal(seen, visible[i].nonzero()[:, 0]), i


@pytest.mark.parametrize("tokens", [250, 256])
@pytest.mark.parametrize("kept", [0, 6])
def test_rows_and_their_gradient(kept, tokens):
    """`_Rows` adds up its gradients by hand: against autograd's own."""
    geometry = Geometry(5, 20, kept, 13)
    config = SparseAttentionConfig(sink_size=5, lag_size=20, top_k=kept, chunk_size=13)
    _, key, value = random_inputs(2, 3, 3, tokens, 16)
    index = select(key, value, config, geometry.selected_partitions(tokens))
    layout, used, padded = layout_of(geometry, tokens)

    def plain(x: Tensor) -> Tensor:
        gathered = x.gather(2, index[..., None].expand(-1, -1, -1, 16))
        gap, tail = (x.new_zeros((2, 3, n, 16)) for n in (layout.raw_offset - used, padded - tokens))
        return torch.cat([x[:, :, : geometry.sink], gathered, gap, x, tail], 2)

    leaves = [key.clone().requires_grad_() for _ in range(2)]
    ours = _Rows.apply(leaves[0], index, geometry.sink, layout.raw_offset, layout.raw_offset + padded)
    theirs = plain(leaves[1])
    assert torch.equal(ours, theirs)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for out in (ours, theirs):
        out.backward(direction)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((1, 4, 2, 300, 16), Geometry(5, 20, 6, 13)),
        ((2, 3, 1, 256, 32), Geometry(0, 32, 8, 32)),
        ((1, 2, 2, 400, 16), Geometry(16, 40, 0, 40)),
        ((1, 2, 1, 390, 16), Geometry(0, 40, 0, 100)),
    ],
    ids=["C-below-L", "aligned", "nothing-kept", "nothing-kept-no-sinks-C-above-L"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_form_equals_the_mask_form_eagerly(shape, geometry, uncompiled):
    """FlexAttention's eager form runs on the CPU: same rows, same mask_mod, no kernel."""
    config = SparseAttentionConfig(
        sink_size=geometry.sink, lag_size=geometry.lag, top_k=geometry.kept, chunk_size=geometry.chunk
    )
    query, key, value = random_inputs(*shape)
    index = select(key, value, config, geometry.selected_partitions(shape[3]), query=query)
    out = flex.attend(query, key, value, index, geometry, 0.2)
    expected = sparse_attention(query, key, value, config, scale=0.2, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [250, 1000, 1100])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_prompts_of_similar_length_share_a_kernel(tokens, uncompiled):
    config = SparseAttentionConfig(sink_size=5, lag_size=20, top_k=6)
    query, key, value = random_inputs(1, 4, 2, tokens, 16)
    index = select(key, value, config, config.geometry.selected_partitions(tokens), query=query)
    with torch.no_grad():
        out = flex.attend(query, key, value, index, config.geometry, 0.2)
    expected = sparse_attention(query, key, value, config, scale=0.2, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_padded_lengths():
    with torch.no_grad():
        found = {tokens: flex.padded_length(tokens) for tokens in (1, 128, 129, 1000, 4096, 4097, 32_768, 100_000)}
        assert len({flex.padded_length(tokens) for tokens in range(1, 131_073, 7)}) < 70
    assert found == {1: 128, 128: 128, 129: 256, 1000: 1024, 4096: 4096, 4097: 4608, 32_768: 32_768, 100_000: 106_496}
    assert flex.padded_length(4097) == 4224


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.zeros(1, 1, 4, 16), "CUDA"),
        (torch.zeros(1, 1, 4, 16, device="meta"), "CUDA"),
    ],
)
def test_obstacles_name_the_reason(query, reason):
    assert reason in flex.obstacle(query)
    assert query.device.type in flex.obstacle(query)
