"""A grid of overrides -> the jobs that can run, and why the others cannot, before anything runs."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lrsa.config import EvalConf, TrainConf
from lrsa.results.record import write_atomically
from lrsa.sweep.job import job_id, task_config
from lrsa.validation import ConfigError, ConfigWarning, check_eval, check_train

PLAN_FILE = "sweep.json"
CHECKS: Mapping[type, Callable[[Any], None]] = {TrainConf: check_train, EvalConf: check_eval}


@dataclass(frozen=True)
class Job:
    """A combination that can run. overrides: all of them; swept: those in which the grid's jobs differ."""

    id: str
    folder: Path
    overrides: list[str]
    swept: str
    conf: TrainConf | EvalConf


@dataclass(frozen=True)
class Pruned:
    """A combination that the config's own checks refuse."""

    overrides: list[str]
    swept: str
    problems: list[str]


@dataclass
class Plan:
    """What a grid comes to. warnings: what runs but looks wrong, with the number of jobs."""

    jobs: list[Job] = field(default_factory=list)
    pruned: list[Pruned] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # combinations that come to the config of an earlier one
    warnings: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """`sweep.json`: which jobs are meant to be here, for whoever reads the results; earlier grids' too."""
        folder.mkdir(parents=True, exist_ok=True)
        jobs = {job["id"]: job for job in planned_before(folder)}
        for job in self.jobs:
            jobs[job.id] = {"id": job.id, "folder": job.folder.name, "swept": job.swept, "overrides": job.overrides}
        value = {"jobs": list(jobs.values()), "pruned": [asdict(one) for one in self.pruned]}
        write_atomically(folder / PLAN_FILE, f"{json.dumps(value, indent=1, ensure_ascii=False)}\n".encode())


def planned_before(folder: Path) -> list[dict[str, Any]]:
    """The jobs that `sweep.json` in `folder` lists; none without one."""
    file = folder / PLAN_FILE
    return json.loads(file.read_text(encoding="utf-8"))["jobs"] if file.is_file() else []


def expand(overrides: Sequence[Override]) -> list[list[str]]:
    """The product of the overrides' values; of a key that comes twice, the last.

    Raises:
        ConfigError: an interval, from which only a sweeper that optimises can choose.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.input_line}: a grid takes lists and ranges; hydra/sweeper=optuna_tpe takes intervals"
            )
        several = (
            override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        )
        values[key] = [f"{key}={value}" for value in several]
    return [list(combination) for combination in itertools.product(*values.values())]


def plan_jobs(
    compose: Callable[[list[str]], DictConfig], grid: Sequence[Sequence[str]], elsewhere: bool = False
) -> Plan:
    """Compose and check every combination of `grid`, in its order.

    Args:
        compose: overrides of a job -> its whole config, the `hydra` node too.
        elsewhere: the jobs run on other machines, so that the GPUs of this one say nothing.

    Raises:
        ConfigError: a value with which no combination can run, be it the fault of what all jobs share; says why.
        HydraException: a combination does not compose, for an unknown key or a wrong type; says which one.
    """
    plan, possible = Plan(), set[str]()
    for overrides, swept in zip(grid, swept_overrides(grid), strict=True):
        config = compose(list(overrides))
        conf = _structured(config, Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir)
        problems, warned = _checked(conf, elsewhere)
        for text in sorted(warned):
            plan.warnings[text] = plan.warnings.get(text, 0) + 1
        if problems:
            plan.pruned.append(Pruned(list(overrides), swept, problems))
            continue
        possible.update(overrides)
        job = Job(job_id(_root_=config), Path(conf.run.output_dir), list(overrides), swept, conf)
        if job.id in {other.id for other in plan.jobs}:
            plan.repeated.append(swept)
        else:
            plan.jobs.append(job)
    impossible = [item for item in dict.fromkeys(itertools.chain(*grid)) if item not in possible]
    if impossible or not plan.jobs:
        raise ConfigError("\n".join(_refusal(plan, impossible)))
    return plan


def swept_overrides(grid: Sequence[Sequence[str]]) -> list[str]:
    """Of each combination, the overrides in which it differs from others; all of them where there is but one."""
    shared = set.intersection(*map(set, grid)) if len(grid) > 1 else set()
    return [" ".join(item for item in overrides if item not in shared) for overrides in grid]


def check_continued(plan: Plan, folder: Path) -> None:
    """Refuse to go on with a sweep of which none of these jobs is.

    Raises:
        ConfigError: `folder` holds no sweep, or one of other jobs.
    """
    before = {job["id"] for job in planned_before(folder)}
    if not before:
        raise ConfigError(
            f"resume={folder}: with -m, the folder of a sweep that was started before: no {PLAN_FILE} there"
        )
    if not before & {job.id for job in plan.jobs}:
        raise ConfigError(
            f"resume={folder}: none of the {len(plan.jobs)} jobs is among the {len(before)} of that sweep; repeat its "
            f"command with resume= alone added ({folder / PLAN_FILE} lists its jobs)"
        )


def _structured(config: DictConfig, folder: Path) -> TrainConf | EvalConf:
    conf = OmegaConf.to_object(task_config(config, str(folder)))
    assert isinstance(conf, TrainConf | EvalConf)
    return replace(conf, resume=None)


def _checked(conf: TrainConf | EvalConf, elsewhere: bool) -> tuple[list[str], set[str]]:
    """Problems and warnings."""
    if elsewhere and conf.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        conf = replace(conf, trainer=replace(conf.trainer, accelerator="auto"))
    problems: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigWarning)
        try:
            CHECKS[type(conf)](conf)
        except ConfigError as error:
            problems = [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
    return problems, {str(one.message) for one in caught if issubclass(one.category, ConfigWarning)}


def _refusal(plan: Plan, impossible: Sequence[str]) -> Iterator[str]:
    if plan.jobs:
        yield "no combination of the grid can run with these values; leave them out, or change what rules them out:"
        for item in impossible:
            problems = (one.problems for one in plan.pruned if item in one.overrides)
            yield f"  - {item}: {'; '.join(dict.fromkeys(itertools.chain(*problems)))}"
        return
    yield f"none of the {len(plan.pruned)} combination(s) can run:"
    for problem in dict.fromkeys(itertools.chain(*(one.problems for one in plan.pruned))):
        count = sum(problem in one.problems for one in plan.pruned)
        yield f"  - {problem}" + (f" ({count} of them)" if count < len(plan.pruned) else "")
