"""Seeded tasks: passkey and multi-key needles here, RULER's, bAbI's and key-value retrieval beside it; their registry.

A draw is one context: documents (needles, facts), and the questions about some of them. The haystack comes from the
assembly. Draws depend on the generator alone, and import nothing but the standard library: the same text everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrsa.data.babi import BABI_ARGS, draw_babi
from lrsa.data.examples import Document, Example, Whitespace
from lrsa.data.retrieval import KV_ARGS, draw_kv
from lrsa.data.ruler import (
    CWE_ARGS,
    CWE_SPACE,
    FWE_ARGS,
    FWE_SPACE,
    HAYSTACK_ARGS,
    HAYSTACK_SPACE,
    NIAH_ARGS,
    NIAH_SPACE,
    VT_ARGS,
    VT_SPACE,
    draw_cwe,
    draw_fwe,
    draw_niah,
    draw_niah_haystack,
    draw_vt,
)
from lrsa.data.wordlists import ADJECTIVES, NOUNS

NEEDLES_INSTRUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards."
)
PASSKEY_INSTRUCTION = (
    "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the pass key afterwards."
)

NEEDLES_ARGS: dict[str, Any] = {
    "needles": 24,  # a context
    "value_digits": 7,  # or words, with values: words
    "values": "digits",  # digits | words
    "key_words": 2,  # 1: a noun; 2: adjective-noun
    "statement": "The special magic number for {key} is: {value}.",
    "question": "What is the special magic number for {key} mentioned in the provided text?",
    "instruction": NEEDLES_INSTRUCTION,
}
PASSKEY_ARGS: dict[str, Any] = {
    "value_digits": 5,
    "values": "digits",
    "statement": "The pass key is {value}. Remember it. {value} is the pass key.",
    "question": "What is the pass key?",
    "instruction": PASSKEY_INSTRUCTION,
}


def _value(rng: random.Random, args: dict[str, Any]) -> str:
    size = int(args["value_digits"])
    if args["values"] == "digits":
        return "".join(rng.choices("0123456789", k=size))
    return " ".join(rng.sample(NOUNS, size))


def _words(rng: random.Random, args: dict[str, Any], count: int, keys: list[str]) -> list[str]:
    """Values of words; no word of a context comes twice, nor in a key: each word has one successor to recall."""
    used = set("-".join(keys).split("-"))
    size = int(args["value_digits"])
    words = rng.sample([noun for noun in NOUNS if noun not in used], count * size)
    return [" ".join(words[start : start + size]) for start in range(0, count * size, size)]


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(draw())
    return list(found)


def _check(args: dict[str, Any], count: int, n_keys: int) -> None:
    if args["values"] not in ("digits", "words"):
        raise ValueError(f"args.values={args['values']!r} is unknown; valid: digits, words")
    size = int(args["value_digits"])
    if size < 1 or count > (10**size if args["values"] == "digits" else (len(NOUNS) - count) // size):
        raise ValueError(f"args.needles={count} distinct values do not exist with args.value_digits={size}")
    if not 1 <= count <= n_keys:
        raise ValueError(f"args.needles={count} must lie in [1, {n_keys}], the number of keys at this args.key_words")


def draw_needles(args: dict[str, Any], questions: int, rng: random.Random, prefix: str) -> list[Example]:
    """One context of `args['needles']` needles with distinct keys and values, `questions` of them asked.

    Returns one example a question, ids `<prefix>-<k>`; each carries all needles, only its own marked supporting.
    """
    count, words = int(args["needles"]), int(args["key_words"])
    if words not in (1, 2):
        raise ValueError(f"args.key_words={words} must be 1 (noun) or 2 (adjective-noun)")
    _check(args, count, len(NOUNS) * (len(ADJECTIVES) if words == 2 else 1))
    if questions > count:
        raise ValueError(f"questions={questions} exceeds args.needles={count}: a needle is asked for at most once")
    if words == 1:
        keys = rng.sample(NOUNS, count)
    else:
        keys = _distinct(lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}", count)
    values = (
        _words(rng, args, count, keys) if args["values"] == "words" else _distinct(lambda: _value(rng, args), count)
    )
    statements = [args["statement"].format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    asked = rng.sample(range(count), questions)
    return [
        Example(
            id=f"{prefix}-{k}",
            question=args["question"].format(key=keys[target]),
            answers=(values[target],),
            documents=tuple(Document(keys[j], statement, j == target) for j, statement in enumerate(statements)),
        )
        for k, target in enumerate(asked)
    ]


def draw_passkey(args: dict[str, Any], questions: int, rng: random.Random, prefix: str) -> list[Example]:
    """One context with a single pass key. `questions` must be 1."""
    if questions != 1:
        raise ValueError(f"questions={questions}: a passkey context has one pass key, so set questions: 1")
    _check(args, 1, 1)
    value = _value(rng, args)
    document = Document("pass key", args["statement"].format(value=value))
    return [Example(f"{prefix}-0", args["question"], (value,), (document,))]


PROSE = Whitespace()


@dataclass(frozen=True)
class Synthetic:
    """`draw(args, questions, rng, prefix)` gives one context's examples; `args` are its arguments with their defaults.

    ordered: the documents stand in the haystack in the order drawn.
    least: set for a source that draws its whole context, in order, from also `size` (units, at least `least`; more are
    more tokens) and `depth` (0 to 1, of what is asked for among them). Question and answers must not depend on `size`.
    space: the white space of its wording.
    hash_draws: whether the first draws are part of the data's fingerprint, which then tells another word list or rule.
    """

    draw: Callable[..., list[Example]]
    args: dict[str, Any]
    ordered: bool = False
    least: int | None = None
    space: Whitespace = PROSE
    hash_draws: bool = True


SYNTHETIC: dict[str, Synthetic] = {
    # Not hashed: records that are older than the hash are compared with new ones.
    "needles": Synthetic(draw_needles, NEEDLES_ARGS, hash_draws=False),
    "passkey": Synthetic(draw_passkey, PASSKEY_ARGS, hash_draws=False),
    "niah": Synthetic(draw_niah, NIAH_ARGS, ordered=True, space=NIAH_SPACE),
    "niah_haystack": Synthetic(draw_niah_haystack, HAYSTACK_ARGS, least=1, space=HAYSTACK_SPACE),
    "vt": Synthetic(draw_vt, VT_ARGS, ordered=True, space=VT_SPACE),
    "cwe": Synthetic(draw_cwe, CWE_ARGS, least=1, space=CWE_SPACE),
    "fwe": Synthetic(draw_fwe, FWE_ARGS, least=16, space=FWE_SPACE),
    "babi": Synthetic(draw_babi, BABI_ARGS, ordered=True),
    "kv": Synthetic(draw_kv, KV_ARGS, least=1),
}
