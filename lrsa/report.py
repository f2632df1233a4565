"""`lrsa-report`: records of a sweep or study -> one self-contained HTML page."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import cast

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from lrsa.benchmark.report import of_records
from lrsa.config import ReportConf, config_dir, register_configs
from lrsa.results.record import write_atomically
from lrsa.results.report import PlainTable, build_report
from lrsa.results.store import load_records

register_configs()


def write_report(conf: ReportConf, command: str = "lrsa-report") -> Path:
    """Read the records, write the page; returns its path.

    Raises RecordError and ValueError as `load_records` and `build_report` do.
    """
    if not conf.records and conf.study is None:
        raise ValueError("name the records to read: records=[FOLDER,...], or study=NAME for experiments/NAME/records")
    if not isinstance(conf.names or {}, dict):
        raise ValueError(f"names={conf.names!r} is not a mapping; write names={{dense: Dense, lrsa: LRSA}}")
    if not isinstance(conf.reference, str | dict | None):
        raise ValueError(f"reference={conf.reference!r}: name an arm, or write {{arm: its reference, ...}}")
    folders = conf.records or [f"experiments/{conf.study}/records"]
    records = load_records(*folders, study=conf.study if conf.records else None, unfinished=True)
    measured = [record for record in records if "rows" in record.metrics]
    page = build_report(
        records,
        title=conf.title,
        arms=conf.arms,
        tasks=conf.tasks,
        compressions=conf.compressions,
        reference=conf.reference,
        names={str(key): str(name) for key, name in (conf.names or {}).items()},
        metrics=conf.metrics,
        n_resamples=conf.bootstrap,
        more=[PlainTable(bench.title, bench.columns, bench.rows) for bench in of_records(measured)],
        command=command,
    )
    path = Path(conf.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8"))
    return path


def _command() -> str:
    """This command as anybody else would type it: paths relative to the folder it was started in."""
    return shlex.join(["lrsa-report", *(argument.replace(f"{os.getcwd()}/", "") for argument in sys.argv[1:])])


@hydra.main(config_path=str(config_dir()), config_name="report", version_base=None)
def main(config: DictConfig) -> None:
    conf = cast(ReportConf, OmegaConf.to_object(config))
    try:
        path = write_report(conf, _command())
    except ValueError as error:  # RecordError among them: bad input, not a bug, so no traceback
        Console(stderr=True).print(Text(f"error: {error}", style="red"))
        raise SystemExit(1) from error
    Console().print(Text(f"wrote {path} ({path.stat().st_size / 1024:,.0f} KiB)"), soft_wrap=True)


if __name__ == "__main__":
    main()
