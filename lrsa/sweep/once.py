"""What is around each job, under any sweeper and launcher: it runs once, whatever is killed when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from rich.console import Console

from lrsa.config import EvalConf, TrainConf
from lrsa.evaluation.journal import JOURNAL_FILE
from lrsa.results import Record
from lrsa.results.record import RECORD_FILE
from lrsa.results.summary import headline
from lrsa.sweep.devices import take_one_gpu
from lrsa.sweep.job import LOCKS, lock_of
from lrsa.sweep.listing import show_jobs
from lrsa.sweep.lock import locked, owner
from lrsa.sweep.plan import Job, Plan
from lrsa.sweep.predict import Measured
from lrsa.training.checkpoint import LAST
from lrsa.validation import BAD_INPUT, ConfigError

log = logging.getLogger(__name__)

Conf = TypeVar("Conf", TrainConf, EvalConf)


class JobFailed(CompactHydraException):
    """A job's error as text, which passes between processes whatever the error was."""


def run_once(conf: Conf, run: Callable[[Conf], object]) -> float | None:
    """`run(conf)`; in a multirun not if the job is finished or another process is at it, and otherwise from where an
    earlier attempt was stopped. With `dry_run`, shown only.

    Returns:
        The `headline` of the run folder's record; None where another process is still at it, and of a dry run.

    Raises:
        JobFailed: in a multirun, whatever went wrong; logged with its traceback.
    """
    if not HydraConfig.initialized():  # called from Python
        return _finished(conf, run)
    hydra = HydraConfig.get()
    several = hydra.mode == RunMode.MULTIRUN
    if conf.dry_run:
        _show(conf, hydra, several)
        return None
    if not several:
        return _finished(conf, run)
    folder = Path(conf.run.output_dir)
    take_one_gpu(folder.parent / LOCKS, hydra.launcher)
    # A sweeper that learns from results has to wait for them; the grid goes on with its other jobs.
    with locked(lock_of(folder), wait=not _is_grid(hydra)) as mine:
        if not mine:
            log.info("%s is left to %s, which is at it", folder.name, owner(lock_of(folder)) or "another process")
            return None
        if not (folder / RECORD_FILE).exists() or Record.load(folder).status != "finished":
            return _attempt(replace(conf, resume=_found(conf, folder)), run)
        log.info("%s is finished", folder.name)
        return headline(Record.load(folder).cells)


def _finished(conf: Conf, run: Callable[[Conf], object]) -> float | None:
    run(conf)
    return headline(Record.load(conf.run.output_dir).cells)


def _attempt(conf: Conf, run: Callable[[Conf], object]) -> float | None:
    if conf.resume is not None:
        log.info("going on in %s", conf.resume)
    try:
        return _finished(conf, run)
    except Exception as error:
        log.error("%s failed: %s", conf.run.output_dir, error, exc_info=not isinstance(error, BAD_INPUT))
        raise JobFailed(f"{type(error).__name__}: {error}") from error


def _found(conf: TrainConf | EvalConf, folder: Path) -> str | None:
    """`resume` for what an earlier attempt left in its folder; None: there is nothing to go on from."""
    trains = isinstance(conf, TrainConf) and conf.recipe.train
    return str(folder) if (folder / (LAST if trains else JOURNAL_FILE)).is_file() else None


def _is_grid(hydra: Any) -> bool:
    return str(hydra.sweeper.get("_target_")).endswith(".GridSweeper")


def _show(conf: TrainConf | EvalConf, hydra: Any, several: bool) -> None:
    """A single run, as the grid lists its jobs."""
    if several:
        raise ConfigError("dry_run=true lists a grid, but this sweeper chooses a job by the results of those before it")
    folders = hydra.sweeper.measured if _is_grid(hydra) else []
    job = Job("", Path(conf.run.output_dir), [], " ".join(hydra.overrides.task), conf)
    show_jobs(Plan([job]), Measured(folders), Console())
