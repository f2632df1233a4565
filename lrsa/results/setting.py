"""What a cell was measured under, as a table's column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """Nominal compression (1: full cache, None: no context), and how much of the context there was: `full`, `none`, or
    `gold`, its gold documents alone. `column`: of a pivot, names and values of the keys that its columns are of; it
    alone then tells columns apart.
    """

    compression: float | None
    context: str = "full"
    column: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Setting:
        """That of a cell or an outcome. Records from before the ceiling was measured say no `context`."""
        compression = row["compression"]
        return cls(compression, row.get("context") or ("none" if compression is None else "full"))

    @property
    def label(self) -> str:
        """`floor` without the context, `gold` with its gold documents alone, else `full` or `4x`."""
        if self.column:
            return ", ".join(
                _text(value) if isinstance(value, Setting) else f"{name} {_text(value)}" for name, value in self.column
            )
        if self.compression is None or self.context == "none":
            return "floor"
        if self.context != "full":
            return self.context
        return "full" if self.compression == 1 else f"{self.compression:g}x"

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key: the floor, the gold documents alone, then rising compression; of a pivot, its values."""
        if self.column:
            return order_of(tuple(value for _, value in self.column))
        if self.compression is None:
            return (0.0,)
        return (float(self.compression) if self.context == "full" else 0.5,)


def label_of(values: tuple[Any, ...]) -> str:
    """`128, 4x`: the values of a pivot's keys, as a row is called."""
    return ", ".join(_text(value) for value in values)


def order_of(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sort key of values of any kind: null, then settings and numbers by size, then text."""
    return tuple(_rank(value) for value in values)


def _rank(value: Any) -> tuple[Any, ...]:
    if value is None:
        return (0,)
    if isinstance(value, Setting):
        return (1, *value.order)
    if isinstance(value, list | tuple):
        return (1, *(item for part in value for item in _rank(part))) if value else (0,)
    return (1, float(value)) if isinstance(value, int | float) else (2, str(value))


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Setting):
        return value.label
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        return "+".join(map(_text, value)) or "none"
    return str(value)
