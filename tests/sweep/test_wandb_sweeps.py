"""`sweeps/*.yaml`: what W&B's server asks of a sweep, command lines that compose, and a metric that a run logs."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lrsa.config import TrainConf
from lrsa.results import Record
from lrsa.results.summary import SCORE, tracked_metrics
from lrsa.validation import check_train

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
# https://docs.wandb.ai/guides/sweeps/sweep-config-keys
DISTRIBUTIONS = {"uniform", "int_uniform", "log_uniform_values", "q_uniform", "normal", "categorical", "constant"}
KEYS = {"method", "metric", "parameters", "program", "command", "run_cap", "name", "description", "project", "entity"}


def ends(parameter: dict[str, Any]) -> list[Any]:
    """First and last value."""
    if "values" in parameter:
        return [parameter["values"][0], parameter["values"][-1]]
    return [parameter["min"], parameter["max"]]


pytestmark = pytest.mark.usefixtures("hydra_configs")


def test_there_is_one_of_each_method() -> None:
    assert {yaml.safe_load(file.read_text())["method"] for file in FILES} == {"grid", "random", "bayes"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_file_is_valid_and_its_commands_compose(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert set(sweep) <= KEYS
    assert sweep["metric"] == {"name": SCORE, "goal": "maximize"}
    for name, parameter in sweep["parameters"].items():
        if sweep["method"] == "grid":
            assert set(parameter) == {"values"}, f"{name}: a grid takes lists"
        assert set(parameter) == {"values"} or parameter["distribution"] in DISTRIBUTIONS, name
        assert "values" in parameter or parameter["min"] < parameter["max"], name
    assert sweep["program"] == "lrsa-train" and sweep["command"][:2] == ["${env}", "${program}"]
    fixed = [item for item in sweep["command"][2:] if item != "${args_no_hyphens}"]
    assert len(fixed) == len(sweep["command"]) - 3 and "logger.mode=online" in fixed

    for values in itertools.product(*map(ends, sweep["parameters"].values())):
        chosen = {name: {"value": value} for name, value in zip(sweep["parameters"], values, strict=True)}
        said = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        conf = OmegaConf.to_object(compose("train", [*fixed, *said, "run.output_dir=unused"]))
        assert isinstance(conf, TrainConf) and conf.logger.mode == "online"
        check_train(conf)


def test_the_metric_is_one_that_a_run_logs() -> None:
    record = Record.load(ROOT / "experiments" / "demo" / "records" / "lrsa-seed0")
    assert 0 < tracked_metrics(record.cells)[SCORE] < 1
