"""`lrsa-bench`: how fast sparse attention is, or a training step with it, against dense in the same process."""

from __future__ import annotations

from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lrsa.benchmark import kernels, step
from lrsa.config import BenchConf, config_dir, register_configs
from lrsa.results import Record
from lrsa.tracking import plain, task_overrides

register_configs()
MODES = {"kernels": kernels.run, "step": step.run}


@hydra.main(config_path=str(config_dir()), config_name="bench", version_base=None)
def main(config: DictConfig) -> None:
    conf = cast(BenchConf, OmegaConf.to_object(config))
    if conf.mode not in MODES:
        raise ValueError(f"mode={conf.mode!r} is unknown: choose one of {', '.join(MODES)}")
    if conf.run.threads is not None:
        torch.set_num_threads(conf.run.threads)
    wanted = conf.device if conf.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    with Record.start(
        conf.run.output_dir,
        command="lrsa-bench",
        study=conf.run.study,
        arm=conf.run.arm or conf.mode,
        seed=conf.run.seed,
        config=plain(conf),
        overrides=task_overrides(),
    ) as record:
        rows = list(track(MODES[conf.mode](conf, device), description=f"lrsa-bench {conf.mode}", transient=True))
        record.finish({"threads": torch.get_num_threads(), "rows": rows})
    Console().print(TABLES[conf.mode](conf, rows, device))
    Console().print(f"record: {record.path}", highlight=False)


def kernel_table(conf: BenchConf, rows: list[dict[str, Any]], device: torch.device) -> Table:
    """Medians in ms, dense (the fastest kernel here) -> sparse; an implementation that is wrong gets no time."""
    shape = f"batch {conf.batch_size}, {conf.query_heads}/{conf.key_value_heads} heads, D {conf.head_dim}"
    title = f"Dense -> sparse attention, {shape}, {conf.dtype}, {device.type}, median of {conf.rounds}"
    table = _table(title, ["T", "L", "keep", "backend", "error", "forward ms", "", "fwd+bwd ms", "", "ideal"])
    for row in rows:
        cells = [f"{row['length']:,}", str(row["lag"]), f"1/{row['compression']:g}", row["backend"]]
        if row["gate"] != "passed":
            table.add_row(*cells, f"[red]{row['error']:.0e} > {row['allowed_error']:.0e}")
            continue
        cells.append(f"{row['error']:.0e}")
        for name in ("forward", "forward_backward"):
            dense, sparse = (row[name][kernel]["median"] for kernel in (row[f"{name}_dense"], "sparse"))
            cells += [f"{dense:.3g} -> {sparse:.3g}", f"[bold]{row[f'{name}_speedup']:.2f}x[/]"]
        table.add_row(*cells, f"{row['ideal_speedup']:.2f}x")
    return table


def step_table(conf: BenchConf, rows: list[dict[str, Any]], device: torch.device) -> Table:
    """A training step: ms, tokens a second, peak memory."""
    title = f"Training step, dense -> sparse: {conf.model.name}, batch {conf.batch_size}, {conf.dtype}, {device.type}"
    table = _table(title, ["T", "L", "keep", "ms a step", "sparse / dense", "tokens/s", "peak GiB"])
    for row in rows:
        ms, speed, memory = (
            [value["median"] if isinstance(value, dict) else value for value in row[name].values()]
            for name in ("step", "tokens_per_second", "peak_memory")
        )
        table.add_row(
            f"{row['length']:,}",
            str(row["lag"]),
            f"1/{row['compression']:g}",
            f"{ms[0]:.1f} -> {ms[1]:.1f}",
            f"[bold]{row['step_ratio']:.2f}[/]",
            f"{speed[0]:,.0f} -> {speed[1]:,.0f}",
            "-" if memory[0] is None else f"{memory[0] / 2**30:.1f} -> {memory[1] / 2**30:.1f}",
        )
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


TABLES = {"kernels": kernel_table, "step": step_table}

if __name__ == "__main__":
    main()
