"""Filler prose, token by token: text between needles, and the last bit of a context of documents.

Built in: sentences of `wordlists.HAYSTACK` in random order, or (`repeat`) RULER's line of noise again and again. Else
running text (`lrsa.data.books`: a folder, a file, or `owner/name:config` on the hub; `@train` leaves the books out that
are held out); a slice starts at a random paragraph.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lrsa.data.books import read_texts
from lrsa.data.examples import NEW_PARAGRAPH, SAME_PARAGRAPH
from lrsa.data.tokens import Ids, TokenStore, digest
from lrsa.data.wordlists import HAYSTACK, REPEATED_NOISE

# White space after a full stop (and a closing quote) and before a new sentence; not after a title.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][”’\"')]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[“‘\"'(A-Z])"
)
_PARAGRAPH = 6  # sentences of a built-in paragraph
REPEAT = "repeat"  # name of the filler of repeated noise


@dataclass(frozen=True)
class Book:
    """Paragraphs, each a tuple of sentences."""

    title: str
    paragraphs: tuple[tuple[str, ...], ...]

    def pieces(self) -> Iterator[str]:
        """Its sentences with the white space before them."""
        return (piece for paragraph in self.paragraphs for piece in marked(paragraph))


def marked(paragraph: Sequence[str]) -> list[str]:
    """Its sentences with the white space before them."""
    return [(SAME_PARAGRAPH if index else NEW_PARAGRAPH) + text for index, text in enumerate(paragraph)]


def read_books(name: str) -> tuple[tuple[Book, ...], str]:
    """The books of `name`, without headings, rules and page marks, and the origin. Read once a process."""
    return _read_books(name, os.environ.get("LRSA_DATA"))


@lru_cache(maxsize=4)
def _read_books(name: str, _stand_ins: str | None) -> tuple[tuple[Book, ...], str]:
    texts, origin = read_texts(name)
    books = []
    for title, text in texts:
        paragraphs = []
        for block in re.split(r"\n\s*\n|\n", text):
            sentences = tuple(part.strip() for part in _SENTENCE_END.split(block.strip()) if part.strip())
            if sum(map(len, sentences)) >= 40:
                paragraphs.append(sentences)
        books.append(Book(title, tuple(paragraphs)))
    if not any(book.paragraphs for book in books):
        raise ValueError(f"text {name!r} has no paragraph of 40 characters or more")
    return tuple(books), origin


def read_paragraphs(name: str) -> tuple[tuple[tuple[str, ...], ...], str]:
    """All paragraphs of `read_books`, and the origin."""
    books, origin = read_books(name)
    return tuple(paragraph for book in books for paragraph in book.paragraphs), origin


class Filler:
    """Blocks of filler tokens, tokenised once. `noise`: how a line of repeated noise is written (`Whitespace`)."""

    def __init__(self, name: str | None, store: TokenStore, noise: str = "{}\n") -> None:
        self.store, self.repeats = store, name == REPEAT
        self.paragraphs: tuple[tuple[str, ...], ...] = ()
        self.origin = "built-in sentences"
        if self.repeats:
            self.line, self.origin = noise.format(REPEATED_NOISE), "repeated noise"
            texts = repr((REPEAT, self.line))
            store.preload([self.line])
        elif name is None:
            texts = repr(HAYSTACK)
            store.preload([mark + text for text in HAYSTACK for mark in (NEW_PARAGRAPH, SAME_PARAGRAPH)])
        else:
            self.paragraphs, self.origin = read_paragraphs(name)
            texts = repr(self.paragraphs)
            store.preload([piece for paragraph in self.paragraphs for piece in marked(paragraph)])
        self.fingerprint = digest([texts])

    def prose(self) -> Ids:
        """All paragraphs in the order of the text, joined."""
        pieces = [self.store.get(piece) for paragraph in self.paragraphs for piece in marked(paragraph)]
        return np.concatenate(pieces)

    def _stream(self, rng: random.Random) -> Iterator[list[Ids]]:
        """Paragraphs without end, each a list of sentences' ids."""
        at = rng.randrange(len(self.paragraphs)) if self.paragraphs else 0
        while True:
            paragraph = self.paragraphs[at] if self.paragraphs else tuple(rng.sample(HAYSTACK, _PARAGRAPH))
            at = (at + 1) % len(self.paragraphs) if self.paragraphs else 0
            yield [self.store.get(piece) for piece in marked(paragraph)]

    def blocks(self, rng: random.Random, size: int, by_sentence: bool) -> list[Ids]:
        """Sentences, or whole paragraphs, of exactly `size` tokens together; the last block is trimmed to the token, of
        repeated noise the first one, whose end is kept.
        """
        if self.repeats:
            line = self.store.get(self.line)
            lines, rest = divmod(size, max(len(line), 1))
            return [line[-rest:]] * bool(rest) + [line] * lines
        found: list[Ids] = []
        missing, stream, idle = size, self._stream(rng), 0
        while missing > 0:
            sentences = next(stream)
            for block in sentences if by_sentence else [np.concatenate(sentences)]:
                if missing > 0 and len(block):
                    found.append(block[:missing])
                    missing -= len(found[-1])
                    idle = 0
            idle += 1
            if idle > 1000:
                raise ValueError(f"the tokenizer gives no tokens for the filler ({self.origin})")
        return found
