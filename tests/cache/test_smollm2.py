"""All forms on a real model: SmolLM2-135M, float32. Slow: twelve configurations, each fed token by token too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lrsa.attention import SparseAttentionConfig
from lrsa.models import load_model, load_tokenizer, make_cache, set_attention
from tests.attention.tensors import LOCAL
from tests.cache.feeding import feed, kept, parallel

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAG, TOKENS = 64, 400
NEAR = {"rtol": 1e-3, "atol": 2e-3}  # of logits that reach 40


@pytest.fixture(scope="module")
def smollm2(repository):
    folder = Path(os.environ.get("LRSA_SMOLLM2", repository / "models" / "SmolLM2-135M-Instruct"))
    if not (folder / GGUF).is_file():
        pytest.skip(f"no {folder / GGUF}: `make model` puts it there, or LRSA_SMOLLM2 names its folder")
    text = (repository / "README.md").read_text(encoding="utf-8")
    ids = load_tokenizer(folder, gguf_file=GGUF)(text, return_tensors="pt").input_ids[:, :TOKENS]
    return load_model(folder, None, gguf_file=GGUF).eval(), ids


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [LAG, 2 * LAG, 3 * LAG + 1], ids=["C=L", "C=2L", "C=3L+1"])
@pytest.mark.parametrize("scorer", LOCAL)
def test_all_forms_and_feedings_agree(smollm2, scorer, chunk):
    model, ids = smollm2
    config = SparseAttentionConfig(
        scorer=scorer, sink_size=16, lag_size=LAG, top_k=0 if scorer == "recency" else 16, chunk_size=chunk
    )
    set_attention(model, config, backend="reference")
    mask_form = parallel(model, ids)
    set_attention(model, config, backend="gather")
    torch.testing.assert_close(parallel(model, ids), mask_form, **NEAR)
    held = None
    for block in (1, 64, 2 * LAG, 3 * LAG + 1, TOKENS):
        cache = make_cache(model)
        torch.testing.assert_close(
            feed(model, cache, ids, block), mask_form, **NEAR, msg=lambda m, b=block: f"{b}: {m}"
        )
        held = held or kept(cache)
        assert kept(cache) == held, f"blocks of {block}"
