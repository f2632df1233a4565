"""Questions made from passages: what sources that ask about plain text have in common.

A question is a place in a passage; all places are found when the data are read, and each question is worded when it is
asked. An epoch asks every place once, so nothing is repeated before all of them are used up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lrsa.data.examples import Document, Example

GRAM = 8  # words in a row that tell one place of the text from all others

PASSAGE_ARGS: dict[str, Any] = {
    "over": "squad",  # whose passages: a source of documents, or prose
    "without": None,  # a split whose articles are left out, because it is tested on
    "max_words": 250,  # of a passage that is asked about, so that several fit beside their questions
}

Places = NDArray[np.int32]
"""``[n, 1 + k]``: the passage's number, then k whole numbers of the source's own."""


class Questions(Sequence[Example]):
    """One example for each row of `places`, made by `ask(document, k numbers, question's number)` when it is read."""

    def __init__(
        self, documents: Sequence[Document], places: Places, ask: Callable[[Document, list[int], int], Example]
    ) -> None:
        self.documents, self.places, self.ask = documents, places, ask

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number, *rest = self.places[index].tolist()
        return self.ask(self.documents[number], rest, index % len(self))


def make_places(rows: Sequence[tuple[int, ...]], what: str) -> Places:
    """ValueError where there is none."""
    if not rows:
        raise ValueError(f"no passage has a {what}: give longer passages, or raise args.max_words")
    return np.array(rows, dtype=np.int32)


def grams_once(documents: Sequence[Document]) -> list[NDArray[np.bool_]]:
    """Of each passage, which of its words (between white space) begin `GRAM` words in a row that no other place of all
    passages has. A passage of W words gets ``max(W - GRAM + 1, 0)`` of them.
    """
    known: dict[str, int] = {}
    ids = [np.array([known.setdefault(w, len(known)) for w in d.text.split()], dtype=np.int64) for d in documents]
    # Equal runs have equal sums; that two others have is a matter of 64 bits, and would only cost their questions.
    mixed = np.random.Generator(np.random.Philox(key=GRAM)).integers(0, 2**64, size=(len(known), GRAM), dtype=np.uint64)
    sums = []
    for row in ids:
        count = max(len(row) - GRAM + 1, 0)
        sums.append(np.zeros(count, dtype=np.uint64))
        for k in range(GRAM):
            sums[-1] += mixed[row[k : k + count], k]
    _, inverse, counts = np.unique(np.concatenate(sums), return_inverse=True, return_counts=True)
    once = counts[inverse] == 1
    return np.split(once, np.cumsum([len(part) for part in sums])[:-1])
