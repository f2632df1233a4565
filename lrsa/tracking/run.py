"""What a command does around its work: the record, the W&B run beside it, the journal, results on the terminal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console, RenderableType
from transformers import PreTrainedModel

from lrsa.config import EvalConf, GenerateConf, TrainConf
from lrsa.evaluation import Journal, Task, identity
from lrsa.results import Record, ResultTable, build_table, cells_frame, rows_for_logging
from lrsa.results.environment import code_fingerprint
from lrsa.results.figures import accuracy_figure, position_figure
from lrsa.results.formats import to_console
from lrsa.results.positions import position_frame
from lrsa.results.summary import summary_metrics, tracked_metrics, training_totals
from lrsa.tracking.wandb_run import WandbRun, start_wandb

log = logging.getLogger(__name__)


def task_overrides() -> list[str]:
    """The overrides on the command line, as Hydra knows them; none outside a Hydra job."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def sweep_name() -> str | None:
    """The sweep folder's name in a Hydra multirun, else None."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None


@contextlib.contextmanager
def recorded(
    conf: TrainConf | EvalConf, command: str, arm: str, overrides: Sequence[str]
) -> Iterator[tuple[Record, WandbRun | None]]:
    """The started record and W&B run of a command; whatever goes wrong inside marks both as failed and is raised."""
    config = plain(conf)
    with Record.start(
        conf.run.output_dir,
        command=command,
        study=conf.run.study,
        arm=arm,
        seed=conf.run.seed,
        config=config,
        overrides=overrides,
        resume=conf.resume,
    ) as record:
        name = f"{conf.run.name}-seed{conf.run.seed}"
        logger = start_wandb(conf.logger, record, name, sweep_name(), conf.resume)
        try:
            yield record, logger
        except BaseException as error:
            if logger is not None:
                logger.finish(error)
            raise
        if logger is not None:
            logger.finish()


@contextlib.contextmanager
def journalled(
    record: Record,
    conf: TrainConf | EvalConf,
    model: PreTrainedModel,
    tasks: Sequence[Task],
    generate: GenerateConf | None = None,
) -> Iterator[Journal]:
    """The journal of the run's evaluation, with what the run folder `conf.resume` has finished. It is removed when the
    record was finished inside, and stays where something went wrong.
    """
    machine = {
        "code": code_fingerprint(),
        **{name: record.versions.get(name) for name in ("torch", "transformers")},
        "device": record.hardware["device"] if model.device.type == "cuda" else model.device.type,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,  # they decide how sums are split
        "attention_backend": conf.model.attention_backend,
    }
    determined = identity(model, conf.evaluation, tasks, generate) | {"machine": machine}
    resume = conf.resume if conf.resume is not None and Path(conf.resume).expanduser().is_dir() else None
    with Journal(record.folder, determined, resume) as journal:
        if resume is not None:
            log.info("%d batches of the evaluation are taken over from %s", journal.batches, resume)
        yield journal
        journal.remove()


def finish(
    record: Record,
    logger: WandbRun | None,
    cells: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Any],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Results into the record and W&B, and as a table on the terminal. `metrics`: further ones than the cells'."""
    record.finish(summary_metrics(cells) | dict(metrics or {}), cells, outcomes)
    if logger is not None:
        logger.summarise(training_totals(record.training))
        logger.log_results(record, tracked_metrics(cells, metrics), rows_for_logging(cells), results_figure(record))
    for metric in ("exact", "f1", "string_match") if not _prose(record) else ("nll",):
        if cells and metric in cells[0]:
            Console().print(results_table(record, metric))
    log.info("record: %s", record.path)


def results_figure(record: Record) -> Figure | None:
    """Exact match against the measured ratio of one finished run, or likelihood by position; None without cells."""
    if _prose(record):
        return position_figure(position_frame(_own_table(record, "nll")))
    return accuracy_figure(cells_frame([record])) if record.cells else None


def results_table(record: Record, metric: str = "exact") -> RenderableType:
    """The finished run's cells as a table for the terminal."""
    return to_console(_own_table(record, metric))


def _own_table(record: Record, metric: str) -> ResultTable:
    factors = {cell["compression"] for cell in record.cells}
    reference = "full" if _prose(record) and 1 in factors and len(factors) > 1 else None
    title = f"{record.study}: {record.arm}, seed {record.seed}"
    return build_table([record], title=title, metric=metric, reference=reference)


def _prose(record: Record) -> bool:
    return any("positions" in cell for cell in record.cells)


def plain(conf: Any) -> dict[str, Any]:
    """A structured config as plain containers, with every field resolved."""
    values = OmegaConf.to_container(OmegaConf.structured(conf), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
