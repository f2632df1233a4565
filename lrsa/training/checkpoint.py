"""What a run leaves on disk: `checkpoints/last.ckpt` to resume from, and `model/` for everybody else.

Both are replaced atomically: a job killed while writing leaves the previous file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lrsa.attention import SparseAttentionConfig
from lrsa.models import set_attention
from lrsa.training.lora import merge_lora

LAST = Path("checkpoints") / "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes `<folder>/checkpoints/last.ckpt` every `every` optimiser steps and after the last one.

    The file holds tensors and plain values only, so `torch.load(..., weights_only=True)` reads it.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"trainer.checkpoint_every={every}: steps between checkpoints, at least 1")
        self.path = Path(folder) / LAST
        self.every = every
        self._saved_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._saved_step and (step % self.every == 0 or step == trainer.max_steps):
            self.save(trainer)
            self._saved_step = step

    def save(self, trainer: Trainer) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Lightning's own temporary file lies in /tmp, from where a move to another file system is a plain copy.
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial, weights_only=False)  # of all processes, into the first one's file
        if not trainer.is_global_zero:
            return
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        make_readable(partial)
        os.replace(partial, self.path)


def find_checkpoint(resume: str | Path) -> Path:
    """The checkpoint that `resume` means: a run folder's last one, or the file itself.

    Raises:
        FileNotFoundError: there is none; says where it was looked for.
    """
    path = Path(resume).expanduser()
    candidate = path / LAST if path.is_dir() else path
    if not candidate.is_file():
        raise FileNotFoundError(
            f"resume={resume}: no checkpoint at {candidate}. Give a run folder that holds {LAST}, or a .ckpt file"
        )
    return candidate.resolve()


def make_readable(path: Path) -> None:
    """Give colleagues on a shared disk the right to read: temporary files are their owner's alone."""
    if path.is_file():
        path.chmod(path.stat().st_mode | 0o044)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar a file, which takes less time than reading it."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    attention: SparseAttentionConfig | None = None,
    adapter: PeftModel | None = None,
) -> PreTrainedModel:
    """Write weights (safetensors), configs and tokenizer, so that `AutoModelForCausalLM` opens `folder`.

    The config records `attention` (the one trained with, not the last drawn compression); `lrsa.models.load_model`
    restores it, while a plain `from_pretrained` gives the dense model.

    Args:
        adapter: saved beside the weights in `folder/adapter`, in peft's format, then merged into the weights.

    Returns:
        The model that was saved: `model`, without adapters.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if adapter is not None:
        adapter.save_pretrained(str(partial / "adapter"))
        model = merge_lora(adapter)
    set_attention(model, attention)
    with _no_progress_bar():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.rglob("*"):
        make_readable(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return model
