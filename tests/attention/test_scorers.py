"""The contract of a scorer, for every one that is registered, and each one's own promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from lrsa.attention import scorers as scorers_package
from lrsa.attention.layout import Geometry
from lrsa.attention.scorers import SCORERS, Partitions, Prompt, Scorer, build_scorer
from lrsa.attention.scorers.base import to_eleven_bits
from lrsa.attention.scorers.random import mix32
from lrsa.attention.selection import partition
from lrsa.models import make_cache, set_attention
from tests.architectures import model_of, tokens
from tests.attention.tensors import FORMS, LOCAL, prompt, random_inputs
from tests.cache.feeding import feed, parallel

scorers = pytest.mark.parametrize("name", sorted(SCORERS))
GEOMETRY = Geometry(sink=3, lag=8, kept=3, chunk=8)


def cut(name, inputs, partitions=4, layer_idx=0) -> Partitions:
    query, key, value = inputs
    parts = partition(
        key, value, query if SCORERS[name].reads_query else None, GEOMETRY, partitions, layer_idx, scale=0.25
    )
    if SCORERS[name].reads_future:
        lengths = torch.full((len(key),), key.shape[2] - 5)
        parts = replace(parts, prompt=Prompt(query.unflatten(1, (key.shape[1], -1)), key, lengths))
    return parts


@scorers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_float32_of_one_per_token(name, dtype):
    inputs = random_inputs(2, 6, 2, 50, 16, dtype=dtype)
    scores = build_scorer(name, {})(cut(name, inputs))
    assert scores.shape == (2, 2, 4, 8)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", LOCAL)
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
    assert name in ("oracle", "random", "uniform") or SCORERS[name].paper.startswith("https://arxiv.org/abs/")
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
    parts = Partitions(*(t.view(1, 1, 1, 2, 2) for t in (x, x, lag, lag)), None, torch.tensor([[0, 1]]), 0, 1.0, 1)
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
    scores = SCORERS["random"]()(Partitions(parts, parts, parts, parts, None, positions, 0, 1.0, 4))
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
    scores = SCORERS["recency"]()(Partitions(parts, parts, parts, parts, None, positions, 0, 1.0, 4))
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


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_scores_do_not_depend_on_autocast(name, backend):
    """A scorer ranks in float32 whatever the caller's context says, else training and evaluation would part ways."""
    config, options = SparseAttentionConfig(scorer=name, sink_size=3, lag_size=16, top_k=4), prompt(name, 380)
    query, key, value = random_inputs(1, 4, 2, 400, 32)
    kept = kept_tokens(key, value, config, query=query, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kept_tokens(key, value, config, query=query, **options), kept)
        out = sparse_attention(query, key, value, config, backend=backend, **options)
    given = sparse_attention(query, key, value, config, kept=kept, backend=backend)
    torch.testing.assert_close(out.float(), given, rtol=0.05, atol=0.03)


# ------------------------------------------------------------------ rules that look at attention, in plain loops


def observed(name, window, lag=8, seed=0, **args):
    """Scores of one partition with two query heads a KV head, and plain loops' weights ``[W, 2L]`` of each."""
    query, key, value = random_inputs(1, 2, 1, 2 * lag, 16, seed=seed)
    parts = partition(key, value, query, Geometry(0, lag, 3, lag), 1, 0, scale=0.25)
    weights = []
    for head in range(2):
        rows = []
        for i in range(2 * lag - window, 2 * lag):
            logits = [float(query[0, head, i] @ key[0, 0, j]) * 0.25 for j in range(i + 1)]
            total = sum(map(math.exp, logits))
            rows.append([math.exp(x) / total for x in logits] + [0.0] * (2 * lag - i - 1))
        weights.append(rows)
    return SCORERS[name](**args)(parts)[0, 0, 0], torch.tensor(weights)[..., :lag], value[0, 0, :lag]


@pytest.mark.parametrize("window", [1, 3, 8])
def test_snapkv_is_the_mean_weight_over_window_group_and_neighbours(window):
    scores, weights, _ = observed("snapkv", window, window_size=window, kernel_size=3)
    mean = weights.mean((0, 1)).tolist()
    expected = [sum(near) / len(near) for near in (mean[max(0, j - 1) : j + 2] for j in range(8))]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_snapkv_of_a_window_beyond_the_lag_takes_the_lag():
    torch.testing.assert_close(observed("snapkv", 8, window_size=50)[0], observed("snapkv", 8, window_size=8)[0])


@pytest.mark.parametrize(("args", "message"), [({"window_size": 0}, "window_size=0"), ({"kernel_size": 4}, "odd")])
def test_snapkv_refuses_windows_that_make_no_sense(args, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig(scorer="snapkv", scorer_args=args)


def test_h2o_accumulates_over_the_lag():
    scores, weights, _ = observed("h2o", 8)
    torch.testing.assert_close(scores, weights.mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_tova_is_the_last_row():
    scores, weights, _ = observed("tova", 1)
    torch.testing.assert_close(scores, weights.mean((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_by_mean_and_covariance_of_the_queries(covariance, epsilon):
    """Against the published form, k . mu + k' Sigma k / 2, with the matrix written out."""
    query, key, value = (x.double() for x in random_inputs(1, 2, 1, 16, 16))
    parts = partition(key, value, query, Geometry(0, 8, 3, 8), 1, 0, scale=0.25)
    expected = torch.zeros(8, dtype=torch.float64)
    for head in range(2):
        lag, keys = query[0, head, 8:], key[0, 0, :8]
        mean, sigma = lag.mean(0), torch.cov(lag.T, correction=0)
        logits = keys @ mean * 0.25
        if covariance:
            logits = logits + torch.einsum("id,de,ie->i", keys, sigma, keys) * 0.25**2 / 2
        expected += logits.softmax(-1) / 2
    expected = (expected + epsilon) * value[0, 0, :8].norm(dim=-1)
    found = SCORERS["expected_attention"](epsilon=epsilon, use_covariance=covariance)(parts)[0, 0, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_long_prompts_are_taken_in_parts(monkeypatch):
    """A part of the partitions at a time, for memory: the same scores."""
    from lrsa.attention.scorers import observed as module

    inputs = random_inputs(2, 6, 2, 3 + 9 * 8, 16)
    for name in ("snapkv", "h2o", "tova", "expected_attention", "oracle"):
        whole = build_scorer(name, {})(cut(name, inputs, partitions=8))
        for most in (1, 2 * 2 * 3 * 8 * 16 * 3):
            monkeypatch.setattr(module, "MOST_LOGITS", most)
            torch.testing.assert_close(build_scorer(name, {})(cut(name, inputs, partitions=8)), whole)
        monkeypatch.undo()


# ------------------------------------------------------------------ rules that look at keys or values alone


def test_norms_and_keydiff_by_hand():
    """Keys (3, 4), (0, 1), (-1, 0), (6, 8): norms 5, 1, 1, 10; values (1, -2), (0, 0), (5, 0), (0, 3)."""
    key = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0], [6.0, 8.0]]).view(1, 1, 1, 4, 2)
    value = torch.tensor([[1.0, -2.0], [0.0, 0.0], [5.0, 0.0], [0.0, 3.0]]).view(1, 1, 1, 4, 2)
    parts = Partitions(key, value, key, value, None, torch.arange(4)[None], 0, 1.0, 2)
    assert SCORERS["key_norm"]()(parts).flatten().tolist() == [-5, -1, -1, -10]
    assert SCORERS["value_norm"]()(parts).flatten().tolist() == [3, 0, 5, 3]
    mean = (0.6 + 0.0 - 1.0 + 0.6, 0.8 + 1.0 + 0.0 + 0.8)
    length = math.hypot(*mean)
    cosines = [(0.6 * mean[0] + 0.8 * mean[1]) / length, mean[1] / length, -mean[0] / length]
    expected = torch.tensor([-cosines[0], -cosines[1], -cosines[2], -cosines[0]])
    torch.testing.assert_close(SCORERS["keydiff"]()(parts).flatten(), expected)


@pytest.mark.parametrize(
    ("lag", "kept", "places"),
    [(8, 2, [3, 7]), (8, 3, [1, 4, 7]), (8, 8, list(range(8))), (7, 1, [6]), (16, 4, [3, 7, 11, 15]), (5, 0, [])],
)
def test_uniform_keeps_every_nth(lag, kept, places):
    _, key, value = random_inputs(1, 2, 2, 3 + 3 * lag, 16)
    config = SparseAttentionConfig(scorer="uniform", sink_size=3, lag_size=lag, top_k=kept)
    for p in range(2):
        own = kept_tokens(key, value, config)[0, 0, 3 + p * lag : 3 + (p + 1) * lag]
        assert own.nonzero()[:, 0].tolist() == places


def test_the_page_of_rules_has_a_row_for_each():
    page = (Path(scorers_package.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert set(rows) == set(SCORERS)
    for name, row in rows.items():
        scorer = SCORERS[name]
        assert scorer.paper in row
        assert row.split("|")[3].strip() == ("yes" if scorer.reads_query else "no")
        for argument in fields(scorer):
            assert f"`{argument.name}` {str(argument.default).lower()}" in row
    adaptive = page[page.index("`adaptive` (AdaKV") :].split(": those are refused")[0]
    assert all((f"`{name}`" in adaptive.split("Norms and cosines")[0]) == SCORERS[name].comparable for name in SCORERS)


def test_a_rule_from_outside_the_package_has_all_forms(monkeypatch):
    """One class and one registry line: configuration, training form, mask form and cache take it as it is."""

    @dataclass(frozen=True)
    class Loudest(Scorer):
        """The token with the largest entry."""

        sign: float = 1.0

        def __call__(self, partitions):
            return self.sign * partitions.key.float().amax(-1)

    monkeypatch.setitem(SCORERS, "loudest", Loudest)
    config = SparseAttentionConfig(scorer="loudest", scorer_args={"sign": -1.0}, sink_size=3, lag_size=8, top_k=3)
    model, ids = model_of("llama", config, backend="reference"), tokens(1, 60)
    mask_form = parallel(model, ids)
    set_attention(model, config, backend="gather")
    torch.testing.assert_close(parallel(model, ids), mask_form, rtol=1e-3, atol=5e-4)
    torch.testing.assert_close(feed(model, make_cache(model), ids, 7), mask_form, rtol=1e-3, atol=5e-4)
    with pytest.raises(ValueError, match=r"'loudest' takes no \['loud'\]: its scorer_args are \['sign'\]"):
        SparseAttentionConfig(scorer="loudest", scorer_args={"loud": 1})


def test_eleven_bits_are_float16s_at_float32s_range():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).abs() * 10
    rounded = to_eleven_bits(x)
    assert ((rounded - x).abs() <= x * 2**-11).all()
    assert torch.equal(rounded[x > 1e-3], rounded[x > 1e-3].half().float())
    assert torch.equal(to_eleven_bits(rounded), rounded) and to_eleven_bits(torch.tensor([3e38]))[0].isfinite()
    noisy = torch.tensor([4.0, 3.9999995, 4.0000005, 3.0, 3.0000002])
    assert to_eleven_bits(noisy).tolist() == [4, 4, 4, 3, 3] and to_eleven_bits(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["key_norm", "value_norm"])
def test_tokens_of_one_norm_tie_and_the_earlier_stays(name):
    """Rotated copies of one key: what rounding makes of the norm does not decide."""
    angles = torch.rand(27, 8, generator=torch.Generator().manual_seed(0)) * 6
    pairs = torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)[None, None]  # [1, 1, 27, 16], norm sqrt(8)
    x = pairs if name == "key_norm" else pairs.sign() * (1 + 1e-7 * angles.repeat_interleave(2, -1))
    kept = kept_tokens(x, x, SparseAttentionConfig(scorer=name, sink_size=3, lag_size=8, top_k=3))
    assert kept[0, 0, 3:19].view(2, 8).tolist() == [[True] * 3 + [False] * 5] * 2
