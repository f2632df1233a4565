"""lm-eval's tasks over a grid of compressions: what `lrsa-eval mode=lm_eval` runs."""

from __future__ import annotations

import difflib
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import from_conf
from lrsa.config import EvaluationConf, LMEvalConf
from lrsa.data.tokens import digest
from lrsa.evaluation import lm_eval_ruler
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.lm_eval_model import LRSALM
from lrsa.evaluation.lm_eval_tasks import FOLDER
from lrsa.evaluation.scoring import evaluating


@dataclass
class LMEvalResult:
    """For the record.

    metrics: `<task>/<metric>,<filter>/<compression>` as lm-eval names and computes them, standard errors too.
    protocol: how the answers were made, `compressions` with an entry each.
    data: name, fingerprint of the prompts, n, template and version of each task.
    samples: every document's prompt, answer and metrics, with `task` and `compression`.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conf: LMEvalConf,
    evaluation: EvaluationConf,
    seed: int,
    progress: bool = True,
) -> LMEvalResult:
    """Run `conf.tasks` at each of `evaluation.compressions`, on the same documents.

    Args:
        model: its own attention is restored afterwards.
        evaluation: attention, compressions, batch size, precision and bootstrap resamples; the rest plays no part.
        seed: of Python, numpy and torch; before documents are made, and again before each compression.

    Raises:
        EvaluationInputError: a task that lm-eval does not know, that would never end with this tokenizer, or that needs
            a package.
        ConnectionError: a task's data cannot be had.
    """
    attention = from_conf(evaluation.attention)
    tasks, scoring = _load_tasks(tokenizer, conf, seed)
    result = LMEvalResult()
    runs: dict[str, Any] = {}
    for factor in evaluation.compressions:
        used = None if attention is None else attention.with_compression(factor)
        with evaluating(model, used):
            lm = LRSALM(
                model,
                tokenizer=tokenizer,
                batch_size=evaluation.batch_size,
                max_length=conf.max_length,
                mixed_precision_dtype="bfloat16" if evaluation.precision == "bf16-mixed" else None,
            )
            lm.show_progress = progress
            found = lm_eval.simple_evaluate(
                lm,
                tasks=list(tasks),
                task_manager=TaskManager(include_defaults=False),  # the tasks are there already
                num_fewshot=conf.num_fewshot,
                limit=conf.limit,
                bootstrap_iters=evaluation.bootstrap,
                system_instruction=conf.system_instruction,
                apply_chat_template=conf.apply_chat_template,
                fewshot_as_multiturn=conf.fewshot_as_multiturn,
                gen_kwargs=dict(conf.gen_kwargs) if conf.gen_kwargs else None,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=conf.fewshot_seed,
            )
            protocol = lm.protocol()
        label = _label(factor)
        assert found is not None  # of another rank, and there is one
        result.metrics |= _metrics(found["results"], label)
        result.samples += [
            {"task": name, "compression": factor, **sample}
            for name, rows in found["samples"].items()
            for sample in rows
        ]
        template = protocol.pop("chat_template")
        runs[label] = protocol
        if not result.data:
            said = f"the tokenizer's chat template, sha256 {template['sha256']}" if template["applied"] else None
            result.data = _data(found, said)
            result.protocol = {
                "mode": "lm_eval",
                "lm_eval": lm_eval.__version__,
                "chat_template": template,
                "seeds": {"random": seed, "numpy": seed, "torch": seed, "fewshot": conf.fewshot_seed},
                "tasks": {
                    name: {"version": found["versions"].get(name), "num_fewshot": found["n-shot"].get(name)}
                    | {"generation_kwargs": found["configs"][name].get("generation_kwargs")}
                    | ({"scoring": scoring[name]} if name in scoring else {})
                    for name in found["configs"]
                },
            }
    result.protocol["compressions"] = runs
    return result


def _label(factor: float) -> str:
    return "full" if factor == 1 else f"{factor:g}x"


def _load_tasks(
    tokenizer: PreTrainedTokenizerBase, conf: LMEvalConf, seed: int
) -> tuple[Sequence[Any], dict[str, str]]:
    """Tasks and groups with their documents, made once: RULER's take minutes, and each compression gets the same.

    Second, how tasks are scored that are not scored as lm-eval does.
    """
    with tempfile.TemporaryDirectory() as folder:
        metadata = dict(conf.metadata or {})
        if "tokenizer" not in metadata:  # tasks that make documents of a length read it from a folder
            tokenizer.save_pretrained(folder)
            metadata["tokenizer"] = folder
        manager = TaskManager(
            include_path=[str(FOLDER), *([conf.include_path] if conf.include_path else [])], metadata=metadata
        )
        unknown = [name for name in conf.tasks if name not in manager.all_tasks and not Path(name).is_file()]
        if unknown:
            near = [known for name in unknown for known in difflib.get_close_matches(name, manager.all_tasks, 4)]
            raise EvaluationInputError(
                f"lm_eval.tasks: lm-eval knows no {', '.join(unknown)}{' but ' + ', '.join(near) if near else ''}. "
                "`lm-eval ls tasks` lists its own; lm_eval.include_path=FOLDER adds yours"
            )
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            lm_eval_ruler.check_prompts(conf.tasks, tokenizer, metadata.get("max_seq_lengths"))
            with lm_eval_ruler.without_downloads(conf.tasks):
                loaded = manager.load(list(conf.tasks))
        except Exception as error:  # a task's code raises whatever it likes
            better = _cannot_load(conf.tasks, error)
            if better is error:
                raise
            raise better from error
    scoring = lm_eval_ruler.take_best_reference(loaded["tasks"])
    groups: Mapping[str, Any] = loaded.get("groups", {})
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [
        *(group for name, group in groups.items() if name in conf.tasks),
        *(task for name, task in loaded["tasks"].items() if name not in inside),
    ], scoring


def _cannot_load(tasks: Sequence[str], error: Exception) -> Exception:
    """What to raise for an `error` in loading tasks: one that names the fix, or the error itself."""
    if isinstance(error, ImportError):
        return EvaluationInputError(
            f"lm_eval.tasks={list(tasks)} need a package that is not installed ({error}): pip install 'lrsa[ruler]' "
            "for RULER, 'lrsa[longbench]' for LongBench"
        )
    if isinstance(error, ValueError) and not isinstance(error, OSError):  # it says what is wrong
        return error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return error
    return ConnectionError(  # an OSError under it all: no network, no such data set, no such file
        f"lm_eval.tasks={list(tasks)} need data that cannot be loaded ({type(error).__name__}: {error}). Most of "
        f"lm-eval's tasks download theirs; without a network, RULER's {', '.join(lm_eval_ruler.OFFLINE)} run "
        "(lm_eval=ruler), and this project's own (lm_eval=lrsa)"
    )


def _metrics(results: Mapping[str, Mapping[str, Any]], label: str) -> dict[str, float]:
    return {
        f"{task}/{name}/{label}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if "," in name and isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not lm_eval_ruler.is_unmeasured(name, float(value))
    }


def _data(found: Mapping[str, Any], template: str | None) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "source": "lm-eval",
            "version": found["versions"].get(name),
            "n": len({row["doc_id"] for row in rows}),  # a row a filter
            "fingerprint": digest(["lm-eval", *(row["prompt_hash"] + row["target_hash"] for row in rows)]),
            "template": template,
        }
        for name, rows in found["samples"].items()
    ]
