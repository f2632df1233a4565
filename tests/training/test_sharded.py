"""Weights shared out over processes: training as in one, checkpoints included. Two processes on the CPU, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lrsa.config import TrainerConf, config_dir
from lrsa.training import micro_batches
from lrsa.training.sharded import local, make_strategy, shard, summed, total_norm
from lrsa.validation.processes import problems_of

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "data=demo_recall", "task=[recall]", "logger=none", "data.length=300", "attention.sink_size=4",
    "attention.lag_size=32", "recipe=lrsa_uniform", "recipe.steps=4", "recipe.batch_size=4",
    "recipe.micro_batch_size=1", "recipe.warmup_steps=1", "recipe.learning_rate=1e-2",
    "evaluation.tasks.recall.limit=4", "evaluation.bootstrap=100", "evaluation.compressions=[1,4]",
    "trainer.accelerator=cpu", "trainer.progress=false", "trainer.checkpoint_every=2", "run.threads=1",
]  # fmt: skip
WHOLE = ["model=tiny_random", "trainer.precision=32-true"]
OBJECTIVE = [
    *WHOLE, "recipe.distillation.weight=0.5", "recipe.distillation.hidden=0.5", "recipe.score_noise=0.01",
    "recipe.compressions=[2,4]", "recipe.schedule=annealed", "recipe.straight_through=true",
]  # fmt: skip
ADAPTERS = ["model=tiny_lora", "trainer.precision=bf16-mixed"]


def trained(folder: Path, processes: int, *overrides: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Record and saved weights of `lrsa-train` in so many processes."""
    options = folder.parent / "own" / "model"
    options.mkdir(parents=True, exist_ok=True)
    tiny = (config_dir() / "model" / "tiny_random.yaml").read_text()
    more = "dtype: bfloat16\ngradient_checkpointing: true\nlora:\n  rank: 4\n  alpha: 8\n"
    (options / "tiny_lora.yaml").write_text(tiny + more)
    start = [sys.executable]
    if processes > 1:
        # the port of torchrun's own choice, so that two test runs do not meet
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        overrides = (*overrides, "trainer.strategy=fsdp", f"trainer.devices={processes}")
    script = ROOT / "tests" / "training" / "keep_checkpoints.py"
    command = [
        *start,
        str(script),
        "--config-dir",
        str(options.parent),
        *SETTINGS,
        *overrides,
        f"hydra.run.dir={folder}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "record.json").read_text()), load_file(folder / "model" / "model.safetensors")


def alike(one: tuple[dict, dict], other: tuple[dict, dict], tolerance: float) -> None:
    (record, weights), (again, their_weights) = one, other
    curve, their_curve = record["training"]["loss_curve"], again["training"]["loss_curve"]
    assert their_curve.keys() == curve.keys()
    for name in curve:
        assert their_curve[name] == pytest.approx(curve[name], abs=1e-5)
    for name in ("steps", "tokens", "targets", "parameters"):
        assert again["training"][name] == record["training"][name]
    assert weights.keys() == their_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(their_weights[name], weight, rtol=0, atol=tolerance)
    losses = [cell["nll"] for cell in record["cells"]]
    assert [cell["nll"] for cell in again["cells"]] == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [WHOLE, OBJECTIVE, ADAPTERS], ids=["whole", "objective", "lora"])
def test_two_processes_train_what_one_does_and_go_on_from_a_checkpoint(overrides: list[str], tmp_path: Path) -> None:
    one = trained(tmp_path / "one", 1, *overrides)
    two = trained(tmp_path / "two", 2, *overrides)
    assert two[0]["training"]["devices"] == 2 and len(list(tmp_path.glob("*/record.json"))) == 2
    assert one[0]["training"]["loss_curve"]["loss"][0] != one[0]["training"]["loss_curve"]["loss"][-1]
    alike(one, two, 1e-5)  # AdamW at 1e-2 turns rounding into that
    resumed = trained(tmp_path / "resumed", 2, *overrides, f"resume={tmp_path}/two/checkpoints/2.ckpt")
    alike(two, resumed, 0)


def test_devices_share_a_steps_micro_batches() -> None:
    assert micro_batches(32, 1, 8) == 4 and micro_batches(8, None) == 1
    with pytest.raises(ValueError, match=r"makes 4 micro-batches, which trainer\.devices=8 cannot share evenly"):
        micro_batches(8, 2, 8)


def test_one_process_holds_everything() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert total_norm(gradients) == 5 and local(gradients)[1] is gradients[1]
    assert summed(torch.tensor(2.0)) == 2
    assert make_strategy("auto", 1) == "auto"
    with pytest.raises(ValueError, match=r"Linear has no decoder layers that trainer\.strategy=fsdp could share out"):
        shard(nn.Linear(2, 2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "started", "message"),
    [
        ({"strategy": "ddp"}, "1", "trainer.strategy='ddp' is unknown; choose one of auto, fsdp"),
        ({"devices": 0}, "1", "trainer.devices=0: at least 1"),
        ({"devices": 2}, "1", "one process trains on one device; .* trainer=fsdp"),
        ({}, "2", "trainer.devices=1 in 2 process"),
        ({"strategy": "fsdp", "devices": 8}, "1", "1 process.* torchrun --nproc-per-node 8 -m lrsa.train"),
        ({"strategy": "fsdp", "devices": 2}, "2", None),
        ({}, "1", None),
    ],
)
def test_what_was_started_must_be_what_is_asked_for(
    settings: dict, started: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    problems = list(problems_of(TrainerConf(**settings)))
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem)
