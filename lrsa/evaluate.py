"""`lrsa-eval`: evaluate a checkpoint over the grid of tasks and compressions.

mode=score scores references in one pass each, mode=generate generates answers, mode=lm_eval runs lm-eval's tasks,
mode=perplexity reads prose, mode=selection looks at which tokens are kept, mode=layers at which layers need them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.config import EvalConf, ModelConf, config_dir, register_configs
from lrsa.evaluation import Task, evaluate, load_tasks
from lrsa.evaluation.layers import rank_layers
from lrsa.evaluation.perplexity import evaluate_prose, read_windows
from lrsa.evaluation.selection import analyse
from lrsa.models import build_model, build_tokenizer, stored_attention
from lrsa.results import Record
from lrsa.results.figures import NothingToShow, layers_figure, save_figure, selection_figure
from lrsa.results.layers import as_override, layers_metrics, layers_table, write_layers
from lrsa.results.record import write_atomically
from lrsa.results.selection import selection_metrics, selection_tables, write_selection
from lrsa.sweep import register_sweeps, run_once
from lrsa.tracking import WandbRun, finish, journalled, recorded, task_overrides
from lrsa.training import resolve_device
from lrsa.validation import (
    bad_input_without_traceback,
    check_context_window,
    check_eval,
    check_ranking,
    warn_unlike_saved,
)

WIDE = 130  # characters of a table in a log
SAMPLES_FILE = "lm_eval_samples.jsonl.gz"

register_configs()
register_sweeps()


@hydra.main(config_path=str(config_dir()), config_name="eval", version_base=None)
def main(config: DictConfig) -> float | None:
    """Hydra entry; returns the headline score, for sweepers that optimise."""
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, EvalConf)
    try:
        with bad_input_without_traceback():
            return run_once(conf, lambda conf: run_evaluation(conf, overrides=task_overrides()))
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the jobs of a multirun share the process


def run_evaluation(conf: EvalConf, overrides: Sequence[str] = ()) -> Record:
    """Validate, record, evaluate, in `conf.run.output_dir`; returns the finished record.

    Raises:
        ConfigError: settings that cannot work, before anything is written.
        Exception: whatever went wrong later, after the record and the W&B run were marked as failed.
    """
    check_eval(conf)
    if conf.run.threads is not None:
        torch.set_num_threads(conf.run.threads)
    with recorded(conf, "lrsa-eval", conf.run.arm or conf.run.name, overrides) as (record, logger):
        seed_everything(conf.run.seed, verbose=False)
        tokenizer = build_tokenizer(conf.model)
        if conf.mode == "lm_eval":
            _run_lm_eval(conf, tokenizer, record, logger)
        elif conf.mode == "perplexity":
            _run_perplexity(conf, tokenizer, record, logger)
        elif conf.mode == "selection":
            _run_selection(conf, tokenizer, record, logger)
        elif conf.mode == "layers":
            _run_layers(conf, tokenizer, record, logger)
        else:
            _run_grid(conf, tokenizer, record, logger)
    return record


def _load_model(conf: EvalConf) -> PreTrainedModel:
    # Each cell applies its own attention; what the checkpoint was trained with plays no part here.
    model = build_model(conf.model, None).to(resolve_device(conf.trainer))
    check_ranking(conf, model.config)
    warn_unlike_saved(conf, stored_attention(conf.model), model.config.num_hidden_layers)
    return model


def _run_grid(conf: EvalConf, tokenizer: PreTrainedTokenizerBase, record: Record, logger: WandbRun | None) -> None:
    tasks = load_tasks(tokenizer, conf.evaluation, conf.evaluation.length)
    record.update(data=[fact for task in tasks for fact in task.facts()])
    if conf.mode == "generate":
        record.update(protocol=generation_protocol(conf, tokenizer, tasks))
    model = _load_model(conf)
    check_context_window(model.config, conf.evaluation.length)
    generate = conf.generate if conf.mode == "generate" else None
    with journalled(record, conf, model, tasks, generate) as journal:
        cells, outcomes = evaluate(
            model,
            tokenizer,
            conf.evaluation,
            conf.evaluation.length,
            tasks=tasks,
            generate=generate,
            progress=conf.trainer.progress,
            journal=journal,
        )
        finish(record, logger, cells, outcomes)


def generation_protocol(conf: EvalConf, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> dict[str, Any]:
    """How answers are made, for the record; each cell says its `max_new_tokens`, each task's data its template."""
    template = str(tokenizer.chat_template or "")
    return {
        "mode": "generate",
        "decoding": "greedy",
        "truncation": "none",  # a prompt that does not fit is an error
        "padding": "left",
        "chat_template": {"sha256": hashlib.sha256(template.encode()).hexdigest() if template else None},
        "cache": {
            "full": "DynamicCache" if conf.generate.peer else "SparseKVCache, every layer dense",
            "compressed": conf.generate.peer or "SparseKVCache",
            "peer_args": dict(conf.generate.peer_args or {}),
            "block_size": conf.generate.block_size,
            "share_context": conf.generate.share_context and conf.generate.peer is None,
        },
        "tasks": {
            task.name: {
                "prompt": conf.evaluation.tasks[task.name].prompt,
                "stop_tokens": {str(index): text for index, text in task.stop_tokens(tokenizer).items()},
            }
            for task in tasks
        },
    }


def _run_perplexity(
    conf: EvalConf, tokenizer: PreTrainedTokenizerBase, record: Record, logger: WandbRun | None
) -> None:
    length = conf.evaluation.length
    assert length is not None  # checked by check_eval
    windows = read_windows(tokenizer, conf.perplexity, length)
    record.update(data=[windows.facts()])
    model = _load_model(conf)
    check_context_window(model.config, length)
    cells, outcomes = evaluate_prose(model, windows, conf.evaluation, conf.perplexity, conf.trainer.progress)
    finish(record, logger, cells, outcomes)


def _run_selection(conf: EvalConf, tokenizer: PreTrainedTokenizerBase, record: Record, logger: WandbRun | None) -> None:
    evaluation = dataclasses.replace(conf.evaluation, floor=False, ceiling=False)  # which have nothing to select from
    tasks = load_tasks(tokenizer, evaluation, evaluation.length)
    record.update(data=[fact for task in tasks for fact in task.facts()])
    model, other, names = _load_model(conf), None, {"own": conf.run.arm or conf.run.name}
    check_context_window(model.config, evaluation.length)
    if conf.selection.against is not None:
        other = build_model(other_model(conf.model, conf.selection.against), None).to(model.device)
        check_ranking(conf, other.config)
        names["against"] = conf.selection.name
    cells, outcomes, found = analyse(model, other, tokenizer, evaluation, conf.selection, tasks, conf.trainer.progress)
    selection = write_selection(record.folder, names, found)
    finish(record, logger, cells, outcomes, selection_metrics(found))
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for table in selection_tables(selection):
        console.print(table)
    for factor in dict.fromkeys(cell["compression"] for cell in found) if conf.selection.figure else ():
        with contextlib.suppress(NothingToShow):  # the table has said so
            save_figure(selection_figure(selection, factor), record.folder, f"selection_{factor:g}x")


def _run_layers(conf: EvalConf, tokenizer: PreTrainedTokenizerBase, record: Record, logger: WandbRun | None) -> None:
    evaluation = dataclasses.replace(conf.evaluation, floor=False, ceiling=False)
    tasks = load_tasks(tokenizer, evaluation, evaluation.length)
    record.update(data=[fact for task in tasks for fact in task.facts()])
    model = _load_model(conf)
    check_context_window(model.config, evaluation.length)
    keep = partial(write_layers, record.folder)
    found = rank_layers(model, tokenizer, evaluation, conf.layers, tasks, conf.trainer.progress, keep)
    finish(record, logger, [], [], layers_metrics(found))
    save_figure(layers_figure(found), record.folder, "layers")
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(layers_table(found))
    console.print(as_override(found), markup=False, highlight=False, soft_wrap=True)


def other_model(conf: ModelConf, against: str) -> ModelConf:
    """`selection.against` as a model that is loaded as `conf` is: a folder, a hub id, or a .gguf file."""
    other = dataclasses.replace(conf, name=against, gguf_file=None, revision=None, config=None)
    if against.endswith(".gguf"):
        file = Path(against).expanduser()
        other = dataclasses.replace(other, name=str(file.parent), gguf_file=file.name)
    return other


def _run_lm_eval(conf: EvalConf, tokenizer: PreTrainedTokenizerBase, record: Record, logger: WandbRun | None) -> None:
    from lrsa.evaluation.lm_eval_run import run_lm_eval  # lm-eval takes seconds to import

    model = _load_model(conf)
    result = run_lm_eval(model, tokenizer, conf.lm_eval, conf.evaluation, conf.run.seed, conf.trainer.progress)
    record.update(data=result.data, protocol=result.protocol)
    lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in result.samples)
    write_atomically(record.folder / SAMPLES_FILE, gzip.compress(lines.encode("utf-8"), mtime=0))
    finish(record, logger, [], [], result.metrics)
    Console().print(metrics_table(result.metrics))


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """`<task>/<metric>/<compression>` with a row a task and metric, a column a compression."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in metrics.items():
        task, metric, column = name.rsplit("/", 2)
        rows.setdefault((task, metric), {})[column] = value
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("task", "metric", *columns, box=box.SIMPLE_HEAD)
    for (task, metric), row in rows.items():
        table.add_row(task, metric, *(f"{row[column]:.4g}" if column in row else "" for column in columns))
    return table


if __name__ == "__main__":
    main()
