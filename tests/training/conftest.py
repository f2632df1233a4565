"""A tiny model and a stream of random samples: enough to train on in a second, no tokenizer, no download."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.config import RecipeConf, TrainerConf
from lrsa.models import load_model
from lrsa.training import PostTraining, fit

VOCABULARY, LENGTH = 61, 40
SPARSE = SparseAttentionConfig(sink_size=2, lag_size=8, keep_ratio=0.5)


@pytest.fixture
def make_model() -> Callable[[], PreTrainedModel]:
    """Two-layer Llama, 2 KV heads for 4 query heads; the same weights at every call; `options` of
    `load_model`."""

    def make(hidden_size: int = 32, num_hidden_layers: int = 2, **options: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
        return load_model("fresh", None, config=config, **options)

    return make


def make_sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids [T], answer_mask [T]) of sample `index`; between 1 and 7 targets."""
    generator = torch.Generator().manual_seed(index)
    input_ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
    answer_mask = torch.zeros(LENGTH, dtype=torch.bool)
    answer_mask[-1 - index % 7 :] = True
    return input_ids, answer_mask


class Samples(IterableDataset):
    """Endless micro-batches from sample `start` on; remembers which were read."""

    def __init__(self, size: int, start: int, spoil: tuple[int, ...] = ()) -> None:
        self.size, self.start, self.spoil = size, start, spoil

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = self.start
        while True:
            rows = range(position, position + self.size)
            samples = [make_sample(row) for row in rows]
            position += self.size
            yield {
                "input_ids": torch.stack([ids for ids, _ in samples]),
                "answer_mask": torch.stack([mask for _, mask in samples]),
                "document_ids": None,
                "ids": [f"sample-{row}" for row in rows],
            }


class RandomData(LightningDataModule):
    """Sample k of the stream is the same whatever the micro-batch size."""

    def __init__(self, recipe: RecipeConf) -> None:
        super().__init__()
        self.recipe = recipe

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step * self.recipe.batch_size
        return DataLoader(Samples(self.recipe.micro_batch_size or self.recipe.batch_size, start), batch_size=None)


def train(
    model: PreTrainedModel,
    recipe: RecipeConf,
    trainer: TrainerConf,
    folder: Path,
    attention: SparseAttentionConfig | None = SPARSE,
    **options: Any,
) -> tuple[PostTraining, list[dict[str, Any]]]:
    module = PostTraining(model, attention, recipe, seed=3)
    return module, fit(module, RandomData(recipe), trainer, folder, **options).history


@pytest.fixture
def recipe() -> RecipeConf:
    return RecipeConf(steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=2, compressions=[2, 4])


@pytest.fixture
def trainer() -> TrainerConf:
    return TrainerConf(accelerator="cpu", checkpoint_every=100, progress=False, log_every=1)
