"""Distillation: its terms against the formulas in float64, and what a step with a teacher leaves as it was."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.config import DistillationConf, LoraConf, RecipeConf, TrainerConf
from lrsa.models import get_attention, load_model, set_attention
from lrsa.training import NonFiniteLoss, find_checkpoint
from lrsa.training.distillation import Distillation, answer, divergence, relative_error
from lrsa.training.lora import add_lora

from .conftest import SPARSE, make_sample, train
from .test_checkpoint import KillAfter, Killed, without_clock

ModelMaker = Callable[..., PreTrainedModel]
KL = DistillationConf(weight=0.5)
BOTH = DistillationConf(weight=0.25, temperature=2.0, hidden=0.5)


def batch_of(rows: int) -> dict[str, Any]:
    samples = [make_sample(row) for row in range(rows)]
    ids, masks = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return {"input_ids": ids, "answer_mask": masks, "document_ids": None, "ids": [str(row) for row in range(rows)]}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_and_its_gradient_are_the_formulas(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64).unbind()
    student.requires_grad_()
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) * temperature**2
    kl = divergence(student, teacher, temperature)
    assert kl.item() == pytest.approx(expected, rel=1e-12)
    kl.backward()
    gap = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, temperature * gap.detach())
    assert divergence(teacher, teacher, temperature) == 0


def test_error_of_hidden_states_does_not_depend_on_their_scale() -> None:
    teacher = torch.randn(4, 32, dtype=torch.float64)
    assert relative_error(teacher, teacher) == 0
    assert relative_error(torch.zeros_like(teacher), teacher).item() == pytest.approx(4)
    assert relative_error(7 * teacher.roll(1), 7 * teacher).item() == pytest.approx(
        relative_error(teacher.roll(1), teacher).item()
    )


def test_what_the_head_read_is_found_at_the_targets(make_model: ModelMaker) -> None:
    model, batch = make_model().eval(), batch_of(3)
    answers = answer(model, batch, hidden=True)
    states = model.model(batch["input_ids"]).last_hidden_state[:, :-1][batch["answer_mask"][:, 1:]]
    assert answers.hidden is not None
    torch.testing.assert_close(answers.hidden, states)
    torch.testing.assert_close(answers.logits, model.lm_head(states))
    assert not model.lm_head._forward_pre_hooks, "left nothing behind"
    assert answer(model, batch).hidden is None


@pytest.mark.parametrize("conf", [KL, BOTH], ids=["kl", "both"])
def test_a_step_is_the_formula(
    conf: DistillationConf, make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    """Loss, reported terms and gradient norm, by hand with two models in place of one that switches."""
    recipe = replace(recipe, steps=1, compressions=[], distillation=conf)
    _, (step,) = train(make_model(), recipe, trainer, tmp_path)
    student, teacher = make_model().train(), make_model().eval()
    set_attention(student, SPARSE)
    batch = batch_of(4)
    ours, theirs = answer(student, batch, hidden=True), answer(teacher, batch, hidden=True)
    assert ours.hidden is not None and theirs.hidden is not None
    count = len(ours.targets)
    cross_entropy = F.cross_entropy(ours.logits, ours.targets)
    log_p, log_q = ((x / conf.temperature).log_softmax(-1) for x in (theirs.logits.detach(), ours.logits))
    kl = conf.temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / count
    hidden = relative_error(ours.hidden, theirs.hidden.detach()) / count
    total = (1 - conf.weight) * cross_entropy + conf.weight * kl + conf.hidden * hidden
    total.backward()
    assert step["loss"] == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert step["kl"] == pytest.approx(kl.item(), rel=1e-4) and step["kl"] > 1e-5
    assert step["hidden"] == (pytest.approx(hidden.item(), rel=1e-4) if conf.hidden else None)
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    assert step["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_a_student_that_sees_everything_has_nothing_to_learn_from_itself(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    everything = replace(SPARSE, keep_ratio=1.0)
    recipe = replace(recipe, compressions=[], distillation=DistillationConf(weight=1.0, hidden=1.0))
    _, history = train(make_model(), recipe, trainer, tmp_path, attention=everything)
    for step in history:
        assert step["kl"] == pytest.approx(0, abs=1e-6) and step["hidden"] == pytest.approx(0, abs=1e-6)
        assert step["loss"] > 1 and step["gradient_norm"] < 1e-3


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulation_equals_one_batch(
    micro_batch_size: int, make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, distillation=BOTH)
    whole, expected = train(make_model(), recipe, trainer, tmp_path)
    parts = replace(recipe, micro_batch_size=micro_batch_size)
    accumulated, history = train(make_model(), parts, trainer, tmp_path)
    for name in ("loss", "kl", "hidden", "gradient_norm"):
        assert [e[name] for e in history] == pytest.approx([e[name] for e in expected], rel=5e-3), name
    for one, other in zip(whole.model.parameters(), accumulated.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


def test_dense_steps_of_ones_own_teacher_are_plain(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, compressions=[1, 4], schedule="annealed", distillation=BOTH)
    module, history = train(make_model(), recipe, trainer, tmp_path / "taught")
    _, plain = train(make_model(), replace(recipe, distillation=DistillationConf()), trainer, tmp_path / "plain")
    assert [step["kl"] is None for step in history] == [True] * 3 + [False] * 3
    assert [step["loss"] for step in history[:3]] == [step["loss"] for step in plain[:3]], "bit for bit"
    assert get_attention(module.model) == SPARSE


class Watch(Callback):
    """Attention and mode of the model after each micro-batch's backward pass, and what has a gradient."""

    def __init__(self) -> None:
        self.seen: list[tuple[SparseAttentionConfig | None, bool]] = []
        self.without: set[str] | None = None  # names without a gradient in all of them

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        model = pl_module.model
        self.seen.append((get_attention(model), all(module.training for module in model.modules())))
        without = {n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()}
        self.without = without if self.without is None else self.without & without


@pytest.mark.parametrize("lora", [None, LoraConf(rank=2, dropout=0.2)], ids=["full", "lora-dropout"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_teachers_pass_leaves_the_student_as_it_was(
    lora: LoraConf | None,
    checkpointing: bool,
    make_model: ModelMaker,
    recipe: RecipeConf,
    trainer: TrainerConf,
    tmp_path: Path,
) -> None:
    """With a KL that weighs nothing against the cross-entropy, training is training without one: same dropout, same
    attention in forward and recomputation, and under autocast gradients for every weight."""
    trainer, histories = replace(trainer, precision="bf16-mixed"), []
    for conf in (DistillationConf(), DistillationConf(weight=1e-12)):
        model, watch = make_model(gradient_checkpointing=checkpointing), Watch()
        if lora is not None:
            add_lora(model, lora)
        chosen = replace(recipe, micro_batch_size=2, distillation=conf, score_noise=0.3)
        module, history = train(model, chosen, trainer, tmp_path, callbacks=[watch])
        steps = [module.step_attention(step)[0] for step in range(recipe.steps) for _ in range(2)]
        assert watch.seen == [(attention, True) for attention in steps]
        assert watch.without == set()
        histories.append(history)
    plain, taught = histories
    for name in ("loss", "gradient_norm"):
        assert [e[name] for e in taught] == pytest.approx([e[name] for e in plain], rel=1e-6)
    assert all(step["kl"] > 0 for step in taught)


@pytest.mark.parametrize("attention", [SPARSE, None], ids=["sparse", "dense"])
def test_a_frozen_teacher_teaches_and_stays_as_it_is(
    attention: SparseAttentionConfig | None,
    make_model: ModelMaker,
    recipe: RecipeConf,
    trainer: TrainerConf,
    tmp_path: Path,
) -> None:
    """The student starts as something else and comes nearer; the teacher is dense whatever it was saved with."""
    teacher = make_model()
    set_attention(teacher, SPARSE)
    teacher.save_pretrained(tmp_path / "teacher")
    student = make_model()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    conf = DistillationConf(weight=1.0, teacher=str(tmp_path / "teacher"))
    recipe = replace(recipe, steps=30, compressions=[2, 4] if attention else [], distillation=conf)
    module, history = train(student, recipe, trainer, tmp_path, attention=attention)
    assert history[-1]["kl"] < 0.5 * history[0]["kl"]
    assert module.distillation is not None and module.distillation.frozen is not None
    frozen = module.distillation.frozen
    assert get_attention(frozen) is None and not frozen.training
    for name, weight in teacher.named_parameters():
        assert torch.equal(frozen.get_parameter(name), weight) and not frozen.get_parameter(name).requires_grad
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {f"model.{name}" for name in student.state_dict()}, "the teacher is not saved with it"


def test_a_teacher_of_another_vocabulary_or_size_is_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    for vocabulary in (61, 62):
        load_model("fresh", None, config={**config, "vocab_size": vocabulary}).save_pretrained(
            tmp_path / f"{vocabulary}"
        )
    with pytest.raises(ValueError, match=r"teacher=.*62 has a vocabulary of 62, the student one of 61: choose"):
        Distillation(DistillationConf(weight=0.5, teacher=str(tmp_path / "62")), make_model())
    with pytest.raises(ValueError, match=r"hidden size of 16, the student one of 32: choose .* or hidden=0"):
        Distillation(DistillationConf(hidden=0.5, teacher=str(tmp_path / "61")), make_model())
    assert Distillation(DistillationConf(weight=0.5, teacher=str(tmp_path / "61")), make_model()).frozen is not None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Distillation(DistillationConf(weight=0.5, teacher=str(tmp_path / "nowhere")), make_model())


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(
        recipe, micro_batch_size=2, distillation=BOTH, score_noise=0.2, random_share=0.4, schedule="annealed"
    )
    trainer = replace(trainer, checkpoint_every=3)
    whole, expected = train(make_model(), recipe, trainer, tmp_path / "whole")
    with pytest.raises(Killed):
        train(make_model(), recipe, trainer, tmp_path / "cut", callbacks=[KillAfter(4)])
    torch.rand(7)
    resume = find_checkpoint(tmp_path / "cut")
    resumed, history = train(make_model(), recipe, trainer, tmp_path / "new", resume=resume)
    assert without_clock(history) == without_clock(expected)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_teacher_that_is_not_finite_stops_before_the_weights(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if "sample-14" in batch["ids"]:
                pl_module.distillation.frozen.lm_head.weight.fill_(math.nan)

    make_model().save_pretrained(tmp_path / "teacher")
    conf = DistillationConf(weight=0.5, teacher=str(tmp_path / "teacher"))
    recipe = replace(recipe, micro_batch_size=2, distillation=conf)
    with pytest.raises(NonFiniteLoss, match=r"step 4 of 6.*nan.*sample-14"):
        train(make_model(), recipe, trainer, tmp_path, callbacks=[Spoil()])
