import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.config import DistillationConf, RecipeConf, TrainerConf
from lrsa.training import PostTraining, fit
from lrsa.training.callbacks import memory_bytes

from .conftest import RandomData


class Remember(Logger):
    name = version = "memory"

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Any]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        self.seen[step] = metrics

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        pass


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_compression_memory_and_time_left(
    terminal: bool,
    make_model: Callable[..., PreTrainedModel],
    recipe: RecipeConf,
    trainer: TrainerConf,
    tmp_path: Path,
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=150)
    module = PostTraining(make_model(), SparseAttentionConfig(lag_size=8), recipe)
    trainer = replace(trainer, progress=True, log_every=2)
    fit(module, RandomData(recipe), trainer, tmp_path, console=console)
    shown = out.getvalue()
    for word in ("loss", "tokens/s", "2x", "GiB (peak", "left"):
        assert word in shown
    if not terminal:
        steps = [line.split()[1] for line in shown.splitlines()]
        assert steps == ["1/6", "2/6", "4/6", "6/6"]


def test_metrics_reach_the_logger_by_step_and_the_summary_adds_up(
    make_model: Callable[..., PreTrainedModel], recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    logger = Remember()
    module = PostTraining(make_model(), SparseAttentionConfig(lag_size=8), recipe)
    result = fit(module, RandomData(recipe), replace(trainer, log_every=4), tmp_path, logger=logger)
    assert list(logger.seen) == [1, 4, 6]
    assert set(logger.seen[4]) == {
        f"train/{name}"
        for name in (
            "loss",
            "gradient_norm",
            "learning_rate",
            "compression",
            "tokens",
            "targets",
            "tokens_per_second",
            "peak_memory_gib",
        )
    }
    assert logger.seen[4]["train/loss"] == result.history[3]["loss"]
    summary = result.summary
    assert summary["steps"] == 6 and summary["tokens"] == sum(entry["tokens"] for entry in result.history) == 6 * 4 * 40
    assert summary["final_loss"] == result.history[-1]["loss"]
    assert 0 < summary["step_ms_median"] < 1000 * summary["seconds"] and summary["peak_memory_bytes"] > 2**20


def test_what_a_teacher_adds_is_shown_and_logged_where_there_is_one(
    make_model: Callable[..., PreTrainedModel], recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    logger, out = Remember(), io.StringIO()
    recipe = replace(
        recipe, compressions=[1, 4], schedule="annealed", distillation=DistillationConf(weight=0.5, hidden=0.1)
    )
    module = PostTraining(make_model(), SparseAttentionConfig(lag_size=8), recipe)
    console = Console(file=out, width=150)
    fit(module, RandomData(recipe), replace(trainer, progress=True), tmp_path, logger=logger, console=console)
    for step, line in zip(range(1, 7), out.getvalue().splitlines(), strict=True):
        taught = step > 3
        assert ({"train/kl", "train/hidden"} <= set(logger.seen[step])) == taught == (" kl 0." in line)


def test_memory_is_measured() -> None:
    current, peak = memory_bytes(torch.device("cpu"))
    assert 2**20 < current <= 1.05 * peak
