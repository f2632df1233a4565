"""What a cache says it holds is what it holds, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lrsa.attention import slots
from lrsa.cache import SparseKVCache
from lrsa.models import get_attention, make_cache, set_attention
from tests.architectures import model_of, tokens
from tests.cache.feeding import feed, left_padded
from tests.cache.test_feeding import CHUNKS, LAG, config_of


@pytest.mark.parametrize("length", [1, 3, 18, 19, 20, 43, 50, 200])
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_slots_are_the_closed_form(chunk, length):
    config = config_of("lag_relative", chunk)
    model = model_of("llama", config)
    cache = make_cache(model)
    feed(model, cache, tokens(2, length), 200)
    report = cache.report()
    geometry = config.geometry
    n = geometry.compressed(geometry.chunk_start(length))
    held = 3 + n * 3 + (length - 3 - n * LAG) if n else length
    assert report.tokens == (length, length)
    for layer in report.layers:
        assert (layer.kind, layer.slots) == ("sparse", held)
        assert layer.bytes == 2 * 2 * 2 * 16 * 4 * held  # keys and values, rows, heads, head_dim, float32
        assert layer.dense_bytes == 2 * 2 * 2 * 16 * 4 * length
    if chunk == LAG:
        assert held == slots(config, length) == len(cache.kept(0)[0][0])
    assert report.ratio == pytest.approx(length / held)
    assert (report.slots, report.bytes) == (held, 3 * report.layers[0].bytes)


def test_buffers_are_all_that_is_allocated_beyond():
    model = model_of("llama", config_of("tova"))
    cache = make_cache(model, max_tokens=100)
    feed(model, cache, tokens(2, 70), 70)
    for layer, report in zip(cache.layers, cache.report().layers, strict=True):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in vars(layer).values()
                    if isinstance(x, torch.Tensor)}  # fmt: skip
        assert sum(storages.values()) == report.bytes + report.buffer_bytes
    # A ring of 2L raw tokens, and sinks and kept tokens of the longest row: nothing else for keys and values.
    assert cache.layers[0].keys.shape[2] == 2 * LAG + 3 + 3 * ((100 - 3) // LAG - 1)


def test_ragged_rows_dense_layers_and_the_printed_table():
    model = model_of("llama", config_of("lag_relative", dense_layers=(1,)))
    ids, mask = left_padded([tokens(1, 70)[0], tokens(1, 40)[0]])
    cache = make_cache(model)
    feed(model, cache, ids, 70, mask)
    report = cache.report()
    assert [layer.kind for layer in report.layers] == ["sparse", "dense", "sparse"]
    assert report.layers[1].slots == 55 and report.layers[1].bytes == report.layers[1].dense_bytes
    assert "2 rows of 40 to 70 tokens" in str(report) and "dense" in str(report)
    assert report.to_dict()["layers"][0]["kind"] == "sparse"


def test_a_sliding_layer_reports_its_window():
    model = model_of("gemma3_text", config_of("lag_relative"))
    cache = make_cache(model)
    feed(model, cache, tokens(1, 60), 60)
    assert [layer.kind for layer in cache.report().layers] == ["sliding", "sparse", "sliding"]
    assert cache.report().layers[0].slots == 19
    with pytest.raises(ValueError, match="sliding-window"):
        cache.kept(0)


@pytest.mark.parametrize("budget", ["pyramid", "concentrated"])
def test_a_budget_by_layer_meets_no_sliding_layers(budget):
    config = config_of("lag_relative", budget=budget, dense_layers=(1,))
    refused = rf"budget='{budget}' on a model with 2 of 3 layers .*sliding_attention.*take budget='uniform'"
    with pytest.raises(ValueError, match=refused):
        model_of("gemma3_text", config)
    model = model_of("gemma3_text", replace(config, budget="uniform"))
    with pytest.raises(ValueError, match=refused):
        set_attention(model, config)
    assert get_attention(model).budget == "uniform"
    model.config.lrsa = config.to_dict()  # as one may by hand
    with pytest.raises(ValueError, match=refused):
        SparseKVCache(config, model.config)
    assert get_attention(model_of("llama", config)) == config
