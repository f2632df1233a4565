"""The training mixture as a resumable stream of micro-batches.

B samples a micro-batch, T tokens a sample. Sample g of a run (g counts over all devices, optimiser steps and restarts)
depends on (data, seed, g) alone: its part is drawn from (seed, g), and it is the part's next sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lrsa.config import DataConf, ExamplesConf, RecipeConf
from lrsa.data.assembly import SampleSet
from lrsa.data.prose import ProseSet
from lrsa.data.sample import Sample
from lrsa.data.sources import source_of
from lrsa.data.tokens import digest


class Batch(TypedDict):
    """input_ids [B, T] int64; answer_mask [B, T] bool, True where a token is a target (predicted from the position
    before it); document_ids [B, T] int64, 0 for tokens and -1 for pads, or None when no row is padded; ids, B names."""

    input_ids: torch.Tensor
    answer_mask: torch.Tensor
    document_ids: torch.Tensor | None
    ids: list[str]


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Right-pad samples to the longest one."""
    longest = max(sample.length for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_id, dtype=torch.long)
    answer_mask = torch.zeros((len(samples), longest), dtype=torch.bool)
    document_ids = torch.full((len(samples), longest), -1, dtype=torch.long)
    for row, sample in enumerate(samples):
        input_ids[row, : sample.length] = torch.tensor(sample.input_ids, dtype=torch.long)
        document_ids[row, : sample.length] = 0
        for start, stop in sample.answer_spans:
            answer_mask[row, start:stop] = True
    padded = any(sample.length < longest for sample in samples)
    ids = [sample.id for sample in samples]
    return Batch(input_ids=input_ids, answer_mask=answer_mask, document_ids=document_ids if padded else None, ids=ids)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id, or the EOS token's (a pad is told by document_ids, never by its id), or 0."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in found if isinstance(i, int))


class Mixture(Dataset[Sample]):
    """Samples 0 .. total-1 of a run, parts drawn by weight."""

    def __init__(
        self, parts: Mapping[str, SampleSet | ProseSet], weights: dict[str, float], seed: int, total: int
    ) -> None:
        self.parts, self.total = parts, total
        names = list(parts)
        share = np.array([weights[name] for name in names], dtype=np.float64)
        if not names or (share < 0).any() or share.sum() <= 0:
            raise ValueError(f"data.parts weights {dict(weights)} must not be negative, nor all be 0")
        # One sequence from the seed: a longer run begins with the same draws as a shorter one.
        draws = np.random.Generator(np.random.Philox(key=int(digest(["mixture", str(seed)])[:16], 16))).random(total)
        edges = np.cumsum(share) / share.sum()
        choice = np.minimum(np.searchsorted(edges, draws, side="right"), len(names) - 1)
        within = np.zeros(total, dtype=np.int64)
        for index in range(len(names)):
            within[choice == index] = np.arange((choice == index).sum())
        self.plan = [(names[part], int(number)) for part, number in zip(choice, within, strict=True)]

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Sample:
        name, number = self.plan[index]
        return self.parts[name].sample(number)

    def check(self) -> None:
        """Find a sample that does not fit before the first step."""
        for name, part in self.parts.items():
            part.check(sum(1 for chosen, _ in self.plan if chosen == name))


class ResumableSampler(DistributedSampler[int]):
    """Global sample numbers of one device in order, from `start` on.

    Consecutive blocks of `block` samples go to devices 0, 1, ... in turn. A DistributedSampler so that Lightning leaves
    it alone. Its length is that of the whole run, whatever `start` is: a restored trainer counts batches from 0.
    """

    def __init__(self, data: Mixture, start: int, block: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(data, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.start, self.block, self.stop = start, block, len(data)

    def __iter__(self) -> Iterator[int]:
        for first in range(self.start + self.rank * self.block, self.stop, self.block * self.num_replicas):
            yield from range(first, min(first + self.block, self.stop))

    def __len__(self) -> int:
        return self.stop // self.num_replicas


class StreamLoader(DataLoader[Sample]):
    """A loader that tells Lightning that it can be resumed; the data module holds the position (`start_sample`)."""

    def state_dict(self) -> dict[str, int]:
        """Nothing: the sampler starts where the data module says."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class LRSADataModule(L.LightningDataModule):
    """Train loader over the mixture; steps x batch_size samples in all.

    ValueError, before training, for a batch size that the micro-batch does not divide, weights that make no mixture, or
    a sample that does not fit `data.length`.
    """

    def __init__(self, data: DataConf, tokenizer: PreTrainedTokenizerBase, recipe: RecipeConf, seed: int) -> None:
        super().__init__()
        self.data, self.tokenizer, self.recipe, self.seed = data, tokenizer, recipe, seed
        self.micro_batch_size = recipe.micro_batch_size or recipe.batch_size
        if recipe.batch_size % self.micro_batch_size:
            raise ValueError(
                f"recipe.batch_size={recipe.batch_size} is not a multiple of "
                f"recipe.micro_batch_size={recipe.micro_batch_size}: choose a divisor"
            )
        if not data.parts:
            raise ValueError("data.parts is empty: name at least one part")
        self.pad_id = pad_id_of(tokenizer)
        self.start_sample = 0  # set by load_state_dict, or by hand before the loader is made
        self._mixture: Mixture | None = None

    @property
    def mixture(self) -> Mixture:
        """The mixture; sources are read and tokenised the first time that it is asked for."""
        if self._mixture is None:
            cache_dir = Path(self.data.cache_dir).expanduser() if self.data.cache_dir else None
            parts = {name: self._part(name, conf, cache_dir) for name, conf in self.data.parts.items()}
            weights = {name: conf.weight for name, conf in self.data.parts.items()}
            total = self.recipe.steps * self.recipe.batch_size
            self._mixture = Mixture(parts, weights, self.seed, total)
            self._mixture.check()
        return self._mixture

    def _part(self, name: str, conf: ExamplesConf, cache_dir: Path | None) -> SampleSet | ProseSet:
        stream = f"train/{name}/{self.seed}"
        try:
            made = ProseSet if source_of(conf).prose else SampleSet
            return made(conf, self.tokenizer, self.data.length, stream=stream, cache_dir=cache_dir)
        except ValueError as error:
            error.add_note(f"in data.parts.{name}")
            raise

    def describe(self) -> list[dict[str, Any]]:
        """For the record: one entry a part, with its name, its weight and the samples drawn from it in a whole run."""
        drawn = Counter(name for name, _ in self.mixture.plan)
        return [
            {"name": name, "weight": self.data.parts[name].weight, "drawn": drawn[name], **part.describe()}
            for name, part in self.mixture.parts.items()
        ]

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and check everything, so that mistakes show before the first step."""
        if stage in (None, "fit"):
            _ = self.mixture

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """All but `answer_mask`: who reads from a device where the answers are waits for it to finish its work."""
        moved = super().transfer_batch_to_device({**batch, "answer_mask": None}, device, dataloader_idx)
        return {**moved, "answer_mask": batch["answer_mask"]}

    def train_dataloader(self) -> StreamLoader:
        """Micro-batches (`Batch`) from sample `start_sample` to the run's end."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.recipe.batch_size % (self.micro_batch_size * world):
            raise ValueError(
                f"recipe.batch_size={self.recipe.batch_size} is not a multiple of micro_batch_size x devices = "
                f"{self.micro_batch_size} x {world}"
            )
        return StreamLoader(
            self.mixture,
            batch_size=self.micro_batch_size,
            sampler=ResumableSampler(self.mixture, self.start_sample, self.micro_batch_size, world, rank),
            collate_fn=partial(collate, pad_id=self.pad_id),
            num_workers=self.data.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.data.workers > 0,
        )

    def state_dict(self) -> dict[str, int]:
        """Samples that finished optimiser steps have consumed, over all devices."""
        steps = self.trainer.global_step if self.trainer else 0
        return {"start_sample": steps * self.recipe.batch_size if self.trainer else self.start_sample}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the last finished optimiser step."""
        self.start_sample = int(state_dict["start_sample"])
