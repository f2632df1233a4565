"""Where rows come from: a hub data set, or a local folder or file with the same columns; and their validation.

Rule of `path`, in this order:
1. A path that exists is read from disk: a file (`.jsonl`, `.jsonl.gz`, `.parquet`), or a folder with one such file a
   split, named `<split>.jsonl.gz` and so on.
2. A hub id for which `$LRSA_DATA` holds a stand-in (`STAND_INS`) is read from there; the log and every record say so.
3. A hub id (`owner/name`) is loaded with `datasets`.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lrsa.data.examples import DataRowError

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")


@dataclass(frozen=True)
class StandIn:
    """A folder under `$LRSA_DATA` with a hub data set's columns; `splits` maps hub split names to other file names."""

    folder: str
    splits: dict[str, str] = field(default_factory=dict)


STAND_INS = {
    "rajpurkar/squad": StandIn("squad"),
    "google/xquad": StandIn("squad", {"validation": "test"}),
    "hotpotqa/hotpot_qa": StandIn("hotpotqa"),
    "framolfese/2WikiMultihopQA": StandIn("two_wiki"),
    "dgslibisey/MuSiQue": StandIn("musique"),
    "deepmind/narrativeqa": StandIn("narrativeqa"),
    "Salesforce/wikitext": StandIn("prose"),
}


@dataclass(frozen=True)
class Row:
    """One raw row, or an object in it (`prefix` then says where); its readers raise DataRowError with file, line and
    column."""

    file: str
    line: int
    data: dict[str, Any]
    prefix: str = ""

    def fail(self, column: str, problem: str) -> NoReturn:
        """Raise DataRowError for this row."""
        raise DataRowError(self.file, self.line, self.prefix + column, problem)

    def _find(self, column: str) -> Any:
        value: Any = self.data
        for name in column.split("."):
            if not isinstance(value, dict) or name not in value:
                have = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
                self.fail(column, f"missing (the row has {have or 'nothing'})")
            value = value[name]
        return value

    def text(self, column: str, default: str | None = None) -> str:
        """A string that is not blank; `default` where the column is absent (dots descend: `answers.text`)."""
        if default is not None and self.data.get(column) is None:
            return default
        value = self._find(column)
        if not isinstance(value, str):
            self.fail(column, f"expected a string, got {type(value).__name__} {value!r:.60}")
        if not value.strip() and default is None:
            self.fail(column, "is blank")
        return value

    def texts(self, column: str) -> list[str]:
        """A list of at least one string, none blank."""
        value = self._find(column)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(column, f"expected a list of strings, got {type(value).__name__} {value!r:.60}")
        if not value or not all(item.strip() for item in value):
            self.fail(column, "is empty or has a blank entry")
        return value

    def inside(self, column: str) -> Row:
        """The object that the column holds, to be read like a row."""
        value = self._find(column)
        if not isinstance(value, dict):
            self.fail(column, f"expected an object, got {type(value).__name__} {value!r:.60}")
        return Row(self.file, self.line, value, f"{self.prefix}{column}.")

    def objects(self, column: str) -> list[Row]:
        """The column's objects, at least one, each to be read like a row."""
        values = self._find(column)
        if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
            self.fail(column, f"expected a list of at least one object, got {type(values).__name__} {values!r:.60}")
        return [
            Row(self.file, self.line, value, f"{self.prefix}{column}[{index}].") for index, value in enumerate(values)
        ]


@dataclass(frozen=True)
class Located:
    """What `path` means: `file` on disk, or a hub id. `origin` is the short name that records carry."""

    origin: str
    file: Path | None = None
    hub: str | None = None
    split: str = "train"


def splits_in(folder: Path) -> list[str]:
    """Names of the splits that a local folder holds."""
    names = (item.name for item in folder.iterdir() if item.is_file())
    return sorted({name.removesuffix(end) for name in names for end in SUFFIXES if name.endswith(end)})


def _in_folder(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = splits_in(folder)
    have = f"it has {', '.join(found)}" if found else f"it has none (a split is a file <split>{SUFFIXES[0]})"
    raise ValueError(f"unknown split {split!r} in {folder}: {have}")


def stand_in(hub: str) -> tuple[Path, StandIn] | None:
    """The folder under `$LRSA_DATA` that stands in for a hub id, if there is one."""
    root = os.environ.get("LRSA_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise FileNotFoundError(f"LRSA_DATA={root} is not a folder")
    entry = STAND_INS.get(hub)
    if entry is None or not (Path(root) / entry.folder).is_dir():
        return None
    folder = Path(root).resolve() / entry.folder
    log.warning("data: %s (LRSA_DATA) stands in for the hub's %s", folder, hub)
    return folder, entry


def locate(path: str | None, split: str) -> Located:
    """Apply the module's rule. FileNotFoundError for what is neither on disk nor a hub id; ValueError lists splits."""
    if not path:
        raise ValueError("this source reads files: set `path` to a hub id, a folder of <split>.jsonl.gz, or a file")
    local = Path(path).expanduser()
    if local.is_file():
        if not local.name.endswith(SUFFIXES):
            raise ValueError(f"{local}: unknown format; valid: {', '.join(SUFFIXES)}")
        return Located(f"{local.resolve().parent.name}/{local.name}", file=local, split=split)
    if local.is_dir():
        file = _in_folder(local, split)
        return Located(f"{local.resolve().name}/{file.name}", file=file, split=split)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) or path.endswith(SUFFIXES):
        raise FileNotFoundError(f"path={path!r} is neither a file or folder on this machine nor a hub id (owner/name)")
    entry = stand_in(path)
    if entry:
        folder, names = entry
        file = _in_folder(folder, names.splits.get(split, split))
        return Located(f"{folder.name}/{file.name} in place of {path} [{split}]", file=file, split=split)
    return Located(f"{path} [{split}]", hub=path, split=split)


def hub_rows(hub: str, split: str, config: str | None, revision: str | None) -> Any:
    """The rows of a hub split (`datasets.Dataset`); ConnectionError names the local alternative."""
    import datasets

    try:
        return datasets.load_dataset(hub, config, split=split, revision=revision)
    except ValueError:  # unknown split or config: its message lists the valid ones
        raise
    except Exception as error:  # offline, unknown name, no permission: many types, by version
        known = STAND_INS.get(hub)
        inside = f", or LRSA_DATA=/folder that holds {known.folder}/" if known else ""
        raise ConnectionError(
            f"the hub's data set {hub!r} cannot be loaded ({type(error).__name__}: {error}). Without the hub, set "
            f"path=/folder with {split}.jsonl.gz (or .jsonl, .parquet) in the same columns{inside}"
        ) from error


def read_rows(located: Located, config: str | None = None, revision: str | None = None) -> Iterator[Row]:
    """Rows in file order, lines counted from 1. DataRowError for a line that is not a JSON object."""
    if located.file is None:
        assert located.hub is not None
        for number, data in enumerate(hub_rows(located.hub, located.split, config, revision), 1):
            yield Row(located.origin, number, data)
    elif located.file.suffix == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        for number, data in enumerate(pyarrow.parquet.read_table(located.file).to_pylist(), 1):
            yield Row(str(located.file), number, data)
    else:
        yield from _read_jsonl(located.file)


def _read_jsonl(file: Path) -> Iterator[Row]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    data = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataRowError(str(file), number, f"character {error.colno}", error.msg) from error
                if not isinstance(data, dict):
                    raise DataRowError(str(file), number, "(row)", f"expected an object, got {type(data).__name__}")
                yield Row(str(file), number, data)
        except (UnicodeDecodeError, EOFError, OSError) as error:
            raise DataRowError(str(file), number + 1, "(row)", f"cannot be read: {error}") from error
