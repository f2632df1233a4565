"""A split in two for tuning: `split: train[fit]` to train on, `train[dev]` to choose by. Whole articles go to one side.

Examples that share an article, through whatever chain of others, are one group; its side follows from a hash of its
articles' names and questions' ids, so the other groups of the file do not move it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from lrsa.data.examples import Example
from lrsa.data.tokens import digest

FOLDS = ("fit", "dev")
FIT_SHARE = 0.6  # of the groups


def split_and_fold(split: str) -> tuple[str, str | None]:
    """`train[fit]` to (`train`, `fit`), `train` to (`train`, None); ValueError lists the folds."""
    found = re.fullmatch(r"(.*)\[(.*)\]", split)
    if not found:
        return split, None
    if found[2] not in FOLDS:
        raise ValueError(f"split={split!r}: unknown part {found[2]!r}; valid: {', '.join(FOLDS)}")
    return found[1], found[2]


def fold_of(examples: Sequence[Example], fold: str) -> list[Example]:
    """The examples on this side, in order. No article (`Document.group`), gold or not, is on both sides."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    nodes = [[f"id:{e.id}", *(f"article:{d.group}" for d in e.documents)] for e in examples]
    for own, *articles in nodes:
        for article in articles:
            parent[find(article)] = find(own)
    members: dict[str, list[str]] = defaultdict(list)
    for own, *_ in nodes:
        members[find(own)].append(own)
    fits = {root: int(digest([min(group)])[:8], 16) < FIT_SHARE * 16**8 for root, group in members.items()}
    return [e for e, names in zip(examples, nodes, strict=True) if fits[find(names[0])] == (fold == "fit")]
