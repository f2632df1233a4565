"""`lrsa-bench`: how fast sparse attention is, a training step or generation with it, against dense in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from lrsa.benchmark import block_peers, generate, kernels, step
from lrsa.benchmark.cases import cases
from lrsa.benchmark.figure import speed_figure
from lrsa.benchmark.report import of_records, report, write_reports
from lrsa.config import BenchConf, config_dir, register_configs
from lrsa.results import Record
from lrsa.results.figures import save_figure
from lrsa.results.store import load_records
from lrsa.tracking import log_benchmark, plain, task_overrides

register_configs()


def _kernels(conf: BenchConf, device: torch.device) -> Iterator[dict[str, Any]]:
    yield from kernels.run(conf, device)
    yield from block_peers.run(conf, device)


MODES = {"kernels": _kernels, "step": step.run, "generate": generate.run}


@hydra.main(config_path=str(config_dir()), config_name="bench", version_base=None)
def main(config: DictConfig) -> None:
    conf = cast(BenchConf, OmegaConf.to_object(config))
    records = load_records(*conf.records, unfinished=True) if conf.records else [run(conf)]
    reports = of_records(records)
    for item in reports:
        Console(width=None if sys.stdout.isatty() else 180).print(item.to_console())
    if conf.table is not None:
        target = Path(conf.table)
        rebuild = f"lrsa-bench 'records=[{','.join(conf.records)}]' table={conf.table}"
        write_reports(reports, target, rebuild)
        Console().print(f"wrote {target}", highlight=False)
    if conf.figure is not None:
        target = Path(conf.figure)
        for path in save_figure(speed_figure(records), target.parent, target.name):
            Console().print(f"wrote {path}", highlight=False)


def run(conf: BenchConf) -> Record:
    """Measure what ``conf`` asks for, record it, return the finished record.

    Raises:
        ValueError: an unknown mode; what `cases` refuses; a backend or a peer that cannot run here.
    """
    if conf.mode not in MODES:
        raise ValueError(f"mode={conf.mode!r} is unknown: choose one of {', '.join(MODES)}")
    if conf.figure is not None and conf.mode != "kernels":
        raise ValueError(f"figure={conf.figure} is of mode=kernels, this is mode={conf.mode}: leave it out")
    for name, value, mode in (
        ("graphs", conf.graphs, "kernels"),
        ("peers", conf.peers, "kernels"),
        ("compile", conf.compile, "step"),
    ):
        if value and conf.mode != mode:
            raise ValueError(f"{name}={value} is of mode={mode}, this is mode={conf.mode}: leave it out")
    cases(conf)
    if conf.run.threads is not None:
        torch.set_num_threads(conf.run.threads)
    device = torch.device(conf.device if conf.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if conf.mode == "kernels":
        kernels.check_backends(conf, device)
        block_peers.check_peers(conf, device)
    with Record.start(
        conf.run.output_dir,
        command="lrsa-bench",
        study=conf.run.study,
        arm=conf.run.arm or conf.mode,
        seed=conf.run.seed,
        config=plain(conf),
        overrides=task_overrides(),
    ) as record:
        metrics: dict[str, Any] = {"device": device.type, "threads": torch.get_num_threads(), "rows": []}
        for row in track(MODES[conf.mode](conf, device), description=f"lrsa-bench {conf.mode}", transient=True):
            metrics["rows"].append(row)
            record.metrics = metrics  # a run that is killed leaves what it had measured
            record.write()
            shown = report(conf.mode, record.config, [row], device.type)
            said = [f"{name} {cell}" for name, cell in zip(shown.columns, shown.rows[0], strict=True) if cell]
            Console().print(", ".join(said), soft_wrap=True, highlight=False)
        record.finish(metrics, [], [])
    log_benchmark(record, conf.logger)
    Console().print(f"record: {record.path}", highlight=False)
    return record


if __name__ == "__main__":
    main()
