import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.config import ExamplesConf
from lrsa.data import Sample, SampleSet
from lrsa.data.vocabulary import build_tokenizer
from lrsa.models import load_model

# The recall that recall-tiny was trained on, with fewer needles.
RECALL_ARGS = {
    "needles": 12,
    "values": "words",
    "value_digits": 2,
    "key_words": 1,
    "statement": "The code of {key} is {value}.",
    "question": "Recall the code of {key}",
    "instruction": "",
}


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


@pytest.fixture(scope="session")
def recall_model() -> PreTrainedModel:
    """The packaged model, which finds a needle among 24 with the full cache, and fewer the more is compressed."""
    return load_model("recall-tiny").eval()


@pytest.fixture(scope="session")
def recall_samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """24 prompts of as many lengths, 240 to 447 tokens: each batch is ragged."""
    conf = ExamplesConf(source="needles", limit=24, args=RECALL_ARGS)
    return [SampleSet(conf, tokenizer, 240 + 9 * index)[index] for index in range(24)]
