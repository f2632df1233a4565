"""Metrics by step, and the progress bar: both read `PostTraining.report` after an optimiser step."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lrsa.training.module import PostTraining

WARM_STEPS = 3  # first steps of a process: allocator, autotuning and lazy initialisation are not the steady state


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(current, peak) bytes: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    current = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak
    return current, peak


class StepMeter(Callback):
    """Keeps every optimiser step's numbers, across resumes, and sends them to the loggers every `log_every` steps."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.history: list[dict[str, Any]] = []  # StepReport fields and `seconds`
        self.peak_memory = 0
        self._steady: list[float] = []  # seconds a step, of this process
        self._clock = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PostTraining)
        report = pl_module.report
        if report is None or report.step <= self.steps:
            return
        # The step's loss was read from the device just now, so the wall clock is the device's.
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._steady.append(seconds)
        self.peak_memory = max(self.peak_memory, memory_bytes(pl_module.device)[1])
        self.history.append({**asdict(report), "seconds": seconds})
        if report.step % self.log_every == 0 or report.step in (1, trainer.max_steps):
            metrics = {
                f"train/{name}": value for name, value in asdict(report).items() if value is not None and name != "step"
            }
            metrics |= {
                "train/tokens_per_second": report.tokens / seconds,
                "train/peak_memory_gib": self.peak_memory / 2**30,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=report.step)

    @property
    def steps(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    def summary(self) -> dict[str, Any]:
        """Totals for the record; `step_ms_median` and `tokens_per_second` are the steady state's."""
        steady = self._steady[WARM_STEPS:] or self._steady
        median = statistics.median(steady) if steady else None
        tokens = sum(entry["tokens"] for entry in self.history)
        return {
            "steps": self.steps,
            "tokens": tokens,
            "targets": sum(entry["targets"] for entry in self.history),
            "seconds": sum(entry["seconds"] for entry in self.history),
            "step_ms_median": None if median is None else 1000 * median,
            "tokens_per_second": None if not median else tokens / len(self.history) / median,
            "peak_memory_bytes": self.peak_memory,
            "final_loss": self.history[-1]["loss"] if self.history else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "peak_memory": self.peak_memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.peak_memory = list(state_dict["history"]), state_dict["peak_memory"]


class TrainingProgress(Callback):
    """One rich line: steps, loss, tokens/s, compression, memory, time left; without a terminal, a line now and then."""

    def __init__(self, meter: StepMeter, log_every: int, console: Console | None = None) -> None:
        self.meter = meter
        self.log_every = log_every
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task(
            "training", total=trainer.max_steps, completed=trainer.global_step, status=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PostTraining)
        report = pl_module.report
        if report is None or not self.meter.history or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=report.step, status=self.status(pl_module.device))
        elif report.step % self.log_every == 0 or report.step in (1, trainer.max_steps):
            recent = self.meter.history[-self.log_every :]
            left = (trainer.max_steps - report.step) * statistics.median(entry["seconds"] for entry in recent)
            self.console.print(
                f"step {report.step}/{trainer.max_steps}  {self.status(pl_module.device)}  {left:,.0f} s left",
                highlight=False,
            )

    def status(self, device: torch.device) -> str:
        """`loss 0.512  41,203 tokens/s  4x  12.3 GiB (peak 14.0)`; the speed is the median of the last steps."""
        recent = self.meter.history[-20:]
        speed = statistics.median(entry["tokens"] / entry["seconds"] for entry in recent)
        current, peak = (amount / 2**30 for amount in memory_bytes(device))
        compression = recent[-1]["compression"]
        drawn = "dense" if compression == 1 else f"{compression:g}x" if compression else "sparse"
        kl = "" if recent[-1].get("kl") is None else f"  kl {recent[-1]['kl']:.3f}"
        return f"loss {recent[-1]['loss']:.3f}{kl}  {speed:,.0f} tokens/s  {drawn}  {current:.1f} GiB (peak {peak:.1f})"

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()
