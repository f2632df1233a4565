"""The contract of a scorer, for every one that is registered, and each one's own promise."""

from __future__ import annotations

import math

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from lrsa.attention.layout import Geometry
from lrsa.attention.scorers import SCORERS, Partitions, build_scorer
from lrsa.attention.scorers.random import mix32
from lrsa.attention.selection import partition
from tests.attention.tensors import random_inputs

scorers = pytest.mark.parametrize("name", sorted(SCORERS))
GEOMETRY = Geometry(sink=3, lag=8, kept=3, chunk=8)


def cut(name, inputs, partitions=4, layer_idx=0) -> Partitions:
    query, key, value = inputs
    query = query if SCORERS[name].reads_query else None
    return partition(key, value, query, GEOMETRY, partitions, layer_idx, scale=0.25)


@scorers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_float32_of_one_per_token(name, dtype):
    inputs = random_inputs(2, 6, 2, 50, 16, dtype=dtype)
    scores = build_scorer(name, {})(cut(name, inputs))
    assert scores.shape == (2, 2, 4, 8)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@scorers
def test_scores_of_a_partition_ignore_the_others(name):
    inputs = random_inputs(1, 4, 2, 50, 16)
    scores = build_scorer(name, {})(cut(name, inputs))
    noise = random_inputs(1, 4, 2, 50, 16, seed=5)
    for p in range(4):
        own = slice(GEOMETRY.raw_start(p), GEOMETRY.raw_start(p + 2))
        changed = [y.clone() for y in noise]
        for x, y in zip(inputs, changed, strict=True):
            y[:, :, own] = x[:, :, own]
        again = build_scorer(name, {})(cut(name, changed))
        torch.testing.assert_close(again[:, :, p], scores[:, :, p])


@scorers
def test_it_says_where_it_comes_from_and_takes_no_unknown_argument(name):
    assert SCORERS[name].__doc__
    assert name == "random" or SCORERS[name].paper.startswith("https://arxiv.org/abs/")
    with pytest.raises(ValueError, match=rf"scorer '{name}' takes no \['wrong'\]"):
        build_scorer(name, {"wrong": 1})


def test_partition_and_lag_are_the_tokens_they_should_be():
    key = torch.arange(50.0).view(1, 1, 50, 1).expand(1, 1, 50, 4)
    query = torch.stack([key[:, 0], -key[:, 0]], 1)
    parts = partition(key, key + 100, query, GEOMETRY, 4, 2, 0.5)
    positions = torch.arange(3, 35).view(4, 8)
    assert torch.equal(parts.positions, positions)
    assert torch.equal(parts.key[0, 0, :, :, 0], positions.float())
    assert torch.equal(parts.value[0, 0, :, :, 0], positions + 100.0)
    assert torch.equal(parts.lag_key[0, 0, :, :, 0], positions + 8.0)
    assert torch.equal(parts.lag_value[0, 0, :, :, 0], positions + 108.0)
    assert torch.equal(parts.lag_query[0, 0, 0, :, :, 0], positions + 8.0)
    assert torch.equal(parts.lag_query[0, 0, 1, :, :, 0], -positions - 8.0)


# ------------------------------------------------------------------ lag_relative


def test_lag_relative_by_hand():
    """L 2, D 2. Lag ranges: channel 0 [0, 4], channel 1 constant. x = (4, 9) scales to (1, 0), (2, 9) to (0.5, 0)."""
    lag = torch.tensor([[0.0, 7.0], [4.0, 7.0]])
    x = torch.tensor([[4.0, 9.0], [2.0, 9.0]])
    parts = Partitions(*(t.view(1, 1, 1, 2, 2) for t in (x, x, lag, lag)), None, torch.tensor([[0, 1]]), 0, 1.0)
    deviations = [math.sqrt(0.5), math.sqrt(0.125)]
    weight = math.exp(deviations[0]) / sum(map(math.exp, deviations))
    expected = torch.tensor([weight, 1 - weight])
    scorer = SCORERS["lag_relative"]
    torch.testing.assert_close(scorer()(parts)[0, 0, 0], 2 * expected)
    torch.testing.assert_close(scorer(value_weight=0.0)(parts)[0, 0, 0], expected)
    torch.testing.assert_close(scorer(value_weight=-0.5)(parts)[0, 0, 0], 0.5 * expected)


@pytest.mark.parametrize("change", ["scale", "shift"])
def test_lag_relative_sees_no_channelwise_affine_change(change):
    _, key, value = random_inputs(1, 2, 2, 60, 16)
    config = SparseAttentionConfig(sink_size=3, lag_size=8, top_k=3)
    factor = torch.rand(16) + 0.5
    changed = [x * factor if change == "scale" else x + factor for x in (key, value)]
    assert torch.equal(kept_tokens(*changed, config), kept_tokens(key, value, config))


def test_value_weight_matters():
    _, key, value = random_inputs(1, 2, 2, 120, 16)
    kept = [
        kept_tokens(key, value, SparseAttentionConfig(scorer_args={"value_weight": w}, sink_size=3, lag_size=8))
        for w in (0.0, 1.0, 100.0)
    ]
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])
    other = random_inputs(1, 2, 2, 120, 16, seed=3)[2]
    config = SparseAttentionConfig(scorer_args={"value_weight": 0.0}, sink_size=3, lag_size=8)
    assert torch.equal(kept_tokens(key, other, config), kept[0])


# ------------------------------------------------------------------ random


def random_config(**args) -> SparseAttentionConfig:
    return SparseAttentionConfig(scorer="random", scorer_args=args, sink_size=3, lag_size=16, top_k=4)


def test_random_is_the_same_for_any_content_batch_and_length():
    _, key, value = random_inputs(3, 2, 2, 200, 16)
    config = random_config()
    kept = kept_tokens(key, value, config, layer_idx=1)
    assert torch.equal(kept, kept_tokens(-key, 2 * value, config, layer_idx=1))
    assert torch.equal(kept[0], kept[2])
    shorter = kept_tokens(key[:1, :, :120], value[:1, :, :120], config, layer_idx=1)
    raw = config.geometry.raw_start(config.geometry.compressed(120))
    assert torch.equal(shorter[:, :, :raw], kept[:1, :, :raw])
    torch.manual_seed(7)  # and of any generator's state
    assert torch.equal(kept, kept_tokens(key, value, config, layer_idx=1))


def test_random_differs_by_head_layer_seed_and_partition():
    _, key, value = random_inputs(1, 2, 2, 800, 16)

    def kept(layer_idx=0, **args):
        return kept_tokens(key, value, random_config(**args), layer_idx=layer_idx)[0]

    first = kept()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, kept(layer_idx=1))
    assert not torch.equal(first, kept(seed=1))
    assert not torch.equal(first, kept(seed=-1))
    assert not torch.equal(kept(layer_idx=1), kept(seed=1)), "layer and seed must not stand for each other"
    assert not torch.equal(first[1], kept(layer_idx=1)[0]), "nor head and layer"
    partitions = first[0, 3 : 3 + 32 * 16].view(32, 16)
    assert len(partitions.unique(dim=0)) > 28


def test_random_is_uniform():
    """16,000 draws of 4 in 16: every place in a partition within 4 standard deviations of its share."""
    parts = torch.zeros(1, 16, 1000, 16, 1)
    positions = torch.arange(16000).view(1000, 16)
    scores = SCORERS["random"]()(Partitions(parts, parts, parts, parts, None, positions, 0, 1.0))
    assert scores.min() >= 0 and scores.max() < 1
    assert scores.mean() == pytest.approx(0.5, abs=0.005)
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(4).indices, 1.0).mean((0, 1, 2))
    assert (chosen - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 16000)


def test_mix32_is_the_published_function():
    """lowbias32 in Python's own integers."""

    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF]
    assert mix32(torch.tensor(values)).tolist() == [lowbias32(v) for v in values]


# ------------------------------------------------------------------ recency, tova


def test_recency_keeps_the_newest_of_each_partition():
    _, key, value = random_inputs(1, 2, 2, 3 + 5 * 8, 16)
    kept = kept_tokens(key, value, SparseAttentionConfig(scorer="recency", sink_size=3, lag_size=8, top_k=3))
    assert torch.equal(kept[0, 0, 3 : 3 + 4 * 8].view(4, 8), (torch.arange(8) >= 5).expand(4, 8))


def test_recency_with_nothing_kept_is_streaming_llm():
    """Sinks and a window: after T tokens the last L to 2L - 1."""
    _, key, value = random_inputs(1, 2, 2, 60, 16)
    kept = kept_tokens(key, value, SparseAttentionConfig(scorer="recency", sink_size=3, lag_size=8, top_k=0))
    assert kept[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, *range(51, 60)]


def test_recency_is_exact_at_positions_that_float32_cannot_tell_apart():
    parts = torch.zeros(1, 1, 1, 4, 1)
    positions = torch.arange(2**24 + 1, 2**24 + 5).view(1, 4)
    scores = SCORERS["recency"]()(Partitions(parts, parts, parts, parts, None, positions, 0, 1.0))
    assert scores[0, 0, 0].diff().gt(0).all()


def test_tova_reads_the_last_query_of_the_lag_alone():
    config = SparseAttentionConfig(scorer="tova", sink_size=0, lag_size=8, top_k=2)
    query, key, value = random_inputs(1, 4, 2, 32, 16)
    kept = kept_tokens(key, value, config, query=query)
    other = random_inputs(1, 4, 2, 32, 16, seed=4)[0]
    read = torch.tensor([15, 23, 31])  # the last tokens of partitions 1, 2 and 3
    other[:, :, read] = query[:, :, read]
    assert torch.equal(kept_tokens(key, value, config, query=other), kept)
    other[:, :, 15] = -query[:, :, 15]
    assert not torch.equal(kept_tokens(key, value, config, query=other), kept)


def test_tova_without_queries_says_so():
    _, key, value = random_inputs(1, 2, 1, 60, 16)
    config = SparseAttentionConfig(scorer="tova", sink_size=0, lag_size=8)
    with pytest.raises(ValueError, match=r"scorer 'tova' reads queries: pass query="):
        kept_tokens(key, value, config)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_scores_do_not_depend_on_autocast(backend):
    """A scorer ranks in float32 whatever the caller's context says, else training and evaluation would part ways."""
    for name in sorted(SCORERS):
        config = SparseAttentionConfig(scorer=name, sink_size=3, lag_size=16, top_k=4)
        query, key, value = random_inputs(1, 4, 2, 400, 32)
        kept = kept_tokens(key, value, config, query=query)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kept_tokens(key, value, config, query=query), kept), name
            out = sparse_attention(query, key, value, config, backend=backend)
        given = sparse_attention(query, key, value, config, kept=kept, backend=backend)
        torch.testing.assert_close(out.float(), given, rtol=0.05, atol=0.03)
