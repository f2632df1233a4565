"""Small random models of each of `lrsa.attention.huggingface.ARCHITECTURES`, shared by the tests."""

from __future__ import annotations

import torch

from lrsa.attention import SparseAttentionConfig
from lrsa.models import load_model

SMALL = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
# What an architecture needs besides. Gemma 3 mixes sliding-window layers in, which stay as they are.
FAMILIES = {
    "gemma": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 20,
        "query_pre_attn_scalar": 16,
    },
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
}


def model_of(family: str, attention: SparseAttentionConfig | None, **options):
    """A model with three layers, the same weights whenever it is asked for."""
    torch.manual_seed(0)
    return load_model("fresh", attention, config={"model_type": family, **SMALL, **FAMILIES[family]}, **options).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids ``[B, T]``, none of them special."""
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
