"""Records of benchmarks -> tables, for the terminal and as Markdown."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lrsa.results.record import Record, write_atomically
from lrsa.results.store import UnfinishedRecord


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


def of_records(records: Sequence[Record]) -> list[Report]:
    """The tables of those records that are of `lrsa-bench`, one each. Of a run that did not end, the rows until then,
    each of which was gated and timed by itself; one without rows is left out with a warning."""
    made = []
    for record in records:
        if record.command != "lrsa-bench":
            continue
        if (record.metrics or {}).get("rows"):
            made.append(_of_record(record))
        else:
            warnings.warn(f"{record.path} left out: {record.status}, without a row", UnfinishedRecord, stacklevel=2)
    return made


def _of_record(record: Record) -> Report:
    made = report(record.config["mode"], record.config, record.metrics["rows"], device_of(record))
    ending = {"finished": "", "running": ", cut off or still running"}.get(record.status, f", {record.status}")
    return replace(made, title=made.title + ending)


def device_of(record: Record) -> str:
    """What it was measured on, for a title."""
    hardware, metrics = record.hardware, record.metrics
    on_gpu = metrics.get("device", record.config["device"]) == "cuda"
    return hardware["device"] if on_gpu else f"{hardware['cpu'] or 'CPU'}, {metrics['threads']} threads"


def write_reports(reports: Sequence[Report], path: Path, rebuild: str) -> None:
    """All of them as one Markdown file, whose first line names the command that makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(item.to_markdown() for item in reports)
    write_atomically(path, f"<!-- Generated, do not edit. Rebuild: {rebuild} -->\n\n{text}".encode())


KERNEL_COLUMNS = (
    "T", "scorer", "L", "keep", "form", "error", "select ms", "rows ms", "share", "fwd ms", "gain", "of ideal",
    "fwd+bwd ms", "gain", "of ideal", "ideal", "keys", "peak GiB", "memory",
)  # fmt: skip


def _kernels(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str) -> Report:
    """Medians in ms, dense (the fastest kernel there) -> sparse; an implementation that is wrong gets no time.
    ``share`` is that of the selection and of flash4's rows of keys, both ways, in forward and backward, which hold
    them. ``keys`` are those that a query attends on average, the peak is that of forward and backward, and ``memory``
    what it is beyond dense attention's, in bytes of all keys and values."""
    shape = f"batch {config['batch_size']}, {config['query_heads']}/{config['key_value_heads']} heads"
    how = ", CUDA graphs" if config.get("graphs") else ""
    title = f"Attention, dense->sparse, {shape}, D {config['head_dim']}, {config['dtype']}, {device}{how}"
    cells = [_kernels_row(config, row) for row in rows]
    apart = {"rows ms", "share"}  # flash4's alone, and not of records until 2026-11-22
    shown = [i for i, name in enumerate(KERNEL_COLUMNS) if name not in apart or any(row[i] for row in cells)]
    return Report(title, [KERNEL_COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in cells])


def _kernels_row(config: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    if "peer" in row:
        rule, form = f"{row['blocks']}x{row['block_size']}", row["peer"]
    else:
        rule, form = _scorer(config, row), row["backend"]
    keep = "-" if row["compression"] is None else f"1/{row['compression']:g}"
    cells = [f"{row['length']:,}", rule, _or_dash(row["lag"]), keep, form]
    if "failed" in row:
        return _padded([*cells, row["failed"].splitlines()[0]], KERNEL_COLUMNS)
    if row["gate"] != "passed":
        return _padded([*cells, f"{_why_wrong(row)}: WRONG"], KERNEL_COLUMNS)
    cells += [f"{row['error']:.0e}", *_beside_attending(row)]
    for name in ("forward", "forward_backward"):
        dense, sparse = (row[name][kernel]["median"] for kernel in (row[f"{name}_dense"], "sparse"))
        gain, ideal = row[f"{name}_speedup"], row["ideal_speedup"]
        cells += [f"{_ms(dense)}->{_ms(sparse)}", f"{gain:.2f}x", f"{gain / ideal:.2f}"]
    memory = [row.get("peak_memory_dense"), row.get("peak_memory")]
    peak = "-" if None in memory else "->".join(_gib(count) for count in memory)
    keys = (row["length"] + 1) / 2 / row["ideal_speedup"]
    return [*cells, f"{row['ideal_speedup']:.2f}x", f"{keys:,.0f}", peak, _memory(config, row)]


def _beside_attending(row: Mapping[str, Any]) -> list[str]:
    """ms of the selection, of the rows both ways, and the share of both in forward and backward; "" where not timed."""
    names = "selection", "rows_forward", "rows_backward"
    took = [row[name]["median"] for name in names if name in row]
    rows = sum(took[1:])
    share = sum(took) / row["forward_backward"]["sparse"]["median"]
    return [_ms(took[0]) if took else "", *((_ms(rows), f"{share:.0%}") if rows else ("", ""))]


def _why_wrong(row: Mapping[str, Any]) -> str:
    if row["error"] is not None and row["error"] <= row["allowed_error"]:  # then it chose otherwise than its reference
        return f"{row['selection_agreement']:.0%} of its blocks right"
    return f"{_error(row['error'])} > {_error(row['allowed_error'])}"


def _memory(config: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if row.get("peak_memory") is None:
        return "-"
    size = 4 if config["dtype"] == "float32" else 2
    both = 2 * config["batch_size"] * config["key_value_heads"] * row["length"] * config["head_dim"] * size
    return f"{(row['peak_memory'] - row['peak_memory_dense']) / both:+.2f} KV"


def _scorer(config: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Records until 2026-11-22 had one scorer, in their config."""
    return row.get("scorer") or config["scorer"]


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _step(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str) -> Report:
    """A training step: ms, tokens a second, peak memory; attention's share of the dense one, and what it predicts."""
    name = config["model"]["name"]
    layers = ", compiled layers" if config.get("compile") else ""  # records until 2026-11-22 do not say
    layers += ", attention alone as CUDA graphs" if any(row.get("attention_as_graphs") for row in rows) else ""
    title = f"Training step, dense -> sparse, {name}, batch {config['batch_size']}, {config['dtype']}{layers}, {device}"
    table = []
    for row in rows:
        ms = [row["step"][kind]["median"] for kind in ("dense", "sparse")]
        speed = [row["tokens_per_second"][kind] for kind in ("dense", "sparse")]
        memory = [row["peak_memory"][kind] for kind in ("dense", "sparse")]
        peak = "-" if memory[0] is None else f"{memory[0] / 2**30:.1f} -> {memory[1] / 2**30:.1f}"
        table.append(
            [
                f"{row['length']:,}",
                _scorer(config, row),
                str(row["lag"]),
                f"1/{row['compression']:g}",
                f"{ms[0]:.1f} -> {ms[1]:.1f}",
                f"{row['step_ratio']:.2f}",
                f"{row['predicted_step_ratio']:.2f}" if "attention" in row else "",
                f"{row['attention_share']:.0%}" if "attention" in row else "",
                f"{speed[0]:,.0f} -> {speed[1]:,.0f}",
                peak,
            ]
        )
    columns = [
        "T",
        "scorer",
        "L",
        "keep",
        "ms a step",
        "sparse / dense",
        "predicted",
        "attention",
        "tokens/s",
        "peak GiB",
    ]
    return Report(title, columns, table)


def _generate(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], device: str) -> Report:
    """Prefill of one row, and decode steps at each batch; gains are over dense, with what the bytes moved predict."""
    model = config["model"]
    kernels = {f"{row['kernels']['decode']} (decode)" for row in rows if "kernels" in row}
    kernels |= {f"{row['kernels']['prefill']} (prefill, {row['engine']})" for row in rows if "kernels" in row}
    title = f"Generation, {model['name']}, {model['dtype']}, {device}; kernels: {', '.join(sorted(kernels)) or '-'}"
    table = [_generate_row(row) for row in rows]
    return Report(title, list(GENERATE_COLUMNS), table)


GENERATE_COLUMNS = (
    "T", "L", "engine", "batch", "error", "prefill s", "gain", "GiB", "ms a step", "tokens/s", "gain", "bytes say",
    "cache GiB", "slots", "peak GiB",
)  # fmt: skip


def _generate_row(row: Mapping[str, Any]) -> list[str]:
    cells = [f"{row['length']:,}", _or_dash(row["lag"]), row["engine"], _or_dash(row["batch"])]
    if "failed" in row:
        return _padded([*cells, row["failed"].splitlines()[0]], GENERATE_COLUMNS)
    if row["gate"] not in ("passed", "none"):
        kind = "error" if "error" in row else "exact_error"  # the float32 gate comes first
        return _padded([*cells, f"{_error(row[kind])} > {_error(row[f'allowed_{kind}'])}: WRONG"], GENERATE_COLUMNS)
    gated = f"{_error(row['error'])} < {_error(row['allowed_error'])}" if row["gate"] == "passed" else "another rule"
    cells.append(gated)
    decode, cache = row["decode"], row["cache"]
    if "prefill" in row:
        prefill = row["prefill"]
        cells += [f"{prefill['ms']['median'] / 1e3:.3g}", _gain(row, "prefill_speedup"), _gib(prefill["peak_memory"])]
    else:
        cells += ["", "", ""]
    against = "" if row.get("against_batch") in (None, row["batch"]) else f" (batch {row['against_batch']})"
    return [
        *cells,
        f"{decode['ms']['median']:.3g}" + ("" if decode["graphed"] else " (no graph)"),
        f"{decode['tokens_per_second']:,.0f}",
        _gain(row, "speedup") + against,
        _gain(row, "predicted_speedup"),
        _gib(cache["bytes"] + cache["buffer_bytes"]),
        f"{cache['slots']:,.0f}",
        _gib(decode["peak_memory"]),
    ]


def _padded(cells: list[str], columns: Sequence[str]) -> list[str]:
    return [*cells, *[""] * (len(columns) - len(cells))]


def _error(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.0e}"  # a record has no infinities


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _gain(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.2f}x" if name in row else ""


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.3g}"


REPORTS = {"kernels": _kernels, "step": _step, "generate": _generate}
