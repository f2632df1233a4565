"""The geometry against counting on fingers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa.attention import SparseAttentionConfig, slots
from lrsa.attention.layout import Geometry

lags = st.integers(1, 12)
geometries = lags.flatmap(
    lambda lag: st.builds(
        Geometry, sink=st.integers(0, 9), lag=st.just(lag), kept=st.integers(0, lag), chunk=st.integers(1, 3 * lag + 2)
    )
)
lengths = st.integers(0, 120)


def chunk_starts(geometry: Geometry, tokens: int) -> list[int]:
    starts, at = [0], geometry.sink + 2 * geometry.lag
    while at < tokens:
        starts.append(at)
        at += geometry.chunk
    return starts


def due(geometry: Geometry, tokens: int) -> int:
    """Partitions whose lag lies whole among the first ``tokens`` positions."""
    count = 0
    while geometry.sink + (count + 2) * geometry.lag <= tokens:
        count += 1
    return count


@given(geometries, lengths)
def test_compressed_counts_partitions_with_a_whole_lag(geometry, tokens):
    assert geometry.compressed(tokens) == due(geometry, tokens)


@given(geometries, st.integers(0, 200))
def test_chunk_start_is_the_last_start_not_behind_the_position(geometry, position):
    assert geometry.chunk_start(position) == max(s for s in chunk_starts(geometry, position + 1) if s <= position)


@given(geometries, lengths)
def test_slots_counts_what_is_held(geometry, tokens):
    held = 0
    for position in range(tokens):
        partition, inside = divmod(position - geometry.sink, geometry.lag)
        compressed = position >= geometry.sink and partition < due(geometry, tokens)
        held += inside < geometry.kept if compressed else 1
    assert geometry.slots(tokens) == held


def test_slots_of_the_published_example():
    config = SparseAttentionConfig(sink_size=16, lag_size=128, keep_ratio=0.25)
    assert 4096 / slots(config, 4096) == pytest.approx(3.37, abs=0.005)
    assert slots(None, 4096) == 4096


@given(geometries, lengths)
def test_selected_partitions_are_those_that_some_query_needs(geometry, tokens):
    needed = max((due(geometry, geometry.chunk_start(i)) for i in range(tokens)), default=0)
    assert geometry.selected_partitions(tokens) == needed


@given(geometries, lengths, st.integers(1, 40))
def test_spans_cover_every_query_once_and_share_its_past(geometry, tokens, longest):
    covered = []
    for start, stop, partitions in geometry.spans(tokens, longest):
        assert 0 < stop - start <= longest
        covered.extend(range(start, stop))
        assert all(due(geometry, geometry.chunk_start(i)) == partitions for i in range(start, stop))
    assert covered == list(range(tokens))


@given(geometries, st.integers(1, 120))
def test_spans_are_cut_only_where_the_past_changes(geometry, tokens):
    spans = list(geometry.spans(tokens, tokens))
    assert all(a.partitions < b.partitions for a, b in itertools.pairwise(spans))


@given(geometries, lengths)
def test_pairs_counts_what_every_query_attends(geometry, tokens):
    total = 0
    for i in range(tokens):
        n = due(geometry, geometry.chunk_start(i))
        raw = [j for j in range(i + 1) if j < geometry.sink or j >= geometry.sink + n * geometry.lag]
        total += len(raw) + n * geometry.kept
    assert geometry.pairs(tokens) == total
