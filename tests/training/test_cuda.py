"""Objectives where they are meant to run: FlexAttention, bfloat16, a compiled selection."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.config import DistillationConf, RecipeConf, TrainerConf
from lrsa.training import PostTraining, fit

from .conftest import RandomData

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Graphs(Callback):
    """How many graphs have been compiled after each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        self.seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("straight_through", [False, True], ids=["plain", "straight-through"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_nothing_is_compiled_anew_from_step_to_step(
    checkpointing: bool, straight_through: bool, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    # heads of 16, FlexAttention's least
    model = make_model(hidden_size=64, backend="flex", gradient_checkpointing=checkpointing)
    attention = SparseAttentionConfig(sink_size=2, lag_size=8, keep_ratio=0.5)
    recipe = RecipeConf(
        steps=12, batch_size=4, micro_batch_size=2, warmup_steps=2, score_noise=0.02, random_share=0.5,
        straight_through=straight_through,
        distillation=DistillationConf(weight=0.5, hidden=0.5),
    )  # fmt: skip
    graphs, trainer = Graphs(), TrainerConf(accelerator="gpu", precision="bf16-mixed", progress=False)
    module = PostTraining(model, attention, recipe, seed=3)
    assert len({module.score_noise(step) for step in range(12)}) == 2, "steps of both kinds"
    history = fit(module, RandomData(recipe), trainer, tmp_path, callbacks=[graphs]).history
    assert graphs.seen[0] > 0 and graphs.seen[2] == graphs.seen[-1], graphs.seen
    assert all(step["kl"] > 0 and step["hidden"] > 0 for step in history)
