"""What every data source produces: questions with their documents, before any tokenizer is involved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

NEW_PARAGRAPH, SAME_PARAGRAPH = "\n\n", " "
JOINED_BY = ", "  # answers that are all asked for


class DataRowError(ValueError):
    """A malformed row of a data file; the message names file, line and column."""

    def __init__(self, file: str, line: int, column: str, problem: str) -> None:
        super().__init__(f"{file}, line {line}, column {column!r}: {problem}")
        self.file, self.line, self.column = file, line, column


@dataclass(frozen=True)
class Document:
    """A passage. `is_supporting`: the answer needs it (gold), so it must be in the context; others need not."""

    title: str
    text: str
    is_supporting: bool = True

    @property
    def group(self) -> str:
        """What a distractor must not share with a gold passage: the article, or the passage where no title is known."""
        return self.title or self.text


@dataclass(frozen=True)
class Example:
    """One question. `answers[0]` is the training target, the others further references; with `all_answers` every one
    of them belongs to the answer, and the target is all of them, `joined_by` (`target_text`).

    `opening` replaces the source's instruction, `answer_prefix` is put in the model's mouth: prompt, not target.
    `group` is the article (distractors come from other groups). `messages` holds a whole conversation as
    (role, content) pairs instead: `question` and `documents` are then empty.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...] = ()
    group: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    # Not in repr, which the fingerprints of rows read from files are made of: older records stay comparable.
    all_answers: bool = field(default=False, repr=False)
    opening: str = field(default="", repr=False)
    answer_prefix: str = field(default="", repr=False)
    joined_by: str = field(default=JOINED_BY, repr=False)


@dataclass(frozen=True)
class Whitespace:
    """What a source's wording has between the pieces of a prompt. `{}` stands for the text of a piece.

    statement: of a document, among prose; in_noise: among lines of repeated noise, of which `noise` is one.
    question: before the question; after_noise: where the context ends with such a line; before_noise: where it begins.
    whole: before a context that is drawn whole.
    """

    whole: str = NEW_PARAGRAPH
    statement: str = SAME_PARAGRAPH + "{}"
    in_noise: str = SAME_PARAGRAPH + "{}"
    noise: str = "{}\n"
    question: str = NEW_PARAGRAPH
    before_noise: str = "\n"
    after_noise: str = NEW_PARAGRAPH


def target_text(answers: Sequence[str], all_answers: bool, joined_by: str = JOINED_BY) -> str:
    """The canonical answer: the first reference, or where all are asked for, all in order, `a, b, c`."""
    return joined_by.join(answers) if all_answers else answers[0]


def stream_rng(*key: object) -> random.Random:
    """A generator that depends on `key` alone: not on the process, PYTHONHASHSEED or what was drawn before."""
    return random.Random(":".join(str(part) for part in key))
