"""One prompt with its answers, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lrsa.data.examples import JOINED_BY


class ContextTooLongError(ValueError):
    """What a sample must hold takes more than T tokens; the message says by how many."""


@dataclass(frozen=True)
class Sample:
    """Token ids with the ranges to learn or score.

    `answer_spans` are half-open ranges of `input_ids`, one a question, the end-of-turn token included; `answers` the
    references of each question (the first is the one in the tokens, or with `all_answers` all of them,
    `examples.target_text`); `gold_depth` where each gold passage starts,
    0 to 1 of the context's tokens, in the order of the questions' documents; `context_length` the tokens before the
    first question: what a method that compresses without knowing the question may see. 0 without a context.
    """

    id: str
    input_ids: list[int]
    answer_spans: list[tuple[int, int]]
    question_ids: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    gold_depth: tuple[float, ...]
    length: int
    context_length: int = 0
    all_answers: bool = False
    joined_by: str = JOINED_BY

    @property
    def depth(self) -> float | None:
        """Where the one gold passage of its one question starts, 0 to 1 of the context; None where there are several,
        or none.
        """
        single = len(self.gold_depth) == len(self.answer_spans) == 1
        return round(self.gold_depth[0], 4) if single else None
