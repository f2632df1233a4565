"""Evaluation under any compression: parallel scoring of references, generated answers, and the grid of tasks.

`lrsa.evaluation.lm_eval_model` is apart: it imports lm-eval, which takes seconds.
"""

from lrsa.evaluation.generate import Answer, Answers, generate_answers
from lrsa.evaluation.grid import Task, evaluate, identity, load_tasks
from lrsa.evaluation.journal import Journal
from lrsa.evaluation.scoring import Outcome, score

__all__ = [
    "Answer",
    "Answers",
    "Journal",
    "Outcome",
    "Task",
    "evaluate",
    "generate_answers",
    "identity",
    "load_tasks",
    "score",
]
