"""A table of prose by position, as its figure reads it."""

from __future__ import annotations

import pandas as pd

from lrsa.results.join import FULL
from lrsa.results.tables import ResultTable


def position_frame(table: ResultTable) -> pd.DataFrame:
    """The table's stretches of prose as `figures.position_figure` reads them, without the row of the whole window: the
    differences to the full cache in a table of `reference=full`, else the values. Empty where no prose was read.
    """
    rows = [row for row in (table.differences if table.reference == FULL.label else table.rows) if row.positions]
    widths = [row.positions[1] - row.positions[0] for row in rows if row.positions]
    return pd.DataFrame(
        [
            {
                "arm": table.name(row.arm),
                "column": column.label,
                "middle": sum(row.positions) / 2,
                "nll": cell.interval.mean,
                "low": cell.interval.low,
                "high": cell.interval.high,
                "n": cell.interval.size,
                "difference": cell.interval.difference,
            }
            for row, width in zip(rows, widths, strict=True)
            for column, cell in zip(table.columns, row.cells, strict=True)
            if cell.interval is not None and row.positions and (width < 2 * min(widths) or len(set(widths)) == 1)
        ]
    )
