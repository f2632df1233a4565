"""Spans of a sentence that are worth asking for, found without a tagger: names, numbers and dates, quotations; where it
has none of these, a run of rare words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from lrsa.data.examples import Document
from lrsa.data.wordlists import FUNCTION_WORDS

Span = tuple[int, int]

# A full stop is no end after an initial or a title, nor before a small letter or a digit.
_TITLES = """
Mr Mrs Ms Dr St Jr Sr Gen Col Lt Capt Sgt Rev Prof Hon Gov Sen Mt Ft No Vol vs Inc Ltd Co Corp
""".split()  # noqa: SIM905
_NO_END = "".join(rf"(?<!\b{title}\.)" for title in _TITLES) + r"(?<!\b[A-Z]\.)"
_END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][”’\"')])){_NO_END}\s+(?=[“‘\"'(A-Z])|\n+")

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = rf"\d{{1,2}} {_MONTH}(?: \d{{4}})?|{_MONTH} \d{{1,2}}(?:, \d{{4}})?(?!\d)|{_MONTH} \d{{4}}"
_AMOUNT = r"[$£€]?\d+(?:[.,]\d+)*(?:st|nd|rd|th|s|%)?(?: (?:hundred|thousand|million|billion|trillion|percent))?"
_NUMBER = re.compile(rf"(?<![\w.,$£€–-])(?:{_DATE}|{_AMOUNT})(?![\w–-]|[.,]\d)")
_QUOTED = re.compile(r"(?<=[“\"])[^“”\"]{3,60}(?=[”\"])")
_WORD = r"[A-ZÀ-ÖØ-Þ]\w*(?:[-'’&]\w+|\.(?=[A-Z]\b))*"
_NAME = re.compile(rf"(?<![\w'’-]){_WORD}(?:\.? (?:(?:of|de|la|von|van|der|du) (?:the )?)?{_WORD})*")
_CONTENT = re.compile(r"[a-z]+(?:-[a-z]+)*")
MOST_WORDS = 6  # of a span
_RARE_WORDS = 3  # of a run of rare words


def sentences(text: str) -> Iterator[Span]:
    """Sentences of a paragraph, without the white space around them."""
    start = len(text) - len(text.lstrip())
    for end in _END.finditer(text):
        yield start, end.start()
        start = end.end()
    yield start, len(text.rstrip())


def count_words(documents: Iterable[Document]) -> Counter[str]:
    """How often each word occurs in all passages, in small letters."""
    return Counter(word for document in documents for word in re.findall(r"\w+(?:-\w+)*", document.text.lower()))


def spans(sentence: str, counts: Counter[str], rare: int) -> list[Span]:
    """Spans that occur once in the sentence and do not overlap, in order; nothing at its beginning.

    rare: occurrences (`counts`) that a rare word has at most.
    """
    words = sorted([*_numbers(sentence), *_quotations(sentence), *_names(sentence)], key=lambda s: (s[0], -s[1]))
    found = [span for before, span in pairwise([(0, 0), *words]) if span[0] >= before[1]] or _rare(
        sentence, counts, rare
    )
    return [(a, b) for a, b in found if a > 0 and _once(sentence, sentence[a:b])]


def _once(sentence: str, span: str) -> bool:
    """Whether these words occur once in it, however they are written."""
    text, said, count, at = f" {sentence.lower()} ", span.lower(), 0, -1
    while (at := text.find(said, at + 1)) >= 0:
        count += not (text[at - 1].isalnum() or text[at + len(said)].isalnum())
    return count == 1


def _numbers(sentence: str) -> Iterator[Span]:
    return (match.span() for match in _NUMBER.finditer(sentence))


def _quotations(sentence: str) -> Iterator[Span]:
    for match in _QUOTED.finditer(sentence):
        said = match.group()
        if said == said.strip(" ,.;!?") and len(said.split()) <= MOST_WORDS:
            yield match.span()


def _names(sentence: str) -> Iterator[Span]:
    for match in _NAME.finditer(sentence):
        start = match.start()
        name = re.sub(r"['’]s?$", "", match.group())
        words = name.split()
        while words and words[0].lower().strip(".") in FUNCTION_WORDS:  # She, However, The
            start += len(words[0]) + 1
            words.pop(0)
        text = " ".join(words)
        says = text not in _TITLES and len(text) > 1 and len(words) <= MOST_WORDS
        if match.start() > 0 and says and _inside(sentence, start):
            yield start, start + len(text)


def _inside(sentence: str, start: int) -> bool:
    """Whether a capital there says more than that a sentence or a quotation begins."""
    return re.search(r"[\w,;]['’)]? $|[\w,;] \($", sentence[:start]) is not None


def _rare(sentence: str, counts: Counter[str], rare: int) -> list[Span]:
    """Runs of at most three content words with a rare one among them."""
    matches = list(_CONTENT.finditer(sentence))
    content = [m for m in matches if len(m.group()) > 3 and m.group() not in FUNCTION_WORDS and _whole(sentence, m)]
    runs: list[list[re.Match[str]]] = []
    for match in content:
        if runs and sentence[runs[-1][-1].end() : match.start()] == " ":
            runs[-1].append(match)
        else:
            runs.append([match])
    kept: Sequence[list[re.Match[str]]] = [
        run for run in runs if len(run) <= _RARE_WORDS and any(counts[m.group()] <= rare for m in run)
    ]
    return [(run[0].start(), run[-1].end()) for run in kept]


def _whole(sentence: str, match: re.Match[str]) -> bool:
    around = sentence[max(match.start() - 1, 0) : match.start()] + sentence[match.end() : match.end() + 1]
    return not re.search(r"[\w'’-]", around)
