"""How long a job takes and how much memory, from what a run like it was measured to take; unknown without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lrsa.config import EvalConf, ExamplesConf, TrainConf
from lrsa.results import Record
from lrsa.results.environment import hardware, portable
from lrsa.results.record import RECORD_FILE
from lrsa.results.store import Setting, load_records
from lrsa.sweep.job import COMMANDS

# A measured run says something of a job only if they agree in these ...
SAME = (
    "mode",
    "model",
    "data.length",
    "recipe.train",
    "recipe.batch_size",
    "recipe.micro_batch_size",
    "trainer.precision",
    "evaluation.length",
    "evaluation.precision",
    "evaluation.batch_size",
    "generate",
    "lm_eval",
    "perplexity",
    "run.threads",
)
TRAINS_LIKE = ("trainer.compile",)  # of runs that train: evaluations are never compiled
# ... and of those that do, the one that differs least in these. Whatever neither names is scaled, or costs nothing.
NEAR = ("attention", "evaluation.attention", "recipe.compressions", "data.parts", "evaluation.tasks")
# What acts through another setting alone, here dense_layers, or is only checked.
ACTS_ELSEWHERE = ("model.retrieval_layers", "model.ranked_on")


@dataclass(frozen=True)
class Prediction:
    """seconds, bytes: None where no record says it. source: the folder of the one that does; device: what it ran on;
    differs: in which settings it is another job.
    """

    seconds: float | None = None
    bytes: int | None = None
    source: Path | None = None
    device: str = ""
    differs: tuple[str, ...] = ()


class Measured:
    """Finished runs to predict from: the records below `folders`, of which some may not exist or hold any.

    Raises:
        RecordError: a damaged record, naming file and field.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.folders = list(map(str, folders))
        self.machine = hardware()
        self.records: list[Record] = []
        for folder in map(Path, self.folders):
            if next(folder.rglob(RECORD_FILE), None) is None:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # says which are unfinished
                records = load_records(folder, unfinished=True)
            # An attempt that went on from another one did not do all the work that its clocks are about.
            self.records += [record for record in records if record.status == "finished" and record.attempt == 1]

    def predict(self, conf: TrainConf | EvalConf) -> Prediction:
        """Time scaled to the job's steps and examples; memory as measured, which runs do that train."""
        values = OmegaConf.to_container(OmegaConf.structured(conf))
        config = portable(values, Path(conf.run.output_dir))
        trains = isinstance(conf, TrainConf) and conf.recipe.train
        same = (*SAME, *TRAINS_LIKE) if trains else SAME
        alike = [
            record
            for record in self.records
            if record.command == COMMANDS[type(conf)]
            and self._same_device(record, conf.trainer.accelerator)
            and not list(_differences(record.config, config, same))
        ]
        if not alike:
            return Prediction()
        differs, record = min(
            ((tuple(_differences(record.config, config, NEAR)), record) for record in alike),
            key=lambda pair: len(pair[0]),
        )
        memory = (record.training or {}).get("peak_memory_bytes")
        return Prediction(_seconds(record, conf), memory, record.folder, record.hardware["device"], differs)

    def _same_device(self, record: Record, accelerator: str) -> bool:
        """A job for a GPU that is planned where there is none may take its time from any."""
        there, here = record.hardware, self.machine
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and here["device"] == "cpu")
        if on_cpu != (there["device"] == "cpu" or record.config["trainer"]["accelerator"] == "cpu"):
            return False
        if on_cpu:
            return bool(there["cpu"] == here["cpu"] and there["cpu_cores"] == here["cpu_cores"])
        return here["device"] in ("cpu", there["device"])


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    elif value is not None and value is not False:  # which may be a setting that an older record does not know
        yield name, value


def _of(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], groups: Sequence[str]) -> Iterator[str]:
    for group in groups:
        old, new = (dict(_leaves(_of(config, group), group)) for config in (before, now))
        names = [name for name in dict.fromkeys([*old, *new]) if not _acts_elsewhere(name)]
        yield from (name for name in names if old.get(name) != new.get(name))


def _acts_elsewhere(name: str) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in ACTS_ELSEWHERE)


def _seconds(record: Record, conf: TrainConf | EvalConf) -> float | None:
    """Of the training by step, of each cell by example, and what the run took besides."""
    training = record.training or {}
    if record.wall_s is None:
        return None
    if isinstance(conf, EvalConf) and conf.mode in ("lm_eval", "perplexity"):  # all that decides it is in SAME
        compressions = _of(record.config, "evaluation.compressions")
        return record.wall_s if compressions == conf.evaluation.compressions else None
    total = record.wall_s - training.get("seconds", 0.0) - sum(cell["seconds"] for cell in record.cells)
    if isinstance(conf, TrainConf) and conf.recipe.train:
        total += training["seconds"] / training["steps"] * conf.recipe.steps
    for name, task in conf.evaluation.tasks.items():
        cells = {Setting.of(cell): cell for cell in record.cells if cell["task"] == name}
        examples = _examples(task, _of(record.config, f"evaluation.tasks.{name}"), cells)
        if examples is None:
            return None
        rates = {setting: cell["seconds"] / cell["n"] for setting, cell in cells.items()}
        # for a compression that was not measured, the slowest that was
        total += sum(rates.get(setting, max(rates.values())) * examples for setting in _settings(conf))
    return total


def _examples(task: ExamplesConf, measured: Any, cells: Mapping[Setting, Mapping[str, Any]]) -> int | None:
    """Of the job's task; all of a data set are as many as they were."""
    if not cells or measured is None:
        return None
    same = measured["limit"] == task.limit
    return int(next(iter(cells.values()))["n"]) if same else task.limit


def _settings(conf: TrainConf | EvalConf) -> Iterator[Setting]:
    if conf.evaluation.floor:
        yield Setting(None, "none")
    if conf.evaluation.ceiling:
        yield Setting(1, "gold")
    yield from map(Setting, conf.evaluation.compressions)
