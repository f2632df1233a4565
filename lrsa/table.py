"""`lrsa-table`: records of finished runs -> the train x inference table (Markdown, LaTeX, CSV) and figures."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from lrsa.config import TableConf, config_dir, register_configs
from lrsa.results.figures import make_figures, save_figure
from lrsa.results.formats import to_console, write_table
from lrsa.results.record import Record
from lrsa.results.retention import build_retention
from lrsa.results.store import load_records
from lrsa.results.tables import ResultTable, build_table

register_configs()


def build(conf: TableConf, command: str = "lrsa-table") -> tuple[ResultTable, list[Path]]:
    """Read the records, write what `conf` asks for; returns the table and the paths written.

    Raises RecordError and ValueError as `load_records`, `build_table` and `write_table` do.
    """
    if not conf.records and conf.study is None:
        raise ValueError("name the records to read: records=[FOLDER,...], or study=NAME for experiments/NAME/records")
    if not isinstance(conf.names or {}, dict):
        raise ValueError(f"names={conf.names!r} is not a mapping; write names={{dense: Dense, lrsa: LRSA}}")
    if not isinstance(conf.reference, str | dict | None):
        raise ValueError(f"reference={conf.reference!r}: name an arm, or write {{arm: its reference, ...}}")
    folders = conf.records or [f"experiments/{conf.study}/records"]
    output = Path(conf.output or (f"experiments/{conf.study}" if conf.study else "tables"))
    records = load_records(*folders, study=conf.study)
    wanted: dict[str, Any] = {
        "title": conf.title,
        "arms": conf.arms,
        "tasks": conf.tasks,
        "compressions": conf.compressions,
        "reference": conf.reference,
        "names": {key: str(name) for key, name in (conf.names or {}).items()},
        "metric": conf.metric,
        "n_resamples": conf.bootstrap,
        "rebuild": conf.rebuild or command,
    }
    if conf.retention is not None:
        table = build_retention(records, of=conf.retention, **wanted)
        return table, write_table(table, output, conf.formats, stem=f"retention_{conf.retention}")
    table = build_table(records, **wanted)
    written = write_table(table, output, conf.formats)
    if conf.figure:
        written += _write_figures(table, records, output, conf.figures)
    return table, written


def _write_figures(table: ResultTable, records: list[Record], output: Path, wanted: Any) -> list[Path]:
    made = make_figures(records, table, wanted)
    return [path for name, figure in made.items() for path in save_figure(figure, output, name)]


def _command() -> str:
    """This command as anybody else would type it: paths relative to the folder it was started in."""
    return shlex.join(["lrsa-table", *(argument.replace(f"{os.getcwd()}/", "") for argument in sys.argv[1:])])


@hydra.main(config_path=str(config_dir()), config_name="table", version_base=None)
def main(config: DictConfig) -> None:
    conf = cast(TableConf, OmegaConf.to_object(config))
    console, errors = Console(), Console(stderr=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # what was left out of a table must be seen
        try:
            table, written = build(conf, _command())
        except ValueError as error:  # RecordError among them: bad input, not a bug, so no traceback
            errors.print(Text(f"error: {error}", style="red"))
            raise SystemExit(1) from error
        finally:
            for message in dict.fromkeys(str(item.message) for item in caught):
                errors.print(Text(f"warning: {message}", style="yellow"))
    console.print(to_console(table))
    console.print()
    for path in written:
        console.print(Text(f"wrote {path}"), soft_wrap=True)


if __name__ == "__main__":
    main()
