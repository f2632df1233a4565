"""Finished batches of an evaluation, on disk as they come: what a killed run need not do again.

`journal.jsonl` in the run folder holds a line that says what determines the outcomes (the identity), then a line a
finished batch, each written whole and fsynced. `kill -9` loses the batch that was being computed, and may leave a last
line without its end, which is dropped. Batches are always those of all examples, for a row's last digits may depend on
its batch. The file goes when the run's outcomes are written: they hold all that it held.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lrsa.evaluation.errors import EvaluationInputError

JOURNAL_FILE = "journal.jsonl"
_START_ANEW = (
    "repeat that run's command with resume= alone added; or, to evaluate anew, leave resume out (lrsa-train: name the "
    "trained checkpoint instead of the folder, resume=<run folder>/checkpoints/last.ckpt)"
)

Line = dict[str, Any]


class Keyed(Protocol):
    """A column of the grid."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from all other columns of the run, plain values."""


class Finished:
    """The finished batches of one column, and where the next one is put. By itself, without a file, it is empty."""

    def __init__(self, key: Sequence[Any] = (), lines: Sequence[Line] = (), journal: Journal | None = None) -> None:
        self._key, self._journal = list(key), journal
        self._lines = {tuple(line["batch"]): line for line in lines}
        self._clock = time.perf_counter()
        self.rows = sum(map(len, self._lines))  # found in the journal
        self.seconds = sum(line["seconds"] for line in lines)  # that those took

    def get(self, indices: Sequence[int]) -> Line | None:
        """What `add` was given for the batch of these examples; None: it is to be computed now."""
        self._clock = time.perf_counter()
        return self._lines.get(tuple(indices))

    def add(self, indices: Sequence[int], **values: Any) -> Line:
        """Keep plain `values` of the batch; they are on disk when this returns."""
        seconds = round(time.perf_counter() - self._clock, 6)
        if self._journal is not None:
            self._journal.append({"column": self._key, "batch": list(indices), "seconds": seconds, **values})
        return values


class Journal:
    """The journal of a run in `folder`, for as long as it runs; a context manager.

    Args:
        identity: plain values of what determines outcomes, nested mappings.
        resume: run folder whose finished batches are taken over, `folder` itself or another; None: begin anew.

    Raises:
        EvaluationInputError: `resume` has a journal of another identity, whose differences are named, or a damaged one.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], resume: str | Path | None = None) -> None:
        self.path = Path(folder) / JOURNAL_FILE
        header = {"identity": json.loads(json.dumps(identity, default=str))}
        self._lines = [] if resume is None else _read(Path(resume).expanduser() / JOURNAL_FILE, header["identity"])
        partial = self.path.with_suffix(".partial")  # a kill in here leaves the old journal
        partial.write_bytes(b"".join(map(_encoded, [header, *self._lines])))
        os.replace(partial, self.path)
        self._file = self.path.open("ab")
        os.fsync(self._file.fileno())

    @property
    def batches(self) -> int:
        """That an earlier attempt finished."""
        return len(self._lines)

    def column(self, column: Keyed) -> Finished:
        """The finished batches of `column`."""
        key = list(column.key)
        return Finished(key, [line for line in self._lines if line["column"] == key], self)

    def append(self, line: Line) -> None:
        """Write `line`; it is on disk when this returns."""
        self._file.write(_encoded(line))
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The outcomes are stored elsewhere."""
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _encoded(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _read(path: Path, identity: Line) -> list[Line]:
    """The batches in `path`; [] where a run was killed before its first one."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # what follows the last end of line is torn
    lines = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise EvaluationInputError(f"{path}, line {number} is damaged ({error}): {_START_ANEW}") from error
    header, *batches = lines or [{"identity": identity}]
    changed = list(differences(header["identity"], identity))
    if changed:
        raise EvaluationInputError(f"{path} is of another evaluation: {'; '.join(changed)}; {_START_ANEW}")
    return batches


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`name was this, is that` for every value in which two nested mappings differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield f"{name} was {before!r}, is {now!r}"


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits over names, types, shapes and bits of all weights, the same on every device.

    The bits of each tensor go in as their integer sum, at the speed of memory: it tells weights of another training,
    and is no protection against forgery.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        bits = weight.contiguous().view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(weight.itemsize, torch.int64)
        )
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:16]
