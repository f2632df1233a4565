"""What `lrsa-eval mode=selection` found: the file beside its record, its numbers by name, and tables of it.

The file is a mapping: `names`, how the two models are called, and `cells`, one a task and compression, with `layers`,
those that choose, and `survival`, `agreement` and `swap` as `lrsa.evaluation.selection.statistics` returns them;
`survival_by_rule` is what would survive if other rules ranked the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lrsa.results.found import read_found, write_found

FILE = "selection.json"
Found = Mapping[str, Any]


def write_selection(folder: str | Path, names: Mapping[str, str], cells: Sequence[Found]) -> dict[str, Any]:
    """Write `selection.json` into a run folder; returns what it holds."""
    found = {"names": dict(names), "cells": list(cells)}
    write_found(Path(folder) / FILE, found)
    return found


def read_selection(folder: str | Path) -> dict[str, Any]:
    """The same from a run folder.

    Raises:
        RecordError: there is none, or it is damaged.
    """
    return read_found(Path(folder) / FILE, "selection")


def selection_metrics(cells: Sequence[Found]) -> dict[str, float]:
    """For a record, `selection/<task>/<what>/4x`; shares as fractions, `own` and `against` as the file has them:

    survival.answer.own, enrichment.answer.own, whole.answer.own (in one layer at least), whole.answer.own.oracle (if
    the oracle had chosen); agreement.own.oracle;
    exact.own.against, of own weights under the other's selection; nll likewise; and the differences,
    effect.exact.selection_under_own_weights.
    """
    metrics: dict[str, float] = {}
    for cell in cells:
        named: dict[str, float] = {}
        for model, kinds in cell["survival"].items():
            for kind, of in kinds.items():
                if of is not None:
                    named |= {f"{name}.{kind}.{model}": of[name] for name in ("survival", "enrichment")}
                    named[f"whole.{kind}.{model}"] = of["whole"]["in_a_layer"]
        for rule in cell["survival_by_rule"]:
            of = rule["found"]["answer"]
            if of is not None:
                named[f"survival.answer.{rule['of']}.{rule['by']}"] = of["survival"]
                named[f"whole.answer.{rule['of']}.{rule['by']}"] = of["whole"]["in_a_layer"]
        for pair in cell["agreement"]:
            if pair["found"] is not None:
                named[f"agreement.{pair['of']}.{pair['with']}"] = pair["found"]["shared"]
        for score in ("exact", "nll") if cell["swap"] else ():
            for of in cell["swap"]["cells"]:
                named[f"{score}.{of['weights']}.{of['selection']}"] = of[score]
            for effect, of in cell["swap"]["effects"].items():
                named[f"effect.{score}.{effect}"] = of[score]
        metrics |= {f"selection/{cell['task']}/{name}/{_factor(cell)}": value for name, value in named.items()}
    return metrics


def selection_tables(found: Found) -> Iterator[Table]:
    """For the terminal: survival, the same by depth, agreement, and where there are two models the swap."""
    names, cells = found["names"], found["cells"]
    yield _survival(names, cells)
    yield _depth(names, cells)
    if any(cell["agreement"] for cell in cells):
        yield _agreement(names, cells)
    if any(cell["swap"] for cell in cells):
        yield _swap(names, cells)
        yield _effects(names, cells)


def _survival(names: Mapping[str, str], cells: Sequence[Found]) -> Table:
    table = _table(
        "What survives until the answer: tokens held, %, mean over heads and layers; chance is the share of all tokens",
        ("task", "", "model", "of the"),
        ("n", "held", "chance", "enrichment", "whole in a layer", "in all layers"),
    )
    for cell in cells:
        rows = [(names[m], kind, of) for m, kinds in cell["survival"].items() for kind, of in kinds.items()]
        rules = [rule for rule in cell["survival_by_rule"] if rule["of"] == "own"]
        rows += [(f"{names['own']}, by {rule['by']}", "answer", rule["found"]["answer"]) for rule in rules]
        for model, kind, of in rows:
            if of is not None:
                shares = [
                    f"{100 * share:.1f}" for share in (of["base"], of["whole"]["in_a_layer"], of["whole"]["anywhere"])
                ]
                shares.insert(1, f"{of['enrichment']:.2f}x")
                table.add_row(*_place(cell), model, kind, f"{of['n']}", _percent(of, "survival"), *shares)
    return table


def _depth(names: Mapping[str, str], cells: Sequence[Found]) -> Table:
    answers = [(cell, name, cell["survival"][model]["answer"]) for cell in cells for model, name in names.items()]
    parts = [part for _, _, of in answers if of is not None for part in of["by_depth"]]
    columns = sorted({(part["from"], part["to"]) for part in parts})
    titles = [f"{100 * first:.0f} to {100 * last:.0f}" for first, last in columns]
    table = _table(
        "Answers' tokens held, %, by the depth of the answer in the context, %", ("task", "", "model"), titles
    )
    for cell, name, of in answers:
        if of is not None:
            shares = {part["from"]: f"{100 * part['survival']:.1f} (n {part['n']})" for part in of["by_depth"]}
            table.add_row(*_place(cell), name, *(shares.get(first, "") for first, _ in columns))
    return table


def _agreement(names: Mapping[str, str], cells: Sequence[Found]) -> Table:
    table = _table(
        "Agreement: of the tokens that one keeps, those that the other keeps too, %; a head at a time",
        ("task", "", "selection of", "and of"),
        ("n", "in common", "chance", "Jaccard", "lowest layer", "highest layer"),
    )
    for cell in cells:
        for pair in cell["agreement"]:
            of = pair["found"]
            if of is not None:
                shares = of["chance"], of["jaccard"], min(of["by_layer"]), max(of["by_layer"])
                pieces = names[pair["of"]], names.get(pair["with"], pair["with"])
                more = [f"{100 * share:.1f}" for share in shares]
                table.add_row(*_place(cell), *pieces, f"{of['n']}", _percent(of, "shared"), *more)
    return table


def _swap(names: Mapping[str, str], cells: Sequence[Found]) -> Table:
    table = _table("The swap: one's weights, the other's selection", ("task", "", "weights", "selection"), _SCORES)
    for cell in cells:
        for of in cell["swap"]["cells"]:
            pieces = names[of["weights"]], names[of["selection"]]
            table.add_row(*_place(cell), *pieces, f"{cell['swap']['n']}", _percent(of, "exact"), _nats(of))
    return table


def _effects(names: Mapping[str, str], cells: Sequence[Found]) -> Table:
    title = f"What {names['own']} has over {names['against']}, by what it keeps and by how it uses it (paired)"
    table = _table(title, ("task", "", "difference"), _SCORES)
    for cell in cells:
        for effect, of in cell["swap"]["effects"].items():
            said = (
                effect.replace("_", " ").replace("against", f"{names['against']}'s").replace("own", f"{names['own']}'s")
            )
            table.add_row(*_place(cell), said, f"{cell['swap']['n']}", _percent(of, "exact", "+"), _nats(of, "+"))
    return table


_SCORES = ("n", "exact match, %", "NLL, nats")


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _place(cell: Found) -> tuple[str, str]:
    return cell["task"], _factor(cell)


def _factor(cell: Found) -> str:
    return f"{cell['compression']:g}x"


def _percent(of: Found, name: str, sign: str = "") -> str:
    mean, low, high = (f"{100 * of[key]:{sign}.1f}" for key in (name, f"{name}_low", f"{name}_high"))
    return f"{mean} [{low}, {high}]"


def _nats(of: Found, sign: str = "") -> str:
    mean, low, high = (f"{of[key]:{sign}.3f}" for key in ("nll", "nll_low", "nll_high"))
    return f"{mean} [{low}, {high}]"
