"""An evaluated example as the model read it, put together again from its record's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from lrsa.config import EvaluationConf
from lrsa.data import build_samples
from lrsa.evaluation.grid import load_tasks
from lrsa.evaluation.scoring import answer_ids


class Example(NamedTuple):
    """`prompt`: all that the model reads before it answers; `reference`: the tokens that count as exact, what ends the
    turn included; `answer`: the words of it.
    """

    prompt: str
    reference: str
    answer: str


def find_example(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    example: str,
    fingerprint: str | None = None,
) -> Example:
    """The example `example` of `task`, with its context.

    Args:
        config: resolved, of the record (`Record.config`).
        fingerprint: `data_fingerprint` of a cell of the task with its context: then the same prompt to the letter.

    Raises:
        ValueError: a task that the config has not, an example that the task has not, or another fingerprint.
        FileNotFoundError: the task's data are not here.
    """
    evaluation = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EvaluationConf), config["evaluation"]))
    assert isinstance(evaluation, EvaluationConf)
    if task not in evaluation.tasks:
        raise ValueError(f"the run has no task '{task}'; its tasks: {', '.join(evaluation.tasks)}")
    evaluation.tasks = {task: evaluation.tasks[task]}
    evaluation.floor = evaluation.ceiling = False
    (found,) = load_tasks(tokenizer, evaluation, (config.get("data") or {}).get("length"))
    if fingerprint not in (None, found.prompts.fingerprint):
        raise ValueError(
            f"the prompts of '{task}' are no longer those of the record: its data_fingerprint is {fingerprint}, here "
            f"it is {found.prompts.fingerprint} (other data, another tokenizer, or another version of lrsa)"
        )
    for sample in build_samples(found.prompts):
        for name, (first, stop) in zip(answer_ids(sample), sample.answer_spans, strict=True):
            if name == example:
                read, scored = sample.input_ids[:first], sample.input_ids[first:stop]
                answer = tokenizer.decode(scored, skip_special_tokens=True).strip()
                return Example(tokenizer.decode(read), tokenizer.decode(scored), answer)
    raise ValueError(f"'{task}' has no example '{example}'")
