"""Feeding changes nothing: mask form, parallel form and a cache fed in any blocks agree, logits and kept tokens."""

from __future__ import annotations

import pytest
import torch

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.huggingface import ARCHITECTURES
from lrsa.cache import prefill
from lrsa.cache.checks import last_compression
from lrsa.models import make_cache, set_attention
from tests.architectures import FAMILIES, model_of, tokens
from tests.attention.tensors import LOCAL
from tests.cache.feeding import feed, kept, parallel

LAG, TOKENS = 8, 50
CHUNKS = {"C=L": LAG, "C=2L": 2 * LAG, "C=3L+1": 3 * LAG + 1}
NEAR = {"rtol": 1e-3, "atol": 5e-4}  # of logits that reach 10: float32 rounding through three layers of large weights


def config_of(scorer: str, chunk: int | None = LAG, **options) -> SparseAttentionConfig:
    usual = {"sink_size": 3, "lag_size": LAG, "top_k": 0 if scorer == "recency" else 3, "chunk_size": chunk}
    return SparseAttentionConfig(scorer=scorer, **(usual | options))


def test_every_architecture_is_tested():
    assert set(FAMILIES) == set(ARCHITECTURES)


# Every rule on one architecture, and on every architecture one rule that reads queries and one that does not; the
# rest of the product, which found nothing else so far, is slow.
PAIRS = [
    pytest.param(
        family, scorer, marks=[] if family == "llama" or scorer in ("lag_relative", "tova") else pytest.mark.slow
    )
    for family in FAMILIES
    for scorer in LOCAL
]


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("family", "scorer"), PAIRS)
def test_all_forms_and_feedings_agree(family, scorer, chunk):
    config = config_of(scorer, chunk)
    model, ids = model_of(family, config, backend="reference"), tokens(2, TOKENS)
    mask_form = parallel(model, ids)
    set_attention(model, config, backend="gather")
    torch.testing.assert_close(parallel(model, ids), mask_form, **NEAR)
    held = None
    for block in (1, 64, LAG, 2 * LAG, 3 * LAG + 1, TOKENS):
        cache = make_cache(model)
        torch.testing.assert_close(
            feed(model, cache, ids, block), mask_form, **NEAR, msg=lambda m, b=block: f"{b}: {m}"
        )
        held = held or kept(cache)
        assert kept(cache) == held, f"blocks of {block}"
    set_attention(model, None)
    assert (parallel(model, ids) - mask_form).abs().max() > 0.01, "nothing was compressed"


@pytest.mark.parametrize("scorer", LOCAL)
def test_kept_tokens_are_those_of_the_parallel_form(scorer, monkeypatch):
    from lrsa.attention import api, kept_tokens

    seen = {}
    real = api.select

    def spy(key, value, config, partitions, **options):
        seen.setdefault(options["layer_idx"], (key, value, options["query"]))
        return real(key, value, config, partitions, **options)

    config = config_of(scorer)
    model, ids = model_of("llama", config), tokens(2, TOKENS)
    cache = make_cache(model)
    feed(model, cache, ids, 13)
    monkeypatch.setattr(api, "select", spy)
    parallel(model, ids)
    for layer, (key, value, query) in seen.items():
        monkeypatch.setattr(api, "select", real)
        expected = kept_tokens(key, value, config, query=query, layer_idx=layer)
        for row, positions in enumerate(cache.kept(layer)):
            for head, held in enumerate(positions.tolist()):
                assert held == expected[row, head].nonzero()[:, 0].tolist()
    assert len(seen) == 3


@pytest.mark.parametrize("sizes", [[45, 1, 4], [1, 1, 30, 18], [3, 16, 19, 12], [2, 48]], ids=str)
@pytest.mark.parametrize("scorer", ["lag_relative", "tova"])
def test_uneven_blocks(scorer, sizes):
    model, ids = model_of("llama", config_of(scorer)), tokens(2, TOKENS)
    torch.testing.assert_close(feed(model, make_cache(model), ids, sizes), parallel(model, ids), **NEAR)


@pytest.mark.parametrize("scorer", ["lag_relative", "tova"])
@pytest.mark.parametrize("sink", [0, 5])
def test_dense_layers_no_sinks_and_a_full_budget(scorer, sink):
    config = config_of(scorer, sink_size=sink, dense_layers=(0, -1))
    model, ids = model_of("llama", config), tokens(1, TOKENS)
    cache = make_cache(model)
    torch.testing.assert_close(feed(model, cache, ids, 7), parallel(model, ids), **NEAR)
    assert [layer.slots for layer in cache.report().layers] == [TOKENS, config.geometry.held(TOKENS), TOKENS]

    everything = config_of(scorer, sink_size=sink, top_k=LAG)
    set_attention(model, everything)
    sparse = feed(model, make_cache(model), ids, 7)
    set_attention(model, None)
    torch.testing.assert_close(sparse, parallel(model, ids), **NEAR)


def check_forms(config: SparseAttentionConfig, uniform: SparseAttentionConfig) -> list[int]:
    """That all forms of a budget by layer agree and are not `uniform`'s function; returns the slots of each layer."""
    model, ids = model_of("llama", config, backend="reference"), tokens(2, TOKENS)
    mask_form = parallel(model, ids)
    set_attention(model, config, backend="gather")
    torch.testing.assert_close(parallel(model, ids), mask_form, **NEAR)
    for block in (1, 13, TOKENS):
        cache = make_cache(model)
        torch.testing.assert_close(feed(model, cache, ids, block), mask_form, **NEAR)
    set_attention(model, uniform)
    flat = make_cache(model)
    feed(model, flat, ids, TOKENS)
    slots = [layer.slots for layer in cache.report().layers]
    assert sum(slots) == sum(layer.slots for layer in flat.report().layers)
    assert (parallel(model, ids) - mask_form).abs().max() > 0.01
    return slots


@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_a_pyramid_has_all_forms_and_the_same_total(dense_layers):
    """Layers with shares of their own: 5, 3 and 1 of 8 where all would keep 3."""
    options = {"dense_layers": dense_layers}
    slots = check_forms(config_of("lag_relative", budget="pyramid", **options), config_of("lag_relative", **options))
    assert slots[0] > slots[2]


def test_a_concentrated_budget_has_all_forms_and_the_same_total():
    """Of 4 tokens a partition in each of three layers the last takes its 8, and 2 are left for each of the others."""
    config = config_of("lag_relative", budget="concentrated", dense_layers=(-1, 0), top_k=4)
    few = config_of("lag_relative", top_k=2).geometry.held(TOKENS)
    assert check_forms(config, config_of("lag_relative", top_k=4)) == [few, few, TOKENS]


def test_a_hybrid_of_full_and_window_layers_has_all_forms_and_is_cropped_by_its_windows():
    options = {"budget": "concentrated", "dense_layers": (-1,), "keep_ratio": 1 / 2, "top_k": None}
    config = config_of("recency", chunk=None, equal_bytes_at=TOKENS, **options)
    window = config.for_layer(0, 3).geometry
    assert window.lag > LAG and window.kept == 0
    assert check_forms(config, config_of("recency", top_k=4))[2] == TOKENS

    model, ids = model_of("llama", config), tokens(1, TOKENS)
    cache = make_cache(model)
    feed(model, cache, ids, TOKENS)
    back = TOKENS - last_compression(window, TOKENS)
    with pytest.raises(ValueError, match=rf"at most {back} tokens can be taken back"):
        cache.crop(-back - 1)
    cache.crop(-back)
    again = feed(model, cache, ids[:, TOKENS - back :], 3)
    torch.testing.assert_close(again, parallel(model, ids)[:, TOKENS - back :], **NEAR)


def test_prefill_in_blocks_is_prefill_at_once():
    model, ids = model_of("qwen3", config_of("lag_relative")), tokens(2, TOKENS)
    expected = parallel(model, ids)[:, -1]
    for block_size in (None, 1, 20, TOKENS, 1000):
        cache = make_cache(model)
        torch.testing.assert_close(prefill(model, ids, cache, block_size=block_size), expected, **NEAR)
        assert cache.get_seq_length() == TOKENS
    with pytest.raises(ValueError, match="block_size=0"):
        prefill(model, ids, make_cache(model), block_size=0)
    with pytest.raises(ValueError, match="no token"):
        prefill(model, ids[:, :0], make_cache(model))


@pytest.mark.parametrize("max_tokens", [None, TOKENS])
def test_storage_moves_only_where_its_size_was_not_given(max_tokens):
    model, ids = model_of("llama", config_of("lag_relative")), tokens(1, TOKENS)
    cache = make_cache(model, max_tokens)
    feed(model, cache, ids[:, :1], 1)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    feed(model, cache, ids[:, 1:], 1)
    if max_tokens:
        assert [layer.keys.data_ptr() for layer in cache.layers] == before
        with pytest.raises(ValueError, match="max_tokens=50"):
            feed(model, cache, ids[:, :1], 1)


def test_storage_grows_without_being_told():
    model, ids = model_of("llama", config_of("lag_relative", dense_layers=(1,))), tokens(1, 500)
    cache = make_cache(model)
    logits = feed(model, cache, ids, [1, 300, *[1] * 20, 179])
    torch.testing.assert_close(logits, parallel(model, ids), **NEAR)
