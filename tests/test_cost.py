"""The predicted cost: counted against known sizes and against counting by hand, and shown by the command."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lrsa.attention import SparseAttentionConfig
from lrsa.benchmark.cost import (
    H100_FLOPS,
    forward_flops,
    measured_utilisations,
    most_alike,
    predict,
    shape_of,
    training_flops,
)
from lrsa.config import LoraConf, ModelConf
from lrsa.cost import read
from lrsa.results import Record

ROOT = Path(__file__).resolve().parents[1]
TINY = ["model=tiny_random", "recipe=lrsa_uniform", "data=demo_recall", "task=[recall]", "trainer=cpu"]


@pytest.mark.parametrize(
    ("model", "parameters", "layers"),
    [("qwen2_5_7b", 7_615_616_512, 28), ("llama3_1_8b", 8_030_261_248, 32)],  # as their model cards say
)
def test_shapes_are_those_of_the_models(model: str, parameters: int, layers: int) -> None:
    conf = read([f"model={model}"]).model
    shape = shape_of(conf)
    assert (shape.parameters, shape.layers) == (parameters, layers)
    assert conf.gradient_checkpointing and conf.dtype == "bfloat16" and conf.lora is not None
    heads = 2 * (shape.query_heads + shape.key_value_heads) * shape.head_dim  # q and o, k and v
    assert shape.adapters == layers * 16 * (4 * shape.hidden + heads)


def test_a_layer_counted_by_hand() -> None:
    """Llama: q, k, v, o of 32 x (32 + 16 + 16 + 32) weights, an MLP of 3 x 32 x 64; four heads of 8."""
    shape = shape_of(read(TINY).model)
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert shape.matrices == matrices and shape.adapters == 0
    scores = 4 * 4 * 8 * (100 * 101 / 2) * 2
    assert forward_flops(shape, 100, None) == (2 * matrices * 100, scores)
    assert training_flops(shape, 100, None, False) == 3 * 2 * matrices * 100 + 3.5 * scores
    assert training_flops(shape, 100, None, True) == 4 * 2 * matrices * 100 + 4.5 * scores
    lora = shape_of(ModelConf(name="x", config=read(TINY).model.config, lora=LoraConf(rank=2)))
    assert lora.adapters == 2 * 2 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    adapters = 2 * lora.adapters * 100
    assert training_flops(lora, 100, None, False) == 2 * 2 * matrices * 100 + 3 * adapters + 3.5 * scores


def test_compression_saves_attended_pairs_alone() -> None:
    shape = shape_of(read(TINY).model)
    sparse = SparseAttentionConfig(sink_size=4, lag_size=32, keep_ratio=1 / 4)
    matrices, scores = forward_flops(shape, 1024, sparse)
    dense_matrices, dense_scores = forward_flops(shape, 1024, None)
    assert matrices == dense_matrices
    assert scores / dense_scores == sparse.geometry.pairs(1024) / (1024 * 1025 / 2) < 0.5


def test_each_layer_is_counted_by_its_own_share() -> None:
    """Four layers at 4x: the total pays for a whole one and leaves none to the others; the second alone is dense."""
    shape = replace(shape_of(read(TINY).model), layers=4)
    uniform = SparseAttentionConfig(sink_size=4, lag_size=32, keep_ratio=1 / 4)
    per_pair, dense = 4 * shape.query_heads * shape.head_dim, 1024 * 1025 / 2
    spared = replace(uniform, dense_layers=(-1,))
    assert forward_flops(shape, 1024, spared)[1] == per_pair * (dense + 3 * uniform.geometry.pairs(1024))
    nothing = replace(uniform, keep_ratio=None, top_k=0).geometry.pairs(1024)
    concentrated = replace(uniform, budget="concentrated", dense_layers=(1, 3))
    assert forward_flops(shape, 1024, concentrated)[1] == per_pair * (dense + 3 * nothing)
    pyramid = replace(uniform, budget="pyramid")
    pairs = sum(pyramid.for_layer(layer, 4).geometry.pairs(1024) for layer in range(4))
    assert forward_flops(shape, 1024, pyramid)[1] == per_pair * pairs


def test_a_run_is_its_steps_and_a_device_its_share() -> None:
    overrides = ["model=llama3_1_8b", "recipe=lrsa_uniform", "data=qa", "task=[xquad]", "recipe.batch_size=8"]
    overrides += ["recipe.micro_batch_size=1"]
    alone = predict(read([*overrides, "recipe.steps=10"]))
    assert alone.tokens == 10 * 8 * 4096
    longer = predict(read([*overrides, "recipe.steps=20"]))
    assert longer.flops == pytest.approx(2 * alone.flops) and longer.hours(0.5) == pytest.approx(2 * alone.hours(0.5))
    shared = predict(read([*overrides, "recipe.steps=10", "trainer=fsdp"]))
    assert shared.hours(0.4) == pytest.approx(alone.hours(0.4) / 8)
    assert shared.memory["frozen weights"] == alone.memory["frozen weights"] / 8 == 2 * 8_030_261_248 / 8
    assert shared.memory["gathered weights"] > 0 and "gathered weights" not in alone.memory
    assert alone.hours(0.4) == pytest.approx(alone.flops / (H100_FLOPS * 0.4) / 3600)
    mixed = predict(read([*overrides, "recipe=lrsa_mixed", "recipe.compressions=[2,8]", "recipe.steps=10"]))
    each = [
        predict(read([*overrides, "recipe.steps=10", f"recipe.compressions=[{factor}]"])).flops for factor in (2, 8)
    ]
    assert mixed.flops == pytest.approx(sum(each) / 2)
    with pytest.raises(ValueError, match=r"recipe\.batch_size=4 is not a multiple of .*=1 x trainer\.devices=8"):
        predict(read([*overrides, "trainer=fsdp", "recipe.batch_size=4"]))


def test_a_teacher_is_a_dense_pass_forward_in_the_steps_that_it_teaches() -> None:
    conf = read([*TINY, "recipe.compressions=[1,4]"])
    shape, steps = shape_of(conf.model), conf.recipe.steps * conf.recipe.batch_size
    alone, forward = predict(conf), sum(forward_flops(shape, conf.data.length, None))
    conf.recipe.distillation.weight = 0.5
    assert predict(conf).flops - alone.flops == pytest.approx(steps * forward / 2)
    conf.recipe.distillation.teacher = "another/model"
    other = predict(conf)
    assert other.flops - alone.flops == pytest.approx(steps * forward)
    assert sum(other.memory.values()) - sum(alone.memory.values()) == pytest.approx(4 * shape.parameters)


def test_a_shape_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    conf = ModelConf(name="/nowhere/at/all")
    with pytest.raises(ValueError, match=r"model\.name=/nowhere/at/all: .* set model\.shape"):
        shape_of(conf)
    with pytest.raises(ValueError, match=r"model\.shape=absent: there is no .*absent\.yaml"):
        shape_of(replace(conf, shape="absent"))


def test_utilisation_is_that_of_the_records() -> None:
    record = Record.load(ROOT / "experiments/benchmark/records/h100-step-4k")
    step = measured_utilisations(record)
    row = record.metrics["rows"][0]
    shape = shape_of(read(["model=smollm2_random"]).model)
    flops = 8 * training_flops(shape, 4096, None, False)
    assert step[0].share == pytest.approx(flops / (row["step"]["dense"]["median"] / 1e3) / H100_FLOPS)
    assert 0.05 < step[1].share < step[0].share < 0.3, "a small model, and sparse attention does less arithmetic"
    assert [(one.step, one.sparse, one.tokens) for one in step] == [(True, False, 4096), (True, True, 4096)]
    forward = measured_utilisations(Record.load(ROOT / "experiments/generation/records/h100-llama8b-32k"))
    assert {one.sparse for one in forward} == {False, True} and not any(one.step for one in forward)
    assert all(0.3 < one.share < 0.8 and one.parameters == 8_030_261_248 for one in forward)
    for field, value in (("hardware", {"device": "cpu"}), ("command", "lrsa-train")):
        other = replace(record, **{field: value})
        assert measured_utilisations(other) == []
    cost = predict(read([*TINY, "model=llama3_1_8b"]))
    assert most_alike([*step, *forward], cost) == [step[1], next(one for one in forward if one.sparse)]
    assert most_alike(step, replace(cost, sparse=False)) == [step[0]] and most_alike([], cost) == []
    fused = measured_utilisations(Record.load(ROOT / "experiments/benchmark/records/h100-step-4k-compiled"))
    assert "sparse, compiled" in fused[1].what and fused[1].share > step[1].share
    assert most_alike([*step, *fused], cost) == [step[1]]
    compiled = predict(read([*TINY, "model=llama3_1_8b", "trainer.compile=true"]))
    assert most_alike([*step, *fused], compiled) == [fused[1]]


@pytest.mark.parametrize("experiment", ["qwen2_5_7b", "llama3_1_8b"])
def test_the_large_studies_fit_eight_gpus(experiment: str) -> None:
    conf = read([f"experiment={experiment}"])
    assert (conf.trainer.strategy, conf.trainer.devices, conf.trainer.precision) == ("fsdp", 8, "bf16-mixed")
    assert conf.model.lora is not None and conf.run.study == experiment
    assert sum(predict(conf).memory.values()) < 70 * 2**30


def test_the_command_shows_it() -> None:
    command = [sys.executable, "-m", "lrsa.cost"]
    done = subprocess.run([*command, "experiment=qwen2_5_7b"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "7,615,616,512 parameters" in done.stdout and "hours on 8 H100" in done.stdout
    assert "assumed, not measured" in done.stdout and "training step" in done.stdout


def test_the_command_refuses_without_a_traceback(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrsa.cost import main

    for wrong, message in (
        ("recipe.stepz=3", "recipe.stepz"),
        ("model.shape=absent", "there is no"),
        ("recipe=lrsa", "recipe=lrsa_uniform"),
    ):
        monkeypatch.setattr(sys, "argv", ["lrsa-cost", "model=qwen2_5_7b", "recipe=lrsa_uniform", wrong])
        with pytest.raises(SystemExit):
            main()
        assert "error: " in (shown := capsys.readouterr().err) and message in shown
