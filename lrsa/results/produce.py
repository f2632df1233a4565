"""What `lrsa-table` makes: records read, a table built, files and figures written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrsa.config import TableConf
from lrsa.results.formats import write_table
from lrsa.results.perplexity import NAME as PERPLEXITY
from lrsa.results.perplexity import build_perplexity
from lrsa.results.pivot import COLUMNS, Pivot
from lrsa.results.record import Record
from lrsa.results.retention import build_retention
from lrsa.results.tables import EACH, METRICS, SHARED, ResultTable, build_table
from lrsa.results.where import Where


def make_table(conf: TableConf, records: Sequence[Record], rebuild: str = "lrsa-table") -> ResultTable:
    """The table that `conf` asks for. `rebuild`: the command that its files name.

    Raises RecordError and ValueError as `build_table`, `build_retention` and `build_perplexity` do.
    """
    if not isinstance(conf.names or {}, dict):
        raise ValueError(f"names={conf.names!r} is not a mapping; write names={{dense: Dense, lrsa: LRSA}}")
    if not isinstance(conf.reference, str | dict | None):
        raise ValueError(f"reference={conf.reference!r}: name an arm, or write {{arm: its reference, ...}}")
    if conf.metric not in (*METRICS, PERPLEXITY):
        raise ValueError(f"unknown metric '{conf.metric}'; choose from {', '.join((*METRICS, PERPLEXITY))}")
    wanted: dict[str, Any] = {
        "title": conf.title,
        "arms": conf.arms,
        "tasks": conf.tasks,
        "compressions": conf.compressions,
        "reference": conf.reference,
        "names": {str(key): str(name) for key, name in (conf.names or {}).items()},
        "n_resamples": conf.bootstrap,
        "rebuild": rebuild,
        "seeds": expected_seeds(conf.seeds),
        "where": Where.parse(conf.where),
        "pivot": Pivot(tuple(conf.rows), tuple(conf.columns), conf.rows_title),
        "draws": conf.draws or (EACH if conf.store is None else SHARED),
    }
    if conf.retention is not None:
        return build_retention(records, of=conf.retention, metric=conf.metric, **wanted)
    if conf.metric == PERPLEXITY:
        return build_perplexity(records, **wanted)
    return build_table(records, metric=conf.metric, **wanted)


def expected_seeds(seeds: Any) -> Mapping[str, Sequence[int]] | Sequence[int]:
    """`seeds` of a config: none, a list for all arms, or a list an arm. Raises ValueError for anything else."""
    lists = list(seeds.values()) if isinstance(seeds, dict) else [seeds or []]
    if any(not isinstance(one, list) or not all(type(seed) is int for seed in one) for one in lists):
        raise ValueError(f"seeds={seeds!r}: write [0, 1, 2] for all arms, or {{dense: [0, 1, 2], none: [0]}}")
    return {str(arm): list(one) for arm, one in seeds.items()} if isinstance(seeds, dict) else list(seeds or [])


def write_all(conf: TableConf, table: ResultTable, records: Sequence[Record], folder: Path) -> list[Path]:
    """The table in its formats, and the figures; returns the paths written."""
    stem = f"retention_{conf.retention}" if conf.retention is not None and conf.stem == "table" else conf.stem
    written = write_table(table, folder, conf.formats, stem=stem)
    if conf.figure and conf.retention is None and tuple(conf.columns) == COLUMNS:
        written += _write_figures(conf, table, records, folder, "" if conf.stem == "table" else f"{conf.stem}_")
    return written


def _write_figures(
    conf: TableConf, table: ResultTable, records: Sequence[Record], folder: Path, prefix: str
) -> list[Path]:
    # matplotlib takes a second to import, and not every table has a figure
    from lrsa.results.figures import make_figures, save_figure

    made = make_figures(Where.parse(conf.where).of(records), table, conf.figures)
    return [path for name, figure in made.items() for path in save_figure(figure, folder, f"{prefix}{name}")]
