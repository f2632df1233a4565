"""What `lrsa-eval mode=layers` found: the file beside its record, its numbers by name, and a table of it.

The file is what `lrsa.evaluation.layers.rank_layers` returns: `start`, `order`, `full` and `rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lrsa.results.found import read_found, write_found

FILE = "layers.json"
Found = Mapping[str, Any]


def write_layers(folder: str | Path, found: Found) -> None:
    """Write `layers.json` into a run folder, after each round: a run that is killed keeps what it found."""
    write_found(Path(folder) / FILE, found)


def read_layers(folder: str | Path) -> dict[str, Any]:
    """The same from a run folder.

    Raises:
        RecordError: there is none, or it is damaged.
    """
    return read_found(Path(folder) / FILE, "layers")


def as_override(found: Found) -> str:
    """The order as lrsa-train's recipe=lrsa takes it."""
    return f"model.retrieval_layers=[{','.join(map(str, found['order']))}]"


def layers_metrics(found: Found) -> dict[str, float]:
    """For a record: `layers/nll/3` (nats an answer token) and `layers/exact/3` (a fraction) with three layers added,
    `.../0` with none, `.../all` with every layer dense; `layers/layer/3`, the third that was added.
    """
    columns = {**{str(number): of for number, of in enumerate(found["rounds"])}, "all": found["full"]}
    scores = {f"layers/{name}/{column}": of[name] for name in ("nll", "exact") for column, of in columns.items()}
    return scores | {
        f"layers/layer/{column}": of["layer"] for column, of in columns.items() if of.get("layer") is not None
    }


def layers_table(found: Found) -> Table:
    """For the terminal: a row a round, its runner-up beside it, between none added and every layer dense."""
    start = f" (dense from the start: {', '.join(map(str, found['start']))})" if found["start"] else ""
    title = f"Layers that need the full cache, in order{start}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("added", "layer", "NLL, nats", "exact match, %", "runner-up", "its NLL"):
        table.add_column(name, justify="right")
    for number, of in enumerate(found["rounds"]):
        layer = "none" if of["layer"] is None else str(of["layer"])
        others = sorted(
            (other for other in of["candidates"] if other["layer"] != of["layer"]), key=lambda other: other["nll"]
        )
        beside = [str(others[0]["layer"]), f"{others[0]['nll']:.4f}"] if others else ["", ""]
        table.add_row(str(number), layer, f"{of['nll']:.4f}", f"{100 * of['exact']:.1f}", *beside)
    full = found["full"]
    table.add_row("", "every", f"{full['nll']:.4f}", f"{100 * full['exact']:.1f}", "", "")
    return table
