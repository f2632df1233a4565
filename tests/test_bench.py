"""`lrsa-bench` on tiny shapes: it measures, it gates, and it shows records again. No test looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lrsa import bench
from lrsa.attention import SparseAttentionConfig
from lrsa.benchmark import kernels
from lrsa.benchmark.report import report
from lrsa.benchmark.timing import compare
from lrsa.config import BenchConf, config_dir

TINY = ["lengths=[200]", "lags=[16]", "sink_size=4", "head_dim=16", "query_heads=4", "key_value_heads=2", "rounds=2"]


def configured(folder: Path, *overrides: str) -> BenchConf:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir()), version_base=None):
        config = compose("bench", overrides=[*TINY, f"run.output_dir={folder}", "run.name=x", *overrides])
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def test_kernels_are_gated_timed_and_recorded(tmp_path: Path) -> None:
    record = bench.run(configured(tmp_path, "compressions=[2,4]"))
    rows = json.loads(record.path.read_text())["metrics"]["rows"]
    assert [row["compression"] for row in rows] == [2, 4]
    for row in rows:
        assert row["gate"] == "passed" and 0 < row["error"] <= row["allowed_error"]
        assert row["forward"]["sparse"]["rounds"] == 2
        dense, sparse = (row["forward"][name]["median"] for name in ("sdpa", "sparse"))
        assert row["forward_speedup"] == pytest.approx(dense / sparse)
    assert rows[1]["ideal_speedup"] > rows[0]["ideal_speedup"] > 1


def test_a_wrong_kernel_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.sparse_attention

    def wrong(*args, backend, **kwargs):
        out = right(*args, backend=backend, **kwargs)
        return out if backend == "reference" else out * 1.01

    monkeypatch.setattr(kernels, "sparse_attention", wrong)
    conf = configured(tmp_path)
    (row,) = kernels.run(conf, torch.device("cpu"))
    assert row["gate"] == "FAILED" and "forward" not in row
    (shown,) = report("kernels", vars(conf), [row], "cpu").rows
    assert "WRONG" in shown[4] and not any(shown[5:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_passes_every_backend_of_a_cpu(dtype: str, tmp_path: Path) -> None:
    conf = configured(tmp_path, f"dtype={dtype}")
    config = SparseAttentionConfig(sink_size=4, lag_size=16)
    for backend in ("gather", "reference"):
        error, allowed = kernels.gate(conf, config, backend, torch.device("cpu"))
        assert error <= allowed, backend


def test_a_training_step_is_compared_with_the_dense_one(tmp_path: Path) -> None:
    record = bench.run(configured(tmp_path, "mode=step", "model=tiny_random", "backends=[gather]"))
    (row,) = record.metrics["rows"]
    times = {name: row["step"][name]["median"] for name in ("dense", "sparse")}
    assert row["step_ratio"] == pytest.approx(times["sparse"] / times["dense"])


def test_functions_take_turns() -> None:
    calls: list[str] = []
    timings = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4  # a warm-up, then three rounds
    assert timings["a"].rounds == 3


def test_an_unknown_mode_lists_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mode='speed' is unknown: choose one of kernels, step"):
        bench.run(configured(tmp_path, "mode=speed"))


def test_records_are_shown_again_by_the_command(tmp_path: Path) -> None:
    bench.run(configured(tmp_path / "run"))
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "lrsa.bench", f"records=[{tmp_path}/run]", f"table={table}"]
    done = subprocess.run([*command, f"hydra.run.dir={tmp_path}/h"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| 200 | 16 | 1/4 | gather |" in table.read_text()
    assert "median" not in done.stderr
