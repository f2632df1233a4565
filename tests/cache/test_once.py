"""A cache under schedule ``prefill_once``: however the prompt is fed, what the parallel form computes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from lrsa.attention import SparseAttentionConfig, kept_tokens
from lrsa.attention.huggingface import ARCHITECTURES
from lrsa.cache import SparseKVCache, prefill
from lrsa.cache.graphed import GraphedStep
from lrsa.models import make_cache, set_attention
from tests.architectures import model_of, tokens
from tests.attention.tensors import LOCAL
from tests.cache.feeding import feed, kept, left_padded
from tests.cache.test_feeding import NEAR

PROMPT, TOKENS = 40, 50


def config_of(scorer: str = "tova", **options) -> SparseAttentionConfig:
    usual = {"sink_size": 3, "lag_size": 8, "keep_ratio": 0.3, "schedule": "prefill_once"}
    return SparseAttentionConfig(scorer=scorer, **(usual | options))


def sizes(block: int, prompt: int = PROMPT, total: int = TOKENS) -> list[int]:
    """Blocks of at most ``block`` columns, none of which crosses the prompt's end."""
    ends = [min(start + block, prompt) for start in range(0, prompt, block)]
    ends += [min(start + block, total) for start in range(prompt, total, block)]
    return [after - before for before, after in zip([0, *ends], ends, strict=False)]


@torch.no_grad()
def parallel(model, ids, prompt=PROMPT):
    return model(input_ids=ids, use_cache=False, prompt_lengths=prompt).logits


PAIRS = [("llama", scorer) for scorer in LOCAL]
PAIRS += [(family, scorer) for family in ARCHITECTURES for scorer in ("lag_relative", "tova") if family != "llama"]


@pytest.mark.parametrize(("family", "scorer"), PAIRS)
def test_all_forms_and_feedings_agree(family, scorer):
    config = config_of(scorer)
    model, ids = model_of(family, config, backend="reference"), tokens(2, TOKENS)
    mask_form = parallel(model, ids)
    set_attention(model, config, backend="auto")
    torch.testing.assert_close(parallel(model, ids), mask_form, **NEAR)
    caches = [(make_cache(model), [PROMPT, 10])]
    caches += [(make_cache(model, prompt_length=PROMPT), sizes(block)) for block in (1, 7, PROMPT)]
    held = None
    for cache, blocks in caches:
        logits = feed(model, cache, ids, blocks)
        torch.testing.assert_close(logits, mask_form, **NEAR, msg=lambda m, b=blocks: f"{b}: {m}")
        held = held or kept(cache)
        assert kept(cache) == held, blocks
    slots = config.held(PROMPT) + TOKENS - PROMPT
    assert {len(head) for layer in held for row in layer for head in row} == {slots}
    set_attention(model, None)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(dense[:, :PROMPT], mask_form[:, :PROMPT], **NEAR)
    assert (dense - mask_form)[:, PROMPT:].abs().max() > 0.01, "nothing was compressed"


@pytest.mark.parametrize("scorer", LOCAL)
def test_kept_tokens_are_those_of_the_parallel_form(scorer, monkeypatch):
    from lrsa.attention import once

    seen, real = {}, once.kept_tokens

    def spy(key, value, config, rows, **options):
        seen[options["layer_idx"]] = key, value, options["query"]
        return real(key, value, config, rows, **options)

    config = config_of(scorer)
    model, ids = model_of("llama", config), tokens(2, TOKENS)
    cache = make_cache(model, prompt_length=PROMPT)
    feed(model, cache, ids, sizes(13))
    monkeypatch.setattr(once, "kept_tokens", spy)
    parallel(model, ids)
    monkeypatch.undo()
    assert sorted(seen) == [0, 1, 2]
    for layer, (key, value, query) in seen.items():
        expected = kept_tokens(key, value, config, query=query, layer_idx=layer, prompt_lengths=PROMPT)
        for row in range(2):
            marked = [head.nonzero()[:, 0].tolist() for head in expected[row]]
            assert cache.kept(layer)[row].tolist() == marked


@pytest.mark.parametrize("scorer", ["lag_relative", "snapkv"])
@pytest.mark.parametrize("block", [1, 7, PROMPT])
def test_left_padded_rows_are_the_rows_alone(scorer, block):
    """Of as many lengths, one too short to be compressed, one of a single token; a turn follows."""
    model = model_of("llama", config_of(scorer))
    rows, more = [tokens(1, n, n)[0] for n in (PROMPT, 29, 10, 1)], tokens(4, 10, 9)
    ids, mask = left_padded(rows)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    cache = make_cache(model, prompt_length=PROMPT)
    logits = feed(model, cache, ids, sizes(block), mask)
    assert cache.report().tokens == (50, 39, 20, 11)
    for number, row in enumerate(rows):
        alone = make_cache(model)
        own = torch.cat([row, more[number]])[None]
        expected = feed(model, alone, own, [len(row), 10])
        torch.testing.assert_close(logits[number, PROMPT - len(row) :], expected[0], **NEAR)
        torch.testing.assert_close(parallel(model, own, len(row)), expected, **NEAR)
        assert [layer[number] for layer in kept(cache)] == [layer[0] for layer in kept(alone)]


def test_generate_is_the_forward_passes_by_hand():
    model = model_of("llama", config_of())
    ids, mask = left_padded([tokens(1, n, n)[0] for n in (PROMPT, 30)])
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = make_cache(model)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=settings)
    for row, length in ((0, PROMPT), (1, 30)):
        own = out[row : row + 1, PROMPT - length :]
        predicted = parallel(model, own, length)[0, length - 1 : -1].argmax(-1)
        assert predicted.tolist() == own[0, length:].tolist()


def test_prefill_in_blocks_knows_where_the_prompt_ends():
    model, ids = model_of("llama", config_of()), tokens(2, TOKENS)
    caches = [make_cache(model) for _ in range(2)]
    logits = [prefill(model, ids[:, :PROMPT], cache, block_size=b) for cache, b in zip(caches, (None, 7), strict=True)]
    torch.testing.assert_close(*logits, **NEAR)
    assert kept(caches[0]) == kept(caches[1])
    more = [prefill(model, ids[:, PROMPT:], cache, block_size=4) for cache in caches]  # a later turn, all of it kept
    torch.testing.assert_close(more[0], parallel(model, ids)[:, -1], **NEAR)
    assert caches[0].report().slots == config_of().held(PROMPT) + 10


@pytest.mark.parametrize("length", [1, 3, 11, 12, 40])
def test_slots_and_bytes_are_those_of_the_rule(length):
    config = config_of("lag_relative", dense_layers=(1,))
    model, cache = model_of("llama", config), None
    cache = make_cache(model)
    feed(model, cache, tokens(2, length), length)
    report = cache.report()
    assert report.tokens == (length, length)
    for layer, found in zip(cache.layers, report.layers, strict=True):
        held = length if found.kind == "dense" else config.held(length)
        assert found.slots == held == layer.keys.shape[2]
        assert found.bytes == 2 * 2 * 2 * 16 * 4 * held and found.dense_bytes == 2 * 2 * 2 * 16 * 4 * length
        assert found.buffer_bytes == 2 * 2 * held * 4 + (0 if layer.queries is None else layer.queries.nbytes)
    assert [found.kind for found in report.layers] == ["sparse", "dense", "sparse"]
    assert all(layer.queries is None for layer in cache.layers)


def test_crop_takes_back_what_came_after_the_prompt():
    model, ids = model_of("llama", config_of()), tokens(2, TOKENS)
    cache = make_cache(model)
    feed(model, cache, ids, [PROMPT, 8])
    other = copy.deepcopy(cache)
    cache.crop(-8)
    torch.testing.assert_close(feed(model, cache, ids[:, PROMPT:], 10), parallel(model, ids)[:, PROMPT:], **NEAR)
    before = kept(other)
    with pytest.raises(ValueError, match=r"crop leaves 39 columns of a prompt of 40, which .*compresses as a whole"):
        other.crop(-9)
    assert kept(other) == before and other.get_seq_length() == 48


def test_rows_are_reordered_repeated_and_selected():
    model = model_of("llama", config_of())
    ids, mask = left_padded([tokens(1, n, n)[0] for n in (PROMPT, 25, 33)])
    cache = make_cache(model)
    feed(model, cache, ids, PROMPT, mask)
    held = kept(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.lengths == (33, 40, 40)
    assert kept(cache) == [[layer[2], layer[0], layer[0]] for layer in held]
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    assert kept(cache) == [[layer[2], layer[2], layer[0], layer[0]] for layer in held]
    more = tokens(1, 6, 7).expand(4, -1)
    logits = feed(model, cache, more, 6, torch.cat([mask[[2, 2, 0, 0]], torch.ones((4, 6), dtype=torch.long)], 1))
    expected = parallel(model, torch.cat([ids[2, 7:], more[0]])[None], 33)[:, -6:]
    torch.testing.assert_close(logits[:2], expected.expand(2, -1, -1), **NEAR)


def test_reset_forgets_everything():
    model, ids = model_of("llama", config_of("snapkv")), tokens(2, TOKENS)
    for cache in (make_cache(model), make_cache(model, prompt_length=30)):
        feed(model, cache, tokens(1, 30, 5), [30])
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.report().slots == 0
        end = cache.prompt_length or PROMPT
        torch.testing.assert_close(feed(model, cache, ids, [end, TOKENS - end]), parallel(model, ids, end), **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("fed", [0, 1])
def test_a_refused_input_loses_nothing(fed):
    """Neither of the prompt, which may come again with another length, nor of what follows it."""
    model, ids = model_of("llama", config_of()), tokens(2, TOKENS)
    cache, untouched = make_cache(model), make_cache(model)
    for each in (cache, untouched) if fed else ():
        feed(model, each, ids[:, :PROMPT], PROMPT)
    past = fed * PROMPT
    right_pads = torch.ones((2, 30), dtype=torch.long)
    right_pads[1, 25:] = 0
    refused = [({"input_ids": ids[:, :7], "position_ids": torch.arange(7)[None] + 3}, "has position 3 and should")]
    if fed:
        refused += [({"input_ids": ids[:1, PROMPT:], "position_ids": torch.arange(40, 50)[None]}, "a batch of 1 rows")]
    else:
        refused += [({"input_ids": ids[:, :30], "attention_mask": right_pads}, "takes pads on its left alone")]
    for given, message in refused:
        with pytest.raises(ValueError, match=message):
            model(past_key_values=cache, **given)
    other = model_of("llama", config_of("keydiff"))
    with pytest.raises(ValueError, match=r"the cache was made for .*scorer='tova'.* attends with .*scorer='keydiff'"):
        prefill(other, ids[:, past : past + 5], cache)
    blocks = [10] if fed else [PROMPT, 10]
    found, expected = (feed(model, each, ids[:, past:], blocks) for each in (cache, untouched))
    assert torch.equal(found, expected) and kept(cache) == kept(untouched)
    torch.testing.assert_close(found, parallel(model, ids)[:, past:], **NEAR)


def test_what_it_refuses():
    model, ids = model_of("llama", config_of()), tokens(2, TOKENS)
    with pytest.raises(ValueError, match=r"prompt ends at prompt_length=40, where it is compressed: feed 12 columns"):
        feed(model, make_cache(model, prompt_length=PROMPT), ids, [28, 22])
    with pytest.raises(ValueError, match=r"a row comes to 41 tokens, but the cache was made with max_tokens=40"):
        feed(model, make_cache(model, max_tokens=40), ids, [PROMPT, 1])
    mask = torch.ones((2, PROMPT), dtype=torch.long)
    mask[1, 30:] = 0
    with pytest.raises(ValueError, match=r"takes pads on its left alone.*batch_size=1"):
        feed(model, make_cache(model), ids[:, :PROMPT], PROMPT, mask)
    cache = make_cache(model, max_tokens=TOKENS)
    feed(model, cache, ids[:, :PROMPT], PROMPT)
    with (
        pytest.raises(ValueError, match=r"static decoding is not there for schedule='prefill_once'"),
        GraphedStep(model, cache),
    ):
        pass
    with pytest.raises(ValueError, match=r"prompt_length=0: give a positive number"):
        make_cache(model, prompt_length=0)
    chunked = SparseAttentionConfig(lag_size=8)
    set_attention(model, chunked)
    with pytest.raises(ValueError, match=r"prompt_length=9 with schedule='chunked'.*set schedule='prefill_once'"):
        SparseKVCache(chunked, model.config, prompt_length=9)
