"""Puts module, data and callbacks into a Lightning Trainer."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from rich.console import Console

from lrsa.config import TrainerConf
from lrsa.training.callbacks import StepMeter, TrainingProgress
from lrsa.training.checkpoint import LAST, LastCheckpoint
from lrsa.training.compiling import compiled_layers
from lrsa.training.module import NonFiniteLoss, PostTraining
from lrsa.training.sharded import is_first_process, make_strategy


@dataclass
class TrainingResult:
    """`summary`: totals for the record (`StepMeter.summary`); `history`: every optimiser step's numbers."""

    summary: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def resolve_device(conf: TrainerConf) -> torch.device:
    """The device that Lightning trains on under `trainer.accelerator`."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if conf.accelerator in ("cuda", "gpu", "auto") and cuda:
        return torch.device("cuda", 0)
    return torch.device("mps" if conf.accelerator in ("mps", "gpu", "auto") and mps else "cpu")


def micro_batches(batch_size: int, micro_batch_size: int | None, devices: int = 1) -> int:
    """Forward passes an optimiser step on each device.

    Raises:
        ValueError: `micro_batch_size` does not divide `batch_size`, or the devices the micro-batches.
    """
    micro = batch_size if micro_batch_size is None else micro_batch_size
    if micro < 1 or batch_size < 1 or batch_size % micro:
        raise ValueError(
            f"recipe.micro_batch_size={micro_batch_size} does not divide recipe.batch_size={batch_size}: an optimiser "
            "step is a whole number of micro-batches; choose a divisor, or null for no accumulation"
        )
    if batch_size // micro % devices:
        raise ValueError(
            f"recipe.batch_size={batch_size} makes {batch_size // micro} micro-batches, which "
            f"trainer.devices={devices} cannot share evenly: choose a multiple of micro_batch_size x devices"
        )
    return batch_size // micro // devices


def fit(
    module: PostTraining,
    data: LightningDataModule,
    conf: TrainerConf,
    folder: str | Path,
    *,
    logger: Logger | None = None,
    resume: str | Path | None = None,
    callbacks: list[Callback] | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train `module` for `module.recipe.steps` optimiser steps.

    Args:
        folder: the run's; gets `checkpoints/last.ckpt`.
        console: of the progress bar; standard error by default.
        resume: checkpoint to continue from, at the very next micro-batch and with the same draws.

    Raises:
        NonFiniteLoss: names step and samples, and where the last good checkpoint is.
    """
    recipe = module.recipe
    meter = StepMeter(conf.log_every)
    checkpoint = LastCheckpoint(Path(folder), conf.checkpoint_every)
    progress = [TrainingProgress(meter, conf.log_every, console)] if conf.progress and is_first_process() else []
    _quiet_lightning()
    trainer = Trainer(
        accelerator=conf.accelerator,
        devices=conf.devices,
        strategy=make_strategy(conf.strategy, conf.devices),
        precision=conf.precision,  # type: ignore[arg-type]  # checked by lrsa.validation
        max_steps=recipe.steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches(recipe.batch_size, recipe.micro_batch_size, conf.devices),
        gradient_clip_val=None,  # PostTraining clips, after it has divided by the target count
        logger=logger or False,
        callbacks=[meter, *progress, *(callbacks or []), checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,  # StepMeter decides
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )
    try:
        compiled = compiled_layers(module.model) if conf.compile else contextlib.nullcontext()
        with warnings.catch_warnings(), compiled:
            # Batches are built in the main process on purpose: samples are cached, and workers fork the tokenizer.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # inside Lightning
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    except NonFiniteLoss as error:
        path = Path(folder) / LAST
        kept = (
            f"The last good checkpoint is {path}"
            if path.exists()
            else f"No checkpoint yet (every {conf.checkpoint_every} steps)"
        )
        raise NonFiniteLoss(f"{error}. {kept}.") from None
    finally:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
    return TrainingResult(meter.summary(), meter.history)


def _quiet_lightning() -> None:
    """Lightning announces devices and tips at INFO; the record and the progress bar say what matters."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.accelerators.cuda").setLevel(logging.WARNING)
