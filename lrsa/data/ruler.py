"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654): needles, variable tracking, common and frequent words.

Written anew from the paper and the wording of NVIDIA/RULER; keys and words are adjective-noun pairs of our own lists.
`niah` and `vt` draw statements that the assembly spreads through a haystack, in their order. `niah_haystack`, `cwe` and
`fwe` are sized: their whole context is drawn, `size` units of it, and the assembly finds the size that fits. They draw
question and answers first, so that these are the same at every size, and without the context.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from lrsa.data.examples import Document, Example, Whitespace
from lrsa.data.wordlists import ADJECTIVES, NOUNS, REPEATED_NOISE

NIAH_ARGS: dict[str, Any] = {
    "key_type": "words",  # words | numbers | uuids
    "value_type": "numbers",
    "keys": 1,  # at least; one for each query
    "values": 1,  # of a key
    "queries": 1,
    "instruction": "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.",
    "statement": "One of the special magic {type} for {key} is: {value}.",
    "question": "What are all the special magic {type} for {query} mentioned in the provided text?",
    "answer_prefix": "The special magic {type} for {query} mentioned in the provided text are",
}
HAYSTACK_ARGS = {name: value for name, value in NIAH_ARGS.items() if name not in ("keys", "values", "queries")}
VT_ARGS: dict[str, Any] = {
    "chains": 1,
    "hops": 4,
    "shots": 1,  # worked examples, with shorter names, before the instruction: 0 or 1
    "instruction": "Memorize and track the chain(s) of variable assignment hidden in the following text.",
    "question": "Question: Find all variables that are assigned the value {value} in the text above.",
    "answer_prefix": "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assgined the value {value}, they are:",  # sic: RULER's spelling
}
CWE_ARGS: dict[str, Any] = {
    "common": 10,
    "common_repeats": 30,
    "uncommon_repeats": 3,
    "shots": 1,  # a list of 20 words, common ones 3 times, others once
    "instruction": "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
    "the ones that appear most often.",
    "question": "Question: What are the {common} most common words in the above list?",
    "answer_prefix": "Answer: The top {common} words that appear most often in the list are:",
}
FWE_ARGS: dict[str, Any] = {
    "alpha": 2.0,  # word of rank k comes size / k^alpha times; rank 1 is the noise `...`
    "letters": 6,
    "instruction": "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words.",
    "question": "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?",
    "answer_prefix": "Answer: According to the coded text above, the three most frequently appeared words are:",
}
_SHOT_NOISE, _SHOT_LETTERS = 10, 3  # of variable tracking's worked example

# RULER's lines to the blank: a weak model's score moves by ten points with them (experiments/ruler_agreement).
NIAH_SPACE = Whitespace(in_noise="{}\n", noise="{}\n", question="\n", after_noise="")
HAYSTACK_SPACE = Whitespace(whole="\n", statement="{}\n", in_noise="{}\n", question="", after_noise="")
VT_SPACE = Whitespace(noise=" {}\n", before_noise="\n\n", after_noise="\n")
CWE_SPACE = Whitespace(whole="\n", question="\n", after_noise="\n")
FWE_SPACE = Whitespace(whole=" ", question="\n", after_noise="\n")


def one_question(questions: int, source: str) -> None:
    """ValueError for several questions of a context that has one."""
    if questions != 1:
        raise ValueError(f"questions={questions}: a context of {source} has one question, so set questions: 1")


def no_depths(args: dict[str, Any], source: str) -> None:
    """ValueError for `depths` of a task whose answer is everywhere in its context."""
    if args["depths"] is not None:
        raise ValueError(f"args.depths={args['depths']}: the answer to {source} has no one place; leave it null")


def at_least(args: dict[str, Any], **least: int) -> None:
    """ValueError for a whole-number argument that is below its least value."""
    for name, value in least.items():
        if not isinstance(args[name], int) or args[name] < value:
            raise ValueError(f"args.{name}={args[name]!r} must be a whole number, at least {value}")


def draw_word(rng: random.Random) -> str:
    """`adjective-noun`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_uuid(rng: random.Random) -> str:
    """A random UUID, version 4."""
    return str(UUID(int=rng.getrandbits(128), version=4))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "words": draw_word,
    "numbers": lambda rng: str(rng.randrange(10**6, 10**7)),
    "uuids": draw_uuid,
}
MOST_WORDS = len(ADJECTIVES) * len(NOUNS)


def distinct(draw: Callable[[], str]) -> Iterator[str]:
    """Draws without end, each text once. What is drawn first does not depend on how many are taken."""
    seen: set[str] = set()
    while True:
        text = draw()
        if text not in seen:
            seen.add(text)
            yield text


def _kind(args: dict[str, Any], name: str) -> Callable[[random.Random], str]:
    if args[name] not in KINDS:
        raise ValueError(f"args.{name}={args[name]!r} is unknown; valid: {', '.join(KINDS)}")
    return KINDS[args[name]]


def _worded(args: dict[str, Any], name: str, single: bool, query: str = "") -> str:
    """RULER's rule for a single answer: `A special magic number is`, `What is the`."""
    text: str = args[name]
    if single:
        for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
            text = text.replace(plural, singular)
    kind = args["value_type"].removesuffix("s") if single else args["value_type"]
    return text.format(type=kind, query=query)


def _needles_example(
    args: dict[str, Any], prefix: str, keys: list[str], answers: list[str], needles: list[Document]
) -> Example:
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    single = len(answers) == 1
    return Example(
        f"{prefix}-0",
        _worded(args, "question", single, query),
        tuple(answers),
        tuple(needles),
        all_answers=True,
        opening=_worded(args, "instruction", single),
        answer_prefix=_worded(args, "answer_prefix", single, query),
    )


def draw_niah(args: dict[str, Any], questions: int, rng: random.Random, prefix: str) -> list[Example]:
    """Needles of `keys` keys with `values` values each, in random order, `queries` keys asked for at once.

    The answers are every value of every key asked for: key by key as asked, a key's values as they come in the text.
    """
    one_question(questions, "niah")
    at_least(args, keys=1, values=1, queries=1)
    new_key, new_value = _kind(args, "key_type"), _kind(args, "value_type")
    count, each = max(args["keys"], args["queries"]), args["values"]
    if args["key_type"] == "words" and count > MOST_WORDS:
        raise ValueError(f"args.keys={count}: there are {MOST_WORDS} words; ask for fewer, or key_type: uuids")
    keys, values = distinct(lambda: new_key(rng)), distinct(lambda: new_value(rng))
    needles = [(key, next(values)) for key in (next(keys) for _ in range(count)) for _ in range(each)]
    asked = rng.sample(list(dict.fromkeys(key for key, _ in needles)), args["queries"])
    rng.shuffle(needles)
    documents = [
        Document(key, args["statement"].format(type=args["value_type"], key=key, value=value), key in asked)
        for key, value in needles
    ]
    answers = [value for wanted in asked for key, value in needles if key == wanted]
    return [_needles_example(args, prefix, asked, answers, documents)]


def draw_niah_haystack(
    args: dict[str, Any], questions: int, rng: random.Random, prefix: str, *, size: int, depth: float
) -> list[Example]:
    """A context made of `size` needles, one of them asked for, at `depth` of them. ValueError when keys run out."""
    one_question(questions, "niah_haystack")
    new_key, new_value = _kind(args, "key_type"), _kind(args, "value_type")
    if args["key_type"] == "words" and size > MOST_WORDS:
        raise ValueError(f"this length takes {size} needles, and there are {MOST_WORDS} words: use key_type: uuids")
    keys, values = distinct(lambda: new_key(rng)), distinct(lambda: new_value(rng))
    needles = [(next(keys), next(values)) for _ in range(size)]
    asked, answer = needles[0]
    needles.insert(round(depth * (size - 1)), needles.pop(0))
    documents = [
        Document(key, args["statement"].format(type=args["value_type"], key=key, value=value), key == asked)
        for key, value in needles
    ]
    return [_needles_example(args, prefix, [asked], [answer], documents)]


def _assignments(rng: random.Random, chains: int, hops: int, letters: int) -> tuple[list[list[str]], list[str]]:
    """Names of each chain, `hops` + 1 of them, and each chain's value; the first chain's is the one asked for."""
    names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))
    values = distinct(lambda: str(rng.randrange(10**4, 10**5)))
    return [[next(names) for _ in range(hops + 1)] for _ in range(chains)], [next(values) for _ in range(chains)]


def _statements(names: list[str], value: str) -> list[str]:
    pairs = zip(names[1:], names, strict=False)
    return [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before} " for name, before in pairs)]  # blank: sic


def _vt_shot(args: dict[str, Any], rng: random.Random) -> str:
    """One chain between a few lines of noise, worked out."""
    (names,), (value,) = _assignments(rng, 1, args["hops"], _SHOT_LETTERS)
    lines = [f"{REPEATED_NOISE}\n"] * max(_SHOT_NOISE, len(names))
    places = sorted(rng.sample(range(len(lines)), len(names)))
    for place, statement in reversed(list(zip(places, _statements(names, value), strict=True))):
        lines.insert(place, statement)
    question = args["question"].format(value=value)
    said = args["answer_prefix"].format(count=len(names), value=value)
    return f"{args['instruction']}\n\n{' '.join(lines)}\n{question} {said}  {' '.join(names)}\n\n\n\n"


def draw_vt(args: dict[str, Any], questions: int, rng: random.Random, prefix: str) -> list[Example]:
    """Variable tracking: `chains` chains of `hops` assignments, interleaved, each in its order; the names that hold
    the first chain's value are asked for."""
    one_question(questions, "vt")
    at_least(args, chains=1, hops=1, shots=0)
    if args["shots"] > 1:
        raise ValueError(f"args.shots={args['shots']}: 0 or 1")
    names, values = _assignments(rng, args["chains"], args["hops"], 5)
    ahead = [iter(_statements(*chain)) for chain in zip(names, values, strict=True)]
    order = [number for number in range(args["chains"]) for _ in range(args["hops"] + 1)]
    rng.shuffle(order)
    documents = tuple(Document(f"chain {number}", next(ahead[number]), number == 0) for number in order)
    shot = _vt_shot(args, rng) if args["shots"] else ""
    return [
        Example(
            f"{prefix}-0",
            args["question"].format(value=values[0]),
            tuple(names[0]),
            documents,
            all_answers=True,
            opening=shot + args["instruction"],
            answer_prefix=args["answer_prefix"].format(count=len(names[0]), value=values[0]),
            joined_by=" ",
        )
    ]


def _numbered(common: list[str], uncommon: list[str], often: int, seldom: int, rng: random.Random) -> str:
    words = common * often + uncommon * seldom
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def draw_cwe(
    args: dict[str, Any], questions: int, rng: random.Random, prefix: str, *, size: int, depth: float
) -> list[Example]:
    """Common words: a numbered, shuffled list of `common` words `common_repeats` times each and of `size` other words
    `uncommon_repeats` times each. ValueError when words run out."""
    one_question(questions, "cwe")
    no_depths(args, "cwe")
    at_least(args, common=1, common_repeats=2, uncommon_repeats=1, shots=0)
    often, seldom, count = args["common_repeats"], args["uncommon_repeats"], args["common"]
    if often <= seldom or args["shots"] > 1:
        raise ValueError(
            f"args.common_repeats={often} must exceed args.uncommon_repeats={seldom}, and args.shots={args['shots']} "
            "be 0 or 1"
        )
    if size + 2 * count > MOST_WORDS - 10:
        raise ValueError(f"this length takes {size} other words, and there are {MOST_WORDS}: repeat words more often")
    words = distinct(lambda: draw_word(rng))
    common, shown = [next(words) for _ in range(count)], [next(words) for _ in range(count)]
    question, said = (args[name].format(common=count) for name in ("question", "answer_prefix"))
    shot = ""
    if args["shots"]:
        listed = _numbered(shown, [next(words) for _ in range(10)], 3, 1, rng)
        shot = f"{args['instruction']}\n{listed}\n{question} {said} {', '.join(shown)}\n\n"
    listed = _numbered(common, [next(words) for _ in range(size)], often, seldom, rng)
    opening = shot + args["instruction"]
    document = Document("list", listed)
    return [
        Example(
            f"{prefix}-0", question, tuple(common), (document,), all_answers=True, opening=opening, answer_prefix=said
        )
    ]


def draw_fwe(
    args: dict[str, Any], questions: int, rng: random.Random, prefix: str, *, size: int, depth: float
) -> list[Example]:
    """Frequent words: coded words whose counts follow a zeta distribution, the word of rank k floor(size / k^alpha)
    times, shuffled. Rank 1 is the noise `...`; ranks 2 to 4 are asked for, and come more often than all below them."""
    one_question(questions, "fwe")
    no_depths(args, "fwe")
    at_least(args, letters=3)
    if not args["alpha"] >= 1.5:
        raise ValueError(f"args.alpha={args['alpha']} must be at least 1.5, or ranks are hard to tell apart")
    words = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=args["letters"])))
    answers = [next(words) for _ in range(3)]
    text = ["..."] * size
    times = [max(1, int(size / rank ** args["alpha"])) for rank in (2, 3, 4)]
    for word, count in zip(answers, times, strict=True):
        text += [word] * count
    rank = 5
    while (count := min(int(size / rank ** args["alpha"]), times[-1] - 1)) > 0:
        text += [next(words)] * count
        rank += 1
    rng.shuffle(text)
    document = Document("coded text", " ".join(text))
    said = args["answer_prefix"]
    return [Example(f"{prefix}-0", args["question"], tuple(answers), (document,), all_answers=True, answer_prefix=said)]
