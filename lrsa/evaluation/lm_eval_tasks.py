"""This project's tasks as tasks of lm-eval, for any of its models: what `tasks/*.yaml` beside this file call.

    lm_eval run --include_path "$(python -m lrsa.evaluation.lm_eval_tasks)" --tasks lrsa_needles \\
        --model hf --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct --metadata '{"max_seq_lengths": [4096]}'

    TaskManager(include_path=str(FOLDER), metadata={"tokenizer": checkpoint, "max_seq_lengths": [4096]})

The prompts are those of `conf/task/<name>.yaml`, `prompt: plain` without its start token: a chat template is lm-eval's
to apply, and its tokens come on top of T. A prompt is made of tokens and then decoded, T being counted in the tokenizer
that is named. To add a task to lm-eval: three lines of YAML; every task of `conf/task` has them (a test says).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lrsa.config import ExamplesConf, config_dir
from lrsa.data import SampleSet
from lrsa.data.examples import target_text
from lrsa.evaluation.answers import exact_match, f1, rouge_l
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.string_match import string_match
from lrsa.models import load_tokenizer

FOLDER = Path(__file__).parent / "tasks"
SCORES = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}  # metric_list of tasks/_lrsa_yaml names them too


def documents(
    lrsa_task: str,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    max_seq_lengths: int | Sequence[int] = (4096,),
    overrides: Mapping[str, Any] | None = None,
    context: bool = True,
    **_: Any,
) -> dict[str, Any]:
    """The documents of task `lrsa_task`: id, text (the prompt), answers, all_answers (one or all of them are asked),
    target (the answer in the tokens), tokens (of prompt and target, as built).

    All but `lrsa_task` are lm-eval's metadata, with the model's arguments among them, of which others are left alone.

    Args:
        tokenizer: name or folder of the tokenizer that counts T; by default `pretrained`'s.
        max_seq_lengths: T, a number or a list of one, under the name that RULER's tasks have for it.
        overrides: fields of `ExamplesConf` over the task's YAML, such as {"limit": 50, "filler": null}.
        context: False for the question alone, the floor.

    Raises:
        EvaluationInputError: an unknown task, no tokenizer or one with unknown words, or several lengths.
        Others: as `SampleSet` and `load_tokenizer`; ConnectionError names the local stand-in of a hub data set.
    """
    name = next((given for given in (tokenizer, pretrained) if isinstance(given, str) and given), None)
    if name is None:
        raise EvaluationInputError(
            f"lrsa_{lrsa_task} counts its prompts in tokens: name a tokenizer in the metadata, {{'tokenizer': NAME}}"
        )
    lengths = [max_seq_lengths] if isinstance(max_seq_lengths, int | str) else list(max_seq_lengths)
    if len(lengths) != 1 or not isinstance(lengths[0], int):
        raise EvaluationInputError(
            f"max_seq_lengths={max_seq_lengths!r}: lrsa_{lrsa_task} takes one number of tokens, for its scores are "
            "means over all documents; run a length at a time"
        )
    samples = SampleSet(
        replace(_task_conf(lrsa_task, overrides or {}), prompt="plain"), load_tokenizer(name), lengths[0], context
    )
    return {"test": _dataset(samples)}


def scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores of the one answer in `results`, 0 to 1: `SCORES`, the best over the document's references, and RULER's
    string match. Where all references belong to the answer, `SCORES` compare with all of them, joined."""
    said, answers = results[0], doc["answers"]
    whole = [doc["target"]] if doc["all_answers"] else answers
    found = {name: float(score(said, whole)) for name, score in SCORES.items()}
    return found | {"string_match": string_match(said, answers, doc["all_answers"])}


def task_names() -> list[str]:
    """Of `conf/task`, but for those that only list others."""
    files = (config_dir() / "task").glob("*.yaml")
    return sorted(file.stem for file in files if "defaults" not in OmegaConf.load(file))


def _task_conf(name: str, overrides: Mapping[str, Any]) -> ExamplesConf:
    folder = config_dir() / "task"
    if name not in task_names():
        known = ", ".join(task_names())
        raise EvaluationInputError(f"lrsa_task={name!r} is unknown; valid: {known}")
    conf = OmegaConf.merge(OmegaConf.structured(ExamplesConf), OmegaConf.load(folder / f"{name}.yaml"), dict(overrides))
    made = OmegaConf.to_object(conf)
    assert isinstance(made, ExamplesConf)
    return made


def _dataset(samples: SampleSet) -> Any:
    import datasets

    tokenizer = samples.store.tokenizer
    start = 1 if samples.prompt.head else 0  # the start token, which lm-eval's models add
    rows = []
    for sample in (samples[index] for index in range(len(samples))):
        ids = sample.input_ids[start : sample.answer_spans[-1][0]]
        if tokenizer.unk_token_id in ids:
            raise EvaluationInputError(
                f"{type(tokenizer).__name__} cannot spell the prompt of {sample.id}, which has its unknown token: "
                "count tokens with a tokenizer that knows all words, such as a byte-level one (metadata tokenizer)"
            )
        rows.append(
            {
                "id": sample.id,
                "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip(),
                "answers": list(sample.answers[-1]),
                "all_answers": sample.all_answers,
                "target": target_text(sample.answers[-1], sample.all_answers, sample.joined_by),
                "tokens": sample.length,
            }
        )
    return datasets.Dataset.from_list(rows)


if __name__ == "__main__":
    print(FOLDER)
