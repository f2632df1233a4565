"""Records of runs, and what is made of them: intervals, tables, figures. Imports nothing that trains or evaluates."""

from lrsa.results.record import Record, RecordError, downsample
from lrsa.results.statistics import Interval, bootstrap_mean, mean_over_seeds, paired_difference
from lrsa.results.store import cells_frame, load_records, outcomes_frame
from lrsa.results.tables import ResultTable, build_table, plot_frame, rows_for_logging

__all__ = [
    "Interval",
    "Record",
    "RecordError",
    "ResultTable",
    "bootstrap_mean",
    "build_table",
    "cells_frame",
    "downsample",
    "load_records",
    "mean_over_seeds",
    "outcomes_frame",
    "paired_difference",
    "plot_frame",
    "rows_for_logging",
]
