"""One run's record: `<run folder>/record.json`, beside `outcomes.jsonl.gz` with every example's outcome.

Written with status `running` before the work starts, replaced atomically after. A killed process therefore leaves
`running` behind, which nothing takes for a result.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lrsa.results import environment, schema
from lrsa.results.setting import Setting

RECORD_FILE = "record.json"
OUTCOMES_FILE = "outcomes.jsonl.gz"
# where a run is logged, how it is shown, what it saves, where it continues from, and what is only checked do not change
# what it computes
NOT_IN_ID = (
    "run.output_dir",
    "run.threads",
    "logger",
    "trainer.progress",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.save_model",
    "data.cache_dir",
    "data.workers",
    "model.ranked_on",
    "resume",
    "dry_run",
)


class Examples(NamedTuple):
    """Examples of one cell: ids, and their values by metric, NaN for null or for none."""

    ids: list[str]
    values: dict[str, list[float]]


class RecordError(ValueError):
    """A record that cannot be read or written as one; the message names the file and the field."""


@dataclass
class Record:
    """A run as its record says it, fields as in `lrsa.results.schema`. Use as a context manager so that no error goes
    unrecorded:

    >>> with Record.start(folder, command="lrsa-train", study="demo", arm="dense", seed=0, config=resolved) as record:
    ...     record.finish(cells=cells, outcomes=outcomes)
    """

    folder: Path
    id: str
    status: str
    command: str
    study: str
    arm: str
    seed: int
    started: str
    config: dict[str, Any]
    overrides: list[str]
    git: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    data: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None
    cells: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    finished: str | None = None
    wall_s: float | None = None
    attempt: int = 1
    _clock: float = field(default_factory=time.monotonic, repr=False, compare=False)

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        command: str,
        study: str,
        arm: str,
        seed: int,
        config: Mapping[str, Any],
        overrides: Sequence[str] = (),
        data: Iterable[Mapping[str, Any]] = (),
        resume: str | Path | None = None,
    ) -> Record:
        """Write a `running` record into `folder`. `config` is the resolved one as plain containers
        (`OmegaConf.to_container`).

        A folder whose record is `finished` raises RecordError: results are not overwritten. An unfinished or failed one
        is started again, and `attempt` counts it; as it does where the run goes on from another one's folder, `resume`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        attempt = 1
        if (folder / RECORD_FILE).exists():
            before = cls.load(folder)
            if before.status == "finished":
                raise RecordError(
                    f"{folder / RECORD_FILE} is a finished record; choose another run folder or remove it"
                )
            attempt = before.attempt + 1
        if resume is not None and (Path(resume).expanduser() / RECORD_FILE).exists():
            attempt = max(attempt, cls.load(Path(resume).expanduser()).attempt + 1)
        plain = _plain(environment.portable(dict(config), folder))
        record = cls(
            folder=folder,
            id=config_id(command, plain),
            status="running",
            command=command,
            study=study,
            arm=arm,
            seed=seed,
            started=_now(),
            config=plain,
            overrides=environment.portable(list(overrides), folder),
            git=environment.git_state(),
            versions=environment.package_versions(),
            hardware=environment.hardware(),
            data=_plain([dict(item) for item in data]),
            attempt=attempt,
        )
        record.write()
        return record

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record file, or the one in a run folder. Raises RecordError naming the file and the field that is
        wrong.
        """
        path = Path(path)
        file = path / RECORD_FILE if path.is_dir() else path
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            schema.check_record(value)
        except OSError as error:
            raise RecordError(f"{file}: {error.strerror or error}") from error
        except ValueError as error:  # JSON and Unicode errors are ValueErrors too
            raise RecordError(f"{file}: {error}") from error
        return cls.from_dict(file.parent, value)

    @classmethod
    def from_dict(cls, folder: Path, value: Mapping[str, Any], **more: Any) -> Self:
        """A record from what `to_dict` gave, in `folder`; `more`: fields of a subclass."""
        return cls(folder=folder, **{name: value[name] for name in _stored_fields() if name in value}, **more)

    @property
    def path(self) -> Path:
        return self.folder / RECORD_FILE

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values; numbers that are not finite become null."""
        value = {name: getattr(self, name) for name in _stored_fields()} | {"schema": schema.VERSION}
        plain = _plain(environment.portable(value, self.folder))
        assert isinstance(plain, dict)
        return plain

    def write(self) -> None:
        """Replace the file atomically. Raises RecordError when a field is not as the schema says."""
        value = self.to_dict()
        try:
            schema.check_record(value)
        except ValueError as error:
            raise RecordError(f"{self.path}: {error}") from error
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(self.path, text.encode("utf-8"))

    def update(
        self,
        *,
        data: Iterable[Mapping[str, Any]] | None = None,
        training: Mapping[str, Any] | None = None,
        protocol: Mapping[str, Any] | None = None,
    ) -> None:
        """Add what is known by now to a running record: data items are appended, training and protocol facts merged."""
        if data is not None:
            self.data = self.data + [dict(item) for item in data]
        if training is not None:
            self.training = (self.training or {}) | dict(training)
        if protocol is not None:
            self.protocol = (self.protocol or {}) | dict(protocol)
        self.write()

    def finish(
        self,
        metrics: Mapping[str, Any] | None = None,
        cells: Iterable[Mapping[str, Any]] = (),
        outcomes: Iterable[Any] = (),
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Write outcomes (mappings or dataclass instances, as `schema.OUTCOME`), then the record as `finished`."""
        self._write_outcomes(outcomes)
        self.cells = [dict(cell) for cell in cells]
        self.metrics = dict(metrics or {})
        if training is not None:
            self.training = (self.training or {}) | dict(training)
        self.error = None
        self._close("finished")

    def fail(self, exception: BaseException) -> None:
        """Write the record as `failed`, with the exception's type, message and traceback."""
        lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
        self.error = {"type": type(exception).__name__, "message": str(exception), "traceback": "".join(lines)}
        self._close("failed")

    def outcomes(self) -> list[dict[str, Any]]:
        """Every example's outcome. Raises RecordError naming file and line."""
        file = self.folder / OUTCOMES_FILE
        try:
            with gzip.open(file, "rt", encoding="utf-8") as text:
                lines = text.read().splitlines()
        except (OSError, EOFError, ValueError) as error:
            raise RecordError(f"{file}: {error}") from error
        try:
            rows: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")  # one call: a table reads millions of lines
        except ValueError:
            rows = [_parsed(file, number, line) for number, line in enumerate(lines, 1)]
        kinds: dict[tuple[Any, ...], int] = {}
        for number, row in enumerate(rows, 1):
            kinds.setdefault((*row, *map(type, row.values())) if isinstance(row, dict) else (type(row),), number)
        for number in kinds.values():  # rows of the same keys and types pass or fail together
            try:
                schema.check(rows[number - 1], schema.outcome_spec)
            except ValueError as error:
                raise RecordError(f"{file}, line {number}: {error}") from error
        return rows

    def examples(self, metrics: Sequence[str]) -> dict[tuple[str, Setting], Examples]:
        """The outcomes' `metrics`, by task and setting. Raises RecordError for an example that is there twice."""
        found: dict[tuple[str, Setting], Examples] = {}
        for row in self.outcomes():
            into = found.setdefault((row["task"], Setting.of(row)), Examples([], {name: [] for name in metrics}))
            into.ids.append(row["id"])
            for name in metrics:
                value = row.get(name)
                into.values[name].append(math.nan if value is None else float(value))
        for (task, setting), examples in found.items():
            if len(set(examples.ids)) < len(examples.ids):
                twice = next(name for name, count in Counter(examples.ids).items() if count > 1)
                what = f"example '{twice}' of {task} at {setting.label}"
                raise RecordError(f"{self.folder / OUTCOMES_FILE}: {what} is there twice")
        return found

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status == "running":
            self.fail(exception or RuntimeError("the run ended without a result"))

    def _close(self, status: str) -> None:
        self.status, self.finished = status, _now()
        self.wall_s = round(time.monotonic() - self._clock, 3)
        self.write()

    def _write_outcomes(self, outcomes: Iterable[Any]) -> None:
        buffer = io.BytesIO()
        # no time and no file name in the header: the same outcomes are the same bytes
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as out:
            for index, outcome in enumerate(outcomes):
                row = _plain(
                    asdict(outcome) if is_dataclass(outcome) and not isinstance(outcome, type) else dict(outcome)
                )
                if isinstance(row.get("nll"), float):
                    row["nll"] = round(row["nll"], 6)
                try:
                    schema.check(row, schema.outcome_spec)
                except ValueError as error:
                    raise RecordError(f"outcome {index}: {error}") from error
                out.write((json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))
        write_atomically(self.folder / OUTCOMES_FILE, buffer.getvalue())


def _parsed(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RecordError(f"{file}, line {number}: {error}") from error


def config_id(command: str, config: Mapping[str, Any]) -> str:
    """16 hex digits of the command and its resolved config, less what does not change the result."""
    copy = json.loads(json.dumps(config))
    for dotted in NOT_IN_ID:
        *parents, last = dotted.split(".")
        node = copy
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return hashlib.sha256(json.dumps([command, copy], sort_keys=True).encode()).hexdigest()[:16]


def downsample(
    steps: Sequence[int], values: Sequence[float], points: int = 200, **others: Sequence[float | None]
) -> dict[str, list[Any]]:
    """At most `points` means over equal stretches of a curve, as `training.loss_curve` holds it: `{step, loss}`, last
    step of each. `others`: curves beside it, None at a step without a value, as is a stretch of such steps; a curve of
    None alone is left out.
    """
    curves = {"loss": values} | {name: curve for name, curve in others.items() if set(curve) - {None}}
    for curve in curves.values():
        if len(steps) != len(curve):
            raise ValueError(f"{len(steps)} steps and {len(curve)} values")
    count = min(points, len(steps))
    edges = [round(i * len(steps) / count) for i in range(count + 1)] if count else []
    pairs = list(pairwise(edges))
    means = {name: [_mean(curve[a:b]) for a, b in pairs] for name, curve in curves.items()}
    return {"step": [int(steps[b - 1]) for _, b in pairs], **means}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 6) if known else None


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part, also after a crash."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide results from colleagues on a shared disk
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _stored_fields() -> list[str]:
    return [item.name for item in fields(Record) if item.name not in ("folder", "_clock")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    """JSON values: numpy and torch scalars as numbers, tuples as lists, paths as text, NaN and infinity as null."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
