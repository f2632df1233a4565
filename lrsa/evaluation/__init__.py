"""Evaluation: parallel scoring of references under any compression, and the grid of tasks and compressions."""

from lrsa.evaluation.grid import evaluate
from lrsa.evaluation.scoring import Outcome, score

__all__ = ["Outcome", "evaluate", "score"]
