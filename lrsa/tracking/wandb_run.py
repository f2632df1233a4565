"""The W&B run beside a record: offline unless told otherwise, and never the reason why a run fails.

Whatever W&B raises becomes a warning, after which nothing more is logged. A server that does not answer costs
`logger.timeout` seconds at the start, when the run goes on offline, and as many at the end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import wandb
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from lrsa.config import LoggerConf
from lrsa.results import Record
from lrsa.results.figures import save_figure
from lrsa.results.record import OUTCOMES_FILE
from lrsa.tracking.names import JOB_TYPES, listed_config, tags

log = logging.getLogger(__name__)
logging.getLogger("fontTools").setLevel(logging.WARNING)  # at INFO, thirty lines a PDF
STEP = "trainer/global_step"  # optimiser steps: the x axis of what training logs


def _unharmed(doing: str, always: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A method whose errors become a warning: the first one alone, for later calls are not tried, but for `always`."""

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def tried(self: WandbRun, *args: Any, **kwargs: Any) -> None:
            if self.broken and not always:
                return
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                if not self.broken:
                    log.warning(
                        "W&B failed to %s (%s). The run and its record go on without it; what W&B had by then is in "
                        "%s, and `wandb sync` uploads it",
                        doing,
                        _first_line(error),
                        self.folder,
                    )
                self.broken = True

        return tried

    return decorate


class WandbRun(Logger):
    """A started W&B run: a logger of Lightning's, and for results. What W&B raises is not raised."""

    def __init__(self, run: Any, folder: str | Path) -> None:
        """`run`: of `wandb.init`; `folder`: where it keeps its files, in the run folder."""
        super().__init__()
        self.run, self.folder, self.broken = run, Path(folder), False

    @property
    def name(self) -> str:
        return str(self.run.project)

    @property
    def version(self) -> str:
        """The W&B run id, which a resumed run keeps."""
        return str(self.run.id)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run was started with the whole config."""

    @_unharmed("log metrics")
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.run.log({**metrics, **({} if step is None else {STEP: step})})

    @_unharmed("log the results")
    def log_results(
        self,
        record: Record,
        metrics: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]] = (),
        figure: Figure | None = None,
    ) -> None:
        """Metrics into history and summary, `rows` (all of the same keys) as the table `results`, the figure as an
        image; table and figure with the record's files as the artifact `record-<W&B run id>`.
        """
        self.run.log(dict(metrics))  # first: what comes after it writes files
        with _staged_in(self.folder), TemporaryDirectory() as scratch:
            table = pd.DataFrame(rows)
            media: dict[str, Any] = {}
            files = [record.path, record.folder / OUTCOMES_FILE]
            if rows:
                media["results"] = wandb.Table(columns=list(table), data=[list(row.values()) for row in rows])
                files.append(Path(scratch, "results.csv"))
                table.to_csv(files[-1], index=False)
            if figure is not None:
                files += save_figure(figure, scratch, "figure")
                media["figure"] = wandb.Image(str(files[-1]))  # PNG
            self.run.log(media)
            artifact = wandb.Artifact(f"record-{self.run.id}", type="record", metadata={"record_id": record.id})
            for file in files:
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)

    @_unharmed("write its summary")
    def summarise(self, values: Mapping[str, Any]) -> None:
        """Into the summary alone, not the history."""
        self.run.summary.update(dict(values))

    def finish(self, error: BaseException | None = None) -> None:
        """Close the run; W&B lists it as failed if there was an `error`."""
        if error is not None:
            self.summarise({"error": f"{type(error).__name__}: {error}"})
        self._close(0 if error is None else 1)
        if self.broken:
            _restart()  # perhaps its process is gone, which W&B would not notice

    @_unharmed("close its run", always=True)
    def _close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


def start_wandb(conf: LoggerConf, record: Record, name: str, group: str | None, resume: str | None) -> WandbRun | None:
    """A W&B run in `<run folder>/wandb`; None where `logger.wandb` is off, or, with a warning, where it cannot be.

    Args:
        name: as shown.
        group: of a sweep's runs, where `conf.group` names none.
        resume: run folder, or checkpoint in one, that this run goes on from: its W&B run goes on too.
    """
    if not conf.wandb or conf.mode == "disabled":
        return None
    folder = record.folder / "wandb"
    options: dict[str, Any] = {
        "dir": str(record.folder),
        "project": conf.project,
        "entity": conf.entity,
        "group": conf.group or group,
        "name": name,
        "job_type": JOB_TYPES.get(record.command, record.command),
        "tags": tags(conf, record),
        "config": listed_config(record),
    }
    if "WANDB_RUN_ID" not in os.environ:  # which a W&B agent sets, and wandb.init reads
        before = run_id(record.folder, *([resume] if resume else []))
        # one of our own: what an attempt that did not reach the server leaves behind then is a part of the same run
        options |= {"id": uuid.uuid4().hex[:8]} if before is None else {"id": before, "resume": "allow"}
    modes = [conf.mode] if conf.mode == "offline" else [conf.mode, "offline"]
    for mode in modes:
        try:
            run = _init(mode, conf.timeout, options)
        except Exception as error:
            then = "the run is logged offline" if mode != modes[-1] else "the run goes on without it"
            log.warning("W&B cannot start with logger.mode=%s (%s): %s", mode, _first_line(error), then)
            _restart()  # its process takes the id for one in use
            continue
        if mode != conf.mode:
            log.warning("`wandb sync %s` uploads it", folder)
        started = WandbRun(run, folder)
        if "resume" in options:
            started.summarise({"error": ""})  # that of the attempt before
        return started
    return None


def _init(mode: Any, timeout: float, options: Mapping[str, Any]) -> Any:
    settings = wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=mode == "offline",
        init_timeout=timeout,
        login_timeout=timeout,
        finish_timeout=timeout,
        finish_timeout_raises=True,
        reinit="create_new",  # where a run is still open, W&B would hand that one out
    )
    run = wandb.init(mode=mode, settings=settings, **options)
    run.define_metric(STEP, hidden=True)
    run.define_metric("train/*", step_metric=STEP)
    if mode == "online":
        log.info("W&B: %s", run.url)
    return run


def _restart() -> None:
    """The next run gets a new process of W&B's."""
    with contextlib.suppress(Exception):
        wandb.teardown()


def run_id(*places: str | Path) -> str | None:
    """The id of the latest W&B run in the first of the run folders, or folders of checkpoints in them, that has one."""
    for place in places:
        path = Path(place).expanduser()
        for folder in (path, *path.parents[:2]):  # <run folder>/checkpoints/last.ckpt
            found = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
            if found:
                return found[-1].stem.removeprefix("run-")
    return None


@contextlib.contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """W&B copies what it is to upload to WANDB_DATA_DIR, in the home folder by default, which not every node may write
    to and which does not travel with the run folder: here to that, unless the user says otherwise.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
