"""The notebooks run from top to bottom, offline, on the demo's records and tiny models, and hold no outputs."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from lrsa.config import LoggerConf
from lrsa.results import Record, rows_for_logging
from lrsa.results.summary import tracked_metrics
from lrsa.tracking import start_wandb

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
Run = Callable[..., str]


def test_all_four_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["explore_results", "new_scorer", "reproduce_tables", "what_is_kept"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs_and_begins_with_what_may_be_set(path: Path) -> None:
    """Fix: `jupyter nbconvert --clear-output --inplace notebooks/*.ipynb` (from the extra `notebooks`)."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"} and set(notebook.metadata.language_info) == {
        "name"
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == [{"tags": ["parameters"]}]
    assert code[0].metadata, "the first cell of code is the one with the parameters"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Executes a notebook with other parameters, and code after it; returns what it printed and showed, as text."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook

    def execute(name: str, then: str = "", **parameters: Any) -> str:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        first = next(index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code")
        known = re.findall(r"^([A-Z_, ]+) =", notebook.cells[first].source, flags=re.M)
        assert set(parameters) <= {name.strip() for names in known for name in names.split(",")}
        settings = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(settings))
        notebook.cells.append(nbformat.v4.new_code_cell(then))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return "\n".join(map(shown, notebook.cells))

    return execute


def shown(cell: NotebookNode) -> str:
    """Text, HTML and Markdown that a cell gave out, and `<PNG>` for a picture."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts += [output.get("text", ""), *(data.get(f"text/{kind}", "") for kind in ("html", "markdown", "plain"))]
        parts += ["<PNG>"] if "image/png" in data else []
    return "\n".join(parts)


def test_explore_results(run: Run, tmp_path: Path) -> None:
    """On the demo's records, and on W&B runs of the same."""
    shutil.copytree(ROOT / "experiments" / "demo" / "records", tmp_path / "runs")
    for folder in sorted((tmp_path / "runs").iterdir()):
        record = Record.load(folder)
        tracked = start_wandb(LoggerConf(mode="offline"), record, record.arm, "demo", None)
        assert tracked is not None and record.training is not None
        curve = record.training["loss_curve"]
        for step, loss in zip(curve["step"], curve["loss"], strict=True):
            tracked.log_metrics({"train/loss": loss}, step=step)
        tracked.log_results(record, tracked_metrics(record.cells), rows_for_logging(record.cells))
        tracked.finish()
    text = run("explore_results", WANDB=[str(tmp_path / "runs")])
    assert "2 records: dense (seed 0), lrsa (seed 0)" in text
    assert "+38.0 [+32.3, +43.7]" in text, "paired differences"
    assert "<b>needles-00120-0</b>, lost; answer: <b>ladder lemon</b>" in text
    assert "the code of dolphin is <mark>ladder lemon</mark>" in text
    assert text.count("<PNG>") >= 4, "figures of the records, and the loss that W&B logged"
    assert "WANDB is empty" not in text and "lag_relative" in text


def test_what_is_kept(run: Run) -> None:
    move = """
for slider, value in zip(show.widget.children, ("snapkv", 8, 1, 0)):
    slider.value = value
assert show.widget.kwargs == {"scorer": "snapkv", "compression": 8, "layer": 1, "head": 0}
show(**show.widget.kwargs)
"""
    prompt = "the sun is high . she opens the door and looks outside . the code of apple is river stone . " * 12
    text = run("what_is_kept", move, MODEL="recall-tiny", PROMPT=prompt, LAG_SIZE=16)
    assert "recall-tiny: 2 layers, 2 key/value heads" in text
    assert re.search(r"(\d+) of \d+ tokens a head, measured [45]\.\d\dx", text), "8x, as measured"
    assert text.count('<div class="kept"') >= 2 and "<PNG>" in text


def test_new_scorer(run: Run, tmp_path: Path) -> None:
    text = run("new_scorer", STEPS=2, EXAMPLES=6, COMPRESSIONS=[1, 4], RUNS=str(tmp_path / "runs"))
    arms = ["lag_relative", "lag_relative_trained", "said_again", "said_again_trained"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == arms
    record = Record.load(tmp_path / "runs" / "said_again_trained")
    assert record.config["attention"]["scorer"] == record.config["evaluation"]["attention"]["scorer"] == "said_again"
    assert record.training is not None and record.training["steps"] == 2
    assert text.count("Said again, trained − Said again, as it is") == 1
    assert text.count("<PNG>") == 2 and '<div class="kept"' in text


@pytest.mark.slow
def test_new_scorer_as_it_stands_learns_something(run: Run, tmp_path: Path) -> None:
    """With the notebook's own numbers: under both rules the trained model recalls more at 4x."""
    run("new_scorer", RUNS=str(tmp_path / "runs"))
    at_4x = {
        path.name: next(cell["exact"] for cell in Record.load(path).cells if cell["compression"] == 4)
        for path in (tmp_path / "runs").iterdir()
    }
    for scorer in ("lag_relative", "said_again"):
        assert at_4x[f"{scorer}_trained"] > at_4x[scorer] + 0.05


def test_reproduce_tables(run: Run) -> None:
    text = run("reproduce_tables")
    assert "demo: identical, " in text and "| Recall | LRSA 4x | 300 |" in text
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    assert re.search(r"says exact=\S+ the outcomes in outcomes\.jsonl\.gz average", words), (
        "the altered copy is refused"
    )
