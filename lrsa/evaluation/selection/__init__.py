"""What the selection does: `analysis` reads and compares, `recording` notes what layers keep, `statistics` counts."""

from lrsa.evaluation.selection.analysis import analyse

__all__ = ["analyse"]
