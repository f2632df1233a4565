"""Where in a sample the things stand that its questions are about: the answer, what is asked for, the gold passages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lrsa.data.assembly import SampleSet
from lrsa.data.examples import Example
from lrsa.data.sample import Sample
from lrsa.data.tokens import Ids

KINDS = ("answer", "key", "passage")
Positions = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question of a sample. `found` holds, for each of `KINDS`, where it occurs in the context: the positions of the
    tokens of each occurrence, in the sample's `input_ids`.

    answer: the reference that is the target (with `all_answers` each of them), in the question's own gold passages;
    key: what a synthetic question asks for, likewise; passage: each gold passage as a whole. Whole words, or parts of
    words where it never is one; nothing where it is not there to be found, as the yes or no of a comparison.
    """

    id: str
    asked: int  # tokens before its answer
    found: dict[str, list[Positions]]


def gold_questions(data: SampleSet, samples: Sequence[Sample]) -> list[list[Question]]:
    """The questions of each of `samples`, which are all that `build_samples(data)` gave.

    Raises:
        ValueError: the source has no context, or a tokenizer that does not say where its tokens stand in the text.
    """
    if data.bare or not data.context:
        raise ValueError(f"{data.loaded.origin} has no context: there is no passage to find an answer in")
    if not data.store.tokenizer.is_fast:
        name = type(data.store.tokenizer).__name__
        raise ValueError(f"{name} does not say where its tokens stand in the text: use a fast tokenizer")
    each = data.conf.questions if data.conf.apart else 1
    contexts = [(index, sample) for index, sample in enumerate(samples)]
    return [_questions(data, data.examples_of(index // each), sample) for index, sample in contexts]


def _questions(data: SampleSet, examples: list[Example], sample: Sample) -> list[Question]:
    by_id = {example.id: example for example in examples}
    context = np.asarray(sample.input_ids[: sample.context_length])
    found = []
    for name, (asked, _) in zip(sample.question_ids, sample.answer_spans, strict=True):
        example = by_id[name]
        question = Question(name, asked, {kind: [] for kind in KINDS})
        for number, document in enumerate(example.documents):
            if not document.is_supporting:
                continue
            text = data.piece(document, first=number == 0)
            ids = data.store.encode([text])[0]
            start = _start(context, ids)
            tokens = range(start, start + len(ids))
            question.found["passage"].append(tuple(tokens))
            wanted = {"answer": example.answers if example.all_answers else example.answers[:1]}
            if data.synthetic:
                wanted["key"] = (document.title,)
            for kind, phrases in wanted.items():
                for phrase in phrases:
                    question.found[kind] += _tokens_of(data, text, phrase, start)
        found.append(question)
    return found


def _start(context: Ids, ids: Ids) -> int:
    """Where `ids` stand in `context`, the first time. Every piece was tokenised on its own, so they do as they are."""
    for start in np.flatnonzero(context[: len(context) - len(ids) + 1] == ids[0]):
        if np.array_equal(context[start : start + len(ids)], ids):
            return int(start)
    raise ValueError(f"a gold passage of {len(ids)} tokens is not in its context of {len(context)}")


def _tokens_of(data: SampleSet, text: str, phrase: str, start: int) -> Iterator[Positions]:
    """The tokens that hold a character of `phrase`, for each of its occurrences in `text`, which begins at `start`."""
    encoded = data.store.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for first, stop in occurrences(text, phrase):
        yield tuple(
            start + token for token, (a, b) in enumerate(encoded["offset_mapping"]) if a < b and a < stop and first < b
        )


def occurrences(text: str, phrase: str) -> list[tuple[int, int]]:
    """Half-open ranges of `text` at which `phrase` stands as whole words, or where it never does, as part of one."""
    exact = re.escape(phrase.strip())
    if not exact:
        return []
    for pattern in (rf"(?<!\w){exact}(?!\w)", exact):
        found = [match.span() for match in re.finditer(pattern, text)]
        if found:
            return found
    return []
