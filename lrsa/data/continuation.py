"""`continuation`: some words of a passage are said, and those that follow them are asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lrsa.data.examples import Document, Example, stream_rng
from lrsa.data.passages import GRAM, PASSAGE_ARGS, Questions, grams_once, make_places

CONTINUATION_ARGS: dict[str, Any] = {
    **PASSAGE_ARGS,
    "instruction": "Read the documents. You will be asked how their text goes on. Reply with its next words alone.",
    "shown": [8, 12],  # words, least and most
    "answer": [4, 12],
    "every": 8,  # words from one place that is asked about to the next
    "phrasings": [
        'What are the next {count} words after "{words}" in the text?',
        'How does the text go on after "{words}"? Give {count} words.',
        'Copy the {count} words that follow "{words}" in the documents.',
        'Which {count} words follow these in the text: "{words}"?',
    ],
}


def ask_continuation(documents: Sequence[Document], args: dict[str, Any], key: tuple[object, ...]) -> Questions:
    """One question a place: `shown` words are said, and `answer` words asked for, both drawn between least and most.

    What is said begins with 8 words that no other place of all passages has. Nothing spans two lines.

    key: of the random stream that words the questions.

    Raises:
        ValueError: `shown` or `answer` is no pair of least and most, `shown` below 8, `every` below 1, phrasings that
            lack a gap, or passages without such a place.
    """
    (least, most), (fewest, longest), every = _pair(args, "shown", GRAM), _pair(args, "answer", 1), args["every"]
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"args.every={every!r} must be a whole number of words, at least 1")
    for phrasing in args["phrasings"]:
        if "{words}" not in phrasing or "{count}" not in phrasing:
            raise ValueError(f"args.phrasings: {phrasing!r} lacks {{words}} or {{count}}")
    rows: list[tuple[int, ...]] = []
    for number, (document, once) in enumerate(zip(documents, grams_once(documents), strict=True)):
        words = _words(document.text)
        if len(words) > args["max_words"]:
            continue
        for start in range(0, len(words) - most - longest + 1, every):
            if once[start] and "\n" not in document.text[words[start][0] : words[start + most + longest - 1][1]]:
                rows.append((number, start))

    def ask(document: Document, place: list[int], number: int) -> Example:
        rng, words = stream_rng(*key, "continuation", number), _words(document.text)
        start = place[0]
        middle = start + rng.randint(least, most)
        stop = middle + rng.randint(fewest, longest)
        said = document.text[words[start][0] : words[middle - 1][1]]
        answer = document.text[words[middle][0] : words[stop - 1][1]]
        question = rng.choice(args["phrasings"]).format(words=said, count=stop - middle)
        return Example(f"continuation-{number:06d}", question, (answer,), (document,), document.group)

    return Questions(documents, make_places(rows, f"run of {most + longest} words whose first 8 occur once"), ask)


def _words(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def _pair(args: dict[str, Any], name: str, floor: int) -> tuple[int, int]:
    pair = list(args[name])
    if len(pair) != 2 or not all(isinstance(n, int) for n in pair) or not floor <= pair[0] <= pair[1]:
        raise ValueError(f"args.{name}={pair} must be [least, most] words, the least at least {floor}")
    return pair[0], pair[1]
