"""Key-value retrieval: a JSON object of random UUIDs, one value asked for (Liu et al. 2023, arXiv 2307.03172)."""

from __future__ import annotations

import random
from typing import Any

from lrsa.data.examples import Document, Example
from lrsa.data.ruler import distinct, draw_uuid, one_question

KV_ARGS: dict[str, Any] = {
    "instruction": "Extract the value corresponding to the specified key in the JSON object below.",
    "question": 'Key: "{key}"',
    "answer_prefix": "Corresponding value:",
}


def draw_kv(
    args: dict[str, Any], questions: int, rng: random.Random, prefix: str, *, size: int, depth: float
) -> list[Example]:
    """A JSON object of `size` pairs, a document a pair; the one asked for stands at `depth` of them."""
    one_question(questions, "kv_retrieval")
    texts = distinct(lambda: draw_uuid(rng))
    pairs = [(next(texts), next(texts)) for _ in range(size)]
    key, value = pairs[0]
    pairs.insert(round(depth * (size - 1)), pairs.pop(0))
    lines = [f'"{name}": "{text}",' for name, text in pairs]
    lines[0] = "{" + lines[0]
    lines[-1] = lines[-1].removesuffix(",") + "}"
    documents = tuple(Document(name, line, name == key) for (name, _), line in zip(pairs, lines, strict=True))
    question = args["question"].format(key=key)
    return [Example(f"{prefix}-0", question, (value,), documents, answer_prefix=args["answer_prefix"])]
