"""The objective's defaults are plain training, and the knobs that act on the selection."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from transformers import PreTrainedModel

from lrsa.config import AttentionConf, DistillationConf, RecipeConf, TrainerConf
from lrsa.models import set_attention, target_logits
from lrsa.training import PostTraining, fit
from lrsa.training.schedule import draw_compression, hashed_integer, learning_rate_factor
from lrsa.validation.objective import problems_of

from .conftest import SPARSE, RandomData, make_sample

ModelMaker = Callable[..., PreTrainedModel]


def train(
    model: PreTrainedModel, recipe: RecipeConf, trainer: TrainerConf, folder: Path, **options: Any
) -> tuple[PostTraining, list[dict[str, Any]]]:
    module = PostTraining(model, SPARSE, recipe, seed=3)
    return module, fit(module, RandomData(recipe), trainer, folder, **options).history


def plain_loop(model: PreTrainedModel, recipe: RecipeConf, seed: int) -> list[float]:
    """Training by the letter: cross-entropy under a drawn compression, nothing else."""
    optimizer = PostTraining(model, SPARSE, recipe).configure_optimizers()["optimizer"]
    losses = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe.steps, recipe.warmup_steps, 0.0)
        factor = draw_compression(recipe.compressions, seed, step)
        set_attention(model.train(), SPARSE.with_compression(factor or 4))
        torch.manual_seed(hashed_integer("micro-batch", seed, step, 0))
        samples = [make_sample(step * recipe.batch_size + row) for row in range(recipe.batch_size)]
        logits, targets = target_logits(model, *(torch.stack(parts) for parts in zip(*samples, strict=True)))
        loss = F.cross_entropy(logits, targets, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / len(targets)
        scale = torch.full_like(norm, 1 / len(targets)) * (recipe.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        optimizer.step()
        losses.append(loss.item() / len(targets))
    return losses


def test_the_defaults_are_plain_training_bit_for_bit(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    expected = make_model()
    losses = plain_loop(expected, recipe, seed=3)
    module, history = train(make_model(), recipe, trainer, tmp_path)
    assert [step["loss"] for step in history] == losses
    assert all(step["kl"] is None and step["hidden"] is None for step in history)
    for (name, one), other in zip(module.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_annealed_steps_take_the_compressions_in_order(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, schedule="annealed", compressions=[1, 2, 8])
    _, history = train(make_model(), recipe, trainer, tmp_path)
    assert [step["compression"] for step in history] == [1, 1, 2, 2, 8, 8]
    assert [s["learning_rate"] for s in history] == pytest.approx(
        [recipe.learning_rate * learning_rate_factor(step, 6, 2, 0.0) for step in range(6)]
    )


class Selections(Callback):
    """What each selection kept in training, by micro-batch, and what it keeps when the training is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[list[torch.Tensor]] = []
        from lrsa.attention import selection

        best = selection.best

        def noted(scores: torch.Tensor, count: int) -> torch.Tensor:
            kept = best(scores, count)
            self.seen[-1].append(kept)
            return kept

        monkeypatch.setattr(selection, "best", noted)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([])


class Same(RandomData):
    """One batch over and over, of one sample: what differs between passes is then the noise."""

    def train_dataloader(self) -> Any:
        ids, mask = make_sample(5)
        batch = {"input_ids": ids[None], "answer_mask": mask[None], "document_ids": None, "ids": ["5"]}
        return torch.utils.data.DataLoader([batch] * 100, batch_size=None)


@pytest.mark.parametrize("knobs", [{"score_noise": 0.3}, {"random_share": 1.0}], ids=["noise", "random"])
def test_noise_is_fresh_each_micro_batch_and_gone_afterwards(
    knobs: dict[str, float],
    make_model: ModelMaker,
    recipe: RecipeConf,
    trainer: TrainerConf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(recipe, micro_batch_size=2, compressions=[], learning_rate=1e-12, **knobs)
    selections = Selections(monkeypatch)
    module = PostTraining(make_model(), SPARSE, recipe, seed=3)
    fit(module, Same(recipe), trainer, tmp_path, callbacks=[selections])
    assert len(selections.seen) == 2 * recipe.steps and all(len(kept) == 2 for kept in selections.seen), "once a layer"
    first = [kept[0] for kept in selections.seen]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    batch = next(iter(Same(recipe).train_dataloader()))
    for _ in range(2):
        selections.seen.append([])
        target_logits(module.model.eval(), batch["input_ids"], batch["answer_mask"])
    assert all(map(torch.equal, *selections.seen[-2:])), "without noise"
    assert not torch.equal(selections.seen[-1][0], first[-1])


def test_random_steps_are_those_drawn(make_model: ModelMaker, recipe: RecipeConf) -> None:
    module = PostTraining(make_model(), SPARSE, replace(recipe, random_share=0.5, score_noise=0.2), seed=3)
    scales = [module.score_noise(step) for step in range(200)]
    assert set(scales) == {math.inf, 0.2} and 70 < scales.count(math.inf) < 130


def test_more_noise_moves_more_of_the_loss(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    """The knob reaches the step: the first loss is of the same weights and samples."""
    losses = []
    for scale in (0.0, 1e-9, 1.0):
        chosen = replace(recipe, steps=1, warmup_steps=0, compressions=[8], score_noise=scale)
        losses.append(train(make_model(), chosen, trainer, tmp_path)[1][0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_straight_through_gradient_changes_the_training_and_ends_with_it(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    (_, plain), (module, through) = (
        train(make_model(), replace(recipe, straight_through=value), trainer, tmp_path) for value in (False, True)
    )
    assert plain[0]["loss"] == through[0]["loss"] and plain[0]["gradient_norm"] != through[0]["gradient_norm"]
    assert plain[-1]["loss"] != through[-1]["loss"]
    layers = [layer for layer in module.model.modules() if hasattr(layer, "layer_idx")]
    assert layers and not any(layer.lrsa_straight_through for layer in layers)


SPARSE_CONF, DENSE_CONF = AttentionConf(), AttentionConf(scorer="dense")


@pytest.mark.parametrize(
    ("recipe", "attention", "message"),
    [
        ({"schedule": "anealed"}, SPARSE_CONF, r"schedule='anealed' is unknown; choose one of drawn, annealed"),
        ({"schedule": "annealed", "compressions": [4]}, SPARSE_CONF, r"compressions=\[4\]: give two or more"),
        ({"schedule": "annealed", "compressions": [2, 4], "steps": 1}, SPARSE_CONF, r"steps=1 out to 2 .* raise the"),
        ({"score_noise": -1.0}, SPARSE_CONF, r"score_noise=-1\.0: a scale of at least 0"),
        ({"score_noise": math.nan}, SPARSE_CONF, r"score_noise=nan: a scale of at least 0"),
        ({"score_noise": math.inf}, SPARSE_CONF, r"score_noise=inf: .* recipe\.random_share=1"),
        ({"score_noise": 0.1}, DENSE_CONF, r"score_noise=0\.1 .* attention\.scorer=dense keeps everything: choose"),
        ({"score_noise": 0.1, "compressions": [1]}, SPARSE_CONF, r"compressions=\[1\] keeps everything: choose"),
        ({"score_noise": 0.1}, AttentionConf(scorer="recency", top_k=0), r"top_k=0 keeps nothing"),
        ({"random_share": 1.5}, SPARSE_CONF, r"random_share=1\.5: a share of the steps, 0 to 1"),
        ({"random_share": 0.5}, DENSE_CONF, r"random_share=0\.5 .* keeps everything: choose"),
        ({"random_share": 1.0, "score_noise": 0.1}, SPARSE_CONF, r"score_noise=0\.1 is never used with"),
        ({"straight_through": True}, DENSE_CONF, r"straight_through=true .* attention\.scorer=dense keeps everything"),
        (
            {"straight_through": True},
            AttentionConf(scorer="key_norm"),
            r"scorer=key_norm have none: choose one of lag_",
        ),
        ({"straight_through": True}, AttentionConf(schedule="prefill_once"), r"schedule=prefill_once: choose budget"),
        ({"straight_through": True, "random_share": 1.0}, SPARSE_CONF, r"no step asks for with recipe\.random_share=1"),
        ({"distillation": DistillationConf(weight=1.2)}, SPARSE_CONF, r"weight=1\.2: the KL's share of the loss, 0"),
        ({"distillation": DistillationConf(weight=-0.2)}, SPARSE_CONF, r"weight=-0\.2: the KL's share of the loss, 0"),
        ({"distillation": DistillationConf(hidden=-1)}, SPARSE_CONF, r"hidden=-1: a weight of at least 0"),
        ({"distillation": DistillationConf(weight=1, temperature=0)}, SPARSE_CONF, r"temperature=0: above 0"),
        ({"distillation": DistillationConf(weight=0.5)}, DENSE_CONF, r"teacher=self teaches .* full attention already"),
        (
            {"distillation": DistillationConf(hidden=0.5), "compressions": [1]},
            SPARSE_CONF,
            r"teacher=self teaches .*compressions=\[1\] trains with full attention already",
        ),
        ({"distillation": DistillationConf(teacher="x/y")}, SPARSE_CONF, r"teacher=x/y is never asked: set"),
        ({"distillation": DistillationConf(weight=1, teacher="")}, SPARSE_CONF, r"teacher='': self, a folder"),
    ],
)
def test_what_cannot_work_is_refused(recipe: dict[str, Any], attention: AttentionConf, message: str) -> None:
    problems = list(problems_of(RecipeConf(**recipe), attention))
    assert any(re.search(message, problem) for problem in problems), problems
    assert all(problem.startswith("recipe.") for problem in problems)


@pytest.mark.parametrize(
    ("recipe", "attention"),
    [
        ({}, SPARSE_CONF),
        ({}, DENSE_CONF),
        ({"distillation": DistillationConf(weight=1.0, hidden=2.0, temperature=4.0)}, SPARSE_CONF),
        ({"distillation": DistillationConf(weight=0.5, teacher="some/model")}, DENSE_CONF),
        ({"schedule": "annealed", "compressions": [1, 2, 4, 8], "score_noise": 0.1, "random_share": 0.5}, SPARSE_CONF),
        ({"compressions": [4], "score_noise": 0.1}, AttentionConf(scorer="recency", top_k=0, equal_bytes_at=4096)),
    ],
)
def test_what_works_passes(recipe: dict[str, Any], attention: AttentionConf) -> None:
    assert list(problems_of(RecipeConf(**recipe), attention)) == []
