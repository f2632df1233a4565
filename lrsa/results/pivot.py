"""Which row and column of a table a cell belongs to: by arm and compression, or by any keys of record and cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lrsa.results.keys import ABSENT, COMPRESSION, flat, look_up
from lrsa.results.record import NOT_IN_ID, Record
from lrsa.results.setting import Setting, label_of, order_of

ROWS, COLUMNS = ("arm",), (COMPRESSION,)
_VARIES = ("run", "logger", "resume", "recipe.name")  # between seeds of one setting, and names of it


class Place(NamedTuple):
    """A row's label and sort key, and the column."""

    row: str
    order: tuple[Any, ...]
    setting: Setting


@dataclass(frozen=True)
class Pivot:
    """Keys whose values make the rows and the columns; `compression` as a column is the table's usual one.

    rows_title: heads the column that names the rows; None: "post-trained with" above arms, else their keys.
    """

    rows: tuple[str, ...] = ROWS
    columns: tuple[str, ...] = COLUMNS
    rows_title: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        both = set(self.rows) & set(self.columns)
        if both or not self.rows or not self.columns:
            what = f"{', '.join(sorted(both))} in both" if both else "an empty list"
            raise ValueError(f"rows={list(self.rows)} columns={list(self.columns)}: {what}; give each its own keys")
        if "task" in (*self.rows, *self.columns):
            raise ValueError(
                "rows and columns cannot hold 'task': a table has a block of rows a task; choose with tasks="
            )

    @property
    def usual(self) -> bool:
        """Rows are arms, columns compressions."""
        return self == Pivot()

    @property
    def title(self) -> str:
        """Of the column that names the rows."""
        return self.rows_title or ("post-trained with" if self.rows == ROWS else ", ".join(map(_last, self.rows)))

    def place(self, record: Record, cell: Mapping[str, Any]) -> Place:
        setting = Setting.of(cell)
        if self.rows == ROWS:
            row, order = record.arm, (record.arm,)
        else:
            values = self._values(self.rows, record, cell)
            row, order = label_of(values), order_of(values)
        if self.columns != COLUMNS:
            named = zip(map(_last, self.columns), self._values(self.columns, record, cell), strict=True)
            setting = Setting(None, "full", tuple(named))
        return Place(row, order, setting)

    def _values(self, keys: tuple[str, ...], record: Record, cell: Mapping[str, Any]) -> tuple[Any, ...]:
        values = (Setting.of(cell) if key == COMPRESSION else look_up(record, cell, key) for key in keys)
        return tuple(
            None if value is ABSENT else tuple(value) if isinstance(value, list) else value for value in values
        )


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def unlike(one: Record, other: Record) -> list[str]:
    """Config keys in which two runs of one cell differ although they may differ in the seed alone, with both values."""
    a, b = flat(one.config), flat(other.config)
    return [
        f"{key} ({a.get(key)} and {b.get(key)})"
        for key in sorted(a.keys() & b.keys())  # one that a later version added says nothing of the runs
        if a[key] != b[key] and not any(key == name or key.startswith(f"{name}.") for name in (*_VARIES, *NOT_IN_ID))
    ]
