"""What a sweep promises: killed whenever, it goes on; two processes run no job twice; one failure stops no other."""

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lrsa.train
from lrsa.results.record import RECORD_FILE
from lrsa.sweep.lock import locked
from tests.sweep.conftest import Sweeps, ended, has_said, held_by_another, kill, records, result, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
GRID = ["recipe=dense,lrsa_uniform", "run.seed=0,1"]
SEEDS = ["run.seed=0,1"]


class Killed(BaseException):
    """As an interrupt, which is nobody's to catch."""


def killed_and_resumed(sweeps: Sweeps, grid: list[str], kills: int, draw: random.Random) -> None:
    """The first kill in the middle of a training, the others at random moments of the sweep's work; and nothing to be
    seen of them.
    """
    whole, cut = Path("whole"), Path("cut")
    assert ended(sweeps.start(*grid, f"hydra.sweep.dir={whole}")) == 0
    written = sorted(record.path.stat().st_mtime for record in records(whole).values())
    a_job = (written[-1] - written[0]) / (len(written) - 1)

    finished: dict[str, bytes] = {}
    interrupted: set[tuple[str, int]] = set()
    command = [*grid, f"hydra.sweep.dir={cut}"]
    for attempt in range(kills):
        child = sweeps.start(*command)
        wait_until(partial(has_said, child, "Launching"))
        if attempt == 0:
            wait_until(lambda: any(cut.glob("*/checkpoints/last.ckpt")))
        else:  # by what is done, not by the clock: a machine may be twice as fast now as it was a moment ago
            target = len(finished) + draw.randrange(len(written) - len(finished))
            wait_until(lambda: sum(r.status == "finished" for r in records(cut).values()) >= target)  # noqa: B023
            if target < len(written) - 1:  # at least two jobs are left
                time.sleep(draw.uniform(0, a_job / 2))
        assert kill(child), "there was still something to kill"
        for name, record in records(cut).items():
            if record.status == "running":
                interrupted.add((name, record.attempt))
            else:
                content = record.path.read_bytes()
                assert finished.setdefault(name, content) == content, "run to completion twice"
        command = [*grid, f"resume={cut}"]
    assert ended(sweeps.start(*command)) == 0

    before, after = records(whole), records(cut)
    assert before.keys() == after.keys()
    assert all(result(after[name]) == result(before[name]) for name in before)
    assert all(after[name].path.read_bytes() == content for name, content in finished.items())
    assert sum(record.attempt - 1 for record in after.values()) == len(interrupted) > 0, "only what was cut short"
    print(
        f"{len(after)} records, {kills} kills, {len(interrupted)} of them within a job, {len(finished)} left finished"
    )


def test_a_killed_sweep_goes_on(sweeps: Sweeps) -> None:
    killed_and_resumed(sweeps, GRID, kills=2, draw=random.Random(0))


@pytest.mark.slow
def test_24_jobs_killed_five_times(sweeps: Sweeps) -> None:
    grid = ["recipe=dense,lrsa_uniform", "attention.lag_size=16,32", "run.seed=range(6)", "recipe.steps=40"]
    killed_and_resumed(sweeps, grid, kills=5, draw=random.Random())


def test_a_job_goes_on_within_its_epoch(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the step after the last checkpoint, so that no step is computed twice; and in the same W&B run."""
    wandb = ["logger=wandb", "logger.mode=offline"]
    steps: list[int] = []
    step = lrsa.train.PostTraining.training_step

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        if len(steps) == 2:
            steps.append(-1)
            raise Killed
        steps.append(self.global_step)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(lrsa.train.PostTraining, "training_step", watched)
    with pytest.raises(Killed):
        sweeps.run(*SEEDS, "hydra.sweep.dir=cut", *wandb)
    assert [record.status for record in records(Path("cut")).values()] == ["failed"]
    sweeps.run(*SEEDS, "resume=cut", *wandb)
    assert steps == [0, 1, -1, 2, 3, 0, 1, 2, 3]
    first, second = (record for record in records(Path("cut")).values())
    assert (first.attempt, second.attempt) == (2, 1)
    runs = [file.stem for file in first.folder.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(runs) == 2 and len(set(runs)) == 1


def test_two_processes_share_a_sweep(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = lrsa.train.evaluate

    def beside_another_job(*arguments: Any, **options: Any) -> Any:
        wait_until(lambda: len(list(Path("shared").glob(f"*/{RECORD_FILE}"))) > 1)  # of the other process, then
        return evaluate(*arguments, **options)

    monkeypatch.setattr(lrsa.train, "evaluate", beside_another_job)
    grid = [*GRID, "hydra.sweep.dir=shared"]
    children = [sweeps.start(*grid), sweeps.start(*grid)]
    assert [ended(child) for child in children] == [0, 0]
    found = records(Path("shared"))
    assert len(found) == 4
    assert all(record.status == "finished" and record.attempt == 1 for record in found.values())
    ran = [Path(f"{child}.log").read_text().count("- record: ") for child in children]
    assert sum(ran) == 4 and all(ran), "each of them ran some"


def test_a_job_in_other_hands_is_left_alone(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    sweeps.run("run.seed=0", "hydra.sweep.dir=shared")
    (name,) = records(Path("shared"))
    Path("shared", name, RECORD_FILE).unlink()
    held, release = held_by_another(Path("shared/.locks") / name)
    sweeps.run(*SEEDS, "resume=shared")
    assert list(records(Path("shared"))) != [name] and len(records(Path("shared"))) == 1
    shown = capfd.readouterr().out
    assert f"is left to process {held}" in shown and "2 jobs: 1 running, 1 finished" in shown
    release()


def test_a_lock_is_free_at_once_when_its_owner_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    _, release = held_by_another(path)
    with locked(path, patience=0.2) as mine:
        assert not mine
    release()
    with locked(path, patience=0) as mine:
        assert mine


def test_one_failure_is_recorded_and_stops_no_other(
    sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate = lrsa.train.evaluate

    def fail_first_seed(*arguments: Any, **options: Any) -> Any:
        if lrsa.train.task_overrides()[-1] == "run.seed=0":
            raise RuntimeError("disk on fire")
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lrsa.train, "evaluate", fail_first_seed)
        with pytest.raises(SystemExit) as stopped:
            sweeps.run(*SEEDS, "hydra.sweep.dir=runs")
    assert stopped.value.code == 1
    shown = capfd.readouterr()
    assert "2 jobs: 1 failed, 1 finished" in shown.out and "Traceback" in shown.out
    assert "  - failed: run.seed=0: RuntimeError: disk on fire (traceback in runs/" in shown.err
    (failed,) = [record for record in records(Path("runs")).values() if record.status == "failed"]
    assert failed.error is not None and "fail_first_seed" in failed.error["traceback"]

    sweeps.run(*SEEDS, "resume=runs")
    assert [record.attempt for record in records(Path("runs")).values()] == [2, 1], "tried again, from its checkpoint"
