"""The shipped start and the demo on it: what it takes, what it shows."""

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import lrsa.train
from lrsa.config import EvaluationConf, ExamplesConf, TrainConf, config_dir, register_configs
from lrsa.data.tokens import tokenizer_fingerprint
from lrsa.data.vocabulary import build_tokenizer
from lrsa.evaluation import evaluate
from lrsa.models import ASSETS, load_model, load_tokenizer
from lrsa.results import Record
from lrsa.results.statistics import paired_difference
from lrsa.results.store import load_records

START = ASSETS / "recall-tiny"


def composed(*overrides: str) -> TrainConf:
    register_configs()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base=None):
        conf = OmegaConf.to_object(compose("train", [*overrides, "run.output_dir=unused"]))
    assert isinstance(conf, TrainConf)
    return conf


def test_the_start_is_small_and_what_its_recipe_makes() -> None:
    assert sum(path.stat().st_size for path in START.iterdir()) < 3_000_000
    assert tokenizer_fingerprint(load_tokenizer("recall-tiny")) == tokenizer_fingerprint(build_tokenizer())
    asked = composed("experiment=recall_tiny").model.config
    assert asked is not None
    stored = json.loads((START / "config.json").read_text())
    assert {name: stored[name] for name in asked} == asked
    assert "lrsa" not in stored, "the start is dense"


def test_both_arms_share_everything_but_the_attention() -> None:
    dense, sparse = (composed("experiment=demo", f"recipe={arm}") for arm in ("dense", "lrsa_uniform"))
    assert (dense.attention.scorer, sparse.attention.scorer) == ("dense", "lag_relative")
    assert sparse.recipe.compressions == [4]
    for conf in (dense, sparse):
        conf.recipe.name = conf.run.arm = conf.run.name = ""
        conf.recipe.compressions = []
        conf.attention = dense.evaluation.attention
    assert dense == sparse
    assert dense.model.name == "recall-tiny" and dense.trainer.accelerator == "cpu"
    assert dense.evaluation.compressions == [1, 2, 4, 8, 16]
    tasks = list(dense.evaluation.tasks.values())
    assert [task.source for task in tasks] == ["needles"] and (tasks[0].limit or 0) >= 200


def test_the_start_recalls_with_a_full_cache_only() -> None:
    demo = composed("experiment=demo", "recipe=lrsa_uniform").evaluation
    task: ExamplesConf = demo.tasks["recall"]
    task.limit = 40
    conf = EvaluationConf(tasks={"recall": task}, attention=demo.attention, compressions=[1, 4], batch_size=20)
    cells, _ = evaluate(load_model("recall-tiny", None), load_tokenizer("recall-tiny"), conf, 512, progress=False)
    floor, full, compressed = (cell["exact"] for cell in cells)
    assert full >= 0.9 and floor <= 0.1 and compressed <= 0.6


@pytest.mark.slow
def test_the_demo_shows_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The multirun of `make demo`: LRSA above dense at 4x by at least 20 points, the paired interval clear of 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lrsa-train", "-m", "experiment=demo", "logger=none", "hydra.sweep.dir=runs"])
    GlobalHydra.instance().clear()
    lrsa.train.main()
    GlobalHydra.instance().clear()
    runs: dict[str, Record] = {record.arm: record for record in load_records("runs")}
    assert set(runs) == {"dense", "lrsa"}
    exact = {
        arm: {(o["compression"], o["id"]): float(o["exact"]) for o in record.outcomes()} for arm, record in runs.items()
    }
    for arm, outcomes in exact.items():
        full = [value for (compression, _), value in outcomes.items() if compression == 1]
        assert len(full) >= 200 and sum(full) / len(full) >= 0.85, arm
    at_4x = {arm: {name: v for (c, name), v in outcomes.items() if c == 4} for arm, outcomes in exact.items()}
    difference = paired_difference(at_4x["lrsa"], at_4x["dense"])
    assert difference.mean >= 0.2 and difference.low > 0
    assert sum(record.wall_s or 0.0 for record in runs.values()) < 360
