"""`lrsa-eval` where layers differ: the mode that ranks them, and models that were saved with some of them spared."""

import warnings
from pathlib import Path

import pytest

from lrsa.attention import SparseAttentionConfig
from lrsa.evaluate import run_evaluation
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.models import load_model, load_tokenizer
from lrsa.results import Record
from lrsa.results.layers import read_layers
from lrsa.training import save_model
from lrsa.validation import ConfigError, ConfigWarning
from tests.test_evaluate import configure

pytestmark = pytest.mark.usefixtures("hydra_configs")


def test_layers_in_order_and_what_stands_beside_their_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["mode=layers", "layers.count=2", "evaluation.attention.keep_ratio=0.25", "evaluation.ceiling=true"]
    record = run_evaluation(configure(tmp_path / "run", *more))
    shown = capsys.readouterr().out
    found = read_layers(record.folder)
    assert sorted(found["order"]) == [0, 1] and len(found["rounds"]) == 3
    assert shown.rstrip().endswith(f"model.retrieval_layers=[{found['order'][0]},{found['order'][1]}]")
    assert "Layers that need the full cache" in shown and (record.folder / "layers.png").is_file()
    assert {fact["name"] for fact in record.data} == {"recall"} and record.cells == []
    scored = run_evaluation(configure(tmp_path / "scored")).metrics
    metrics = Record.load(tmp_path / "run").metrics
    assert metrics["layers/nll/0"] == pytest.approx(scored["nll/recall/4x"])
    assert metrics["layers/exact/0"] == scored["exact/recall/4x"] < metrics["layers/exact/all"]
    assert metrics["layers/nll/all"] == pytest.approx(scored["nll/recall/full"])
    assert metrics["layers/nll/2"] == pytest.approx(metrics["layers/nll/all"], abs=1e-4)

    # one more layer dense under the grid's own compressions
    line = f"evaluation.attention.dense_layers=[{found['order'][0]}]"
    dense = run_evaluation(configure(tmp_path / "dense", line)).metrics
    assert dense["nll/recall/4x"] == pytest.approx(metrics["layers/nll/1"])
    assert dense["exact/recall/4x"] == metrics["layers/exact/1"]


def test_what_mode_layers_cannot_do_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match=r"layers\.count=3, but 2 of the model's 2 layers"):
        run_evaluation(configure(tmp_path / "many", "mode=layers", "layers.count=3"))
    assert Record.load(tmp_path / "many").status == "failed" and not (tmp_path / "many" / "layers.json").exists()
    with pytest.raises(ConfigError, match=r"resume=.*: mode=layers keeps no journal") as error:
        run_evaluation(configure(tmp_path / "run", "mode=layers", "layers.count=0", f"resume={tmp_path / 'many'}"))
    assert "layers.count=0: layers to rank, at least 1" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def spared(tmp_path_factory) -> Path:
    """recall-tiny as it is saved after training with its last layer spared."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    attention = SparseAttentionConfig(lag_size=32, budget="concentrated", dense_layers=(-1,))
    save_model(load_model("recall-tiny", None), load_tokenizer("recall-tiny"), folder, attention)
    return folder


UNLIKE = (
    r"was saved with budget=concentrated, dense_layers=\[-1\], and is evaluated with evaluation\.attention\."
    r"budget=uniform.* evaluation\.attention\.budget=concentrated 'evaluation\.attention\.dense_layers=\[-1\]'$"
)
ALIKE = ["evaluation.attention.budget=concentrated", "evaluation.attention.dense_layers=[1]"]


def test_a_saved_model_is_evaluated_otherwise_with_a_warning(spared: Path, tmp_path: Path) -> None:
    few = ["evaluation.tasks.recall.limit=2", "evaluation.floor=false"]
    for number, mode in enumerate(("score", "generate")):
        with pytest.warns(ConfigWarning, match=UNLIKE):
            run_evaluation(configure(tmp_path / f"{number}", f"model.name={spared}", f"mode={mode}", *few))
    with pytest.warns(ConfigWarning, match=r"dense_layers=\[0\]; as it was trained"):
        run_evaluation(
            configure(
                tmp_path / "other", f"model.name={spared}", *few, ALIKE[0], "evaluation.attention.dense_layers=[0]"
            )
        )
    for number, overrides in enumerate((ALIKE, ["evaluation.compressions=[1]"], ["model.name=recall-tiny"])):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConfigWarning)
            run_evaluation(configure(tmp_path / f"silent{number}", f"model.name={spared}", *few, *overrides))
