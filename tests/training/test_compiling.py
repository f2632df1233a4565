"""`trainer.compile`: the same training, layers compiled once each variant, and nothing left of it afterwards."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig, selection
from lrsa.attention.config import BY_LAYER
from lrsa.config import DistillationConf, LoraConf, RecipeConf, TrainerConf
from lrsa.models import set_attention, target_logits
from lrsa.training import compiling
from lrsa.training.compiling import checkpoints_outside, compiled_layers, decoder_layers
from lrsa.training.lora import add_lora

from .conftest import SPARSE, make_sample, train

ModelMaker = Callable[..., PreTrainedModel]
VARIANTS = {"dense": None, "lrsa": SPARSE} | {name: replace(SPARSE, scorer=name) for name in ("random", "snapkv")}


def checkpointed(on: bool = True) -> bool:
    """``on``, where this transformers has it with compiled layers; `test_checkpoints_around...` is of those without."""
    if on and checkpoints_outside():
        pytest.skip("this transformers checkpoints around what is compiled, which is refused")
    return on


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and differentiated as ever, but run by PyTorch's operators: no C++ compiler, little time."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model: PreTrainedModel, attention: SparseAttentionConfig | None) -> dict[str, torch.Tensor]:
    """Of the loss over two samples, which is among them as ``loss``."""
    set_attention(model, attention)
    model.zero_grad()
    ids, masks = zip(*map(make_sample, range(2)), strict=True)
    logits, targets = target_logits(model, torch.stack(ids), torch.stack(masks))
    loss = nn.functional.cross_entropy(logits, targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("attention", VARIANTS.values(), ids=VARIANTS)
def test_compiled_layers_compute_the_same(
    attention: SparseAttentionConfig | None, checkpointing: bool, make_model: ModelMaker
) -> None:
    model = make_model(gradient_checkpointing=checkpointed(checkpointing)).train()
    expected = gradients(model, attention)
    with compiled_layers(model):
        same(expected, gradients(model, attention))
        assert (compiled_graphs(), graph_breaks()) == (1, 0)
    same(expected, gradients(model, attention))


@pytest.mark.parametrize("attention", VARIANTS.values(), ids=VARIANTS)
def test_layers_are_one_graph_whatever_their_number(
    attention: SparseAttentionConfig | None, make_model: ModelMaker
) -> None:
    counted = []
    for layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        with compiled_layers(model := make_model(num_hidden_layers=layers).train()):
            for _ in range(2):
                gradients(model, attention)
        counted.append((compiled_graphs(), graph_breaks()))
    assert counted == [(1, 0), (1, 0)]


def test_switching_between_attentions_compiles_each_but_once(make_model: ModelMaker) -> None:
    variants = [None, SPARSE, SPARSE.with_compression(4)]
    with compiled_layers(model := make_model().train()):
        for attention in variants * 2:
            gradients(model, attention)
        assert (compiled_graphs(), graph_breaks()) == (len(variants), 0)


def test_layers_of_two_kinds_are_two_graphs(make_model: ModelMaker) -> None:
    partly = replace(SPARSE, dense_layers=(0, -1))
    model = make_model(num_hidden_layers=4).train()
    expected = gradients(model, partly)
    with compiled_layers(model):
        same(expected, gradients(model, partly))
    assert (compiled_graphs(), graph_breaks()) == (2, 0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_each_layer_selects_once_a_step(
    checkpointing: bool, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputing a selection would draw other noise, and could break a tie otherwise."""
    called, best = [], selection.best
    monkeypatch.setattr(selection, "best", lambda *given: called.append(given) or best(*given))
    with compiled_layers(model := make_model(gradient_checkpointing=checkpointed(checkpointing)).train()):
        gradients(model, SPARSE)
        assert len(called) == 2


@pytest.mark.parametrize(
    "attention",
    [
        replace(SPARSE, budget="adaptive"),
        SparseAttentionConfig(sink_size=2, lag_size=8, schedule="prefill_once"),
        replace(SPARSE, budget="pyramid"),
        replace(SPARSE, budget="concentrated", dense_layers=(1,), keep_ratio=None, top_k=5),
    ],
    ids=["mask-form", "once", "pyramid", "concentrated"],
)
def test_what_takes_python_runs_apart_and_is_the_same(attention: SparseAttentionConfig, make_model: ModelMaker) -> None:
    model = make_model().train()
    expected = gradients(model, attention)
    with compiled_layers(model):
        same(expected, gradients(model, attention))
        assert (graph_breaks() > 0) == (attention.budget not in BY_LAYER)


def test_rows_of_several_documents_are_the_same(make_model: ModelMaker) -> None:
    model = make_model().train()
    ids, mask = make_sample(0)
    documents = (torch.arange(len(ids)) >= 13).long()[None]

    def loss() -> torch.Tensor:
        logits, targets = target_logits(model, ids[None], mask[None], documents)
        return nn.functional.cross_entropy(logits, targets)

    for attention in (None, SPARSE):
        set_attention(model, attention)
        expected = loss()
        with compiled_layers(model):
            torch.testing.assert_close(loss(), expected)


def histories(
    make: Callable[[], PreTrainedModel], recipe: RecipeConf, trainer: TrainerConf, folder: Path
) -> list[list[dict[str, Any]]]:
    """Of the same training as it is, and compiled; checks weights and names of parameters."""
    found, weights = [], []
    for switch in (False, True):
        model = make()
        _, history = train(model, recipe, replace(trainer, compile=switch), folder / str(switch))
        found.append(history)
        weights.append(model.state_dict())
        assert all(layer._compiled_call_impl is None for layer in decoder_layers(model)), "an evaluation would compile"
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-4)
    return found


@pytest.mark.parametrize(
    "kind", ["drawn", "noise", "teacher", "straight_through", "checkpointed", "noise checkpointed"]
)
def test_training_compiled_is_the_same_training(
    kind: str, make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    recipe = replace(recipe, compressions=[4], micro_batch_size=2)
    if kind == "drawn":
        recipe = replace(recipe, compressions=[1, 4])
    elif kind.startswith("noise"):
        recipe = replace(recipe, score_noise=1.0, random_share=0.5)
    elif kind == "teacher":
        recipe = replace(recipe, distillation=DistillationConf(weight=0.5, hidden=0.5))
    elif kind == "straight_through":
        recipe = replace(recipe, straight_through=True)
    plain, compiled = histories(
        lambda: make_model(gradient_checkpointing=checkpointed(kind.endswith("checkpointed"))),
        recipe,
        trainer,
        tmp_path,
    )
    for name in ("loss", "gradient_norm") if kind != "teacher" else ("loss", "gradient_norm", "kl", "hidden"):
        assert [e[name] for e in compiled] == pytest.approx([e[name] for e in plain], rel=2e-3)
    if kind == "drawn":
        assert {entry["compression"] for entry in compiled} == {1.0, 4.0}


def test_adapters_train_compiled(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    def adapted() -> PreTrainedModel:
        model = make_model()
        torch.manual_seed(1)
        add_lora(model, LoraConf(rank=2, alpha=4))
        return model

    plain, compiled = histories(adapted, recipe, trainer, tmp_path)
    assert [e["loss"] for e in compiled] == pytest.approx([e["loss"] for e in plain], rel=2e-3)


def test_fresh_noise_a_step_compiles_nothing_anew(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    counted = []
    for steps in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        noisy = replace(recipe, steps=steps, compressions=[4], score_noise=1.0)
        train(make_model(), noisy, replace(trainer, compile=True), tmp_path / str(steps))
        counted.append(compiled_graphs())
    assert counted[0] == counted[1] > 0


def test_a_run_goes_on_with_the_switch_changed(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    whole, expected = train(make_model(), recipe, trainer, tmp_path / "whole")
    half = replace(trainer, checkpoint_every=3)
    train(make_model(), replace(recipe, steps=3), replace(half, compile=True), tmp_path / "first")
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    resumed, history = train(make_model(), recipe, half, tmp_path / "second", resume=checkpoint)
    assert [e["step"] for e in history] == [e["step"] for e in expected]
    assert whole.model.state_dict().keys() == resumed.model.state_dict().keys()


def test_too_many_variants_are_an_error_not_a_slow_run(make_model: ModelMaker) -> None:
    with compiled_layers(model := make_model().train()), torch._dynamo.config.patch(recompile_limit=1):
        gradients(model, None)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            target_logits(model, make_sample(0)[0][None, :30], make_sample(0)[1][None, 10:])
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def test_checkpoints_around_compiled_layers_are_refused(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where older transformers put them: a layer that is computed again would select again."""
    monkeypatch.setattr(compiling.GradientCheckpointingLayer, "__call__", nn.Module.__call__, raising=False)
    with compiled_layers(make_model()):
        pass
    message = r"trainer\.compile=true with model\.gradient_checkpointing=true: transformers .* upgrade"
    with pytest.raises(ValueError, match=message), compiled_layers(make_model(gradient_checkpointing=True)):
        pass


def test_a_model_without_decoder_layers_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"Linear has no decoder layers that trainer\.compile=true could compile"),
        compiled_layers(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "lrsa"])
def test_fused_kernels_compute_the_same(
    attention: SparseAttentionConfig | None, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler that trains; it calls the C++ compiler here."""
    monkeypatch.undo()
    model = make_model().train()
    expected = gradients(model, attention)
    with compiled_layers(model):
        same(expected, gradients(model, attention))
