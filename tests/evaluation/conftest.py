import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.data.vocabulary import build_tokenizer
from lrsa.models import load_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Fresh weights, 3 layers; scaled up so that predictions depend on what is attended to."""
    torch.manual_seed(1)
    config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
    }
    return load_model("fresh", None, config=config).eval()
