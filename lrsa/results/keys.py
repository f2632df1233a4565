"""A key of a record or of one of its cells: `arm`, `attention.lag_size`, `compression`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrsa.results.record import Record
from lrsa.results.setting import Setting

OF_RECORDS = ("arm", "seed", "study", "command", "id", "attempt", "wall_s")
OF_CELLS = ("task", "compression", "context", "column")  # and whatever else a cell holds
COMPRESSION = "compression"


class Absent:
    """The value of a key that a record does not have."""


ABSENT = Absent()


def look_up(record: Record, cell: Mapping[str, Any], key: str) -> Any:
    """The value of `key`: a field of `OF_RECORDS` or of the cell, else a dotted key of the run's resolved config;
    `ABSENT` where there is none. Raises ValueError for a whole group of the config.
    """
    if key in OF_RECORDS:
        return getattr(record, key)
    if key in OF_CELLS:
        setting = Setting.of(cell)
        return {"context": setting.context, "column": setting.label}.get(key, cell.get(key))
    if key in cell:
        return cell[key]
    node: Any = record.config
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return ABSENT
        node = node[name]
    if isinstance(node, Mapping):
        raise ValueError(f"'{key}' is a group of the config, not a value; its keys: {', '.join(map(str, node))}")
    return node


def check_keys(keys: Iterable[str], records: Sequence[Record]) -> None:
    """Raises ValueError for a key that no record has, with those most like it."""
    for key in dict.fromkeys(keys):
        if key in (*OF_RECORDS, *OF_CELLS) or not records:
            continue
        if not any(look_up(record, cell, key) is not ABSENT for record in records for cell in record.cells or [{}]):
            known = sorted({name for record in records for name in (*flat(record.config), *_of_cells(record))})
            last = key.rpartition(".")[2]
            close = difflib.get_close_matches(key, known, 4, 0.6) or [name for name in known if last in name.split(".")]
            like = f"; is it one of {', '.join(close[:4])}?" if close else ""
            raise ValueError(f"no record has the key '{key}'{like} Known: {', '.join((*OF_RECORDS, *OF_CELLS))}, "
                             "fields of cells, and every dotted key of the runs' config")  # fmt: skip


def _of_cells(record: Record) -> Iterable[str]:
    return dict.fromkeys(name for cell in record.cells for name in cell)


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of a config by dotted key, `{"attention.lag_size": 128}`; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{above}{key}.")
        else:
            leaves[f"{above}{key}"] = value
    return leaves
