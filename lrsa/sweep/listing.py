"""A plan on the terminal: which jobs there are, how far they came, what they will take."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrsa.results import Record
from lrsa.sweep.job import State, state_of
from lrsa.sweep.plan import Job, Plan
from lrsa.sweep.predict import Measured, Prediction


def show_left_out(plan: Plan, console: Console) -> None:
    """What of the grid does not become a job, and why; and what runs but looks wrong."""
    reasons: dict[str, list[str]] = {}
    for one in plan.pruned:
        reasons.setdefault("; ".join(one.problems), []).append(one.swept)
    for reason, combinations in reasons.items():
        console.print(f"pruned {len(combinations)}: {reason}", highlight=False, markup=False)
        for combination in combinations:
            console.print(f"    {combination}", highlight=False, markup=False)
    for swept in plan.repeated:
        console.print(f"the same job as one before it: {swept}", highlight=False, markup=False)
    for text, count in plan.warnings.items():
        console.print(f"warning, of {count} job(s): {text}", highlight=False, markup=False)


def show_jobs(plan: Plan, measured: Measured, console: Console) -> None:
    """The dry run: every job with its state, and its time and memory as predicted from which record."""
    table = Table("", "job", "state", "time", "memory", "source", box=box.SIMPLE_HEAD)
    sources: dict[str, str] = {}
    left, unknown, states = 0.0, 0, Counter[State]()
    for number, job in enumerate(plan.jobs, 1):
        state, predicted = state_of(job.folder), measured.predict(job.conf)
        states[state] += 1
        if state != State.FINISHED:
            left += predicted.seconds or 0.0
            unknown += predicted.seconds is None
        mark = sources.setdefault(_source(predicted), f"[{len(sources) + 1}]") if predicted.source else ""
        table.add_row(str(number), Text(job.swept), state, _time(predicted.seconds), _memory(predicted.bytes), mark)
    console.print(table)
    for source, mark in sources.items():
        console.print(f"{mark} {source}", highlight=False, markup=False, soft_wrap=True)
    if unknown:
        console.print(f"unknown: no finished run like it, on such a machine, in {', '.join(measured.folders)}")
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    total = f"about {_time(left)} one after another" if unknown < len(plan.jobs) - states[State.FINISHED] else "unknown"
    more = f" and {unknown} of unknown time" if unknown and left else ""
    console.print(f"{len(plan.jobs)} jobs: {counted}. To do: {total}{more}.", highlight=False)


def show_outcome(plan: Plan, console: Console) -> list[str]:
    """How the jobs stand after a sweep; returns a line for each that is neither finished nor in other hands."""
    states = {job.id: state_of(job.folder) for job in plan.jobs}
    counted = Counter(states.values())
    console.print(
        f"{len(plan.jobs)} jobs: {', '.join(f'{count} {state}' for state, count in counted.items())}", highlight=False
    )
    return [
        f"{states[job.id]}: {job.swept}: {_why(job, states[job.id])}"
        for job in plan.jobs
        if states[job.id] not in (State.FINISHED, State.RUNNING)
    ]


def _why(job: Job, state: State) -> str:
    if state != State.FAILED:
        return shown(job.folder)
    record = Record.load(job.folder)
    error = record.error or {}
    message = str(error.get("message")).partition("\n")[0]
    return f"{error.get('type')}: {message} (traceback in {shown(record.path)})"


def shown(path: Path) -> str:
    """Relative to where the user is, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _source(predicted: Prediction) -> str:
    assert predicted.source is not None
    differs = f", with another {', '.join(predicted.differs)}" if predicted.differs else ""
    return f"{shown(predicted.source)} on {predicted.device}{differs}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(amount: int | None) -> str:
    return "unknown" if amount is None else f"{amount / 2**30:.1f} GiB"
