"""`lrsa-bench` on tiny shapes: it measures, it gates, and it shows records again. No test looks at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lrsa import bench
from lrsa.attention import SparseAttentionConfig, blocks, decode, flash4
from lrsa.attention.selection import select
from lrsa.benchmark import dense, engines, filled, generate, kernels, peers
from lrsa.benchmark import report as report_module
from lrsa.benchmark.figure import speed_figure
from lrsa.benchmark.report import of_records, report
from lrsa.benchmark.timing import compare
from lrsa.config import BenchConf, config_dir
from lrsa.models import build_model
from lrsa.results.store import UnfinishedRecord, load_records
from lrsa.training import compiling

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


def test_a_scorer_without_a_fast_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"times the fast forms.*: scorer='oracle' ranks .*; choose another scorer"):
        bench.run(configured(tmp_path / "run", "scorers=[lag_relative,oracle]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backends", ["flash4", "gather,flash4"])
def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_measured(backends, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(flash4, "_installed", lambda: None)
    with pytest.raises(ValueError, match=r"backend='flash4' cannot run here: .* pip install 'flash-attn-4"):
        bench.run(configured(tmp_path / "run", f"backends=[{backends}]"))
    assert not (tmp_path / "run").exists()


def test_flash_attn_4_is_a_rival_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for a GPU: its dense kernel is timed beside PyTorch's, and the row names the fastest."""
    cpu = kernels.make_inputs(configured(tmp_path), 40, torch.device("cpu"))
    called = []
    stand_in = types.SimpleNamespace(attend_causally=lambda *x: called.append(len(x)) or x[0])
    monkeypatch.setattr(flash4, "obstacle", lambda query: None)
    monkeypatch.setattr(flash4, "kernels", lambda: stand_in)
    query = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(kernels, "dense_attention", lambda inputs, backend: lambda: cpu[0].sum())
    monkeypatch.setattr(kernels, "with_gradients", lambda function, inputs: function)
    found = kernels.dense_kernels((query, *cpu[1:]))
    assert sorted(found) == ["cudnn", "flash", "flash4"]
    found["flash4"]()
    assert called == [3]


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
    assert "WRONG" in shown[5] and not any(shown[6:])


@pytest.mark.parametrize("lag", [16, 1024])
def test_the_gate_compresses_something(lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    monkeypatch.setattr(kernels, "make_inputs", lambda conf, length, device: lengths.append(length) or 1 / 0)
    config = SparseAttentionConfig(lag_size=lag)
    with pytest.raises(ZeroDivisionError):
        kernels.gate(configured(tmp_path), config, "gather", torch.device("cpu"))
    assert config.geometry.selected_partitions(lengths[0]) > 0


def test_several_scorers_beside_each_other(tmp_path: Path) -> None:
    conf = configured(tmp_path, "scorers=[lag_relative,snapkv,random]")
    rows = list(kernels.run(conf, torch.device("cpu")))
    assert [row["scorer"] for row in rows] == ["lag_relative", "snapkv", "random"]
    assert all(row["gate"] == "passed" and row["selection"]["median"] > 0 for row in rows)


def test_rows_are_timed_apart_as_flash4_makes_them(tmp_path: Path) -> None:
    config = SparseAttentionConfig(sink_size=4, lag_size=16)
    _, key, value, _ = kernels.make_inputs(configured(tmp_path), 300, torch.device("cpu"))
    index = select(key, value, config, config.geometry.selected_partitions(300))
    layout = blocks.layout(config.geometry, 300, torch.device("cpu"), blocks.WALK, heads=1.0)
    passes = kernels.row_passes(key, value, index, layout)
    made = passes["rows_forward"]()
    assert [x.shape[2] for x in made] == [layout.length] * 2 and torch.equal(made[0][:, :, :4], key[:, :, :4])
    gradients = passes["rows_backward"]()
    assert [x.shape for x in gradients[:2]] == [key.shape, value.shape]


def test_the_share_beside_attending_is_of_the_whole_pass() -> None:
    def took(ms: float) -> dict[str, float]:
        return {"median": ms}

    row = {"selection": took(0.2), "forward_backward": {"sparse": took(10.0)}}
    assert report_module._beside_attending(row) == ["0.2", "", ""], "a form whose rows are not apart, an older record"
    row |= {"rows_forward": took(0.1), "rows_backward": took(0.3)}
    assert report_module._beside_attending(row) == ["0.2", "0.4", "6%"]
    assert report_module._beside_attending({"forward_backward": {"sparse": took(1.0)}}) == ["", "", ""]


def test_columns_that_only_flash4_has_stand_where_it_is(tmp_path: Path) -> None:
    record = json.loads(bench.run(configured(tmp_path)).path.read_text())
    config, rows = record["config"], record["metrics"]["rows"]
    assert "rows ms" not in report_module._kernels(config, rows, "x").columns
    timed = rows[0] | {name: rows[0]["selection"] for name in ("rows_forward", "rows_backward")}
    shown = report_module._kernels(config, [*rows, timed], "x")
    at = shown.columns.index("rows ms")
    assert [bool(row[at]) for row in shown.rows] == [False, True] and len(shown.rows[0]) == len(shown.columns)


def test_an_unknown_scorer_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scorer='snapkw' is unknown: choose one of .*snapkv"):
        next(kernels.run(configured(tmp_path, "scorers=[lag_relative,snapkw]"), torch.device("cpu")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_passes_every_backend_of_a_cpu(dtype: str, tmp_path: Path) -> None:
    conf = configured(tmp_path, f"dtype={dtype}")
    config = SparseAttentionConfig(sink_size=4, lag_size=16)
    for backend in ("gather", "reference"):
        error, allowed = kernels.gate(conf, config, backend, torch.device("cpu"))
        assert error <= allowed, backend


@pytest.mark.parametrize("status", ["failed", "running"])
def test_a_run_that_did_not_end_shows_what_it_had_measured(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies_at_the_second(conf: object, device: object) -> Iterator[dict[str, Any]]:
        yield next(kernels.run(configured(tmp_path), torch.device("cpu")))
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.MODES, "kernels", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench.run(configured(tmp_path))
    records = load_records(tmp_path, unfinished=True)
    assert records[0].status == "failed"
    records[0].status = status  # that of a process that was killed
    (shown,) = of_records(records)
    assert shown.title.endswith(", failed" if status == "failed" else ", cut off or still running")
    assert len(shown.rows) == 1
    with pytest.raises(ValueError, match="finished run"):
        speed_figure(records)
    records[0].metrics = {}
    with pytest.warns(UnfinishedRecord, match="without a row"):
        assert of_records(records) == []


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_training_step_is_compared_with_the_dense_one(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # no C++ compiler
    settings = "mode=step", "model=tiny_random", "backends=[gather]", f"compile={compiled}"
    record = bench.run(configured(tmp_path, *settings))
    assert ("compiled layers" in of_records([record])[0].title) == compiled
    (row,) = record.metrics["rows"]
    times = {name: row["step"][name]["median"] for name in ("dense", "sparse")}
    assert row["step_ratio"] == pytest.approx(times["sparse"] / times["dense"])
    attention = {name: row["attention"][name]["median"] for name in ("dense", "sparse")}
    layers = 2
    assert row["attention_share"] == pytest.approx(layers * attention["dense"] / times["dense"])
    saved = layers * (attention["dense"] - attention["sparse"])
    assert row["predicted_step_ratio"] == pytest.approx(1 - saved / times["dense"])


GENERATE = ["mode=generate", "model=tiny_random", "lengths=[120]", "decode_steps=8", "compressions=[4]"]


def test_generation_is_gated_timed_and_recorded(tmp_path: Path) -> None:
    record = bench.run(configured(tmp_path, *GENERATE, "batches=[2]"))
    rows = json.loads(record.path.read_text())["metrics"]["rows"]
    assert [(row["engine"], row["batch"]) for row in rows] == [
        ("dense", 1),
        ("dense", 2),
        ("lrsa 4x", 1),
        ("lrsa 4x", 2),
    ]
    for row in rows:
        assert row["gate"] == "passed" and "failed" not in row
        assert row["error"] <= row["allowed_error"] and row["exact_error"] <= row["allowed_exact_error"]
        assert row["kernels"]["decode"] == "sdpa" and not row["decode"]["graphed"]
        assert row["decode"]["steps"] == 16  # a whole chunk
        assert row["cache"]["slots"] == row["cache"]["expected_slots"]
        assert ("prefill" in row) == (row["batch"] == 1)
    dense, sparse = rows[1], rows[3]
    assert sparse["cache"]["bytes"] < dense["cache"]["bytes"] == sparse["cache"]["dense_bytes"]
    speed = [row["decode"]["tokens_per_second"] for row in (dense, sparse)]
    assert sparse["against_batch"] == 2 and sparse["speedup"] == pytest.approx(speed[1] / speed[0])
    moved = [sum(row["bytes_per_step"].values()) for row in (dense, sparse)]
    assert sparse["predicted_speedup"] == pytest.approx(moved[0] / moved[1]) and moved[0] > moved[1]
    slot = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, D, float32
    assert dense["cache"]["bytes"] == 2 * dense["cache"]["tokens"] * slot
    shown = report("generate", record.config, rows, "cpu")
    assert all(len(row) == len(shown.columns) for row in shown.rows) and "(no graph)" in shown.to_markdown()


def test_a_peer_is_measured_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for kvpress, which wants an older transformers than this environment has."""

    @dataclasses.dataclass
    class HalfPress:
        compression_ratio: float = 0.0
        lag_size: int = 1

        @contextlib.contextmanager
        def __call__(self, model):
            yield

    module = types.ModuleType("kvpress")
    module.HalfPress = HalfPress  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", module)
    record = bench.run(configured(tmp_path, *GENERATE, "engines=[dense,kvpress/HalfPress]"))
    dense, peer = record.metrics["rows"]
    assert (peer["engine"], peer["batch"], peer["gate"]) == ("kvpress/HalfPress 4x", 1, "none")
    assert peer["cache"]["slots"] == peer["cache"]["tokens"] == 120 + 3 + 8  # this press removes nothing
    assert peer["decode"]["steps"] == 8 and peer["speedup"] > 0 and peer["prefill_speedup"] > 0
    shown = report("generate", record.config, [dense, peer], "cpu").rows[1]
    assert shown[4] == "another rule" and "(no graph)" in shown[8]
    press = peers.press_of("kvpress/HalfPress", 4, 16, 128)
    assert (press.compression_ratio, press.lag_size) == (0.75, 128)


@pytest.mark.parametrize(
    ("engine", "message"),
    [("vllm", "'vllm' is unknown: choose of dense, lrsa"), ("kvpress/LagKVPress", "environment of its own")],
)
def test_an_engine_that_cannot_be_had_is_refused_at_once(engine: str, message: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("kvpress") is not None:
        pytest.skip("kvpress is here")
    with pytest.raises(ValueError, match=message):
        bench.run(configured(tmp_path, *GENERATE, f"engines=[{engine}]"))


@pytest.mark.parametrize("engine", ["dense", "lrsa 4x"])
def test_wrong_decoding_gets_no_time(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.attend

    def wrong(query, key, value, valid, *rest):
        out = right(query, key, value, valid, *rest)
        return out if (valid is None) != (engine == "dense") else out * 1.01  # a sparse cache says which slots count

    monkeypatch.setattr(decode, "attend", wrong)
    rows = list(generate.run(configured(tmp_path, *GENERATE), torch.device("cpu")))
    assert {row["engine"]: row["gate"] for row in rows} == {"dense": "passed", "lrsa 4x": "passed"} | {engine: "FAILED"}
    shown = report("generate", {"model": {"name": "x", "dtype": "y"}}, rows, "cpu").rows
    for row, cells in zip(rows, shown, strict=True):
        assert ("decode" in row) == (row["engine"] != engine) == ("WRONG" not in cells[4])


def test_a_cell_that_does_not_fit_is_recorded_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, cache, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB")

    def broken(self, model, backend="auto"):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(engines.Dense, "repeat", full)
    monkeypatch.setattr(engines.Sparse, "attach", broken)
    record = bench.run(configured(tmp_path, *GENERATE, "batches=[2]"))
    found = [(row["engine"], row["batch"], row.get("failed")) for row in record.metrics["rows"]]
    assert found == [
        ("dense", 1, None),
        ("dense", 2, "out of memory"),
        ("lrsa 4x", None, "RuntimeError: no such kernel"),
    ]
    shown = report("generate", record.config, record.metrics["rows"], "cpu").to_markdown()
    assert "out of memory" in shown and "no such kernel" in shown


def test_the_largest_batch_is_tried_downwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    right = engines.Dense.repeat

    def up_to_three(self, cache, rows):
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        right(self, cache, rows)

    monkeypatch.setattr(engines.Dense, "repeat", up_to_three)
    monkeypatch.setattr(filled.Filled, "most_rows", lambda self: 5)
    rows = list(generate.run(configured(tmp_path, *GENERATE), torch.device("cpu")))
    assert tried == [5, 4, 3]
    assert [(row["engine"], row["batch"], row.get("largest", False)) for row in rows] == [
        ("dense", 1, False), ("dense", 3, True), ("lrsa 4x", 1, False), ("lrsa 4x", 3, False), ("lrsa 4x", 5, True),
    ]  # fmt: skip
    assert rows[-1]["against_batch"] == 3  # its largest against dense's


def test_a_run_that_breaks_off_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row(conf, device):
        yield {"length": 1, "lag": None, "engine": "dense", "batch": 1, "failed": "out of memory"}
        assert json.loads((tmp_path / "record.json").read_text())["status"] == "running"
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.MODES, "generate", one_row)
    with pytest.raises(KeyboardInterrupt):
        bench.run(configured(tmp_path, *GENERATE))
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept["status"] == "failed" and len(kept["metrics"]["rows"]) == 1


def test_the_dense_rival_refuses_pads() -> None:
    query = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="no pads"):
        dense.attention(torch.nn.Module(), query, query, query, torch.ones(1, 1))


def test_the_large_model_is_made_on_its_device_in_its_dtype(tmp_path: Path) -> None:
    conf = configured(tmp_path, "mode=generate", "model=llama3_8b_random").model
    with torch.device("meta"):
        model = build_model(conf, None)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert engines.weight_bytes(model) == 2 * (8_030_261_248 - 128256 * 4096)
    assert engines.bytes_per_slot(model) == 2 * 32 * 8 * 128 * 2


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
    assert "| 200 | lag_relative | 16 | 1/4 | gather |" in table.read_text()
    assert "median" not in done.stderr


def test_an_error_that_is_no_number_fails_the_gate() -> None:
    exact = (torch.ones(3), torch.ones(3))
    assert kernels.largest_error((torch.ones(3), torch.tensor([1, 1, torch.nan])), exact) == float("inf")
    assert kernels.largest_error((torch.ones(3), torch.full((3,), 1.5)), exact) == pytest.approx(0.5)


@pytest.mark.parametrize("given", ["graphs=true", "compile=true"])
def test_a_setting_of_another_mode_is_refused(given: str, tmp_path: Path) -> None:
    mode = "step" if given.startswith("graphs") else "kernels"
    with pytest.raises(
        ValueError, match=f"{given.split('=')[0]}=True is of mode=.*, this is mode={mode}: leave it out"
    ):
        bench.run(configured(tmp_path, f"mode={mode}", given))
