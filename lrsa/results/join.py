"""Records -> what each table cell was measured to be: seeds of an arm together, contradictions refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lrsa.results.keys import look_up
from lrsa.results.pivot import Pivot, Place, unlike
from lrsa.results.pool import Pool
from lrsa.results.record import OUTCOMES_FILE, Examples, Record, RecordError
from lrsa.results.setting import Setting
from lrsa.results.statistics import Interval, Retention, mean_over_seeds, paired_difference, retention
from lrsa.results.where import Where


class TableWarning(UserWarning):
    """Something that a reader of the table must know."""


FLOOR, FULL = Setting(None, "none"), Setting(1)
EVERYWHERE, BY_ARM = Where.parse(""), Pivot()
Key = tuple[str, str, Setting]  # arm (or what a pivot calls its row), task, what it was measured under


@dataclass
class Measured:
    """One table cell's runs: values by seed, the records they came from, and what the cells said."""

    values: dict[int, dict[str, float]] = field(default_factory=dict)
    sources: dict[int, Record] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)
    kept: dict[int, tuple[float, float]] = field(default_factory=dict)  # slots a KV head, bytes of all: after a prompt
    fingerprints: set[str] = field(default_factory=set)
    positions: tuple[int, int] | None = None  # of prose: tokens of a window, half-open
    order: tuple[Any, ...] = ()  # sort key of its row
    setting: Setting = FULL  # what it was measured under, whatever its column is called

    @property
    def runs(self) -> list[dict[str, float]]:
        return [self.values[seed] for seed in sorted(self.values)]

    def of_seeds(self, other: Measured) -> list[dict[str, float]] | None:
        """Its runs of the seeds of `other`; None where it lacks one."""
        return (
            [self.values[seed] for seed in sorted(other.values)] if other.values.keys() <= self.values.keys() else None
        )

    @property
    def mean(self) -> float:
        return sum(sum(run.values()) / len(run) for run in self.runs) / len(self.values)

    @property
    def ratio(self) -> float | None:
        return sum(self.ratios.values()) / len(self.ratios) if self.ratios else None


@dataclass
class Joined:
    """Measured cells, and the statistics over them; a pair of arms is compared once."""

    cells: dict[Key, Measured]
    n_resamples: int
    seed: int
    pool: Pool | None = None  # one resampling for all cells; None: each interval draws anew
    _compared: dict[tuple[Key, Key], Interval | None] = field(default_factory=dict)

    def mean(self, key: Key) -> Interval | None:
        """Mean over seeds and examples; None for a cell that nobody measured."""
        cell = self.cells.get(key)
        if cell is None:
            return None
        return self.pool.mean(cell.runs) if self.pool else mean_over_seeds(cell.runs, self.n_resamples, self.seed)

    def difference(self, key: Key, other: str) -> Interval | None:
        """The cell minus that of arm `other`, paired; None where either is missing. ValueError for other examples."""
        return self._difference(key, (other, *key[1:]), (key[0], other))

    def to_full(self, key: Key) -> Interval | None:
        """The cell minus that of its own arm with the full cache, paired; 0 for that itself."""
        base = (*key[:2], FULL)
        if key != base:
            return self._difference(key, base, (key[2].label, FULL.label))
        mean = self.mean(key)
        return mean and Interval(0.0, 0.0, 0.0, mean.n, mean.seeds, "definition", difference=True)

    def _difference(self, key: Key, base: Key, names: tuple[str, str]) -> Interval | None:
        if (key, base) not in self._compared:
            a, b = self.cells.get(key), self.cells.get(base)
            try:
                compared = a and b and self._paired(a.runs, b.runs, names)
            except ValueError as error:
                raise ValueError(f"{key[1]} at {key[2].label}: {error}") from error
            self._compared[key, base] = compared or None
        return self._compared[key, base]

    def _paired(self, a: list[dict[str, float]], b: list[dict[str, float]], names: tuple[str, str]) -> Interval:
        if self.pool is not None:
            return self.pool.difference(a, b, names)
        return paired_difference(a, b, self.n_resamples, self.seed, names)

    def retention(self, key: Key, other: str, higher_is_better: bool) -> Retention | None:
        """The share of arm `other`'s gain with the full cache over its floor that the cell keeps over its own floor.

        None where a cell is missing, or its floor or full in one of its seeds. ValueError for other examples.
        """
        arm, task, setting = key
        wanted = (key, (arm, task, FLOOR), (other, task, FULL), (other, task, FLOOR))
        if any(one not in self.cells for one in wanted):
            return None
        kept, base, top, ground = (self.cells[one] for one in wanted)
        score, floor = kept.runs, base.of_seeds(kept)
        full, full_floor = (top.of_seeds(kept), None) if arm == other else (top.runs, ground.of_seeds(top))
        if floor is None or full is None or (arm != other and full_floor is None):
            return None
        try:
            found = self._retained(score, floor, full, full_floor, higher_is_better)
        except ValueError as error:
            raise ValueError(f"{task} at {setting.label}: {error}") from error
        if found.share is None or key != wanted[2]:
            return found
        return replace(found, share=replace(found.share, low=1.0, high=1.0, method="definition"))

    def _retained(self, score: Any, floor: Any, full: Any, full_floor: Any, higher_is_better: bool) -> Retention:
        if self.pool is not None:
            return self.pool.retention(score, floor, full, full_floor, higher_is_better)
        options: dict[str, Any] = {"n_resamples": self.n_resamples, "seed": self.seed}
        return retention(score, floor, full, full_floor, higher_is_better=higher_is_better, **options)

    def best(self, arms: Sequence[str], task: str, setting: Setting, higher_is_better: bool) -> str | None:
        """The arm that beats every other measured one, each paired interval clear of 0; of the whole context."""
        present = [arm for arm in arms if (arm, task, setting) in self.cells]
        if setting.context != "full" or len(present) < 2:
            return None
        means = {arm: self.cells[arm, task, setting].mean for arm in present}
        top = (max if higher_is_better else min)(present, key=means.__getitem__)
        for arm in sorted(present, key=lambda arm: abs(means[arm] - means[top])):  # the nearest is likeliest to object
            if arm != top:
                interval = self.difference((top, task, setting), arm)
                if interval is None or not interval.excludes_zero:
                    return None
        return top


def collect_cells(
    records: Sequence[Record],
    metric: str,
    arms: Sequence[str] = (),
    tasks: Sequence[str] = (),
    compressions: Sequence[float] = (),
    where: Where = EVERYWHERE,
    pivot: Pivot = BY_ARM,
) -> dict[Key, Measured]:
    """Cells of the given rows, tasks and compressions (default: all), and `where` holds, that were measured in
    `metric`, from the records' outcomes.

    Raises RecordError where the outcomes contradict the record's cells, an example is there twice, or two different
    experiments give one cell. The same experiment run twice counts once: the later run, with a TableWarning.
    """
    found: dict[Key, Measured] = {}
    compared: dict[tuple[Path, Path], list[str]] = {}
    for record in sorted(records, key=lambda record: (record.finished or "", str(record.folder))):
        wanted: list[tuple[Mapping[str, Any], Place]] = []
        for cell in record.cells:
            if (tasks and cell["task"] not in tasks) or metric not in cell:
                continue
            if compressions and Setting.of(cell) not in map(Setting, compressions):
                continue
            if where.holds(partial(look_up, record, cell)):
                place = pivot.place(record, cell)
                if not arms or place.row in arms:
                    wanted.append((cell, place))
        outcomes = record.examples(list(dict.fromkeys(("exact", metric)))) if wanted else {}
        for chosen, place in wanted:
            task, setting = str(chosen["task"]), Setting.of(chosen)
            examples = outcomes.get((task, setting), Examples([], {}))
            _check_agreement(record, chosen, examples, metric)
            into = found.setdefault((place.row, task, place.setting), Measured(order=place.order, setting=setting))
            _check_claim(into, record, setting, place, task, None if pivot.usual else compared)
            into.sources[record.seed] = record
            into.positions = (chosen["positions"][0], chosen["positions"][1]) if "positions" in chosen else None
            into.values[record.seed] = dict(zip(examples.ids, examples.values[metric], strict=True))
            if chosen.get("measured_ratio") is not None:
                into.ratios[record.seed] = float(chosen["measured_ratio"])
            bytes_held = chosen.get("cache_bytes") or sum(chosen.get("kv_bytes_per_layer") or [])
            if bytes_held:
                into.kept[record.seed] = (float(chosen.get("cache_slots") or chosen["slots"]), float(bytes_held))
            if chosen.get("data_fingerprint"):
                into.fingerprints.add(chosen["data_fingerprint"])
    return found


def _check_agreement(record: Record, cell: Mapping[str, Any], examples: Examples, metric: str) -> None:
    where = f"{record.path}: {cell['task']} at {Setting.of(cell).label}"
    if len(examples.ids) != cell["n"] or not examples.ids:
        raise RecordError(f"{where} says n={cell['n']}, {OUTCOMES_FILE} holds {len(examples.ids)} examples")
    for name in dict.fromkeys(("exact", metric)):
        if name == "nll" or name not in cell:  # stored with six digits, and may be infinite
            continue
        values = examples.values[name]
        mean = math.fsum(values) / len(values)
        if not abs(mean - cell[name]) <= 1e-6:
            said = None if math.isnan(mean) else mean
            raise RecordError(f"{where} says {name}={cell[name]}, the outcomes in {OUTCOMES_FILE} average {said}")


def _check_claim(
    into: Measured,
    record: Record,
    setting: Setting,
    place: Place,
    task: str,
    compared: dict[tuple[Path, Path], list[str]] | None,
) -> None:
    """One cell is of one experiment; of a pivot, whose rows name no arm, its runs differ in their seed alone:
    `compared` remembers which do.
    """
    before = into.sources.get(record.seed)
    if compared is not None:
        other = next(iter(into.sources.values()), record)
        if (pair := (other.path, record.path)) not in compared:
            compared[pair] = unlike(other, record)
        apart = list(compared[pair])
        if setting != into.setting:
            apart.append(f"compression ({into.setting.label} and {setting.label})")
        if apart:
            raise RecordError(
                f"{task}: row '{place.row}', column '{place.setting.label}' holds different experiments, "
                f"{other.path} and {record.path}; they differ in {', '.join(apart[:6])}: add one to rows or columns, "
                "or choose with where"
            )
    if before is None:
        return
    what = f"arm '{place.row}', seed {record.seed}, {task} at {place.setting.label}"
    if before.id != record.id and compared is None:
        raise RecordError(
            f"{before.path} and {record.path} are different experiments, and both give {what}; "
            "give one another run.arm, or leave its folder out"
        )
    warnings.warn(
        f"{what}: measured twice, {record.path} (later) is taken, {before.path} is not", TableWarning, stacklevel=3
    )
