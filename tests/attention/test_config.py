"""The config: what it refuses, in words that name the values and the way out, and what it stores."""

import dataclasses
import itertools
import json
import pickle

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, from_conf, slots, sparse_attention
from lrsa.attention.config import concentrated, pyramid
from lrsa.config import AttentionConf
from tests.attention.tensors import random_inputs


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"scorer": "snapkv2"}, ["'snapkv2'", "lag_relative, oracle, random, recency, snapkv, tova"]),
        ({"scorer_args": {"seed": 1}}, ["'lag_relative'", "['seed']", "value_weight"]),
        ({"scorer": "tova", "scorer_args": {"seed": 1}}, ["'tova'", "['seed']", "none"]),
        ({"keep_ratio": 0.0}, ["keep_ratio=0.0", "(0, 1]", "top_k=0"]),
        ({"keep_ratio": -0.25}, ["keep_ratio=-0.25", "(0, 1]"]),
        ({"keep_ratio": 1.01}, ["keep_ratio=1.01", "(0, 1]"]),
        ({"keep_ratio": 4}, ["keep_ratio=4", "1/4 for 4x"]),
        ({"keep_ratio": float("nan")}, ["keep_ratio=nan", "(0, 1]"]),
        ({"keep_ratio": 0.5, "top_k": 64}, ["keep_ratio=0.5", "top_k=64", "one of them"]),
        ({"top_k": 129}, ["top_k=129", "lag_size=128", "lower top_k to at most 128 or raise lag_size"]),
        ({"top_k": -1}, ["top_k=-1", "at least 0"]),
        ({"top_k": 1.5}, ["top_k=1.5", "integer"]),
        ({"lag_size": 0}, ["lag_size=0", "at least 1"]),
        ({"lag_size": True}, ["lag_size=True", "integer"]),
        ({"sink_size": -1}, ["sink_size=-1", "at least 0"]),
        ({"sink_size": "16"}, ["sink_size='16'", "integer"]),
        ({"chunk_size": 0}, ["chunk_size=0", "at least 1"]),
        ({"chunk_size": 2.0}, ["chunk_size=2.0", "integer"]),
        ({"budget": "cone"}, ["budget='cone'", "uniform, pyramid, concentrated, adaptive"]),
        ({"schedule": "sliding"}, ["schedule='sliding'", "chunked"]),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)  # fmt: skip
def test_a_bad_value_is_named_with_the_way_out(values, parts):
    with pytest.raises(ValueError) as error:
        SparseAttentionConfig(**values)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_defaults_are_the_published_ones():
    config = SparseAttentionConfig()
    assert dataclasses.astuple(config.geometry) == (16, 128, 32, 128)
    assert config.scorer == "lag_relative"
    assert config.build_scorer().value_weight == 1.0


@pytest.mark.parametrize(
    ("ratio", "lag", "kept"), [(0.25, 128, 32), (1.0, 128, 128), (0.125, 100, 12), (0.999, 128, 127), (1e-9, 128, 0)]
)
def test_keep_ratio_rounds_down(ratio, lag, kept):
    assert SparseAttentionConfig(keep_ratio=ratio, lag_size=lag).geometry.kept == kept


def test_frozen_hashable_and_comparable():
    config = SparseAttentionConfig(scorer_args={"value_weight": 0.5}, dense_layers=[0, -1])
    assert config == SparseAttentionConfig(scorer_args={"value_weight": 0.5}, dense_layers=(0, -1))
    assert len({config, SparseAttentionConfig(scorer_args={"value_weight": 0.5}, dense_layers=(0, -1))}) == 1
    assert config != SparseAttentionConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lag_size = 64
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_caller_s_dict_is_copied():
    args = {"value_weight": 0.5}
    config = SparseAttentionConfig(scorer_args=args)
    args["value_weight"] = 2.0
    assert config.build_scorer().value_weight == 0.5


@pytest.mark.parametrize(
    "config",
    [
        SparseAttentionConfig(),
        SparseAttentionConfig(
            scorer="random", scorer_args={"seed": 3}, sink_size=0, lag_size=8, top_k=0, chunk_size=3, dense_layers=(0,)
        ),
        SparseAttentionConfig(keep_ratio=0.5, dense_layers=(-1, 2)),
    ],
    ids=["defaults", "all-fields", "ratio"],
)
def test_json_round_trip(config):
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SparseAttentionConfig.from_dict(json.loads(config.to_json())) == config


def test_a_field_of_another_version_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown sparse attention fields \['head_budget'\]: the valid ones are scorer"
    ):
        SparseAttentionConfig.from_dict({**SparseAttentionConfig().to_dict(), "head_budget": 3})


def test_with_compression():
    config = SparseAttentionConfig(top_k=5, sink_size=3)
    assert config.with_compression(4) == SparseAttentionConfig(keep_ratio=0.25, sink_size=3)
    assert config.with_compression(1) is None
    assert [config.with_compression(f).geometry.kept for f in (2, 4, 8, 16, 128)] == [64, 32, 16, 8, 1]
    with pytest.raises(ValueError, match=r"compression 0.25 is below 1: 4 means that a quarter is kept"):
        config.with_compression(0.25)


def test_with_compression_keeps_one_in_the_factor_for_every_lag():
    """1/49 * 49 is 0.999... in floating point, which must not become 0 kept tokens."""
    for factor in range(2, 300):
        for multiple in (1, 2, 3):
            config = SparseAttentionConfig(lag_size=factor * multiple).with_compression(factor)
            assert config.geometry.kept == multiple, (factor, multiple)


def test_dense_layers_from_either_end():
    config = SparseAttentionConfig(dense_layers=(0, -1))
    layers = [config.for_layer(i, 4) for i in range(4)]
    assert [c is None for c in layers] == [True, False, False, True]
    with pytest.raises(ValueError, match=r"dense_layers=\(4,\): layer 4 is not among 4 layers"):
        SparseAttentionConfig(dense_layers=(4,)).for_layer(0, 4)
    with pytest.raises(ValueError, match=r"layer -5 is not among 4 layers"):
        SparseAttentionConfig(dense_layers=(-5,)).resolved(4)
    with pytest.raises(ValueError, match=r"dense_layers=\(0, -1\) counts from the last layer: num_layers is needed"):
        sparse_attention(*random_inputs(1, 2, 1, 60, 16), config)


def test_from_the_config_group():
    assert from_conf(AttentionConf(scorer="dense")) is None
    assert from_conf(AttentionConf()) == SparseAttentionConfig()
    conf = AttentionConf(scorer="random", scorer_args={"seed": 2}, lag_size=64, top_k=7, dense_layers=[0, -1])
    assert from_conf(conf) == SparseAttentionConfig(
        scorer="random", scorer_args={"seed": 2}, lag_size=64, top_k=7, dense_layers=(0, -1)
    )
    assert slots(from_conf(conf), 1000) == 16 + 14 * 7 + (1000 - 16 - 14 * 64)


# ------------------------------------------------------------------ what sparse_attention itself refuses


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 60), (1, 1, 60, 8), (1, 1, 60, 8)), r"must be \[B, heads, T, D\]"),
        (((1, 2, 60, 8), (1, 1, 60, 8), (1, 1, 60, 4)), r"value \(1, 1, 60, 4\) must have key's shape \(1, 1, 60, 8\)"),
        (((1, 2, 1, 8), (1, 1, 60, 8), (1, 1, 60, 8)), r"query \(1, 2, 1, 8\) and key \(1, 1, 60, 8\).*over a cache"),
        (((2, 2, 60, 8), (1, 1, 60, 8), (1, 1, 60, 8)), r"must agree in all but heads"),
        (((1, 5, 60, 8), (1, 2, 60, 8), (1, 2, 60, 8)), r"5 query heads are not a multiple of 2 key/value heads"),
    ],
    ids=["rank", "value", "cache", "batch", "heads"],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_shapes_that_do_not_fit(shapes, message, backend):
    with pytest.raises(ValueError, match=message):
        sparse_attention(*(torch.zeros(s) for s in shapes), SparseAttentionConfig(lag_size=8), backend=backend)


def test_dtypes_that_do_not_fit():
    query, key, value = random_inputs(1, 2, 1, 60, 8)
    with pytest.raises(ValueError, match=r"one dtype, not torch.float32, torch.float32 and torch.float64"):
        sparse_attention(query, key, value.double(), SparseAttentionConfig(lag_size=8))


def test_kept_that_does_not_fit():
    query, key, value = random_inputs(1, 2, 1, 60, 8)
    for kept in (key[..., 0], key[:, :, :50, 0].bool(), key.bool()):
        with pytest.raises(ValueError, match=r"kept must be bool \(1, 1, 60\), not torch\.\w+ \("):
            sparse_attention(query, key, value, SparseAttentionConfig(lag_size=8), kept=kept)


def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"backend='cudnn' is unknown: choose one of auto, reference, gather, flex"):
        sparse_attention(*random_inputs(1, 2, 1, 60, 8), SparseAttentionConfig(lag_size=8), backend="cudnn")


@pytest.mark.parametrize("config", [SparseAttentionConfig(lag_size=8), SparseAttentionConfig(dense_layers=(0,))])
def test_flex_on_the_cpu_says_why(config):
    with pytest.raises(ValueError, match=r"backend='flex' cannot run here: .*CUDA.*cpu; use 'gather' or 'auto'"):
        sparse_attention(*random_inputs(1, 2, 1, 60, 16), config, backend="flex")


@pytest.mark.parametrize("mean", [0, 1, 7, 32, 64, 128])
@pytest.mark.parametrize("layers", [1, 2, 3, 30])
def test_a_pyramid_falls_and_keeps_the_total(mean, layers):
    shares = pyramid(mean, 128, layers)
    assert len(shares) == layers and sum(shares) == layers * mean
    assert all(0 <= share <= 128 for share in shares)
    assert all(after <= before + 1 for before, after in itertools.pairwise(shares))  # to rounding
    if layers == 30 and mean == 32:
        assert shares[0] == 62 and shares[-1] == 2  # 2 * 32 - 32 / 20, and 32 / 20


def test_a_layers_share_of_a_pyramid():
    config = SparseAttentionConfig(budget="pyramid", lag_size=128, keep_ratio=1 / 4, dense_layers=(0, -1))
    shares = [config.for_layer(index, 5) for index in range(5)]
    assert shares[0] is None and shares[4] is None
    assert [share.top_k for share in shares[1:4]] == [62, 32, 2]
    assert {share.budget for share in shares[1:4]} == {"uniform"}
    with pytest.raises(ValueError, match=r"budget='pyramid' depends on the number of layers.*for_layer"):
        SparseAttentionConfig(budget="pyramid").for_layer(1)
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="for_layer"):
        sparse_attention(query, query, query, SparseAttentionConfig(budget="pyramid"))


@pytest.mark.parametrize("mean", [0, 1, 7, 32, 64, 128])
@pytest.mark.parametrize("wanted", [1, 7, 30])
@pytest.mark.parametrize("layers", [7, 30])
def test_a_concentrated_budget_spends_what_a_uniform_one_does(mean, wanted, layers):
    dense, kept = concentrated(mean, 128, wanted, layers)
    spent = dense * 128 + (layers - dense) * kept
    assert 0 <= dense <= wanted and 0 <= kept <= 128
    assert layers * mean - max(1, layers - dense) < spent <= layers * mean or dense == layers or kept == 128
    assert dense == min(wanted, layers) or (dense + 1) * 128 > layers * mean  # no further one was affordable


def test_a_layers_share_of_a_concentrated_budget():
    config = SparseAttentionConfig(budget="concentrated", lag_size=128, dense_layers=(20, -4, 3, 11, 5, 6, 7, 8))

    def shares(factor):
        found = [config.with_compression(factor).for_layer(index, 30) for index in range(30)]
        assert {share.budget for share in found if share} == {"uniform"}
        dense = {index for index, share in enumerate(found) if share is None}
        return dense, {share.top_k for share in found if share}

    assert shares(2) == ({20, 26, 3, 11, 5, 6, 7, 8}, {40})  # (30 * 64 - 8 * 128) / 22
    assert shares(4) == ({20, 26, 3, 11, 5, 6, 7}, {2})
    assert shares(8) == ({20, 26, 3}, {3})  # the first three, in the order given
    assert shares(64) == (set(), {2})
    assert config.with_compression(8).spread(30) == (
        "3 of 30 layers dense (3, 20, 26), the others keep 3 of 128 tokens a partition"
    )
    assert config.with_compression(4).spread(32) == (
        "8 of 32 layers dense (3, 5, 6, 7, 8, 11, 20, 28), the others keep 0 of 128 tokens a partition: sinks and "
        "window alone, the scorer chooses nothing"
    )
    assert (
        SparseAttentionConfig(budget="pyramid").spread(5).startswith("0 of 5 layers dense, the others keep 2 to 62 of")
    )
    alone = config.with_compression(4)
    assert alone.alone(26, 30).for_layer(26) is None and alone.alone(0, 30).for_layer(0).top_k == 2
    with pytest.raises(ValueError, match=r"budget='concentrated' depends on the number of layers.*for_layer"):
        dataclasses.replace(config, dense_layers=(20, 26)).for_layer(20)
    with pytest.raises(ValueError, match=r"dense_layers=\(26, -4\) names a layer of 30 twice"):
        dataclasses.replace(config, dense_layers=(26, -4)).resolved(30)
    with pytest.raises(ValueError, match=r"dense_layers is empty.*lrsa-eval mode=layers.*budget='uniform'"):
        SparseAttentionConfig(budget="concentrated")


@pytest.mark.parametrize("tokens", [1500, 4096])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_window_is_widened_to_equal_bytes(tokens, factor):
    window = SparseAttentionConfig(scorer="recency", top_k=0, equal_bytes_at=tokens).with_compression(factor)
    rival = SparseAttentionConfig().with_compression(factor)
    assert window.top_k == 0 and window.lag_size > 128 and window.equal_bytes_at is None
    assert window.geometry.slots(tokens) == rival.geometry.slots(tokens)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_hybrid_of_full_and_window_layers_holds_the_bytes_of_a_concentrated_budget(factor):
    rule = SparseAttentionConfig(budget="concentrated", dense_layers=(18, 23, -13, 20, 7, 21, 15, 14))
    windows = dataclasses.replace(rule, scorer="recency", top_k=0, equal_bytes_at=4096)
    hybrid, rival = windows.with_compression(factor), rule.with_compression(factor)
    assert SparseAttentionConfig.from_json(hybrid.to_json()) == hybrid and hybrid.with_compression(factor) == hybrid
    for index in range(30):
        one, other = hybrid.for_layer(index, 30), rival.for_layer(index, 30)
        assert (one is None) == (other is None), "the same layers are dense"
        if one is not None:
            assert one.top_k == 0 and one.lag_size > 128 and (one.budget, one.equal_bytes_at) == ("uniform", None)
            assert one.geometry.slots(4096) == pytest.approx(other.geometry.slots(4096), rel=0.03)
            mean, wanted = (sum(x.geometry.slots(t) for t in range(3072, 4097)) / 1025 for x in (one, other))
            assert mean == pytest.approx(wanted, rel=0.12), "where a window's rise and fall happens to stand at 4096"
        assert hybrid.alone(index, 30).for_layer(index) == one
    window = next(filter(None, (hybrid.for_layer(index, 30) for index in range(30)))).lag_size
    assert hybrid.spread(30).endswith(f"), the others hold sinks and windows of {window} tokens")
    assert windows.spread(30) == "0 of 30 layers dense, the others hold sinks and windows of 128 tokens"


def test_a_window_is_widened_where_nothing_is_kept_alone():
    with pytest.raises(ValueError, match=r"equal_bytes_at=4096 .* top_k=3 .*set top_k=0"):
        SparseAttentionConfig(scorer="recency", top_k=3, equal_bytes_at=4096)
