"""W&B beside the record: what an offline run holds, read by W&B's own reader; and that W&B never costs a run."""

import errno
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra import compose
from omegaconf import OmegaConf
from wandb.util import get_core_path

from lrsa.bench import run as run_benchmark
from lrsa.config import BenchConf, LoggerConf, TrainConf
from lrsa.results import Record
from lrsa.results.summary import TrackedName, headline, tracked_metrics
from lrsa.results.wandb_export import load_wandb
from lrsa.tracking import plain
from lrsa.tracking.names import listed_config, tags
from lrsa.tracking.wandb_run import run_id
from lrsa.train import run_training
from lrsa.training import NonFiniteLoss, PostTraining

SETTINGS = [
    "model=tiny_random",
    "recipe=lrsa_uniform",
    "trainer=cpu",
    "trainer.progress=false",
    "trainer.log_every=1",
    "trainer.save_model=false",
    "trainer.checkpoint_every=1",
    "data=demo_recall",
    "data.length=320",
    "task=[recall]",
    "attention.sink_size=4",
    "attention.lag_size=16",
    "recipe.steps=3",
    "recipe.batch_size=1",
    "recipe.warmup_steps=1",
    "evaluation.tasks.recall.limit=3",
    "evaluation.compressions=[1,4]",
    "evaluation.bootstrap=100",
    "logger=wandb",
    "logger.mode=offline",
    "logger.tags=[tried]",
    "logger.group=mine",
    "run.study=tracked",
]


pytestmark = pytest.mark.usefixtures("hydra_configs")


def trained(folder: Path, *overrides: str) -> Record:
    conf = OmegaConf.to_object(compose("train", [*SETTINGS, *overrides, f"run.output_dir={folder}"]))
    assert isinstance(conf, TrainConf)
    run_training(conf)
    return Record.load(folder)


def inspect(run: Path, *options: str) -> str:
    """What W&B's own reader says of an offline run's folder: the program that `wandb leet inspect --json` starts."""
    (file,) = run.glob("*.wandb")
    program = [get_core_path(), "leet", "inspect", "-no-observability", "-json", *options, "-run-file", str(file)]
    return subprocess.run([*program, str(run.parent)], check=True, capture_output=True, text=True, timeout=60).stdout


def entries_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in inspect(run).splitlines()]


def history_of(run: Path) -> list[dict[str, Any]]:
    return [entry["history"]["item"] for entry in entries_of(run) if entry["type"] == "history"]


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(inspect(run, "-summary"))["summary"]
    return summary


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def test_an_offline_run_holds_config_history_summary_table_and_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    caplog.set_level(logging.INFO)  # as in a Hydra job
    record = trained(tmp_path / "run", "run.seed=3")
    assert "fontTools" not in caplog.text
    (offline,) = offline_runs(tmp_path / "run")
    entries = entries_of(offline)

    (run,) = [entry["run"] for entry in entries if entry["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("mine", "train", "lrsa-seed3")
    assert run["tags"] == ["tried", "tracked", "lrsa"]
    config = run["config"]["update"]
    flat = {"study": "tracked", "arm": "lrsa", "seed": 3, "scorer": "lag_relative", "lag_size": 16, "compressions": "4"}
    flat |= {"eval_scorer": "lag_relative", "eval_compressions": "1,4", "tasks": "recall", "model_name": "recall-tiny"}
    assert {name: config[name] for name in flat} == flat
    assert (
        config["record_id"] == record.id
        and config["recipe"]["learning_rate"] == record.config["recipe"]["learning_rate"]
    )

    steps = [row for row in history_of(offline) if "train/loss" in row]
    assert [row["trainer/global_step"] for row in steps] == [1, 2, 3]
    assert record.training is not None
    assert [row["train/loss"] for row in steps] == pytest.approx(record.training["loss_curve"]["loss"], abs=1e-6)

    values = summary_of(offline)
    for cell, column in zip(record.cells, ("floor", "full", "4x"), strict=True):
        for metric in ("exact", "nll", "exact_low", "n"):
            assert values[f"eval/recall/{column}/{metric}"] == pytest.approx(cell[metric])
    assert values["eval/recall/4x/measured_ratio"] == pytest.approx(record.cells[2]["measured_ratio"])
    assert values["score"] == pytest.approx(record.cells[2]["exact"])
    assert values["cost/tokens"] == record.training["tokens"]

    table = json.loads((offline / "files" / values["results"]["path"]).read_text())
    assert [row[table["columns"].index("compression")] for row in table["data"]] == ["floor", "full", "4x"]
    image = (offline / "files" / values["figure"]["path"]).read_bytes()
    assert image.startswith(b"\x89PNG") and values["figure"]["width"] > 600
    (artifact,) = [e["artifact"] for e in entries if e["type"] == "artifact" and e["artifact"]["type"] == "record"]
    staged = {item["path"]: Path(item["local_path"]) for item in artifact["manifest"]["contents"]}
    assert set(staged) == {"record.json", "outcomes.jsonl.gz", "results.csv", "figure.pdf", "figure.png"}
    assert staged["record.json"].read_bytes() == record.path.read_bytes()
    assert all(path.is_relative_to(tmp_path / "run") for path in staged.values()), "the run folder holds what is synced"


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = PostTraining.training_step

    def die(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise NonFiniteLoss("preempted")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PostTraining, "training_step", die)
        with pytest.raises(NonFiniteLoss, match="preempted"):
            trained(tmp_path / "cut")
    (cut,) = offline_runs(tmp_path / "cut")
    assert summary_of(cut)["error"].startswith("NonFiniteLoss: preempted")

    time.sleep(1)  # W&B names a run's folder by the second
    record = trained(tmp_path / "cut", f"resume={tmp_path / 'cut'}")
    assert record.status == "finished" and record.attempt == 2
    first, second = offline_runs(tmp_path / "cut")
    assert run_id(tmp_path / "cut") == cut.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    assert first == cut
    assert [row["trainer/global_step"] for row in history_of(second) if "train/loss" in row] == [3]
    summary = summary_of(second)
    assert summary["error"] == "" and "eval/recall/4x/exact" in summary

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run_id(elsewhere, tmp_path / "cut" / "checkpoints" / "last.ckpt") == run_id(tmp_path / "cut")
    assert run_id(elsewhere) is None


@pytest.fixture
def fresh_wandb() -> Iterator[None]:
    """W&B reads once where its server is."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.parametrize(("key", "why"), [("a" * 40, "connection refused"), ("", "No API key configured")])
def test_an_unreachable_server_costs_a_warning(
    tmp_path: Path,
    fresh_wandb: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    why: str,
) -> None:
    for name, value in {"BASE_URL": "http://127.0.0.1:9", "API_KEY": key}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    record = trained(tmp_path / "run", "logger.mode=online", "logger.timeout=1")
    assert record.status == "finished"
    (warning,) = [entry.getMessage() for entry in caplog.records if "cannot start" in entry.getMessage()]
    assert why in warning and warning.endswith("the run is logged offline")
    assert f"wandb sync {tmp_path / 'run' / 'wandb'}" in caplog.text
    (offline,) = offline_runs(tmp_path / "run")
    assert "eval/recall/4x/exact" in summary_of(offline)
    (run,) = load_wandb(tmp_path / "run")  # what the attempt left behind is a part of it
    assert run.state == "finished" and run.summary["score"] == summary_of(offline)["score"]


def test_a_place_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert trained(tmp_path / "run").status == "finished"
    assert "W&B cannot start with logger.mode=offline (NotADirectoryError" in caplog.text
    assert "the run goes on without it" in caplog.text


def test_a_dead_wandb_process_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PostTraining.training_step

    def kill_wandb(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 1:
            os.kill(wandb_process(), signal.SIGKILL)
            time.sleep(0.3)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PostTraining, "training_step", kill_wandb)
        assert trained(tmp_path / "run").status == "finished"
    assert caplog.text.count("W&B failed to log metrics") == 1, "one warning, not one a step"
    assert trained(tmp_path / "next").status == "finished"
    (offline,) = offline_runs(tmp_path / "next")
    assert "score" in summary_of(offline), "the next job of a multirun logs again"


def wandb_process() -> int:
    """The process id of this process's wandb-core."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, name, _, parent = status.read_text().split()[:4]
        except OSError:  # it has ended
            continue
        if "wandb-core" in name and int(parent) == os.getpid():
            return int(pid)
    raise AssertionError("no wandb-core runs")


def test_a_full_disk_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wandb.Artifact, "add_file", full)
    assert trained(tmp_path / "run").status == "finished"
    assert "W&B failed to log the results (OSError: [Errno 28] No space left on device)" in caplog.text
    assert "wandb sync" in caplog.text
    (offline,) = offline_runs(tmp_path / "run")
    assert "score" in summary_of(offline), "what was logged before is there"


def test_a_server_that_is_gone_at_the_end_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: Any, *_: Any, **__: Any) -> None:
        raise TimeoutError("not uploaded in time")

    monkeypatch.setattr(wandb.Run, "finish", slow)
    assert trained(tmp_path / "run").status == "finished"
    assert "W&B failed to close its run (TimeoutError: not uploaded in time)" in caplog.text
    monkeypatch.undo()
    wandb.teardown()


def test_a_benchmark_is_logged_when_it_is_over(tmp_path: Path) -> None:
    shape = [
        "lengths=[200]",
        "lags=[16]",
        "sink_size=4",
        "head_dim=16",
        "query_heads=4",
        "key_value_heads=2",
        "rounds=2",
    ]
    logger = ["logger=wandb", "logger.mode=offline"]
    conf = OmegaConf.to_object(compose("bench", [*shape, *logger, f"run.output_dir={tmp_path}", "run.study=speed"]))
    assert isinstance(conf, BenchConf)
    record = run_benchmark(conf)
    (offline,) = offline_runs(tmp_path)
    (run,) = [entry["run"] for entry in entries_of(offline) if entry["type"] == "run"]
    assert (run["job_type"], run["tags"]) == ("bench", ["speed", "kernels"])
    summary, row = summary_of(offline), record.metrics["rows"][0]
    assert summary["bench/forward.sparse.median"] == pytest.approx(row["forward"]["sparse"]["median"])
    assert summary["results"]["nrows"] == 1


def test_settings_that_runs_are_told_apart_by(tmp_path: Path) -> None:
    """Of an evaluation, the rule is the one that it applies; what it has not is not there."""
    options = ["model=recall_tiny", "attention@evaluation.attention=snapkv", "evaluation.compressions=[1,1.5]"]
    options += ["evaluation.attention.budget=concentrated", "evaluation.attention.dense_layers=[5,2]"]
    conf = OmegaConf.to_object(compose("eval", [*options, "task=[recall,needles]", f"run.output_dir={tmp_path}"]))
    record = Record.start(tmp_path, command="lrsa-eval", study="s", arm="a", seed=1, config=plain(conf))
    found = listed_config(record)
    expected = {"scorer": "snapkv", "eval_scorer": "snapkv", "eval_compressions": "1,1.5", "tasks": "recall,needles"}
    expected |= {"budget": "concentrated", "dense_layers": "5,2"}
    expected |= {"model_name": "recall-tiny", "length": 4096, "command": "lrsa-eval", "arm": "a", "seed": 1}
    assert {name: found.get(name) for name in expected} == expected
    assert "compressions" not in found and found["evaluation"] == record.config["evaluation"]
    assert tags(LoggerConf(tags=["x", "s", ""]), record) == ["x", "s", "a"]


@pytest.mark.parametrize("name", ["eval/needles/4x/exact", "eval/lrsa/own/task/floor/f1"])
def test_names_come_apart_as_they_were_put_together(name: str) -> None:
    parsed = TrackedName.parse(name)
    assert parsed is not None and str(parsed) == name
    assert parsed.metric in ("exact", "f1") and parsed.column in ("4x", "floor")
    assert TrackedName.parse("train/loss") is None and TrackedName.parse("eval/loss") is None


def test_tracked_metrics_of_cells_and_of_lm_eval() -> None:
    cells = [
        {"task": "a", "compression": None, "exact": 0.0, "n": 4},
        {"task": "a", "compression": 1, "exact": 1.0, "n": 4},
        {"task": "a", "compression": 4, "exact": 0.5, "n": 4, "measured_ratio": 3.4},
        {"task": "a", "compression": 8, "exact": 0.25, "n": 4, "measured_ratio": 5.6},
    ]
    found = tracked_metrics(cells, {"niah_single_1/acc,none/4x": 0.75})
    assert found["eval/a/4x/exact"] == 0.5 and found["eval/a/8x/measured_ratio"] == 5.6
    assert found["eval/niah_single_1/4x/acc,none"] == 0.75
    assert found["score"] == headline(cells) == 0.375
    assert headline(cells[:2]) == 1.0
    prose = [{"task": "prose", "compression": 4, "nll": 2.0, "n": 3, "positions": [0, 8]}]
    assert headline(prose) is None and "score" not in tracked_metrics(prose)
