from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.config import RecipeConf, TrainerConf
from lrsa.models import get_attention
from lrsa.training import NonFiniteLoss, PostTraining, fit
from lrsa.training.checkpoint import LAST

from .conftest import SPARSE, RandomData, make_sample, train

ModelMaker = Callable[..., PreTrainedModel]


def test_loss_is_the_mean_over_the_steps_targets(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, compressions=[], steps=1)
    _, history = train(make_model(), recipe, trainer, tmp_path, attention=None)
    model = make_model()
    losses = []
    for index in range(4):
        input_ids, mask = make_sample(index)
        logits = model(input_ids[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, input_ids[1:], reduction="none")[mask[1:]])
    assert history[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert history[0]["targets"] == len(torch.cat(losses)) == 1 + 2 + 3 + 4
    assert history[0]["tokens"] == 4 * 40


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulation_equals_one_batch(
    micro_batch_size: int, make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    """Answers differ in length, so a mean of micro-batch means would weigh their tokens unequally."""
    whole, expected = train(make_model(), recipe, trainer, tmp_path)
    parts = replace(recipe, micro_batch_size=micro_batch_size)
    accumulated, history = train(make_model(), parts, trainer, tmp_path)
    for name in ("step", "tokens", "targets", "compression", "learning_rate"):
        assert [entry[name] for entry in history] == [entry[name] for entry in expected]
    for name in ("loss", "gradient_norm"):
        assert [e[name] for e in history] == pytest.approx([e[name] for e in expected], rel=2e-3)
    for (name, one), other in zip(whole.model.named_parameters(), accumulated.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_training_lowers_the_loss_and_restores_the_attention(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, steps=40)

    class OneBatch(RandomData):
        def train_dataloader(self) -> Any:
            first = next(iter(super().train_dataloader()))
            return DataLoader([first] * 40, batch_size=None)

    module = PostTraining(make_model(), SPARSE, recipe, seed=0)
    history = fit(module, OneBatch(recipe), trainer, tmp_path).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert {entry["compression"] for entry in history} == {2.0, 4.0}
    assert get_attention(module.model) == SPARSE, "not the last drawn compression"


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[SparseAttentionConfig | None] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.seen.append(get_attention(pl_module.model))


def test_micro_batches_of_a_step_share_the_draw(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, micro_batch_size=1, compressions=[1, 2, 4, 8])
    watch = Watch()
    module, history = train(make_model(), recipe, trainer, tmp_path, callbacks=[watch])
    assert len(watch.seen) == 4 * recipe.steps
    for step, entry in enumerate(history):
        attention, compression = module.step_attention(step)
        assert entry["compression"] == compression
        assert watch.seen[4 * step : 4 * step + 4] == [attention] * 4
    assert len(set(watch.seen)) > 1


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_nan_stops_before_the_weights(
    micro_batch_size: int | None, make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, micro_batch_size=micro_batch_size)
    trainer = replace(trainer, checkpoint_every=2)

    class Spoil(Callback):
        """Makes the loss of the batch that holds sample 14 (step 4) NaN."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            is_bad = "sample-14" in batch["ids"]
            pl_module.model.lm_head.forward = (lambda x: F.linear(x, weight) * float("nan")) if is_bad else clean

    model = make_model()
    clean, weight = model.lm_head.forward, model.lm_head.weight
    with pytest.raises(
        NonFiniteLoss, match=r"step 4 of 6.*nan.*sample-14.*last good checkpoint is .*last\.ckpt"
    ) as error:
        train(model, recipe, trainer, tmp_path, callbacks=[Spoil()])
    assert ("sample-13" in str(error.value)) == (micro_batch_size is None), "names the micro-batch, not the whole step"
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_decay_spares_norms_and_biases(make_model: ModelMaker, recipe: RecipeConf) -> None:
    model = make_model()
    optimizer = PostTraining(model, SPARSE, recipe).configure_optimizers()["optimizer"]
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == recipe.weight_decay and spared["weight_decay"] == 0
    norms = {id(parameter) for name, parameter in model.named_parameters() if "norm" in name}
    assert {id(parameter) for parameter in spared["params"]} == norms
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_drawing_a_compression_needs_sparse_attention(make_model: ModelMaker, recipe: RecipeConf) -> None:
    with pytest.raises(ValueError, match=r"compressions=\[2, 4\].*scorer=dense"):
        PostTraining(make_model(), None, recipe)


def test_gradients_are_clipped(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    norms = []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.nn.utils.get_total_norm(gradients).item())

    _, history = train(make_model(), replace(recipe, gradient_clip=0.01), trainer, tmp_path, callbacks=[Norm()])
    assert all(entry["gradient_norm"] > 0.01 for entry in history), "reported before clipping"
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
