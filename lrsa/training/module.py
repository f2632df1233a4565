"""The one LightningModule: cross-entropy on answer tokens, and what a teacher adds, under dense or sparse attention.

Shapes: B samples of a micro-batch, T tokens, N target tokens of a micro-batch, V vocabulary.
An optimiser step is `recipe.batch_size` samples, in `batch_size / micro_batch_size` micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.huggingface import set_straight_through
from lrsa.attention.noise import noisy_selection
from lrsa.config import RecipeConf
from lrsa.models import set_attention
from lrsa.training.distillation import Distillation, answer
from lrsa.training.schedule import (
    ANNEALED,
    annealed_compression,
    draw_compression,
    hashed_integer,
    is_random,
    learning_rate_factor,
)
from lrsa.training.sharded import local, shard, summed, total_norm


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; raised before the optimiser sees it: the weights are still good."""


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did."""

    step: int  # optimiser steps done, this one included
    loss: float  # cross-entropy, nats a target token, mean over the step's targets
    gradient_norm: float  # before clipping
    learning_rate: float
    compression: float | None  # drawn or configured; 1: dense attention, None: no single factor (top_k)
    tokens: int  # read by the model, pads excluded
    targets: int  # tokens with a loss
    kl: float | None = None  # of the student from its teacher, as `loss`; None in a step without one
    hidden: float | None = None  # relative squared error of the hidden states, likewise


class PostTraining(LightningModule):
    """Trains `model` in place with AdamW, linear warm-up and a cosine.

    The loss of an optimiser step is the mean over *all* its target tokens: micro-batches contribute sums, and the
    gradient is divided by the step's target count once. Accumulating is therefore the same function as one large batch,
    whatever the answers' lengths.

    Args:
        model: a causal LM; parameters with `requires_grad=False` (LoRA) are neither updated nor checkpointed.
        attention: of the training forward pass; None is dense.
        recipe: optimisation, objective, and the compressions that a step is drawn from.
        seed: of the draws and of dropout.
        identity: plain values (dict, list, str, numbers) that a checkpoint must share with the run that resumes it.
        not_identity: dotted names that a checkpoint of another version may hold among them, and that are not compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: SparseAttentionConfig | None,
        recipe: RecipeConf,
        seed: int = 0,
        identity: dict[str, Any] | None = None,
        not_identity: Collection[str] = (),
    ) -> None:
        super().__init__()
        if recipe.compressions and attention is None:
            raise ValueError(
                f"recipe.compressions={recipe.compressions} draws a compression a step, but attention.scorer=dense "
                "keeps everything: choose a sparse attention, or set recipe.compressions=[]"
            )
        self.model = model
        self.attention = attention
        self.recipe = recipe
        self.seed = seed
        self.identity = identity or {}
        self.not_identity = frozenset(not_identity)
        self.report: StepReport | None = None
        self.strict_loading = all(parameter.requires_grad for parameter in model.parameters())
        taught = recipe.distillation.weight > 0 or recipe.distillation.hidden > 0
        self.distillation = Distillation(recipe.distillation, model) if taught else None
        self._active: SparseAttentionConfig | None = None
        # Of the open step's micro-batches: (summed terms of the loss, tokens that are no pads), the terms' names, and
        # the samples'.
        self._sums: list[Tensor] = []
        self._terms: list[str] = []
        self._ids: list[list[str]] = []
        self._targets = 0

    def configure_model(self) -> None:
        """Called before the optimiser is made; `trainer.strategy=fsdp` brings devices to share the weights out on."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    # ------------------------------------------------------------------ the step

    def on_fit_start(self) -> None:
        # from_pretrained hands out models in eval mode, where neither dropout nor activation checkpointing acts.
        self.train()
        self._activate(self.attention)
        set_straight_through(self.model, self.recipe.straight_through)
        if self.distillation is not None:
            self.distillation.to(self.device)

    def on_fit_end(self) -> None:
        set_straight_through(self.model, False)
        self._activate(self.attention)

    def step_attention(self, step: int) -> tuple[SparseAttentionConfig | None, float | None]:
        """Attention and compression factor of optimiser step `step` (0-based)."""
        if self.attention is None:
            return None, 1.0
        recipe = self.recipe
        if recipe.schedule == ANNEALED:
            compression: float | None = annealed_compression(recipe.compressions, step, recipe.steps)
        else:
            compression = draw_compression(recipe.compressions, self.seed, step)
        if compression is None:
            ratio = self.attention.keep_ratio
            fixed = 4.0 if ratio is None else 1.0 / ratio
            return self.attention, None if self.attention.top_k is not None else fixed
        return (None if compression == 1 else self.attention.with_compression(compression)), compression

    def score_noise(self, step: int) -> float:
        """Scale of the noise on the scores in optimiser step `step` (0-based); infinite where they do not count."""
        return math.inf if is_random(self.recipe.random_share, self.seed, step) else self.recipe.score_noise

    def _hashed(self, what: str) -> int:
        """A seed for `what` of the micro-batch at hand: the same however many processes share the step's."""
        number = len(self._ids) * self.trainer.world_size + self.global_rank
        return hashed_integer(what, self.seed, self.global_step, number)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Seeded anew each micro-batch: dropout does not depend on what drew random numbers before, resumed or not.
        torch.manual_seed(self._hashed("micro-batch"))
        attention, _ = self.step_attention(self.global_step)
        if attention != self._active:
            self._activate(attention)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        distillation, taught = self.distillation, None
        if distillation is not None and distillation.teaches(self._active):
            taught = distillation.teach(self.model, batch)
        with noisy_selection(self.score_noise(self.global_step), self._hashed("noise")):
            student = answer(self.model, batch, hidden=taught is not None and taught.hidden is not None)
        if student.targets.numel() == 0:
            raise ValueError(f"samples {batch['ids']} have no target token: answer_mask is empty")
        loss = F.cross_entropy(student.logits, student.targets, reduction="sum")
        terms = {"loss": loss}
        if distillation is not None and taught is not None:
            terms |= distillation.terms(student, taught)
            loss = distillation.total(loss, terms)
        input_ids, document_ids = batch["input_ids"], batch.get("document_ids")
        tokens = torch.ones_like(input_ids) if document_ids is None else document_ids >= 0
        self._sums.append(torch.stack([*(term.detach() for term in terms.values()), tokens.sum().to(loss.dtype)]))
        self._terms = list(terms)
        self._ids.append(list(batch["ids"]))
        self._targets += student.targets.numel()
        # Lightning divides by the number of micro-batches; the division by the target count comes once, below.
        return loss * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise, check and clip the accumulated gradient. The step's only wait for the device."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        world, targets, sums = self.trainer.world_size, self._targets, torch.stack(self._sums)
        totals: Tensor | None = None
        if world > 1:  # gradients are means over processes, losses and counts each process's own
            *shared, counted = summed(torch.stack([*sums.double().sum(0), sums.new_tensor(targets).double()]))
            totals, targets = torch.stack(shared), int(counted)
        norm = total_norm(gradients) * world / targets
        scale = torch.full_like(norm, world / targets)
        if self.recipe.gradient_clip > 0:
            scale = scale * (self.recipe.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local(gradients), scale)
        *values, gradient_norm = torch.cat([sums.flatten(), norm.reshape(1)]).tolist()
        rows = [values[start : start + sums.shape[1]] for start in range(0, len(values), sums.shape[1])]
        *terms, tokens = [sum(column) for column in zip(*rows, strict=True)] if totals is None else totals.tolist()
        if not all(map(_is_finite, [*values, *terms, gradient_norm])):
            self._raise_non_finite([sum(row[:-1]) for row in rows], gradient_norm)
        means = {name: term / targets for name, term in zip(self._terms, terms, strict=True)}
        _, compression = self.step_attention(self.global_step)
        self.report = StepReport(
            step=self.global_step + 1,
            loss=means["loss"],
            gradient_norm=gradient_norm,
            learning_rate=optimizer.param_groups[0]["lr"],
            compression=compression,
            tokens=int(tokens),
            targets=targets,
            kl=means.get("kl"),
            hidden=means.get("hidden"),
        )
        self._sums, self._ids, self._targets = [], [], 0

    def _raise_non_finite(self, losses: list[float], gradient_norm: float) -> None:
        bad = [name for loss, ids in zip(losses, self._ids, strict=True) if not _is_finite(loss) for name in ids]
        what = f"the loss is {sum(losses)} on batch {bad}"
        if not bad:
            ids = [name for names in self._ids for name in names]
            what = f"the loss is finite but the gradient's norm is {gradient_norm}, batch {ids}"
        raise NonFiniteLoss(
            f"optimiser step {self.global_step + 1} of {self.recipe.steps}: {what}. The weights are those of the "
            "step before; try a lower recipe.learning_rate, more recipe.warmup_steps, or trainer.precision=32-true"
        )

    def _activate(self, attention: SparseAttentionConfig | None) -> None:
        set_attention(self.model, attention)
        self._active = attention

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim >= 2]
        others = [
            parameter for parameter in trained if parameter.ndim < 2
        ]  # norms, biases: decay would only shrink them
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        beta1, beta2 = recipe.betas
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.learning_rate,
            betas=(beta1, beta2),
            fused=all(parameter.is_cuda for parameter in trained) or None,
        )
        floor = recipe.min_learning_rate / recipe.learning_rate

        def factor(step: int) -> float:
            return learning_rate_factor(step, recipe.steps, recipe.warmup_steps, floor)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lrsa"] = self.identity
        if not self.strict_loading:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        differences = [
            f"{key}: {before!r} in the checkpoint, {now!r} now"
            for key, before, now in _compare(checkpoint.get("lrsa", {}), self.identity)
            if key not in self.not_identity
        ]
        if differences:
            raise ValueError(
                "resume continues the same run, but the configuration changed: "
                + "; ".join(differences)
                + ". Restore these values, or start a new run from the saved weights (model.name=<run folder>/model)"
            )


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _compare(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves at which two nested dicts differ, as (dotted path, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted({*before, *now})
            for difference in _compare(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if before == now else [(path, before, now)]


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters: `total`, and `trained` (those that require a gradient)."""
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
