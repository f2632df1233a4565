"""Sweeps of a tiny model, called as their console script is, in this process or in one that can be killed."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import lrsa.train
from lrsa.results import Record
from lrsa.results.record import RECORD_FILE
from lrsa.sweep.lock import locked

TINY = [
    "model=tiny_random",
    "recipe=lrsa_uniform",
    "trainer=cpu",
    "trainer.progress=false",
    "trainer.checkpoint_every=1",
    "trainer.save_model=false",
    "logger=none",
    "data=demo_recall",
    "task=[recall]",
    "data.length=320",
    "attention.sink_size=4",
    "attention.lag_size=32",
    "recipe.steps=4",
    "recipe.batch_size=2",
    "recipe.warmup_steps=1",
    "evaluation.tasks.recall.limit=4",
    "evaluation.batch_size=2",
    "evaluation.compressions=[1,4]",
    "evaluation.bootstrap=100",
]
ROOT = Path(__file__).resolve().parents[2]
CLOCK = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's further threads do not come along into a forked process; and how many there are decides last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Sweeps:
    """`lrsa-train -m` of the tiny model, in an empty folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def run(self, *overrides: str, main: Callable[[], object] = lrsa.train.main, tiny: bool = True) -> None:
        """In this process. A failure is a SystemExit, its message on standard error."""
        self._monkeypatch.setattr(sys, "argv", ["lrsa", "-m", *(TINY if tiny else []), *overrides])
        GlobalHydra.instance().clear()
        try:
            main()
        finally:
            GlobalHydra.instance().clear()

    def start(self, *overrides: str) -> int:
        """In a process of its own, which has imported all already; returns its id, after which its output is named."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with open(f"{os.getpid()}.log", "w") as said, redirect_stdout(said), redirect_stderr(said):
                    self.run(*overrides)
                    status = 0
            finally:
                os._exit(status)
        return child


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", str(ROOT), prepend=os.pathsep
    )  # processes of launchers: this checkout, installed or not
    return Sweeps(monkeypatch)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_said(child: int, text: str) -> bool:
    log = Path(f"{child}.log")
    return log.exists() and text in log.read_text()


def ended(child: int) -> int:
    """Exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int) -> bool:
    """`kill -9`; whether there was still something to kill."""
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def held_by_another(path: Path) -> tuple[int, Callable[[], bool]]:
    """A process that holds the lock until it is killed; its id, and what kills it."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path):
            os.write(said, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    return child, lambda: kill(child)


def records(folder: Path) -> dict[str, Record]:
    """Those in a sweep's job folders, by the folder's name."""
    return {file.parent.name: Record.load(file) for file in sorted(folder.glob(f"*/{RECORD_FILE}"))}


def result(record: Record) -> object:
    """All that a run came to, but for its clocks."""
    assert record.status == "finished" and record.training is not None
    cells = [{name: value for name, value in cell.items() if name not in CLOCK} for cell in record.cells]
    return record.id, record.metrics, cells, record.outcomes(), record.training["loss_curve"]
