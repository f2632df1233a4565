"""The block lists against brute force: the mask form's own mask, read through the buffer of kept keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsa.attention import blocks, reference
from lrsa.attention.blocks import KEY_BLOCK, Layout, Walk
from lrsa.attention.layout import Geometry
from lrsa.attention.selection import kept_mask
from tests.attention.block_sparse import listed, pairs_backward, pairs_forward

CPU = torch.device("cpu")
WALKS = {
    "whole": Walk(0, False),
    "whole-last-first": Walk(0, True),
    "cut-1": Walk(1, False),
    "cut-2-last-first": Walk(2, True),
    "cut-4": Walk(4, False),
}
GEOMETRIES = {
    "published-r4": (Geometry(16, 128, 32, 128), 1111),
    "published-r8": (Geometry(16, 128, 16, 128), 1900),
    "r2-no-sinks-aligned": (Geometry(0, 128, 64, 128), 1536),
    "K-not-a-multiple-of-16-C-2L": (Geometry(16, 128, 37, 256), 1301),
    "C-3L": (Geometry(0, 64, 9, 192), 1000),
    "C-below-L": (Geometry(16, 48, 12, 7), 700),
    "C1": (Geometry(5, 40, 10, 1), 400),
    "nothing-kept-no-sinks": (Geometry(0, 64, 0, 64), 600),
    "nothing-kept": (Geometry(4, 64, 0, 64), 600),
    "all-kept": (Geometry(128, 128, 128, 128), 1100),
    "long-lag-r8": (Geometry(16, 1024, 128, 1024), 4200),
    "many-changes-a-block": (Geometry(3, 8, 2, 8), 300),
    "more-sinks-than-a-block": (Geometry(200, 64, 60, 64), 1000),
    "one-query-past-the-first-chunk": (Geometry(16, 128, 32, 128), 273 + 127),
    "shorter-than-a-block": (Geometry(2, 8, 3, 8), 40),
    "partition-of-one": (Geometry(0, 1, 0, 1), 200),
}  # fmt: skip


def layout_of(geometry: Geometry, tokens: int, walk: Walk, query_block: int) -> Layout:
    return blocks.layout(geometry, tokens, CPU, walk, 1.0, query_block)


def positions_and_mask(geometry: Geometry, tokens: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of each key its token, T where there is none; and the mask form's mask ``[T, T]`` for one head's selection."""
    partitions = geometry.selected_partitions(tokens)
    scores = torch.rand(partitions, geometry.lag, generator=torch.Generator().manual_seed(0))
    index = scores.topk(geometry.kept).indices.sort().values + torch.arange(partitions)[:, None] * geometry.lag
    index = (index + geometry.sink).flatten()
    positions = torch.full((layout.length,), tokens)
    positions[: geometry.sink] = torch.arange(geometry.sink)
    positions[geometry.sink : geometry.sink + len(index)] = index
    raw = layout.mask.raw_offset
    positions[raw : raw + tokens - geometry.sink] = torch.arange(geometry.sink, tokens)
    kept = kept_mask(index[None, None], tokens, geometry, partitions)
    return positions, reference.visible(kept, geometry, None)[0, 0]


def by_token(pairs: Tensor, positions: Tensor, tokens: int) -> Tensor:
    """Pairs of rows and keys as pairs of rows and tokens; the last column are keys that are no token."""
    return torch.zeros(pairs.shape[0], tokens + 1, dtype=pairs.dtype).index_add_(1, positions, pairs)


def assert_lists(geometry: Geometry, tokens: int, walk: Walk, query_block: int = 128) -> None:
    layout, rows = layout_of(geometry, tokens, walk, query_block), tokens - geometry.sink
    positions, mask = positions_and_mask(geometry, tokens, layout)
    expected = torch.nn.functional.pad(mask[geometry.sink :].long(), (0, 1))
    pairs = pairs_forward(layout, rows)
    # Once each and nothing else: so no pair is missed, none is listed twice, and full blocks are full.
    assert torch.equal(by_token(pairs, positions, tokens), expected), "forward"

    again = torch.cat([*(torch.arange(count) for count in layout.again), torch.arange(layout.length)])
    assert len(again) == layout.mask_backward.skipped + layout.length
    backward = pairs_backward(layout, rows)
    assert torch.equal(torch.zeros_like(pairs).index_add_(1, again, backward), pairs), "backward is not the transpose"

    for line in range(layout.forward.partial_count.shape[2]):
        first = line * query_block
        for block, masked in listed(layout.forward, line):
            part = pairs[first : first + query_block, block * KEY_BLOCK : (block + 1) * KEY_BLOCK]
            assert part.any(), "an empty block is computed"
            assert not (masked and part.all()), "a full block is computed with a mask"
    for column in range(layout.backward.partial_count.shape[2]):
        order = [list(group) for group in ([], [])]
        for block, masked in listed(layout.backward, column):
            order[masked].append(block)
        assert any(order), "a column of nothing"
        assert all(group == sorted(group, reverse=walk.descending) for group in order)
        if walk.window and column * KEY_BLOCK < layout.mask_backward.skipped:
            assert not order[True] and len({block // walk.window for block in order[False]}) == 1


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize(("geometry", "tokens"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_lists_are_the_rule(geometry, tokens, walk):
    assert_lists(geometry, tokens, walk)


@pytest.mark.parametrize(("geometry", "tokens"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_lists_are_the_rule_in_blocks_of_256_queries(geometry, tokens):
    assert_lists(geometry, tokens, Walk(2, True), 256)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_the_lists_are_the_rule_for_random_geometries(data):
    lag = data.draw(st.sampled_from([1, 3, 16, 37, 64, 100, 128, 200]), "lag")
    geometry = Geometry(
        sink=data.draw(st.sampled_from([0, 1, 16, 128, 150]), "sink"),
        lag=lag,
        kept=data.draw(st.integers(0, lag), "kept"),
        chunk=data.draw(st.sampled_from([1, lag, 2 * lag, lag + 5, 128, 300]), "chunk"),
    )
    first = geometry.first_chunk
    tokens = data.draw(st.integers(first + geometry.chunk, first + geometry.chunk + 600), "tokens")
    if geometry.selected_partitions(tokens):
        assert_lists(geometry, tokens, data.draw(st.sampled_from(list(WALKS.values())), "walk"))


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("walk", [Walk(0), Walk(2), Walk(1, False)], ids=["whole", "cut-2", "cut-1-first-first"])
@pytest.mark.parametrize(("geometry", "tokens"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_each_head_of_a_group_has_the_same_pairs(geometry, tokens, walk, group):
    """The heads' blocks stand one after the other, and all that needs a mask is in the buffer's own columns."""
    rows = tokens - geometry.sink
    single = layout_of(geometry, tokens, walk, 128)
    grouped = blocks.layout(geometry, tokens, CPU, walk, 1.0, 128, group)
    expected, count = pairs_forward(single, rows), -(-rows // 128)
    pieces = [torch.arange(n) for n in grouped.again]
    again = torch.cat([*pieces, torch.arange(grouped.length)])
    assert len(again) == grouped.mask_backward.skipped + grouped.length
    for head in range(group):
        pairs = pairs_backward(grouped, rows, head)
        assert torch.equal(torch.zeros_like(expected).index_add_(1, again, pairs), expected)
    listed_blocks = grouped.backward.full_index.max() if grouped.backward.full_count.any() else 0
    assert listed_blocks < group * count
    in_front = grouped.mask_backward.skipped // KEY_BLOCK
    assert not grouped.backward.partial_count[..., :in_front].any()
    columns = grouped.backward.partial_count + grouped.backward.full_count
    assert (columns > 0).all(), "a column of nothing"


@pytest.mark.parametrize(("lag", "chunk"), [(3, 3), (7, 20), (64, 64), (96, 50), (128, 256), (128, 1), (1, 1)])
def test_closed_forms_of_what_is_compressed(lag, chunk):
    row = torch.arange(3000)
    found = blocks.compressed_partitions(row, lag=lag, chunk=chunk)
    geometry = Geometry(0, lag, 0, chunk)
    assert found.tolist() == [geometry.compressed(geometry.chunk_start(r)) for r in row.tolist()]
    for count in range(1, int(found.max()) + 1):
        first = int((found >= count).nonzero()[0])
        assert blocks.first_row_of(count, lag=lag, chunk=chunk) == first


def test_closed_forms_need_no_quotient_of_a_negative_number():
    """CuTe's quotients of numbers are those of C, rounded to zero, where Python's are rounded down."""

    class Natural(int):
        """An integer that is not divided while it is negative."""

        def __floordiv__(self, other):
            assert self >= 0 and other > 0
            return Natural(int(self) // int(other))

        def __add__(self, other):
            return Natural(int(self) + int(other))

        def __sub__(self, other):
            return Natural(int(self) - int(other))

        def __mul__(self, other):
            return Natural(int(self) * int(other))

    for lag, chunk in ((3, 3), (7, 20), (96, 50), (128, 256), (1, 1)):
        for row in range(700):
            found = blocks.compressed_partitions(Natural(row), lag=lag, chunk=chunk)
            assert found == int(blocks.compressed_partitions(torch.tensor(row), lag=lag, chunk=chunk)) >= 0


def test_aligned_partitions_need_a_mask_on_the_diagonal_alone():
    """What leaving out the sinks from the rows is for: C = L, whole blocks, kept tokens that fill blocks."""
    layout = layout_of(Geometry(0, 256, 128, 256), 4096, Walk(0), 128)
    assert layout.forward.partial_count.flatten().tolist() == [1] * 32
    assert layout.backward.partial_count.flatten().tolist() == [0] * 14 + [1] * 32
    layout = layout_of(Geometry(16, 256, 128, 256), 16 + 4096, Walk(0), 128)
    assert layout.forward.partial_count.flatten().tolist() == [2] * 32  # the sinks' block, which is not filled


def test_the_longest_column_is_short_enough():
    """32,768 tokens at 1/8 in 32 heads on 132 processors: a column of 240 blocks would be a seventh of a processor's
    work. In eight such rows it is nothing."""
    geometry = Geometry(0, 1024, 128, 1024)

    def longest(heads: float) -> int:
        lists = blocks.layout(geometry, 32_768, CPU, Walk(), heads).backward
        return int((lists.partial_count + lists.full_count).max())

    def pairs(heads: float) -> int:
        lists = blocks.layout(geometry, 32_768, CPU, Walk(), heads).backward
        return int((lists.partial_count + lists.full_count).sum())

    assert longest(8 * 32 / 132) == 240
    assert longest(32 / 132) <= max(blocks.TAIL * pairs(32 / 132) * 32 / 132, 16 + 1) < 240
    assert pairs(32 / 132) == pairs(8 * 32 / 132)


def test_memory_of_the_lists_at_131072_tokens():
    layout = blocks.layout(Geometry(16, 1024, 512, 1024), 131_072, CPU, Walk(), 32 / 132)
    assert sum(x.nbytes for lists in (layout.forward, layout.backward) for x in lists) < 16 << 20
