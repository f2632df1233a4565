"""Random geometries, rows and feedings: the cache's attention is the mask form's, row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from lrsa.attention.huggingface import CACHE_ATTEND
from lrsa.cache import SparseKVCache
from tests.attention.tensors import random_inputs


@st.composite
def cases(draw):
    lag = draw(st.integers(1, 9))
    scorer = draw(st.sampled_from(["lag_relative", "tova", "random", "recency"]))
    config = SparseAttentionConfig(
        scorer=scorer,
        sink_size=draw(st.integers(0, 7)),
        lag_size=lag,
        top_k=draw(st.integers(0, lag)),
        chunk_size=draw(st.integers(1, 4 * lag)),
        dense_layers=(0,) if draw(st.booleans()) and draw(st.booleans()) else (),
    )
    # Blocks: for each, how many tokens each row reads in it; the rest of the block's columns are pads.
    rows = draw(st.integers(1, 3))
    blocks = draw(st.lists(st.lists(st.integers(0, 25), min_size=rows, max_size=rows), min_size=1, max_size=6))
    left = draw(st.booleans())
    max_tokens = draw(st.booleans())
    return (
        config,
        blocks,
        left,
        max_tokens,
        draw(st.integers(0, 10_000)),
        draw(st.sampled_from([(2, 1), (4, 2), (3, 3)])),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_cache_is_the_mask_form(case):
    config, blocks, left, max_tokens, seed, (query_heads, heads) = case
    lengths = [sum(block[row] for block in blocks) for row in range(len(blocks[0]))]
    if max(lengths) == 0:
        return
    inputs = [random_inputs(1, query_heads, heads, n, 16, seed + row) for row, n in enumerate(lengths)]
    cache = cache_of(config, max(lengths) if max_tokens else None)
    outputs = [[] for _ in lengths]
    done, mask = [0] * len(lengths), torch.zeros((len(lengths), 0), dtype=torch.long)
    for block in blocks:
        width = max(block)
        if width == 0:
            continue
        real = torch.stack([places(width, n, left) for n in block])
        mask = torch.cat([mask, real.long()], 1)
        query, key, value = (torch.full((len(lengths), n, width, 16), torch.nan) for n in (query_heads, heads, heads))
        positions = torch.zeros((len(lengths), width), dtype=torch.long)
        for row, n in enumerate(block):
            part = slice(done[row], done[row] + n)
            for whole, x in zip(inputs[row], (query, key, value), strict=True):
                x[row][:, real[row]] = whole[0][:, part]
            positions[row, real[row]] = torch.arange(part.start, part.stop)
            done[row] += n
        key, value = cache.update(key, value, 0)
        out = getattr(key, CACHE_ATTEND)(
            query, key, value, attention_mask=mask, position_ids=positions, config=cache.config, scale=0.25,
            backend="auto",
        )  # fmt: skip
        for row in range(len(lengths)):
            outputs[row].append(out[row][:, real[row]])
    assert cache.lengths == tuple(lengths)
    for row, n in enumerate(lengths):
        if n == 0:
            continue
        expected = sparse_attention(*inputs[row], config, scale=0.25, backend="reference")[0]
        torch.testing.assert_close(torch.cat(outputs[row], 1), expected, rtol=1e-4, atol=1e-5)
        query, key, value = inputs[row]
        held = kept_tokens(key, value, config, query=query, scale=0.25)[0]
        for head, positions in enumerate(cache.kept(0)[row].tolist()):
            assert positions == held[head].nonzero()[:, 0].tolist()


def places(width: int, tokens: int, left: bool) -> torch.Tensor:
    columns = torch.arange(width)
    return columns >= width - tokens if left else columns < tokens


def cache_of(config: SparseAttentionConfig, max_tokens: int | None) -> SparseKVCache:
    model_config = LlamaConfig(num_hidden_layers=1)
    model_config._attn_implementation = "lrsa"
    model_config.lrsa = config.to_dict()
    return SparseKVCache(config, model_config, max_tokens)
