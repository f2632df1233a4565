"""Distillation: a student under sparse attention learns to predict what a teacher with full attention predicts.

N target tokens of a micro-batch, V vocabulary, D hidden size. The teacher is the student itself, with the weights of
the step under dense attention, or a frozen model. (Hinton, Vinyals & Dean, arXiv 1503.02531.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.config import DistillationConf
from lrsa.models import full_attention, get_attention, load_model, set_attention, target_logits

SELF = "self"


class Answers(NamedTuple):
    """What a model makes of a micro-batch's targets: float32 ``logits [N, V]``, int64 ``targets [N]``, and ``hidden
    [N, D]``, what its head read to predict them, where that was asked for."""

    logits: Tensor
    targets: Tensor
    hidden: Tensor | None


def answer(model: PreTrainedModel, batch: dict[str, Any], hidden: bool = False) -> Answers:
    """One pass of `model` over a micro-batch; raises as `lrsa.models.target_logits`."""
    read: list[Tensor] = []
    with _head_inputs(model, read) if hidden else contextlib.nullcontext():
        logits, targets = target_logits(model, batch["input_ids"], batch["answer_mask"], batch.get("document_ids"))
    if not hidden:
        return Answers(logits, targets, None)
    wanted = batch["answer_mask"].cpu()[:, 1:]  # the head runs at positions that some row needs, see target_logits
    rows, places = (x.to(logits.device, non_blocking=True) for x in wanted[:, wanted.any(0)].nonzero(as_tuple=True))
    return Answers(logits, targets, read[0][rows, places].float())


@contextlib.contextmanager
def _head_inputs(model: PreTrainedModel, into: list[Tensor]) -> Iterator[None]:
    """Inside, what the language-model head reads is appended: the last hidden states without those of all layers."""
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: into.append(inputs[0]))
    try:
        yield
    finally:
        handle.remove()


class Distillation:
    """What a teacher adds to the loss of a step. No part of the student: neither trained, sharded nor saved with it.

    Args:
        conf: weights of the terms, temperature, and who teaches.
        student: the model in training; a teacher of its own is read here, in its dtype.

    Raises:
        ValueError: a student that cannot switch between attentions; a teacher of another vocabulary, or of another
            hidden size where hidden states are compared.
        FileNotFoundError: no such teacher.
    """

    def __init__(self, conf: DistillationConf, student: PreTrainedModel) -> None:
        self.conf = conf
        self.frozen: PreTrainedModel | None = None
        self._dense = full_attention(student)
        if conf.teacher != SELF:
            self.frozen = load_model(conf.teacher, None, dtype=student.dtype).eval().requires_grad_(False)
            _check_teacher(conf, self.frozen, student)
        elif self._dense is None:
            raise ValueError(
                f"recipe.distillation.teacher={SELF} switches {type(student).__name__} between sparse and dense "
                "attention, which it cannot: name a frozen model instead"
            )

    def to(self, device: torch.device) -> None:
        if self.frozen is not None:
            self.frozen.to(device)

    def teaches(self, attention: SparseAttentionConfig | None) -> bool:
        """Whether a step under `attention` has a teacher: with dense attention (None) a model has nothing to learn from
        itself."""
        return self.frozen is not None or attention is not None

    def teach(self, model: PreTrainedModel, batch: dict[str, Any]) -> Answers:
        """The teacher's answers to a micro-batch, without gradient.

        Before the student's pass, whose recomputation relies on what the bridge found out about the batch last.
        """
        with torch.no_grad(), self._teaching(model) as teacher:
            return answer(teacher, batch, self.conf.hidden > 0)

    def terms(self, student: Answers, taught: Answers) -> dict[str, Tensor]:
        """What parts the student from its teacher, each summed over the N targets: ``kl``, ``hidden``."""
        terms = {}
        if self.conf.weight > 0:
            terms["kl"] = divergence(student.logits, taught.logits, self.conf.temperature)
        if student.hidden is not None and taught.hidden is not None:
            terms["hidden"] = relative_error(student.hidden, taught.hidden)
        return terms

    def total(self, cross_entropy: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The loss: ``(1 - weight) * cross_entropy + weight * kl + hidden_weight * hidden``."""
        loss = (1 - self.conf.weight) * cross_entropy
        if "kl" in terms:
            loss = loss + self.conf.weight * terms["kl"]
        if "hidden" in terms:
            loss = loss + self.conf.hidden * terms["hidden"]
        return loss

    @contextlib.contextmanager
    def _teaching(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Inside, `model` is its own teacher: dense, without dropout, nothing recomputed. Afterwards as it was."""
        if self.frozen is not None:
            yield self.frozen
            return
        attention, training = get_attention(model), model.training
        # Dense as a config of the same attention: transformers is not told to switch, which takes longer.
        set_attention(model, self._dense)
        model.eval()
        try:
            yield model
        finally:
            model.train(training)
            set_attention(model, attention)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of ``[N, V]`` logits at a temperature T, times T^2, nats, summed over the N tokens.

    T^2 keeps the gradient's scale where softer targets would shrink it (arXiv 1503.02531, section 2).
    """
    log_student, log_teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of ``[N, D]`` hidden states as a share of the teacher's squared length, summed over the N
    tokens: a number of the same size for any model, 0 where they agree and about 2 where they have nothing in common.
    """
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()


def _check_teacher(conf: DistillationConf, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    for what, name, used in (("vocabulary", "vocab_size", True), ("hidden size", "hidden_size", conf.hidden > 0)):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if used and theirs != ours:
            raise ValueError(
                f"recipe.distillation.teacher={conf.teacher} has a {what} of {theirs}, the student one of {ours}: "
                "choose a teacher of the student's own kind" + (", or hidden=0" if name == "hidden_size" else "")
            )
