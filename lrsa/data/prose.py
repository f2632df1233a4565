"""`prose`: running text for next-token prediction. T tokens of one book a sample, the last of them targets.

The targets of an epoch's windows follow on each other, so each token of a book (but for the first windows' context and
an end shorter than a window's targets) is a target once an epoch; the next epoch's windows are cut at other places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lrsa.config import ExamplesConf
from lrsa.data.examples import stream_rng
from lrsa.data.filler import read_books
from lrsa.data.sample import Sample
from lrsa.data.sources import PROSE, plain_conf, source_args
from lrsa.data.tokens import default_cache_dir, digest, leading_ids, token_store

_STEP = 0.618034  # of the targets, from one epoch's cuts to the next one's: spreads any number of epochs evenly
RULE = "1"  # raise it when the same inputs give other samples


class ProseSet(Dataset[Sample]):
    """An endless stream of windows of running text, reshuffled an epoch; `conf.split: train` leaves the books out that
    are held out (`lrsa.data.books`).

    length: tokens of every sample, T. `args.targets` of them, the last ones, are the one answer span.
    stream, cache_dir: as of `SampleSet`.

    Raises:
        ValueError: more targets than T - 1, or no book of T tokens.
    """

    def __init__(
        self,
        conf: ExamplesConf,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        stream: str,
        cache_dir: Path | None = None,
    ) -> None:
        conf = plain_conf(conf)
        self.conf, self.length, self.stream = conf, length, stream
        self.targets = int(source_args(conf)["targets"])
        self.lead = leading_ids(tokenizer)
        room = length - len(self.lead)
        if self.targets >= length:
            raise ValueError(f"args.targets={self.targets} must be below length={length}: they follow on something")
        store = token_store(tokenizer, cache_dir or default_cache_dir())
        books, self.origin = read_books(f"{conf.path or PROSE}@{conf.split}")
        store.preload(piece for book in books for piece in book.pieces())
        ids = {book.title: [store.get(piece) for piece in book.pieces()] for book in books if book.paragraphs}
        self.books = {title: np.concatenate(pieces) for title, pieces in ids.items()}
        # Windows of an epoch begin at an offset below `targets`: a book has as many as fit after the largest one.
        counts = {title: (len(ids) - room + 1) // self.targets for title, ids in self.books.items()}
        self.windows = [(title, number) for title, count in counts.items() for number in range(count)]
        if not self.windows:
            longest = max(map(len, self.books.values()))
            raise ValueError(
                f"{self.origin}: its longest book has {longest:,} tokens, a sample takes length={length:,} and up to "
                f"args.targets={self.targets:,} before it: give a longer text, or lower the length"
            )
        self._order: tuple[int, int, list[int]] = (-1, 0, [])
        texts = [text for title, ids in self.books.items() for text in (title, ids.tobytes().hex())]
        said = (RULE, stream, str(conf.seed), str(length), str(self.targets), store.fingerprint)
        self.fingerprint = digest([*said, *texts])

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 of the endless stream; its id says the book and its first token."""
        epoch, within = divmod(index, len(self))
        if self._order[0] != epoch:
            order = list(range(len(self)))
            stream_rng(self.stream, self.conf.seed, "prose", epoch).shuffle(order)
            first = stream_rng(self.stream, self.conf.seed, "prose").randrange(self.targets)
            self._order = (epoch, (first + round(epoch * _STEP * self.targets)) % self.targets, order)
        _, offset, order = self._order
        title, number = self.windows[order[within]]
        start = offset + number * self.targets
        ids = [*self.lead, *self.books[title][start : start + self.length - len(self.lead)].tolist()]
        name, first = f"{title}-{start}", self.length - self.targets
        return Sample(name, ids, [(first, self.length)], (name,), ((),), (), self.length, first)

    def check(self, count: int) -> None:
        """Nothing: every window fits."""

    def describe(self) -> dict[str, Any]:
        """For the record, as `SampleSet.describe`."""
        return {
            "source": self.conf.source,
            "origin": self.origin,
            "books": list(self.books),
            "fingerprint": self.fingerprint,
            "n": len(self),
            "questions": 1,
            "length": self.length,
            "targets": self.targets,
            "template": None,
            "truncation": "none",
        }
