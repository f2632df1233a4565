"""Kept-token maps say what a cache holds after the same prompt, and rank by what the scorers say."""

import numpy as np
import pytest
import torch

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.inspection import inspecting
from lrsa.cache import SparseKVCache
from lrsa.evaluation.kept import kept_map
from lrsa.models import get_attention, set_attention
from tests.architectures import SMALL, model_of

WORDS = "the special magic number for a rainy day is seven and nobody knows it . " * 12
CONFIGS = {
    "lag_relative": SparseAttentionConfig(sink_size=4, lag_size=16),
    "reads queries": SparseAttentionConfig("snapkv", sink_size=4, lag_size=16, keep_ratio=1 / 8),
    "keeps nothing": SparseAttentionConfig("recency", sink_size=4, lag_size=16, top_k=0),
    "dense layers": SparseAttentionConfig(sink_size=4, lag_size=16, dense_layers=(0, -1)),
    "unlike layers": SparseAttentionConfig(sink_size=4, lag_size=16, budget="pyramid"),
    "a dense layer's share": SparseAttentionConfig(sink_size=4, lag_size=16, budget="concentrated", dense_layers=(1,)),
    "a hybrid": SparseAttentionConfig(
        "recency",
        sink_size=4,
        lag_size=16,
        keep_ratio=1 / 2,
        budget="concentrated",
        dense_layers=(1,),
        equal_bytes_at=99,
    ),
    "once": SparseAttentionConfig("h2o", sink_size=4, lag_size=16, schedule="prefill_once"),
}


def held_by_cache(model, attention, ids: np.ndarray) -> list[np.ndarray]:
    """bool ``[H, T]`` of each layer, after one forward pass over a prompt."""
    set_attention(model, attention)
    cache = SparseKVCache(attention, model.config)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
    set_attention(model, None)
    masks = []
    for layer in range(model.config.num_hidden_layers):
        mask = np.zeros((model.config.num_key_value_heads, len(ids)), dtype=bool)
        for head, positions in enumerate(cache.kept(layer)[0].tolist()):
            mask[head, positions] = True
        masks.append(mask)
    return masks


@pytest.mark.parametrize("attention", CONFIGS.values(), ids=CONFIGS)
def test_the_map_is_what_a_cache_holds(model, tokenizer, attention):
    found = kept_map(model, tokenizer, WORDS, attention)
    assert found.kept.shape == (3, 2, len(found.tokens)) == found.scores.shape
    for layer, held in enumerate(held_by_cache(model, attention, found.input_ids)):
        np.testing.assert_array_equal(found.kept[layer], held)
    assert found.ratio > 1.2
    assert get_attention(model) is None and not model.training, "given back as it was"


@pytest.mark.parametrize(
    "attention",
    [
        *CONFIGS.values(),
        SparseAttentionConfig("oracle", sink_size=4, lag_size=16),
        SparseAttentionConfig("snapkv", sink_size=4, lag_size=16, budget="adaptive"),
    ],
    ids=lambda config: f"{config.scorer}-{config.schedule}-{config.budget}-{config.top_k}-{len(config.dense_layers)}",
)
def test_what_is_kept_of_a_partition_scored_best(model, tokenizer, attention):
    found = kept_map(model, tokenizer, WORDS, attention)
    assert found.ranked.any() and not np.isnan(found.scores[:, 0][found.ranked]).any()
    assert np.isnan(found.scores[:, 0][~found.ranked]).all() and found.kept[:, 0][~found.ranked].all()
    if attention.top_k == 0:
        assert not found.kept[:, 0][found.ranked].any()
        return
    for layer in range(3):
        ranked = np.flatnonzero(found.ranked[layer])
        size = attention.lag_size if attention.schedule == "chunked" else max(len(ranked), 1)
        for positions in ranked.reshape(-1, size):
            for head in range(2):
                scores, kept = found.scores[layer, head, positions], found.kept[layer, head, positions]
                if kept.any() and not kept.all():
                    assert scores[kept].min() >= scores[~kept].max()


def test_tokens_are_the_text(recall_model, tokenizer):
    text = "the code of apple is  river stone\nnaïve 日本語 end"
    found = kept_map(recall_model, tokenizer, text, SparseAttentionConfig(sink_size=2, lag_size=4))
    assert "".join(found.tokens).endswith(text)
    assert len(found.tokens) == len(found.input_ids)


def test_a_prompt_too_short_to_compress_is_all_kept(model, tokenizer):
    found = kept_map(model, tokenizer, "a short prompt", SparseAttentionConfig(lag_size=64))
    assert found.kept.all() and not found.ranked.any() and found.ratio == 1
    with pytest.raises(ValueError, match="the prompt is empty"):
        kept_map(model, tokenizer, "", SparseAttentionConfig(), add_special_tokens=False)


def test_a_sliding_layer_holds_its_window(tokenizer):
    """Gemma 3 mixes such layers in; lrsa leaves them as they are."""
    model = model_of("gemma3_text", None)

    class Bytes:  # a vocabulary as small as the model's
        is_fast, all_special_ids = False, ()

        def __call__(self, text, **_):
            return {"input_ids": [3 + ord(mark) % (SMALL["vocab_size"] - 3) for mark in text]}

        def decode(self, ids):
            return str(ids[0])

    found = kept_map(model, Bytes(), WORDS[:200], SparseAttentionConfig(sink_size=4, lag_size=16))
    window = model.config.sliding_window
    assert found.kept[0].sum(-1).tolist() == [window, window] and found.kept[0, :, -window:].all()
    assert found.slots[1].tolist() == [found.attention.geometry.slots(200)] * 2


def test_a_prompts_own_special_tokens_are_shown_by_name(model, tokenizer):
    seen = []
    with inspecting(seen.append):
        found = kept_map(model, tokenizer, f"{tokenizer.eos_token}the code", SparseAttentionConfig(lag_size=4))
    assert found.tokens[0] == tokenizer.eos_token and [inputs.layer_idx for inputs in seen] == [0, 1, 2]
