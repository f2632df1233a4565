"""Filler prose, token by token: text between needles, and the last bit of a context of documents.

Built in: sentences of `wordlists.HAYSTACK` in random order, or (`repeat`) RULER's line of noise again and again. Else a
folder (or file) of `.txt` or `.txt.gz`, or a hub data set with a `text` column, written `owner/name` or
`owner/name:config`; a slice starts at a random paragraph.
"""

from __future__ import annotations

import gzip
import os
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from lrsa.data.examples import NEW_PARAGRAPH, SAME_PARAGRAPH
from lrsa.data.rows import hub_rows, stand_in
from lrsa.data.tokens import Ids, TokenStore, digest
from lrsa.data.wordlists import HAYSTACK, REPEATED_NOISE

# White space after a full stop (and a closing quote) and before a new sentence; not after a title.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][”’\"')]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[“‘\"'(A-Z])"
)
_PARAGRAPH = 6  # sentences of a built-in paragraph
REPEAT = "repeat"  # name of the filler of repeated noise


def _texts(name: str) -> tuple[list[str], str]:
    path = Path(name).expanduser()
    hub, _, config = name.partition(":")
    entry = None if path.exists() else stand_in(hub)
    if entry:
        path = entry[0]
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith((".txt", ".txt.gz")))
        if not files:
            raise FileNotFoundError(f"filler={name!r}: no *.txt or *.txt.gz in {path}")
        texts = []
        for file in files:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as handle:
                texts.append(handle.read())
        return texts, f"{path.resolve().name} in place of {hub}" if entry else path.resolve().name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"filler={name!r} is neither a folder of *.txt(.gz) nor a hub id (owner/name:config)")
    try:
        rows = hub_rows(hub, "train", config or None, None)
    except ConnectionError as error:
        raise ConnectionError(
            f"the hub's text {hub!r} cannot be loaded ({error.__cause__}). Without the hub, set filler=/folder of "
            "*.txt(.gz), LRSA_DATA=/folder that holds prose/, or filler=null for the built-in sentences"
        ) from error
    if "text" not in rows.column_names:
        raise ValueError(f"filler={name!r} needs a column `text`; it has {', '.join(rows.column_names)}")
    return ["\n\n".join(rows["text"])], name


def read_paragraphs(name: str) -> tuple[tuple[tuple[str, ...], ...], str]:
    """Paragraphs, each a tuple of sentences, and the origin. Read once a process."""
    return _read_paragraphs(name, os.environ.get("LRSA_DATA"))


@lru_cache(maxsize=4)
def _read_paragraphs(name: str, _stand_ins: str | None) -> tuple[tuple[tuple[str, ...], ...], str]:
    texts, origin = _texts(name)
    paragraphs = []
    for text in texts:
        for block in re.split(r"\n\s*\n|\n", text):
            sentences = tuple(part.strip() for part in _SENTENCE_END.split(block.strip()) if part.strip())
            if sum(map(len, sentences)) >= 40:  # no headings, rules or page marks
                paragraphs.append(sentences)
    if not paragraphs:
        raise ValueError(f"filler={name!r} has no paragraph of 40 characters or more")
    return tuple(paragraphs), origin


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
            store.preload([piece for paragraph in self.paragraphs for piece in self._marked(paragraph)])
        self.fingerprint = digest([texts])

    def _marked(self, paragraph: tuple[str, ...]) -> list[str]:
        return [(SAME_PARAGRAPH if index else NEW_PARAGRAPH) + text for index, text in enumerate(paragraph)]

    def prose(self) -> Ids:
        """All paragraphs in the order of the text, joined."""
        pieces = [self.store.get(piece) for paragraph in self.paragraphs for piece in self._marked(paragraph)]
        return np.concatenate(pieces)

    def _stream(self, rng: random.Random) -> Iterator[list[Ids]]:
        """Paragraphs without end, each a list of sentences' ids."""
        at = rng.randrange(len(self.paragraphs)) if self.paragraphs else 0
        while True:
            paragraph = self.paragraphs[at] if self.paragraphs else tuple(rng.sample(HAYSTACK, _PARAGRAPH))
            at = (at + 1) % len(self.paragraphs) if self.paragraphs else 0
            yield [self.store.get(piece) for piece in self._marked(paragraph)]

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
