"""`lrsa-table`: records of finished runs -> tables (Markdown, LaTeX, CSV) and figures, by study or as asked for."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console, RenderableType
from rich.text import Text

from lrsa.benchmark.report import of_records, write_reports
from lrsa.config import TableConf, config_dir, register_configs
from lrsa.results.formats import to_console
from lrsa.results.produce import make_table, write_all
from lrsa.results.record import Record
from lrsa.results.store import choose, load_records
from lrsa.results.study import find_studies, read_study, rebuilt_by
from lrsa.results.tables import ResultTable

register_configs()


class Made(NamedTuple):
    """What one table became: for the terminal, the files written, and, unless it is a benchmark's, the table."""

    shown: RenderableType
    written: list[Path]
    table: ResultTable | None = None
    said: str = ""  # of the store


def build(conf: TableConf, rebuild: str = "lrsa-table") -> Made:
    """Read the records of one table, write what `conf` asks for.

    Raises RecordError and ValueError as `load_records`, `make_table` and `write_all` do.
    """
    if not conf.records:
        raise ValueError(
            "name the records to read: records=[FOLDER,...]; or experiment=STUDY, one of experiments/*/table.yaml"
        )
    folder = Path(conf.output or "tables")
    said = ""
    if conf.store is None:
        records = load_records(*conf.records, study=conf.study, unfinished=conf.benchmark)
    else:
        from lrsa.results.gathered import gather  # pyarrow takes its time to import

        every, read = gather(conf.records, conf.store)
        records = choose(every, conf.records, study=conf.study, unfinished=conf.benchmark)
        said = f"store {conf.store}: {len(every)} records, {read} of them read anew"
    if conf.benchmark:
        return _benchmarks(conf, records, folder, rebuild)
    table = make_table(conf, records, rebuild)
    return Made(to_console(table), write_all(conf, table, records, folder), table, said)


def _benchmarks(conf: TableConf, records: Sequence[Record], folder: Path, rebuild: str) -> Made:
    reports = of_records(records)
    if not reports:
        raise ValueError(f"benchmark=true, but no record in {', '.join(conf.records)} is of lrsa-bench")
    path = folder / f"{conf.stem}.md"
    write_reports(reports, path, rebuild)
    return Made(Text(f"{len(reports)} benchmarks: {', '.join(report.title for report in reports)}"), [path])


def plan(conf: TableConf, given: Mapping[str, Any], overrides: Mapping[str, str]) -> list[tuple[TableConf, str]]:
    """The tables that a call asks for, each with the command that its files name. `given`, by key, and `overrides`, as
    typed, are its command line.

    Raises ValueError for a study that is not there, and for a table.yaml that is not as `TableConf` says.
    """
    if conf.experiment is None:
        return [(conf, shlex.join(["lrsa-table", *overrides.values()]))]
    return [
        (table, shlex.join(rebuilt_by(folder.name, overrides)))
        for folder in find_studies(conf.experiment)
        for table in read_study(folder, given).values()
    ]


def _command_line(config: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What this call sets, by key: the values, and as anybody else would type it, paths relative to where it runs."""
    typed = HydraConfig.get().overrides.task
    keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(typed)]
    given: DictConfig = OmegaConf.create({})
    for key in keys:
        OmegaConf.update(given, key, OmegaConf.select(config, key), force_add=True)
    values = OmegaConf.to_container(given)
    assert isinstance(values, dict)
    here = f"{os.getcwd()}/"
    return cast("dict[str, Any]", values), {key: text.replace(here, "") for key, text in zip(keys, typed, strict=True)}


@hydra.main(config_path=str(config_dir() / "results"), config_name="table", version_base=None)
def main(config: DictConfig) -> None:
    conf = cast(TableConf, OmegaConf.to_object(config))
    console, errors = Console(), Console(stderr=True)
    failed = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # what was left out of a table must be seen
        try:
            for table, rebuild in plan(conf, *_command_line(config)):
                made, problem = _tried(table, rebuild)
                if made is not None:
                    console.print(made.shown)
                    console.print()
                    if made.said:
                        console.print(Text(made.said), soft_wrap=True)
                    for path in made.written:
                        console.print(Text(f"wrote {path}"), soft_wrap=True)
                else:
                    errors.print(Text(f"error: {problem}", style="red"))
                    failed = True
        except ValueError as error:
            errors.print(Text(f"error: {error}", style="red"))
            failed = True
        finally:
            for message in dict.fromkeys(str(item.message) for item in caught):
                errors.print(Text(f"warning: {message}", style="yellow"))
    if failed:
        raise SystemExit(1)


def _tried(conf: TableConf, rebuild: str) -> tuple[Made | None, str]:
    """One table's bad input does not keep the others from being built."""
    try:
        return build(conf, rebuild), ""
    except ValueError as error:  # RecordError among them: bad input, not a bug, so no traceback
        where = f"{conf.experiment}, {conf.stem}: " if conf.experiment else ""
        return None, f"{where}{error}"


if __name__ == "__main__":
    main()
