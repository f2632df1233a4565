"""Evaluation: parallel scoring of references under any compression, and the grid of tasks and compressions."""

from lrsa.evaluation.grid import Task, evaluate, load_tasks
from lrsa.evaluation.scoring import Outcome, score

__all__ = ["Outcome", "Task", "evaluate", "load_tasks", "score"]
