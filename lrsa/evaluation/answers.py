"""Normalised exact match and F1 of answers in words, as SQuAD v1.1 defines them, and ROUGE-L.

Source: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1, and its official evaluation script, evaluate-v1.1.py: the
same order of steps, so that numbers compare with published ones. Where an answer has several references, the best
counts.

The script's edges are kept: punctuation is ASCII's alone and goes without leaving a space (`10-20` becomes `1020`);
articles go after punctuation; two texts that are both empty once normalised match exactly, yet share no word, so that
their F1 is 0 (SQuAD v2.0, with its questions without an answer, counts that as 1).

ROUGE-L (Lin 2004, aclanthology.org/W04-1013, section 3.1, its F-measure with beta 1) is that of the package
rouge-score, a port of the original script: lower case, words of ASCII letters and digits, no stemming. LongBench's own
metric (THUDM/LongBench, metrics.py) takes another package's, `rouge` 1.0.1, which nobody keeps, and which computes
another number under the name: case and punctuation count, each distinct word once, and sentences, cut at full stops,
are joined. lm-eval's `longbench` tasks compute that one; this one is for this project's tasks, not comparable to it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an, the, and one space between words."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the normalised prediction is one of the normalised references. ValueError without references."""
    _check(references)
    return normalise(prediction) in map(normalise, references)


def f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1, 0 to 1, over `references`: harmonic mean of precision and recall of the words that both hold.

    A word counts as often as the text that has it less often. ValueError without references.
    """
    _check(references)
    words = normalise(prediction).split()
    return max(_overlap(words, normalise(reference).split()) for reference in references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The best ROUGE-L F-measure, 0 to 1, over `references`: as `f1`, of the longest common subsequence of words.

    0 where either has no word, so for scripts other than Latin too. ValueError without references.
    """
    _check(references)
    return float(rouge_scorer().score_multi(references, prediction)["rougeL"].fmeasure)


@cache
def rouge_scorer() -> Any:
    """What `rouge_l` asks; the first call takes seconds, for the package imports nltk."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def _overlap(words: Sequence[str], reference: Sequence[str]) -> float:
    shared = (Counter(words) & Counter(reference)).total()
    # 2PR / (P + R) with P = shared / len(words) and R = shared / len(reference)
    return 2 * shared / (len(words) + len(reference)) if shared else 0.0


def _check(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references={references!r}: give a list of at least one text")
