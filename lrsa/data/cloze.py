"""`cloze`: a sentence of a passage with a span taken out, which is asked for (Taylor 1953; Hermann et al. 2015, arXiv
1506.03340, for reading). The answer is the passage's own text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lrsa.data.examples import Document, Example, stream_rng
from lrsa.data.passages import PASSAGE_ARGS, Questions, grams_once, make_places
from lrsa.data.spans import count_words, sentences, spans

GAP = "____"
SHORTEST, LONGEST = 8, 40  # words of a sentence that is asked about
_RARE = 50_000  # a rare word is at most one of so many, or
_RARE_LEAST = 3  # occurs so often

CLOZE_ARGS: dict[str, Any] = {
    **PASSAGE_ARGS,
    "phrasings": [
        "Fill the gap in this sentence of the documents: {sentence}",
        "What stands in place of ____ in the documents? {sentence}",
        "One of the documents has this sentence in full. What is missing here? {sentence}",
        'Complete the sentence "{sentence}" as it is in the documents. Give only the missing words.',
        "Which words of the documents belong in the gap? {sentence}",
    ],
}


def ask_cloze(documents: Sequence[Document], args: dict[str, Any], key: tuple[object, ...]) -> Questions:
    """One question a span (`lrsa.data.spans`) of a sentence of 8 to 40 words.

    No other place of all passages has the sentence's first 8 words, and no other sentence is the same around its gap.

    key: of the random stream that words the questions.

    Raises:
        ValueError: phrasings that lack `{sentence}`, or passages without such a sentence.
    """
    for phrasing in args["phrasings"]:
        if "{sentence}" not in phrasing:
            raise ValueError(f"args.phrasings: {phrasing!r} lacks {{sentence}}, the place of the sentence with its gap")
    counts = count_words(documents)
    rare = max(_RARE_LEAST, counts.total() // _RARE)
    rows: list[tuple[int, ...]] = []
    frames: Counter[tuple[str, str]] = Counter()
    for number, (document, once) in enumerate(zip(documents, grams_once(documents), strict=True)):
        text, words = document.text, document.text.split()
        if len(words) > args["max_words"] or GAP in text:
            continue
        before = 0
        for start, stop in sentences(text):
            said = text[start:stop]
            size = len(said.split())
            if SHORTEST <= size <= LONGEST and once[before] and said[-1] in ".!?”\"’')":
                for a, b in spans(said, counts, rare):
                    frames[said[:a], said[b:]] += 1
                    rows.append((number, start, stop, start + a, start + b))
            before += size
    rows = [row for row in rows if frames[_frame(documents, row)] == 1]

    def ask(document: Document, place: list[int], number: int) -> Example:
        rng, (start, stop, a, b), text = stream_rng(*key, "cloze", number), place, document.text
        question = rng.choice(args["phrasings"]).replace("{sentence}", text[start:a] + GAP + text[b:stop])
        return Example(f"cloze-{number:06d}", question, (text[a:b],), (document,), document.group)

    return Questions(documents, make_places(rows, "sentence of 8 to 40 words with a span to ask for"), ask)


def _frame(documents: Sequence[Document], row: tuple[int, ...]) -> tuple[str, str]:
    number, start, stop, a, b = row
    text = documents[number].text
    return text[start:a], text[b:stop]
