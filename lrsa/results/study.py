"""`experiments/<study>/table.yaml`: the tables of a study, as settings of `lrsa-table`.

The file holds fields of `TableConf`; under `tables`, a mapping from a file's name to what is different for it. A study
without `tables` has one, `table`. Folders to read records from stand relative to the file; without any, `records`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lrsa.config import TableConf

FOLDER = Path("experiments")
TABLE_FILE = "table.yaml"
ALL = "all"
_OF_THE_CALL = ("experiment", "output", "store")  # say where and what to build, so they stand on the command line
# What does not change what a table says: left out of the command that it names.
_WHERE_TO = ("experiment", "output", "formats", "figure", "figures", "store")
# What asks for one table of another shape.
_SHAPE = ("metric", "retention", "rows", "columns", "stem")


def find_studies(name: str, root: Path = FOLDER) -> list[Path]:
    """The folders of the study `name`, or of `all` that have a table.yaml.

    Raises ValueError where there is none, naming those there are.
    """
    found = sorted(file.parent for file in root.glob(f"*/{TABLE_FILE}"))
    chosen = found if name == ALL else [folder for folder in found if folder.name == name]
    if not chosen:
        there = ", ".join(folder.name for folder in found) or "none"
        wanted = f"{root}/*/{TABLE_FILE}" if name == ALL else root / name / TABLE_FILE
        raise ValueError(
            f"experiment={name}: there is no {wanted} (here: {there}). Write one, run from the folder that holds "
            f"{root}/, or name records alone: lrsa-table records=[FOLDER]"
        )
    return chosen


def read_study(folder: Path, given: Mapping[str, Any] | None = None) -> dict[str, TableConf]:
    """The tables of a study by file name, with what is `given` on the command line on top.

    Raises ValueError naming the file, for what is not as `TableConf` says.
    """
    file = folder / TABLE_FILE
    try:
        written = OmegaConf.load(file)
        if not isinstance(written, DictConfig):
            raise ValueError("expected a mapping")
        tables = written.pop("tables", None) or {"table": None}
        if set(_SHAPE) & set(given or {}):
            tables = {"table": None}
        if not isinstance(tables, dict | DictConfig):
            raise ValueError(f"tables={tables!r}: expected a mapping, {{file name: what is different for it}}")
        return {str(stem): _table(folder, str(stem), written, own or {}, given or {}) for stem, own in tables.items()}
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise ValueError(f"{file}: {str(error).partition(chr(10))[0]}") from error


def _table(folder: Path, stem: str, common: Any, own: Any, given: Mapping[str, Any]) -> TableConf:
    if not isinstance(own, dict | DictConfig):
        raise ValueError(f"tables.{stem}={own!r}: expected a mapping, what is different for it")
    if "seeds" in own:  # in place of the study's, not in addition
        common = {key: value for key, value in common.items() if key != "seeds"}
    conf: Any = OmegaConf.merge(OmegaConf.structured(TableConf), common, own)
    if "arms" in own and "seeds" not in own and isinstance(conf.seeds, DictConfig):  # not those of other arms
        conf.seeds = {arm: seeds for arm, seeds in conf.seeds.items() if arm in conf.arms}
    set_there = [key for key in _OF_THE_CALL if conf[key] is not None]
    if set_there:
        raise ValueError(f"{', '.join(set_there)}: of the command line, not of the file")
    conf.records = [os.path.normpath(folder / path) for path in conf.records or ["records"]]
    if "tasks" in given or "arms" in given:  # what was chosen by hand need not be complete
        conf.seeds = None
    conf = OmegaConf.merge(conf, dict(given))
    conf.experiment = folder.name
    conf.draws = conf.draws or "each"  # with a store too: the same bytes
    conf.store = f"{conf.store}/{folder.name}" if conf.store else None
    conf.stem = given.get("stem") or stem
    if set(given) <= set(_WHERE_TO):
        conf.output = conf.output or str(folder)
    else:  # another table than the study's own, whose files it must not replace
        conf.output = conf.output or f"tables/{folder.name}"
    if given.get("experiment") == ALL and given.get("output"):
        conf.output = f"{conf.output}/{folder.name}"
    merged = OmegaConf.to_object(conf)
    assert isinstance(merged, TableConf)
    return merged


def rebuilt_by(study: str, overrides: Mapping[str, str]) -> list[str]:
    """The command that makes a table of `study` again, of the overrides (as typed, by key) of this call."""
    more = [typed for key, typed in overrides.items() if key not in _WHERE_TO]
    return ["lrsa-table", f"experiment={study}", *more]
