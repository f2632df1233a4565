"""RULER's tasks as lm-eval has them (up to 0.4.13): what would hang, download or mislead there, caught here.

- variable tracking (`ruler_vt`), common words (`ruler_cwe`) and frequent words (`ruler_fwe`) draw prompts until one is
  short enough, for ever where none is: refused before (`check_prompts`);
- each task asks for NLTK's sentence splitter over the network, although only needles in essays use it
  (`without_downloads`);
- the score at a length that was not run is -1 (`is_unmeasured`);
- question answering (`ruler_qa_*`) averages over references, where RULER takes the best (`take_best_reference`).

Left as they are: `ruler_cwe` lacks RULER's solved example, and `ruler_fwe` no room for its 50 tokens of answer in T.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lrsa.evaluation.errors import EvaluationInputError

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
_ALL = ("ruler", "longcxt")  # group and tag that hold all tasks
_DRAWS = 8  # prompts that are measured, for their lengths vary
_FREQUENT = 27  # coded words of which the fourth most frequent comes once: 27 / (4² ζ(2)) >= 1

Needs = Iterator[tuple[str, int, int]]  # what, the tokens that it takes, the tokens that it may take


def check_prompts(
    tasks: Collection[str], tokenizer: PreTrainedTokenizerBase, lengths: int | str | Sequence[int] | None
) -> None:
    """Refuse tasks whose shortest prompts are longer than they may be. Random states are left as they were.

    Raises:
        EvaluationInputError: one of `ruler_vt`, `ruler_cwe`, `ruler_fwe` would not end, or have nothing to find.
    """
    sizes: list[int] = list(lengths) if isinstance(lengths, list | tuple) else []
    state = random.getstate(), np.random.get_state()
    try:
        for name, needs in _NEEDS.items():
            if set(tasks) & {name, *_ALL}:
                for what, need, room in needs(tokenizer, sizes or [4096]):
                    if need > room:
                        raise EvaluationInputError(
                            f"{name} may never end: with this tokenizer {what} takes {need} tokens, and may have "
                            f"{room}. Leave the task out, raise lm_eval.metadata={{max_seq_lengths: [...]}}, or take "
                            "another tokenizer"
                        )
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


def _variable_tracking(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> Needs:
    """The shortest have 10 lines of filler, and an example that has 5 and grows to 500 tokens; 30 are the answer's."""
    from lm_eval.tasks.ruler import vt_utils

    example, prompt = (
        len(tokenizer(f"{text} {answer}")["input_ids"]) + 30
        for text, answer in (vt_utils.generate_input_output(n, 1, 4, is_icl=n == 5) for n in (5, 10))
    )
    yield "its example", example, 500
    for length in lengths:
        yield f"a prompt of {length}", prompt + 500, length


def _common_words(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> Needs:
    """The shortest list has 10 words; where it is too long with its example, 120 for the answer, it has none."""
    from lm_eval.tasks.ruler import cwe_utils

    for length in lengths:
        drawn = (cwe_utils.generate_input_output(10, length) for _ in range(_DRAWS))
        sizes = [len(tokenizer(f"{example}\n{text} {answer}")["input_ids"]) for example, text, answer in drawn]
        yield f"a prompt of {length}", max(sizes) + 120, length


def _frequent_words(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> Needs:
    """The three words asked for are in it from `_FREQUENT` on; from its T / 50 words, the four first must exist."""
    from lm_eval.tasks.ruler import fwe_utils

    words = ("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(_FREQUENT))
    size = len(tokenizer(fwe_utils.TEMPLATE.format(context=" ".join(words), query=""))["input_ids"])
    for length in lengths:
        yield f"a prompt of {length}", max(size, 4 * 50), length


_NEEDS: dict[str, Callable[[PreTrainedTokenizerBase, Sequence[int]], Needs]] = {
    "ruler_vt": _variable_tracking,
    "ruler_cwe": _common_words,
    "ruler_fwe": _frequent_words,
}


@contextlib.contextmanager
def without_downloads(tasks: Collection[str]) -> Iterator[None]:
    """While RULER's tasks load, NLTK is not asked for the sentence splitter, unless one of `tasks` may need it."""
    without = all(name.startswith(("niah_", "ruler_", "lrsa_")) for name in tasks) and not set(tasks) & set(ESSAYS)
    if not without or importlib.util.find_spec("nltk") is None:
        yield
        return
    import nltk

    find = nltk.data.find
    nltk.data.find = lambda *_, **__: None  # found, so that nothing is downloaded
    try:
        yield
    finally:
        nltk.data.find = find


def is_unmeasured(metric: str, value: float) -> bool:
    """Whether `metric` of lm-eval's results, `<length>,<filter>`, is of a length that was not run."""
    return metric.partition(",")[0].isdigit() and value == -1


def take_best_reference(tasks: Mapping[str, Any]) -> dict[str, str]:
    """Score those of `tasks` (name to lm-eval's object) that are RULER's question answering as RULER does.

    Returns what the record says of each.
    """
    changed = [name for name in tasks if name.startswith("ruler_qa_")]
    for name in changed:
        tasks[name].set_config("process_results", best_reference)
    return {name: "string match, the best reference, as RULER; lm-eval's own is their mean" for name in changed}


def best_reference(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer holds one of the references, whatever the case (RULER's string_match_part)."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred

    (text,) = postprocess_pred(results)
    return {str(doc["max_length"]): float(any(reference.lower() in text.lower() for reference in doc["outputs"]))}
