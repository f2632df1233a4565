"""What transformers asks of a cache, what compression makes impossible, and states that must not be used."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lrsa.attention import SparseAttentionConfig
from lrsa.cache import SparseKVCache, layer
from lrsa.cache.graphed import GraphedStep
from lrsa.models import get_attention, make_cache, set_attention
from tests.architectures import model_of, tokens
from tests.cache.feeding import feed, kept, left_padded, parallel
from tests.cache.test_feeding import LAG, NEAR, TOKENS, config_of


@pytest.fixture
def model():
    return model_of("llama", config_of("tova"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"scorer": "oracle"}, "scorer='oracle' ranks"), ({"scorer": "tova", "budget": "adaptive"}, "budget='adaptive'")],
)
def test_what_the_mask_form_alone_computes_is_refused(options, reason):
    model = model_of("llama", SparseAttentionConfig(sink_size=3, lag_size=LAG, **options))
    with pytest.raises(ValueError, match=rf"SparseKVCache cannot hold this: {reason}.*mode=score.*set_attention"):
        make_cache(model)
    with pytest.raises(ValueError, match=r"make_cache|prompt_lengths="):
        model.generate(tokens(1, 40), max_new_tokens=2)


def test_crop_takes_back_what_is_not_compressed(model):
    ids = tokens(2, TOKENS)
    cache = make_cache(model)
    feed(model, cache, ids[:, :40], 40)  # compressed anew at 35 and at 43
    cache.crop(-5)
    assert cache.get_seq_length() == 35 and cache.lengths == (35, 35)
    torch.testing.assert_close(feed(model, cache, ids[:, 35:], 4), parallel(model, ids)[:, 35:], **NEAR)
    fresh = make_cache(model)
    feed(model, fresh, ids, TOKENS)
    assert kept(cache) == kept(fresh)


def test_crop_by_length_as_5_2_asks(model):
    ids = tokens(1, 12)
    cache = make_cache(model)
    feed(model, cache, ids, 12)
    cache.crop(0)
    cache.crop(20)
    assert cache.get_seq_length() == 12
    cache.crop(4)
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(feed(model, cache, ids[:, 4:], 8), parallel(model, ids)[:, 4:], **NEAR)


def test_crop_into_compressed_history_is_refused_and_changes_nothing(model):
    rows = [tokens(1, 40)[0], tokens(1, 30)[0]]
    ids, mask = left_padded(rows)
    cache = make_cache(model)
    feed(model, cache, ids, 40, mask)
    before = kept(cache), cache.lengths, cache.get_seq_length()
    with pytest.raises(ValueError, match=r"row 0 from 40 to 34 tokens.*at most 5 tokens"):
        cache.crop(-6)
    with pytest.raises(ValueError, match="holds 40 columns"):
        cache.crop(-41)
    assert (kept(cache), cache.lengths, cache.get_seq_length()) == before
    cache.crop(-3)
    assert cache.lengths == (37, 27)


def test_rows_are_reordered_repeated_and_selected(model):
    rows = [tokens(1, n, n)[0] for n in (40, 25, 33)]
    ids, mask = left_padded(rows)
    cache = make_cache(model)
    feed(model, cache, ids, 40, mask)
    held = kept(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.lengths == (33, 40, 40)
    assert kept(cache) == [[layer[2], layer[0], layer[0]] for layer in held]
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    assert cache.lengths == (33, 33, 40, 40)
    more = tokens(1, 20, 7).expand(4, -1)
    mask = torch.cat([mask[[2, 2, 0, 0]], torch.ones((4, 20), dtype=torch.long)], 1)
    logits = feed(model, cache, more, 20, mask)
    expected = parallel(model, torch.cat([rows[2], more[0]])[None])[:, -20:]
    torch.testing.assert_close(logits[:2], expected.expand(2, -1, -1), **NEAR)


def test_reset_and_copies_start_anew(model):
    ids = tokens(2, TOKENS)
    cache = make_cache(model)
    feed(model, cache, ids, 10)
    saved = copy.deepcopy(cache)
    feed(model, cache, ids[:, :7], 7)
    torch.testing.assert_close(
        feed(model, saved, ids[:, :7], 7), feed(model, cache_of(model, ids), ids[:, :7], 7), **NEAR
    )
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.report().slots == 0
    torch.testing.assert_close(feed(model, cache, ids, 10), parallel(model, ids), **NEAR)
    cache.reset()
    other = tokens(3, 30)  # another batch size is welcome once nothing is held
    torch.testing.assert_close(feed(model, cache, other, 10), parallel(model, other), **NEAR)


def cache_of(model, ids):
    cache = make_cache(model)
    feed(model, cache, ids, 10)
    return cache


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("where", ["attend", "_write_ring"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_cache_refuses_further_use(model, monkeypatch, kind, where, at):
    ids = tokens(1, TOKENS)
    cache = make_cache(model)
    feed(model, cache, ids[:, :20], 20)
    real = getattr(layer.SparseLayer, where)

    def fail(self, *args, **kwargs):
        if self.layer_idx == at:
            raise kind("stop")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(layer.SparseLayer, where, fail)
    with pytest.raises(kind, match="stop"):
        feed(model, cache, ids[:, 20:], 30)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="reset"):
            feed(model, cache, ids[:, 20:], 30)
    with pytest.raises(RuntimeError, match="reset"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match="reset"):
        cache.reorder_cache(torch.tensor([0]))
    cache.reset()
    torch.testing.assert_close(feed(model, cache, ids, 30), parallel(model, ids), **NEAR)


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupted_compression_between_static_steps_is_noticed(model, monkeypatch, at):
    ids, cache = tokens(1, 35), make_cache(model, 60)
    feed(model, cache, ids[:, :34], 34)  # the next token completes a chunk
    real = layer.SparseLayer.compress_due

    def fail(self, *args):
        if self.layer_idx == at:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(layer.SparseLayer, "compress_due", fail)
    with pytest.raises(KeyboardInterrupt), GraphedStep(model, cache) as step:
        step(ids[:, 34])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="reset"):
        feed(model, cache, ids[:, 34:], 1)
    with pytest.raises(RuntimeError, match="reset"):
        cache.begin_static()
    cache.reset()
    torch.testing.assert_close(feed(model, cache, ids, 35), parallel(model, ids), **NEAR)


def test_an_exception_between_layers_is_noticed(model, monkeypatch):
    ids, cache = tokens(1, 30), make_cache(model)

    def fail(*args):
        raise MemoryError("stop")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        feed(model, cache, ids, 30)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"ended before layers \[1, 2\]"):
        feed(model, cache, ids, 30)


def test_a_model_that_attends_otherwise_is_refused(model):
    config = get_attention(model)
    set_attention(model, None)
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        SparseKVCache(config, model.config)
    set_attention(model, config)
    cache = SparseKVCache(config, model.config)
    set_attention(model, None)
    with pytest.raises(RuntimeError, match="never attended by the lrsa attention"):
        feed(model, cache, tokens(1, 10), 10)


def test_another_compression_than_the_models_is_refused(model):
    other = SparseAttentionConfig(scorer="tova", sink_size=3, lag_size=LAG, top_k=5)
    with pytest.raises(ValueError, match="give both the same"):
        SparseKVCache(other, model.config)
    cache = make_cache(model)
    feed(model, cache, tokens(1, 10), 10)
    set_attention(model, other)
    with pytest.raises(ValueError, match="the cache was made for"):
        feed(model, cache, tokens(1, 10), 10)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
def test_an_ordinary_cache_is_refused_by_a_sparse_model(model, make):
    ids = tokens(1, 10)
    with torch.no_grad(), pytest.raises(ValueError, match="make_cache"):
        cache = make(config=model.config)
        for start in (0, 9):
            model(input_ids=ids[:, start : start + 9], past_key_values=cache, use_cache=True)


def test_wrong_masks_positions_and_batches_are_refused_and_lose_nothing(model):
    ids = tokens(2, 31)
    cache, untouched = make_cache(model), make_cache(model)
    for each in (cache, untouched):
        feed(model, each, ids[:, :30], 30)
    lying = torch.ones(2, 31)
    lying[0, 3] = 0
    one = torch.tensor([[30]])
    with torch.no_grad():
        for given, message in (
            ({"attention_mask": torch.ones(2, 5)}, r"\[B, columns\] = \(2, 31\)"),
            ({"attention_mask": lying}, "past columns"),
            ({"position_ids": torch.tensor([[0]])}, "new token 0 has position 0 and should have 30"),
            ({"input_ids": ids[:1, :1], "position_ids": one}, "a batch of 1 rows for a cache that holds 2"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**{"input_ids": ids[:, 30:], "past_key_values": cache} | given)
        found, expected = (model(input_ids=ids[:, 30:], past_key_values=each).logits for each in (cache, untouched))
    assert torch.equal(found, expected)


def test_left_pads_without_position_ids_are_noticed(model):
    ids, mask = left_padded([tokens(1, 20)[0], tokens(1, 30)[0]])
    with torch.no_grad(), pytest.raises(ValueError, match="row 0: new token 10 has position 10 and should have 0"):
        model(input_ids=ids, attention_mask=mask, past_key_values=make_cache(model))


def test_gradients_are_refused(model):
    with pytest.raises(ValueError, match="no gradient"):
        model(input_ids=tokens(1, 10), past_key_values=make_cache(model))


def test_prefill_chunk_size_of_generate_gives_the_same_or_is_refused(model):
    """transformers 5.2 repeats positions there, even with a dense cache."""
    ids, options = tokens(1, 40), {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    expected = model.generate(ids, past_key_values=make_cache(model), **options)
    try:
        found = model.generate(ids, past_key_values=make_cache(model), prefill_chunk_size=16, **options)
    except ValueError as error:
        assert "prefill_chunk_size" in str(error)
    else:
        assert found.tolist() == expected.tolist()


def test_assisted_decoding_is_refused(model):
    with pytest.raises(ValueError, match=r"assisted decoding|compressed history"):  # 5.2 never asks
        model.generate(
            tokens(1, 40), past_key_values=make_cache(model), do_sample=False, max_new_tokens=30, eos_token_id=2,
            prompt_lookup_num_tokens=3,
        )  # fmt: skip


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_max_tokens_is_positive(model, max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens={max_tokens}"):
        make_cache(model, max_tokens)
