"""Training where it is meant to run: kernels in bfloat16, compiled layers, objectives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig, flash4
from lrsa.config import DistillationConf, RecipeConf, TrainerConf
from lrsa.models import set_attention, target_logits
from lrsa.training import PostTraining, fit
from lrsa.training.compiling import checkpoints_outside, compiled_layers

from .conftest import VOCABULARY, RandomData

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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", ["dense", "flex", "flash4"])
def test_compiled_layers_compute_the_same(
    backend: str, checkpointing: bool, make_model: Callable[..., PreTrainedModel]
) -> None:
    """Tokens are kept by a hash of their positions: in bfloat16, where compiled layers round otherwise, a near tie of
    keys would fall otherwise too."""
    if backend == "flash4" and (reason := flash4.obstacle(torch.zeros(1, 1, 1, 64, device="cuda").bfloat16())):
        pytest.skip(reason)
    attention = None if backend == "dense" else SparseAttentionConfig("random", sink_size=16, lag_size=128)
    if checkpointing and checkpoints_outside():
        pytest.skip("this transformers checkpoints around what is compiled, which is refused")
    model = make_model(hidden_size=256, gradient_checkpointing=checkpointing).cuda()
    set_attention(model.train(), attention, backend="auto" if backend == "dense" else backend)
    ids = torch.randint(VOCABULARY, (2, 1000), generator=torch.Generator().manual_seed(0))
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -40:] = True

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits, targets = target_logits(model, ids.cuda(), answers)
            loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, expected = gradients()
    torch._dynamo.reset()
    counters.clear()
    with compiled_layers(model):
        compiled_loss, found = gradients()
        gradients()
        graphs = counters["stats"]["unique_graphs"]
        gradients()
    assert compiled_loss == pytest.approx(loss, rel=5e-3)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm(), name
    # The layers' one, and scores and rows outside of it, which are compiled anew for what asks for no gradient.
    assert 1 <= graphs == counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
