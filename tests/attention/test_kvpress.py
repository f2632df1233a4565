"""Our rules against kvpress', on the same keys, queries and weights. Where kvpress is: `make test-peers`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens
from lrsa.attention.layout import Geometry
from lrsa.attention.scorers import SCORERS
from lrsa.attention.selection import partition
from tests.attention.tensors import random_inputs

kvpress = pytest.importorskip("kvpress", reason="kvpress needs transformers < 5.3: make test-peers")
LAG, SCALE = 24, 16**-0.5


@pytest.fixture(params=[0, 1, 2], ids="seed{}".format)
def case(request):
    """A partition and its lag, one KV head with four query heads: our view, and kvpress' inputs."""
    query, key, value = random_inputs(2, 4, 1, 2 * LAG, 16, seed=request.param)
    query = 3 * query  # attention that singles tokens out
    logits = query @ key.mT * SCALE
    weights = logits.masked_fill(torch.ones(2 * LAG, 2 * LAG).triu(1).bool(), -torch.inf).softmax(-1)
    parts = partition(key, value, query, Geometry(0, LAG, 6, LAG), 1, 0, SCALE)
    module = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4, num_key_value_heads=1), head_dim=16)
    return parts, module, key, value, weights


def theirs(press, case, keys=2 * LAG, weights=None):
    _, module, key, value, found = case
    weights = found if weights is None else weights
    hidden = torch.zeros(2, keys, 8)  # of which they take the length
    return press.score(module, hidden, key[:, :, :keys], value[:, :, :keys], weights, {})


def ours(name, case, **args):
    return SCORERS[name](**args)(case[0])[:, :, 0]


def assert_same_ranking(found, expected):
    torch.testing.assert_close(found.argsort(-1), expected.argsort(-1))


@pytest.mark.parametrize("window", [1, 5, LAG])
def test_snapkv(case, window):
    press = kvpress.SnapKVPress(compression_ratio=0.5, window_size=window, kernel_size=1)
    found = ours("snapkv", case, window_size=window, kernel_size=1)
    torch.testing.assert_close(found, theirs(press, case)[..., :LAG])
    # Smoothed: alike where all neighbours are in the partition. They pool on into what follows, and with zeros at 0.
    press = kvpress.SnapKVPress(compression_ratio=0.5, window_size=window, kernel_size=5)
    smoothed = ours("snapkv", case, window_size=window, kernel_size=5)
    torch.testing.assert_close(smoothed[..., 2:-2], theirs(press, case)[..., 2 : LAG - 2])


@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_once_is_theirs(kernel):
    """Without sinks and with their window as the lag, prefill_once keeps what they keep of the prompt. They pool
    with zeros beyond both ends, so the two tokens at each end may be ranked otherwise, and one of them for another."""
    window, prompt, ratio = 8, 60, 0.5
    query, key, value = random_inputs(2, 4, 1, prompt, 16)
    query = 3 * query
    weights = (query @ key.mT * SCALE).masked_fill(torch.ones(prompt, prompt).triu(1).bool(), -torch.inf).softmax(-1)
    module = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4, num_key_value_heads=1), head_dim=16)
    press = kvpress.SnapKVPress(compression_ratio=ratio, window_size=window, kernel_size=kernel)
    score = press.score(module, torch.zeros(2, prompt, 8), key, value, weights, {})
    count = int(prompt * (1 - ratio)) - window
    args = {"window_size": window, "kernel_size": kernel}
    config = SparseAttentionConfig(
        scorer="snapkv", scorer_args=args, sink_size=0, lag_size=window, top_k=count, schedule="prefill_once"
    )
    kept = kept_tokens(key, value, config, query=query, prompt_lengths=prompt)
    theirs = torch.zeros_like(kept).scatter_(-1, score.topk(count + window).indices, True)
    inner = slice(kernel // 2, prompt - window - kernel // 2)
    same = (kept == theirs)[..., inner]
    assert same.all() if kernel == 1 else same.float().mean() > 0.9


def test_tova(case):
    """With one KV head: they take the mean over all heads of the layer, we over the group."""
    torch.testing.assert_close(ours("tova", case), theirs(kvpress.TOVAPress(compression_ratio=0.5), case)[..., :LAG])


def test_h2o(case):
    """They divide by the number of queries that saw a token and count those of the partition itself too; every token of
    ours was seen by the same ones, the lag's."""
    weights = case[4].clone()
    weights[:, :, :LAG] = 0
    counted = theirs(kvpress.ObservedAttentionPress(compression_ratio=0.5), case, weights=weights)
    seen_by = torch.arange(2 * LAG, 0, -1)
    assert_same_ranking(ours("h2o", case), (counted * seen_by)[..., :LAG])


def test_key_norm(case):
    expected = theirs(kvpress.KnormPress(compression_ratio=0.5), case, LAG)
    torch.testing.assert_close(ours("key_norm", case), expected, rtol=2**-11, atol=0)


def test_keydiff(case):
    torch.testing.assert_close(ours("keydiff", case), theirs(kvpress.KeyDiffPress(compression_ratio=0.5), case, LAG))


def test_lag_relative_is_another_rule(case):
    """Their scores are ranks within a partition, mixed with sinks and tail in one budget: see design and docs."""
    press = kvpress.LagKVPress(compression_ratio=0.5, n_sink=0, lag_size=LAG)
    score = theirs(press, case)
    assert_same_ranking(ours("lag_relative", case), score[..., :LAG])
    assert (score[..., LAG:] == 1).all(), "the tail is charged to the budget"
