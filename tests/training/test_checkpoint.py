import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrsa.config import LoraConf, RecipeConf, TrainerConf
from lrsa.models import get_attention, load_model
from lrsa.training import PostTraining, TrainingResult, find_checkpoint, fit, save_model
from lrsa.training.checkpoint import LAST
from lrsa.training.lora import add_lora
from lrsa.training.module import parameter_counts

from .conftest import SPARSE, RandomData

ModelMaker = Callable[..., PreTrainedModel]


class Killed(BaseException):
    pass


class KillAfter(Callback):
    """Dies like a preempted job, after optimiser step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Killed


class FakeTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def run(
    model: PreTrainedModel, recipe: RecipeConf, trainer: TrainerConf, folder: Path, **options: Any
) -> tuple[PreTrainedModel, TrainingResult]:
    module = PostTraining(model, SPARSE, recipe, seed=5, identity={"recipe": {"steps": recipe.steps}})
    return model, fit(module, RandomData(recipe), trainer, folder, **options)


def without_clock(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("lora", [None, LoraConf(rank=2, dropout=0.2)], ids=["full", "lora-dropout"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    lora: LoraConf | None,
    micro_batch_size: int | None,
    make_model: ModelMaker,
    recipe: RecipeConf,
    trainer: TrainerConf,
    tmp_path: Path,
) -> None:
    recipe = replace(recipe, micro_batch_size=micro_batch_size)
    trainer = replace(trainer, checkpoint_every=3)

    def start() -> PreTrainedModel:
        model = make_model()
        if lora is not None:
            add_lora(model, lora)
        return model

    undisturbed, expected = run(start(), recipe, trainer, tmp_path / "whole")
    with pytest.raises(Killed):
        run(start(), recipe, trainer, tmp_path / "cut", callbacks=[KillAfter(4)])
    torch.rand(7)  # whatever else drew random numbers meanwhile
    resumed, result = run(start(), recipe, trainer, tmp_path / "new", resume=find_checkpoint(tmp_path / "cut"))
    assert without_clock(result.history) == without_clock(expected.history)
    assert result.summary["steps"] == 6 and result.summary["tokens"] == expected.summary["tokens"]
    for (name, one), other in zip(undisturbed.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_resuming_a_finished_run_trains_no_more(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    trained, expected = run(make_model(), recipe, trainer, tmp_path)
    again, result = run(make_model(), recipe, trainer, tmp_path / "again", resume=tmp_path / LAST)
    assert without_clock(result.history) == without_clock(expected.history)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_checkpoints_hold_plain_values_and_a_kill_while_writing_keeps_the_previous(
    make_model: ModelMaker,
    recipe: RecipeConf,
    trainer: TrainerConf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = replace(trainer, checkpoint_every=2)
    replaced = os.replace

    def die(source: Any, target: Any) -> None:
        if Path(target).name == LAST.name and torch.load(source, weights_only=True)["global_step"] == 4:
            raise Killed
        replaced(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        run(make_model(), recipe, trainer, tmp_path)
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["lrsa"] == {"recipe": {"steps": 6}}


def test_resume_refuses_another_configuration(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    run(make_model(), recipe, trainer, tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.steps: 6 in the checkpoint, 9 now"):
        run(make_model(), replace(recipe, steps=9), trainer, tmp_path / "new", resume=tmp_path / LAST)


@pytest.mark.parametrize("what", ["nothing", "empty"])
def test_missing_checkpoint_says_where_it_looked(what: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*" + what):
        find_checkpoint(tmp_path / what)


def test_saved_model_opens_with_auto_classes_and_remembers_its_attention(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model()
    save_model(model, FakeTokenizer(), tmp_path / "model", SPARSE)  # type: ignore[arg-type]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert not any(name.endswith(".bin") for name in files)
    assert get_attention(load_model(tmp_path / "model")) == SPARSE
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
    save_model(model, FakeTokenizer(), tmp_path / "model", None)  # type: ignore[arg-type]  # again, over the old one
    assert get_attention(load_model(tmp_path / "model")) is None


def test_adapters_train_alone_and_are_saved_merged_and_apart(
    make_model: ModelMaker, recipe: RecipeConf, trainer: TrainerConf, tmp_path: Path
) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = add_lora(model, LoraConf(rank=2))
    counts = parameter_counts(model)
    assert 0 < counts["trained"] < counts["total"] / 5
    run(model, recipe, trainer, tmp_path)
    stored = torch.load(tmp_path / LAST, weights_only=True)["state_dict"]
    assert stored and all("lora_" in name for name in stored), "frozen weights would make every checkpoint huge"
    input_ids = torch.arange(30)[None]
    expected = model(input_ids).logits
    merged = save_model(model, FakeTokenizer(), tmp_path / "model", SPARSE, adapter)  # type: ignore[arg-type]
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    reloaded = load_model(tmp_path / "model")
    torch.testing.assert_close(reloaded(input_ids).logits, expected, atol=1e-5, rtol=1e-4)
    changed = {name for name, value in reloaded.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.rsplit(".", 2)[-2] in LoraConf().target_modules for name in changed)


def test_unknown_target_modules_list_the_valid_ones(make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match=r"names \['c_attn'\].*q_proj"):
        add_lora(make_model(), LoraConf(target_modules=["c_attn", "q_proj"]))
