"""Records of benchmarks -> tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Report:
    """One benchmark's table: plain text cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_console(self) -> Table:
        table = Table(title=self.title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for name in self.columns:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "| ---: " * len(self.columns) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows)]) + "\n"


def report(mode: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str) -> Report:
    """The table of ``rows`` as a benchmark of that mode recorded them; ``device`` as its record names it."""
    return REPORTS[mode](config, rows, device)


def _kernels(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str) -> Report:
    """Medians in ms, dense (the fastest kernel there) -> sparse; an implementation that is wrong gets no time."""
    shape = f"batch {config['batch_size']}, {config['query_heads']}/{config['key_value_heads']} heads"
    title = f"Attention, dense->sparse, {shape}, D {config['head_dim']}, {config['dtype']}, {device}"
    columns = ["T", "L", "keep", "form", "error", "fwd ms", "gain", "fwd+bwd ms", "gain", "ideal"]
    table = []
    for row in rows:
        cells = [f"{row['length']:,}", str(row["lag"]), f"1/{row['compression']:g}", row["backend"]]
        if row["gate"] != "passed":
            missing = [""] * (len(columns) - len(cells) - 1)
            table.append([*cells, f"{row['error']:.0e} > {row['allowed_error']:.0e}: WRONG", *missing])
            continue
        cells.append(f"{row['error']:.0e}")
        for name in ("forward", "forward_backward"):
            dense, sparse = (row[name][kernel]["median"] for kernel in (row[f"{name}_dense"], "sparse"))
            cells += [f"{_ms(dense)}->{_ms(sparse)}", f"{row[f'{name}_speedup']:.2f}x"]
        table.append([*cells, f"{row['ideal_speedup']:.2f}x"])
    return Report(title, columns, table)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _step(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str) -> Report:
    """A training step: ms, tokens a second, peak memory."""
    name = config["model"]["name"]
    title = f"Training step, dense -> sparse, {name}, batch {config['batch_size']}, {config['dtype']}, {device}"
    table = []
    for row in rows:
        ms = [row["step"][kind]["median"] for kind in ("dense", "sparse")]
        speed = [row["tokens_per_second"][kind] for kind in ("dense", "sparse")]
        memory = [row["peak_memory"][kind] for kind in ("dense", "sparse")]
        peak = "-" if memory[0] is None else f"{memory[0] / 2**30:.1f} -> {memory[1] / 2**30:.1f}"
        table.append(
            [
                f"{row['length']:,}",
                str(row["lag"]),
                f"1/{row['compression']:g}",
                f"{ms[0]:.1f} -> {ms[1]:.1f}",
                f"{row['step_ratio']:.2f}",
                f"{speed[0]:,.0f} -> {speed[1]:,.0f}",
                peak,
            ]
        )
    return Report(title, ["T", "L", "keep", "ms a step", "sparse / dense", "tokens/s", "peak GiB"], table)


REPORTS = {"kernels": _kernels, "step": _step}
