"""String match of generated answers, as RULER scores them.

Source: Hsieh et al. 2024 (arXiv 2404.06654) and the evaluation of NVIDIA/RULER: an answer is stripped, its control
characters become line breaks, and a reference counts where it stands anywhere in it, in whatever case. Tasks that ask
for several things count the share found (`all`), question answering the best reference (`part`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of `references`, 0 to 1, that stand in `prediction`. ValueError without references, or for a blank one."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 where any of `references` stands in `prediction`, else 0. ValueError as above."""
    return float(any(_found(prediction, references)))


def string_match(prediction: str, references: Sequence[str], all_answers: bool) -> float:
    """`string_match_all` where every reference belongs to the answer, else `string_match_part`."""
    return (string_match_all if all_answers else string_match_part)(prediction, references)


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if isinstance(references, str) or not references:
        raise ValueError(f"references={references!r}: give a list of at least one text")
    if not all(reference.strip() for reference in references):
        raise ValueError(f"references={list(references)!r}: a blank one stands in every answer; take it out")
    said = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in said for reference in references]
