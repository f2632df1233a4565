"""The vectors of the LagKV authors' own cache, through ours, fed as theirs was and in other ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.huggingface import CACHE_ATTEND
from lrsa.cache import SparseKVCache


@pytest.fixture(scope="module")
def vectors(shared_data):
    with np.load(shared_data / "conformance" / "lagkv_vectors.npz", allow_pickle=False) as archive:
        return dict(archive)


def cache_of(config: SparseAttentionConfig) -> SparseKVCache:
    model_config = LlamaConfig(num_hidden_layers=1)
    model_config._attn_implementation = "lrsa"
    model_config.lrsa = config.to_dict()
    return SparseKVCache(config, model_config)


def take_in(cache: SparseKVCache, key: torch.Tensor, value: torch.Tensor) -> None:
    key, value = cache.update(key.clone(), value, 0)
    attend = getattr(key, CACHE_ATTEND)
    attend(key, key, value, attention_mask=None, position_ids=None, config=cache.config, scale=0.1, backend="auto")


@pytest.mark.parametrize("blocks", ["as recorded", 1, 7])
@pytest.mark.parametrize("case", range(6))
def test_every_cached_row_is_the_authors(vectors, case, blocks):
    sink, lag, kept, chunk, weight = vectors[f"{case}.params"].tolist()
    config = SparseAttentionConfig(
        scorer_args={"value_weight": weight}, sink_size=int(sink), lag_size=int(lag), top_k=int(kept),
        chunk_size=int(chunk),
    )  # fmt: skip
    key, value = (torch.from_numpy(vectors[f"{case}.{name}"]) for name in ("keys", "values"))
    cache = cache_of(config)
    for j, (first, stop) in enumerate(vectors[f"{case}.bounds"].tolist()):
        size = stop - first if blocks == "as recorded" else blocks
        for start in range(first, stop, size):
            block = slice(start, min(stop, start + size))
            take_in(cache, key[:, :, block], value[:, :, block])
        expected = vectors[f"{case}.cached.{j}"]
        found = torch.stack(cache.kept(0)).numpy()
        assert np.array_equal(found, expected), f"chunk {j}"
