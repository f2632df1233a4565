"""`where="attention.lag_size == 128 and seed < 3"`: which cells, said in a small language that runs no code.

Comparisons (`==`, `!=`, `<`, `<=`, `>`, `>=`, `in`, `not in`) of keys with numbers, texts, `true`, `false`, `null` and
lists of them, joined by `and`, `or`, `not` and brackets. Python's parser reads it; only these nodes are let in, and
they are interpreted here.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lrsa.results.keys import ABSENT, look_up
from lrsa.results.record import Record

_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ORDERED = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_ALLOWED = "keys, numbers, 'text', true, false, null, [lists], == != < <= > >= in, not in, and, or, not, brackets"


@dataclass(frozen=True)
class Where:
    """A condition on a key's values. `Where.parse("")` holds everywhere."""

    text: str
    _tree: ast.expr | None

    @classmethod
    def parse(cls, text: str | None) -> Where:
        """Raises ValueError, with the place, for anything beyond the language."""
        text = " ".join((text or "").split())
        if not text:
            return cls("", None)
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ValueError(f"where='{text}' cannot be read: {error}. It knows {_ALLOWED}") from error
        where = cls(text, tree)
        where._condition(tree)
        return where

    @property
    def keys(self) -> list[str]:
        """Those that it asks for."""
        return [] if self._tree is None else list(dict.fromkeys(self._names(self._tree)))

    def holds(self, value_of: Callable[[str], Any]) -> bool:
        """Whether it is true of what has the values `value_of`. A key that is `ABSENT` counts as null; an order with
        null is false. Raises ValueError for an order between a text and a number.
        """
        return self._tree is None or bool(self._value(self._tree, value_of))

    def of(self, records: Iterable[Record]) -> list[Record]:
        """The records with those cells alone of which it holds, their outcomes whole; without those that keep none."""
        if self._tree is None:
            return list(records)
        held = ((one, [cell for cell in one.cells if self.holds(partial(look_up, one, cell))]) for one in records)
        return [replace(record, cells=cells) for record, cells in held if cells]

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Attribute | ast.Name):
            self._dotted(node)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                self._condition(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._condition(node.operand)
        elif isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                self._check(part)
            for op, right in zip(node.ops, node.comparators, strict=True):
                if type(op) not in _COMPARE:
                    self._refuse(node)
                if isinstance(op, ast.In | ast.NotIn) and not isinstance(right, ast.List | ast.Tuple):
                    self._refuse(right, "`in` wants a list, [64, 128]")
        elif isinstance(node, ast.List | ast.Tuple):
            for item in node.elts:
                self._check(item)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            if not (isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int | float)):
                self._refuse(node)
        elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float | str)):
            self._refuse(node)

    def _condition(self, node: ast.expr) -> None:
        """A part of `and`, `or`, `not`: a comparison, or a key that is true or false."""
        self._check(node)
        if isinstance(node, ast.Constant | ast.List | ast.Tuple):
            self._refuse(node, "compare a key with it")

    def _refuse(self, node: ast.AST, why: str = "") -> None:
        part = ast.get_source_segment(self.text, node) or self.text  # type: ignore[arg-type]
        raise ValueError(
            f"where='{self.text}': '{part}' is not allowed{': ' + why if why else ''}. It knows {_ALLOWED}"
        )

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        if not isinstance(node, ast.Name):
            self._refuse(node)
        assert isinstance(node, ast.Name)
        return node.id

    def _names(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Attribute | ast.Name):
            if (name := self._dotted(node)) not in _CONSTANTS:
                yield name
            return
        for child in ast.iter_child_nodes(node):
            yield from self._names(child)

    def _value(self, node: ast.AST, value_of: Callable[[str], Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute | ast.Name):
            name = self._dotted(node)
            value = _CONSTANTS[name] if name in _CONSTANTS else value_of(name)
            return None if value is ABSENT else value
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(item, value_of) for item in node.elts]
        if isinstance(node, ast.BoolOp):
            every = all if isinstance(node.op, ast.And) else any
            return every(self._value(value, value_of) for value in node.values)
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, value_of)
            return not value if isinstance(node.op, ast.Not) else -value
        assert isinstance(node, ast.Compare)
        values = [self._value(part, value_of) for part in (node.left, *node.comparators)]
        return all(self._compare(op, *values[i : i + 2]) for i, op in enumerate(node.ops))

    def _compare(self, op: ast.cmpop, left: Any, right: Any) -> bool:
        if isinstance(op, _ORDERED) and (left is None or right is None):
            return False
        try:
            return bool(_COMPARE[type(op)](left, right))
        except TypeError as error:
            raise ValueError(f"where='{self.text}': {left!r} and {right!r} have no order ({error})") from error
