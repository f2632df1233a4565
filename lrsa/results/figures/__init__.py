"""Figures for print: PDF with embedded fonts, and PNG; one look, told apart with any colour vision.

`make_figures` draws what a table and its records have the data for, `FIGURES` names them all:

- accuracy: a score by measured compression; pareto: the same by kept bytes, the frontier marked
- retention: what is left of the full cache's gain over the floor, with intervals; retained: the same, of the
  reference's, by share of bytes kept
- heat: a score by two settings, such as lag x compression; needle: by depth and length of the context
- position: likelihood of prose by position; loss, throughput: of runs

`kept_figure`, `kept_text_figure` and `kept_html` show which tokens of a prompt a model keeps, `selection_figure` what
becomes of the answers' tokens, layer by layer, `layers_figure` which layers need the full cache.
"""

from lrsa.results.figures.curves import loss_figure, throughput_figure
from lrsa.results.figures.heat import heat_figure, needle_figure
from lrsa.results.figures.kept import kept_figure, kept_html, kept_share, kept_text_figure
from lrsa.results.figures.layers import layers_figure
from lrsa.results.figures.lines import accuracy_figure, pareto_figure, position_figure, retention_figure
from lrsa.results.figures.registry import FIGURES, make_figures
from lrsa.results.figures.retained import retained_figure
from lrsa.results.figures.selection import selection_figure
from lrsa.results.figures.style import COLOURS, MARKERS, save_figure
from lrsa.results.grids import NothingToShow

__all__ = [
    "COLOURS",
    "FIGURES",
    "MARKERS",
    "NothingToShow",
    "accuracy_figure",
    "heat_figure",
    "kept_figure",
    "kept_html",
    "kept_share",
    "kept_text_figure",
    "layers_figure",
    "loss_figure",
    "make_figures",
    "needle_figure",
    "pareto_figure",
    "position_figure",
    "retained_figure",
    "retention_figure",
    "save_figure",
    "selection_figure",
    "throughput_figure",
]
