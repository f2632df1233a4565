"""A killed evaluation goes on at the next example: same record, nothing computed twice."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf

import lrsa.evaluate
import lrsa.train
from lrsa.evaluate import run_evaluation
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.journal import JOURNAL_FILE
from lrsa.results import Record
from lrsa.results.record import OUTCOMES_FILE
from lrsa.train import run_training
from lrsa.validation import ConfigError

COMMON = [
    "trainer=cpu",
    "trainer.progress=false",
    "logger=none",
    "task=[recall]",
    "evaluation.compressions=[1,4]",
    "evaluation.bootstrap=100",
]
EVAL = [
    *COMMON,
    "model=recall_tiny",
    "evaluation.tasks.recall.limit=10",
    "evaluation.length=240",
    "evaluation.batch_size=3",
    "evaluation.attention.sink_size=4",
    "evaluation.attention.lag_size=32",
]
TRAIN = [
    *COMMON,
    "model=recall_tiny",
    "recipe=lrsa_uniform",
    "data=demo_recall",
    "data.length=320",
    "attention.sink_size=4",
    "attention.lag_size=32",
    "recipe.steps=2",
    "recipe.batch_size=2",
    "recipe.warmup_steps=1",
    "evaluation.tasks.recall.limit=5",
    "evaluation.batch_size=2",
]
CLOCK = ("seconds", "tokens_per_second")


pytestmark = pytest.mark.usefixtures("hydra_configs")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP's further threads do not come along into a forked process; and how many there are decides last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configure(name: str, folder: Path, *overrides: str) -> Any:
    settings = EVAL if name == "eval" else TRAIN
    return OmegaConf.to_object(compose(name, [*settings, *overrides, f"run.output_dir={folder}"]))


def evaluated(folder: Path, *overrides: str) -> Record:
    return run_evaluation(configure("eval", folder, *overrides))


def trained(folder: Path, *overrides: str) -> Record:
    run_training(configure("train", folder, *overrides))
    return Record.load(folder)


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("out of luck")


class Reader:
    """Watches the forward passes of evaluations that read several tokens a row: their rows in order, pads and all."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.limit: int | None = None  # rows; the pass that exceeds it stops as it begins
        self.stop: Callable[[], None] = kill_this_process

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            self.rows += map(tuple, ids.tolist())
            if self.limit is not None and len(self.rows) > self.limit:
                self.stop()

    def taken(self) -> list[tuple[int, ...]]:
        """The rows since the last call."""
        rows, self.rows = self.rows, []
        return rows


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    found = Reader()
    for module in (lrsa.evaluate, lrsa.train):
        evaluate = module.evaluate

        def watched(model: Any, *arguments: Any, evaluate: Any = evaluate, **options: Any) -> Any:
            with model.register_forward_pre_hook(found, with_kwargs=True):
                return evaluate(model, *arguments, **options)

        monkeypatch.setattr(module, "evaluate", watched)
    return found


def kill(run: Callable[[], object], reader: Reader, after: int) -> None:
    """`run` in a process of its own, which kill -9 ends when `after` rows were read."""
    child = os.fork()
    if child == 0:
        try:
            reader.limit = after
            run()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def assert_same(record: Record, whole: Record) -> None:
    """But for clocks, what was asked for, and the attempt."""
    assert record.status == whole.status == "finished"
    for mine, theirs in zip(record.cells, whole.cells, strict=True):
        assert {k: v for k, v in mine.items() if k not in CLOCK} == {k: v for k, v in theirs.items() if k not in CLOCK}
    assert (record.folder / OUTCOMES_FILE).read_bytes() == (whole.folder / OUTCOMES_FILE).read_bytes()
    assert (record.metrics, record.data, record.id) == (whole.metrics, whole.data, whole.id)
    assert not (record.folder / JOURNAL_FILE).exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, reader: Reader, mode: str) -> None:
    """Into another folder, killed again there, and at last in that same folder."""
    whole = evaluated(tmp_path / "whole", f"mode={mode}")
    rows = reader.taken()
    assert len(rows) == 30, "10 examples in 3 columns, in batches of 3, 3, 3, 1"

    kill(lambda: evaluated(tmp_path / "a", f"mode={mode}"), reader, after=16)
    assert Record.load(tmp_path / "a").status == "running"
    kill(lambda: evaluated(tmp_path / "b", f"mode={mode}", f"resume={tmp_path / 'a'}"), reader, after=7)
    journal = (tmp_path / "b" / JOURNAL_FILE).read_text().splitlines()
    assert [sum(len(json.loads(line)["batch"]) for line in journal[1:])] == [23]

    last = evaluated(tmp_path / "b", f"mode={mode}", f"resume={tmp_path / 'b'}")
    assert reader.taken() == rows[23:], "nothing is read twice, in the same batches"
    assert_same(last, whole)
    assert last.attempt == 3 and whole.attempt == 1
    assert Record.load(tmp_path / "a").status == "running", "a folder that was only read is as it was"


def test_questions_over_one_context_go_on_as_well(tmp_path: Path, reader: Reader) -> None:
    """4 of a context in rounds of 3 and 1: between the two, the context is read again, and counted once."""
    settings = ["mode=generate", "evaluation.tasks.recall.limit=2", "evaluation.floor=false"]
    settings += ["evaluation.tasks.recall.questions=4", "evaluation.tasks.recall.apart=true"]
    whole = evaluated(tmp_path / "whole", *settings)
    rows = reader.taken()
    assert len(rows) == 2 * 2 * (1 + 4)
    reader.limit, reader.stop = 4, fail
    with pytest.raises(RuntimeError, match="out of luck"):
        evaluated(tmp_path / "cut", *settings)
    reader.limit = None
    reader.taken()
    again = evaluated(tmp_path / "again", *settings, f"resume={tmp_path / 'cut'}")
    assert reader.taken() == [rows[0], *rows[4:]]
    assert_same(again, whole)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_in_the_evaluation_after_training(tmp_path: Path, reader: Reader) -> None:
    whole = trained(tmp_path / "whole")
    rows = reader.taken()
    kill(lambda: trained(tmp_path / "cut"), reader, after=7)
    again = trained(tmp_path / "again", f"resume={tmp_path / 'cut'}")
    assert reader.taken() == rows[7:] and len(rows) == 15
    assert_same(again, whole)
    assert again.attempt == 2 and again.training is not None and whole.training is not None
    assert again.training["loss_curve"] == whole.training["loss_curve"]

    other = "evaluation.batch_size=3"
    with pytest.raises(EvaluationInputError, match=r"batch_size was 2, is 3; .*resume=<run folder>/checkpoints/last"):
        trained(tmp_path / "other", other, f"resume={tmp_path / 'cut'}")
    reader.taken()
    trained(tmp_path / "other", other, f"resume={tmp_path / 'cut' / 'checkpoints' / 'last.ckpt'}")
    assert len(reader.taken()) == 15, "the checkpoint alone: trained on, evaluated anew"


@pytest.fixture
def stopped(tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an evaluation that failed after 6 of 30 rows."""

    reader.limit, reader.stop = 6, fail
    with pytest.raises(RuntimeError, match="out of luck"):
        evaluated(tmp_path / "stopped")
    reader.limit = None
    reader.taken()
    return tmp_path / "stopped"


def test_a_line_that_was_being_written_is_dropped(tmp_path: Path, reader: Reader, stopped: Path) -> None:
    journal = stopped / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3, "what determines outcomes, and two batches"
    journal.write_bytes(b"".join(lines)[:-9])
    evaluated(tmp_path / "again", f"resume={stopped}")
    assert len(reader.taken()) == 27
    journal.write_bytes(lines[0][:50])
    evaluated(tmp_path / "anew", f"resume={stopped}")
    assert len(reader.taken()) == 30
    journal.write_bytes(lines[0] + lines[1][9:] + lines[2])
    with pytest.raises(EvaluationInputError, match=r"journal\.jsonl, line 2 is damaged .*leave resume out"):
        evaluated(tmp_path / "damaged", f"resume={stopped}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["evaluation.batch_size=4"], "evaluation.batch_size was 3, is 4"),
        (["evaluation.attention.keep_ratio=null", "attention@evaluation.attention=tova"], "scorer was 'lag_relative'"),
        (["evaluation.precision=bf16-mixed"], "evaluation.precision was '32-true', is 'bf16-mixed'"),
        (["evaluation.tasks.recall.seed=1"], "data.recall was '[0-9a-f]+', is '[0-9a-f]+'"),
        (["mode=generate"], "generate was None, is {"),
        (["run.threads=2"], "machine.threads was 1, is 2"),
        (["model.dtype=bfloat16"], "model.weights was '[0-9a-f]+', is '[0-9a-f]+'"),
    ],
)
def test_another_evaluation_is_refused(stopped: Path, tmp_path: Path, change: list[str], message: str) -> None:
    before = (stopped / JOURNAL_FILE).read_bytes()
    with pytest.raises(EvaluationInputError, match=f"is of another evaluation: .*{message}"):
        evaluated(tmp_path / "other", *change, f"resume={stopped}")
    assert (stopped / JOURNAL_FILE).read_bytes() == before


def test_what_cannot_be_resumed_is_told_at_once(tmp_path: Path) -> None:
    evaluated(tmp_path / "done", "evaluation.tasks.recall.limit=3")
    for folder, change, message in (
        ("nowhere", [], "nowhere.*No such file"),
        ("done", [], "done is the folder of a finished run"),
        ("done", ["mode=lm_eval", "lm_eval.tasks=[own]"], "mode=lm_eval keeps no journal"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluated(tmp_path / "new", *change, f"resume={tmp_path / folder}")
    with pytest.raises(ConfigError, match="done is the folder of a finished run"):
        trained(tmp_path / "new", "recipe=none", f"resume={tmp_path / 'done'}")
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_not_post_trained_is_resumed_too(tmp_path: Path, reader: Reader) -> None:
    whole = trained(tmp_path / "whole", "recipe=none")
    rows = reader.taken()
    reader.limit, reader.stop = 5, fail
    with pytest.raises(RuntimeError, match="out of luck"):
        trained(tmp_path / "cut", "recipe=none")
    reader.limit = None
    reader.taken()
    assert_same(trained(tmp_path / "again", "recipe=none", f"resume={tmp_path / 'cut'}"), whole)
    assert reader.taken() == rows[5:]
