"""A result table as text: GitHub Markdown, LaTeX (booktabs), CSV, and for the terminal. Same table, same bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrsa.results.record import write_atomically
from lrsa.results.statistics import Interval
from lrsa.results.tables import Cell, ResultTable, Row

MIXED = "see cells"


def to_markdown(table: ResultTable) -> str:
    """Title, values, differences, notes."""
    lines = [
        f"<!-- Generated, do not edit. Rebuild: {table.rebuild.replace('-->', '')} -->",
        "",
        f"### {table.title}",
        "",
    ]
    lines += _markdown_rows(table, table.rows)
    if table.differences:
        lines += ["", f"**{_capital(table.difference_title)}**, paired by example:", ""]
        lines += _markdown_rows(table, table.differences)
    lines += [""] + [f"- {note}" for note in table.notes]
    return "\n".join(lines) + "\n"


def _markdown_rows(table: ResultTable, rows: Sequence[Row]) -> list[str]:
    header = ["task", table.rows_title, "n", *(column.header for column in table.columns)]
    lines = [_markdown_line(header), "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for row in rows:
        head = [table.name(row.task), table.row_name(row), row.size or MIXED]
        lines.append(_markdown_line(head + [_markdown_cell(table, row, cell) for cell in row.cells]))
    return lines


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _markdown_cell(table: ResultTable, row: Row, cell: Cell) -> str:
    size = "" if row.size or cell.weight is None else f" n={cell.weight.size}"
    if cell.interval is None:
        return cell.absent + size
    mean, low, high = _numbers(table, cell.interval)
    return f"{f'**{mean}**' if cell.best else mean} [{low}, {high}]{size}"


def _numbers(table: ResultTable, interval: Interval) -> tuple[str, str, str]:
    """Mean, low and high as printed. Who prints them prints n beside them: in the row, or in the cell where a row's
    differ.
    """
    scale, digits = table.metric.scale, table.metric.digits
    return (
        interval.number(interval.mean, scale, digits),
        interval.number(interval.low, scale, digits),
        interval.number(interval.high, scale, digits),
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def to_latex(table: ResultTable) -> str:
    r"""A `table*` with booktabs rules, for `\input`; needs `\usepackage{booktabs}` only."""
    width = len(table.columns)
    lines = [
        f"% Generated, do not edit. Rebuild: {' '.join(table.rebuild.split())}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{_tex(table.title)}. {' '.join(_tex(note) for note in table.notes)}}}",
        r"\small",
        rf"\begin{{tabular}}{{ll{'r' * (width + 1)}}}",
        r"\toprule",
        _latex_line(
            [
                "Task",
                _tex(_capital(table.rows_title)),
                "$n$",
                *(_latex_header(column.header) for column in table.columns),
            ]
        ),
        r"\midrule",
        *_latex_rows(table, table.rows),
    ]
    if table.differences:
        title = _tex(f"{_capital(table.difference_title)}, paired by example")
        lines += [
            r"\midrule",
            rf"\multicolumn{{{width + 3}}}{{l}}{{\emph{{{title}}}}} \\",
            r"\midrule",
            *_latex_rows(table, table.differences),
        ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"


def _latex_rows(table: ResultTable, rows: Sequence[Row]) -> list[str]:
    lines, before = [], None
    for row in rows:
        if before is not None and row.task != before:
            lines.append(r"\addlinespace")
        head = [
            _tex(table.name(row.task)) if row.task != before else "",
            _tex(table.row_name(row)),
            _latex_size(row.size or MIXED),
        ]
        lines.append(_latex_line(head + [_latex_cell(table, row, cell) for cell in row.cells]))
        before = row.task
    return lines


def _latex_cell(table: ResultTable, row: Row, cell: Cell) -> str:
    interval = cell.interval
    size = "" if row.size or cell.weight is None else rf"\,{{\scriptsize($n$={_latex_size(cell.weight.size)})}}"
    if interval is None:
        return rf"\emph{{{cell.absent}}}{size}"
    scale, digits = table.metric.scale, table.metric.digits
    mean = interval.number(interval.mean, scale, digits)
    # bounds as printed must add up to the bounds themselves, so each is rounded before it is subtracted
    ends = [round(value * scale, digits) for value in (interval.low, interval.mean, interval.high)]
    down, up = abs(round(ends[1] - ends[0], digits)), abs(round(ends[2] - ends[1], digits))
    if cell.best:
        mean = rf"\mathbf{{{mean}}}"
    return f"${mean}_{{-{down:.{digits}f}}}^{{+{up:.{digits}f}}}${size}"


def _latex_size(size: str) -> str:
    return size.replace(" × ", r"$\times$")


def _latex_header(header: str) -> str:
    label, _, measured = header.partition(" ")
    return rf"\shortstack{{{_tex(label)} \\ \scriptsize {_tex(measured)}}}" if measured else _tex(label)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    mark: "\\" + mark for mark in "&%$#_{}"
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(mark, mark) for mark in text).replace("×", r"$\times$").replace("−", "$-$")


def to_csv(table: ResultTable) -> str:
    """A line a cell, in the metric's own unit (exact match: a fraction); read with `pandas.read_csv(path,
    comment="#")`.
    """
    out = io.StringIO()
    out.write(f"# Generated, do not edit. Rebuild: {' '.join(table.rebuild.split())}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "kind",
            "metric",
            "task",
            "arm",
            "reference",
            "column",
            "measured_ratio",
            "mean",
            "low",
            "high",
            "n",
            "seeds",
            "method",
            "best",
        ]
    )
    for kind, rows in (("value", table.rows), ("difference", table.differences)):
        for row in rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                head = [
                    kind,
                    table.metric.name,
                    row.task,
                    row.arm,
                    row.reference or "",
                    column.label,
                    _short(cell.measured_ratio),
                ]
                writer.writerow(head + _csv_interval(cell) + [int(cell.best) if kind == "value" else ""])
    return out.getvalue()


def _csv_interval(cell: Cell) -> list[str]:
    interval = cell.interval
    if interval is None:
        size = [] if cell.unclear is None else [str(cell.unclear.n), str(cell.unclear.seeds)]
        return [cell.absent, "", "", *(size or ["", ""]), ""]
    return [
        *(_short(value) for value in (interval.mean, interval.low, interval.high)),
        str(interval.n),
        str(interval.seeds),
        interval.method,
    ]


def _short(value: float | None) -> str:
    # six digits: rounding hides differences in the last bit between machines
    return "" if value is None else f"{value:.6g}"


def to_console(table: ResultTable) -> RenderableType:
    """Values and differences task by task, for `rich.print`; 80 columns hold six inference settings."""
    parts: list[RenderableType] = [Text(table.title, style="bold")]
    for rows, caption in ((table.rows, table.metric.title), (table.differences, table.difference_title)):
        for task in dict.fromkeys(row.task for row in rows):
            parts += [Text(""), Text(f"{table.name(task)}: {caption}", style="bold cyan")]
            parts.append(_console_task(table, [row for row in rows if row.task == task], values=rows is table.rows))
    return Group(*parts, Text(""), *(Text(note, style="dim") for note in table.notes))


def _console_task(table: ResultTable, rows: Sequence[Row], values: bool) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=0)
    shown.add_column("", overflow="fold")
    for column in table.columns:
        shown.add_column(column.header.replace(" (", "\n("), justify="right", overflow="fold")  # never cut a number
    for row in rows:
        size = f"\nn={row.size}" if row.size else ""
        cells = [_console_cell(table, row, cell, values) for cell in row.cells]
        shown.add_row(Text.assemble(table.row_name(row), (size, "dim")), *cells)
    return shown


def _console_cell(table: ResultTable, row: Row, cell: Cell, values: bool) -> Text:
    interval = cell.interval
    size = "" if row.size or cell.weight is None else f"\nn={cell.weight.size}"
    if interval is None:
        return Text(cell.absent + size, style="yellow")
    mean, low, high = _numbers(table, interval)
    low, high = low.lstrip("+"), high.lstrip("+")  # six settings fit 80 columns, to the character
    clear = cell.best if values else interval.excludes_zero
    return Text.assemble((mean, "bold green" if clear else ""), (f"\n{low}..{high}{size}", "dim"))


FORMATS: dict[str, tuple[str, Callable[[ResultTable], str]]] = {
    "markdown": ("md", to_markdown),
    "latex": ("tex", to_latex),
    "csv": ("csv", to_csv),
}


def write_table(
    table: ResultTable, folder: str | Path, formats: Sequence[str] = tuple(FORMATS), stem: str = "table"
) -> list[Path]:
    """Write `<folder>/<stem>.<md|tex|csv>`; returns the paths. Raises ValueError for an unknown format, listing the
    valid ones.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown table format {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in formats:
        suffix, render = FORMATS[name]
        path = folder / f"{stem}.{suffix}"
        write_atomically(path, render(table).encode("utf-8"))
        paths.append(path)
    return paths
