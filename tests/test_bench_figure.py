"""The figure of kernels, from made-up records: what is drawn is what the rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrsa import bench
from lrsa.benchmark.figure import speed_figure
from lrsa.config import BenchConf
from lrsa.results import Record
from lrsa.results.figures import save_figure
from lrsa.results.store import load_records

LENGTHS = (8192, 32768)


def row(length: int, compression: float | None = 4, **fields: Any) -> dict[str, Any]:
    """A case that reaches half of its ideal speed-up of 4 in the forward pass, a quarter with the backward one."""
    made: dict[str, Any] = {"length": length, "compression": compression, "lag": 128, "gate": "passed"}
    for name, gain in (("forward", 2.0), ("forward_backward", 1.0)):
        made[name] = {"flash4": {"median": length / 1e3}, "sparse": {"median": length / 1e3 / gain}}
        made |= {f"{name}_dense": "flash4", f"{name}_speedup": gain}
    ours = {} if "peer" in fields else {"scorer": "lag_relative", "backend": "flex"}
    return made | {"ideal_speedup": 4.0, "error": 1e-3, "allowed_error": 1e-2} | ours | fields


def record(folder: Path, rows: list[dict[str, Any]], **config: Any) -> Record:
    settings = {"mode": "kernels", "batch_size": 1, "query_heads": 32, "key_value_heads": 2, "head_dim": 128}
    settings |= {"rounds": 5, "dtype": "bfloat16", "device": "cpu"} | config
    made = Record.start(folder, command="lrsa-bench", study="benchmark", arm="x", seed=0, config=settings, overrides=[])
    made.finish({"device": "cpu", "threads": 2, "rows": rows}, [], [])
    return made


def drawn(figure: Any) -> list[dict[str, list[float]]]:
    """The heights of each panel's lines by colour: as the legend tells them apart."""
    return [{str(line.get_color()): list(line.get_ydata()) for line in axes.lines} for axes in figure.axes]


def test_every_gated_case_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    peers = [row(t, peer="nsa", blocks=16, block_size=64) for t in LENGTHS]
    own = [row(t, None, peer="moba", blocks=3, block_size=512, lag=None) for t in LENGTHS]
    lost = [row(8192, gate="FAILED", lag=1024), {**row(8192, peer="moba", blocks=2, block_size=64), "failed": "x"}]
    del lost[1]["gate"], lost[1]["forward"]
    figure = speed_figure([record(tmp_path, [*map(row, LENGTHS), *(row(t, 8) for t in LENGTHS), *peers, *own, *lost])])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dense", "LRSA, L 128", "MoBA 3x512", "NSA", "ideal", "pale: forward alone"]
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == [
        "forward, keep 1/4", "forward + backward, keep 1/4", "of the ideal, keep 1/4",
    ]  # fmt: skip
    panels = drawn(figure)
    assert panels[0]["black"] == [t / 1e3 for t in LENGTHS] == panels[2]["black"]
    assert panels[0]["#0072B2"] == [t / 2e3 for t in LENGTHS]
    assert [len(panel) for panel in panels] == [4, 3, 4, 3, 4, 3]  # NSA was matched at 1/4 alone, MoBA at none
    assert panels[4]["#0072B2"] == [25, 25] and panels[4]["0.4"] == [100, 100]
    assert {axes.get_xscale() for axes in figure.axes} == {"log"} == {axes.get_yscale() for axes in figure.axes[:4]}


def test_the_newest_record_of_a_case_counts(tmp_path: Path) -> None:
    older = record(tmp_path / "a", [row(8192)])
    newer = record(tmp_path / "b", [row(8192, forward_backward_speedup=3.0)])
    newer.started = "9999"
    for both in ([older, newer], [newer, older]):
        assert drawn(speed_figure(both))[2]["#0072B2"] == [75]


def test_lines_are_named_apart(tmp_path: Path) -> None:
    rows = [row(8192), row(8192, lag=1024), row(8192, backend="gather"), row(8192, scorer="snapkv")]
    rows += [row(8192, peer="nsa", blocks=2, block_size=64, lag=lag) for lag in (128, 1024)]
    names = [text.get_text() for text in speed_figure([record(tmp_path, rows)]).legends[0].get_texts()]
    assert names[1:-2] == [
        "lag_relative, L 128, flex", "lag_relative, L 128, gather", "snapkv, L 128, flex", "lag_relative, L 1024, flex",
        "NSA as L 128", "NSA as L 1024",
    ]  # fmt: skip


def test_times_with_and_without_launches_are_not_drawn_as_one(tmp_path: Path) -> None:
    plain = record(tmp_path / "plain", [row(8192), row(4096)])
    graphs = record(tmp_path / "graphs", [row(8192, 8)], graphs=True)
    with pytest.raises(ValueError, match="at 8,192 tokens some records are of CUDA graphs and some are not"):
        speed_figure([plain, graphs])
    newer = record(tmp_path / "newer", [row(8192)], graphs=True)  # takes the place of the first one's
    assert speed_figure([plain, graphs, newer])


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    shapes = [record(tmp_path / str(heads), [row(8192)], query_heads=heads) for heads in (8, 32)]
    with pytest.raises(ValueError, match=r"one machine and shape, .* 32/2 heads.*; .* 8/2 heads"):
        speed_figure(shapes)
    for nothing in ([], [record(tmp_path / "failed", [row(8192, gate="FAILED")])]):
        with pytest.raises(ValueError, match="nothing to draw"):
            speed_figure(nothing)
    with pytest.raises(ValueError, match=r"figure=x is of mode=kernels, this is mode=step"):
        bench.run(BenchConf(mode="step", figure="x"))


def test_one_command_draws_records(tmp_path: Path) -> None:
    record(tmp_path / "run", [row(t) for t in LENGTHS])
    command = [sys.executable, "-m", "lrsa.bench", f"records=[{tmp_path}/run]", f"figure={tmp_path}/out/speed"]
    done = subprocess.run([*command, f"hydra.run.dir={tmp_path}/h"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    png = (tmp_path / "out" / "speed.png").read_bytes()
    assert (tmp_path / "out" / "speed.pdf").read_bytes().startswith(b"%PDF") and png.startswith(b"\x89PNG")
    (again,) = save_figure(speed_figure(load_records(str(tmp_path / "run"))), tmp_path, "again")[1:]
    assert again.read_bytes() == png  # the same records, the same picture
