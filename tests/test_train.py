"""The commands as users call them: from any folder, several runs at once, with one's own configs, failing, resuming."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrsa.evaluate
import lrsa.train
from lrsa.attention import SparseAttentionConfig
from lrsa.data.vocabulary import build_tokenizer
from lrsa.models import get_attention, load_model
from lrsa.results import Record
from lrsa.training import NonFiniteLoss
from lrsa.validation import ConfigError

SMALL = [
    "model=tiny_random",
    "model.retrieval_layers=[1]",  # so that the default recipe works
    "trainer=cpu",
    "trainer.progress=false",
    "data=demo_recall",
    "task=[recall]",
    "data.length=320",
    "attention.sink_size=4",
    "attention.lag_size=32",
    "recipe.steps=4",
    "recipe.batch_size=2",
    "recipe.warmup_steps=1",
    "evaluation.tasks.recall.limit=3",
    "evaluation.compressions=[1,4]",
    "evaluation.bootstrap=100",
]
Command = Callable[..., None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Calls an entry in an empty folder, as its console script does."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def call(main: Callable[[], Any], *arguments: str, small: bool = True) -> None:
        settings = [*SMALL, f"model.tokenizer={tokenizer}"] if small else []
        flags = [argument for argument in arguments if argument.startswith("-")]  # argparse wants them together
        overrides = [argument for argument in arguments if argument not in flags]
        monkeypatch.setattr(sys, "argv", ["lrsa", *flags, *settings, *overrides])
        GlobalHydra.instance().clear()
        main()

    yield call
    GlobalHydra.instance().clear()


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_train_with_a_budget_that_heads_share(command: Command) -> None:
    """In the mask form, with recomputed activations; and the yardstick afterwards, at the same geometry."""
    options = ["recipe=lrsa_mixed", "attention=snapkv_adaptive", "attention@evaluation.attention=oracle"]
    geometry = ["evaluation.attention.sink_size=4", "evaluation.attention.lag_size=32"]
    command(lrsa.train.main, "logger=none", *options, *geometry, "model.gradient_checkpointing=true")
    record = Record.load(only(Path.cwd(), "outputs/*/lrsa_mixed/*"))
    assert record.status == "finished" and record.training is not None and record.training["steps"] == 4
    assert [cell["compression"] for cell in record.cells] == [None, 1, 4] and record.cells[2]["measured_ratio"] > 1.5
    attention = get_attention(load_model(record.folder / "model"))
    assert attention is not None and (attention.scorer, attention.budget) == ("snapkv", "adaptive")


def test_the_default_recipe_says_how_it_shares_tokens_out(command: Command) -> None:
    command(lrsa.train.main, "logger=none", "recipe.compressions=[1,2,4]")
    record = Record.load(only(Path.cwd(), "outputs/*/lrsa/*"))
    lines = (record.folder / "train.log").read_text().splitlines()
    assert [line.partition(" - ")[2] for line in lines if "layers dense" in line] == [
        "2x: 1 of 2 layers dense (1), the others keep 0 of 32 tokens a partition: sinks and window alone, the scorer "
        "chooses nothing",
        "4x: 0 of 2 layers dense, the others keep 8 of 32 tokens a partition",
    ]
    assert record.cells[2]["measured_ratio"] > 1.5
    attention = get_attention(load_model(record.folder / "model"))
    assert attention is not None and (attention.budget, attention.dense_layers) == ("concentrated", (1,))


def test_train_then_evaluate_the_saved_model(command: Command) -> None:
    command(lrsa.train.main, "logger=none", "run.study=first", "recipe=lrsa_mixed")
    run = only(Path.cwd(), "outputs/first/lrsa_mixed/*")
    record = Record.load(run)
    assert record.status == "finished" and record.overrides[-1] == "recipe=lrsa_mixed"
    assert record.config["recipe"]["compressions"] == [2, 4, 8] and record.config["attention"]["lag_size"] == 32
    facts = record.training
    assert facts is not None
    assert facts["steps"] == 4 and facts["tokens"] == 4 * 2 * 320 and facts["step_ms_median"] > 0
    assert facts["peak_memory_bytes"] > 0 and facts["parameters"]["trained"] == facts["parameters"]["total"]
    assert set(record.metrics) >= {"exact/recall/floor", "exact/recall/full", "exact/recall/4x", "nll/recall/4x"}

    folder = run / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<end>"
    expected = SparseAttentionConfig(sink_size=4, lag_size=32, keep_ratio=0.25, scorer_args={"value_weight": 1.0})
    assert get_attention(load_model(folder)) == expected, "the recipe's own ratio, not a drawn one"

    command(
        lrsa.evaluate.main,
        f"model.name={folder}",
        "logger=none",
        "trainer=cpu",
        "task=[recall]",
        "evaluation.tasks.recall.limit=3",
        "evaluation.compressions=[1,4]",
        "evaluation.length=320",
        "evaluation.attention.sink_size=4",
        "evaluation.attention.lag_size=32",
        "run.study=first",
        "run.name=again",
        small=False,
    )
    again = Record.load(only(Path.cwd(), "outputs/first/again/*"))
    clock = ("seconds", "tokens_per_second")
    for mine, theirs in zip(again.cells, record.cells, strict=True):
        assert {k: v for k, v in mine.items() if k not in clock} == {
            k: pytest.approx(v) if isinstance(v, float) else v for k, v in theirs.items() if k not in clock
        }


def test_multirun_with_own_configs_and_wandb(command: Command, tmp_path: Path) -> None:
    """`--config-dir` brings an experiment of the user's; the sweep's runs share one W&B group."""
    own = tmp_path / "my_configs" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /logger: wandb\n"
        "run: {study: mine}\n"
        "recipe: {weight_decay: 0.5}\n"
        "hydra: {sweeper: {params: {recipe: 'dense,lrsa'}}}\n"
    )
    command(lrsa.train.main, "-m", f"--config-dir={own.parent}", "experiment=mine")
    sweep = only(Path.cwd(), "multirun/mine/*")
    runs = sorted(path.name for path in sweep.glob("*-seed0-*"))
    assert [name.rpartition("-")[0] for name in runs] == ["dense-seed0", "lrsa-seed0"]
    for name, arm in zip(runs, ("dense", "lrsa"), strict=True):
        record = Record.load(sweep / name)
        assert (record.status, record.arm, record.study) == ("finished", arm, "mine")
        assert record.config["recipe"]["weight_decay"] == 0.5
        offline = only(sweep / name / "wandb", "offline-run-*")
        content = only(offline, "*.wandb").read_bytes()
        for said in (sweep.name, "train/loss", "train/tokens_per_second", "eval/recall/4x/exact", "learning_rate"):
            assert said.encode() in content, said
        table = json.loads(only(offline, "files/media/table/results*.json").read_text())
        assert table["columns"][:2] == ["task", "compression"] and len(table["data"]) == 3
        assert list(offline.glob("files/media/images/figure*.png"))


def test_a_model_that_is_not_post_trained_is_scored_by_the_same_command(command: Command) -> None:
    command(lrsa.train.main, "logger=none", "recipe=none")
    run = only(Path.cwd(), "outputs/scratch/none/*")
    record = Record.load(run)
    assert (record.status, record.arm, record.training) == ("finished", "none", None)
    assert [cell["compression"] for cell in record.cells] == [None, 1, 4]
    assert not (run / "model").exists() and record.data[0]["name"] == "recall"


def test_a_failed_run_says_so_and_the_sweep_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = lrsa.train.evaluate

    def fail_dense(model: Any, *arguments: Any, **options: Any) -> Any:
        if get_attention(model) is None:
            raise RuntimeError("disk on fire")
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(lrsa.train, "evaluate", fail_dense)
    with pytest.raises(CompactHydraException, match="failed: recipe=dense: RuntimeError: disk on fire"):
        command(lrsa.train.main, "-m", "logger=none", "recipe=dense,lrsa", "run.study=broken")
    dense, sparse = (Record.load(path) for path in sorted(Path.cwd().glob("multirun/broken/*/*-seed0-*")))
    assert dense.status == "failed" and dense.error is not None and dense.error["message"] == "disk on fire"
    assert (dense.folder / "model" / "model.safetensors").exists(), "what was trained is kept"
    assert sparse.status == "finished"


def test_a_broken_setting_leaves_nothing_behind(command: Command) -> None:
    with pytest.raises(ValueError, match="micro_batch_size=3"):
        command(lrsa.train.main, "logger=none", "recipe.micro_batch_size=3")
    assert not list(Path.cwd().glob("outputs/**/record.json"))


def test_a_missing_task_file_shows_before_training(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lrsa.train, "fit", lambda *_, **__: pytest.fail("trained although a task cannot be read"))
    with pytest.raises(FileNotFoundError) as error:
        command(
            lrsa.train.main,
            "logger=none",
            "task=[recall,squad]",
            "evaluation.tasks.squad.path=/nowhere/squad",
            "evaluation.tasks.squad.filler=null",
        )
    assert "in evaluation.tasks.squad" in error.value.__notes__
    assert Record.load(only(Path.cwd(), "outputs/*/*/*")).status == "failed"


# A model that was named without a group of its own: the default one's ranking is of another.
UNRANKED = ["model.name=recall-tiny", "logger=none", *(one for one in SMALL if one != "model=tiny_random")]
OF_AN_EVALUATION = [
    *(one for one in UNRANKED if one.partition(".")[0] not in ("data", "attention", "recipe", "data=demo_recall")),
    "evaluation.length=320",
    "evaluation.attention.lag_size=32",
]
TAKEN_OVER = (
    r"dense_layers are model\.retrieval_layers=\[1\], ranked on a model of model_type=llama, num_hidden_layers=30, "
    r"hidden_size=576, but model\.name=recall-tiny has model_type=qwen3, num_hidden_layers=2, hidden_size=64: "
    r"rank .*mode=layers.* model\.ranked_on=null, or take "
)
SPARED = ["evaluation.attention.budget=concentrated", "evaluation.attention.dense_layers=${model.retrieval_layers}"]


@pytest.mark.parametrize(
    ("main", "overrides", "message"),
    [
        (
            lrsa.train.main,
            ["recipe=lrsa"],
            r"attention\.dense_layers and evaluation\.attention\." + TAKEN_OVER + "recipe=lrsa_uniform",
        ),
        (lrsa.train.main, ["recipe=none", *SPARED], TAKEN_OVER + r"evaluation\.attention\.budget=uniform"),
        (lrsa.train.main, ["recipe=lrsa", "model.retrieval_layers=[18,23]"], r"layers=\[18, 23\], ranked on"),
        (lrsa.evaluate.main, SPARED, TAKEN_OVER + r"evaluation\.attention\.budget=uniform"),
    ],
    ids=["trained", "scored", "beyond-the-model", "evaluated"],
)
def test_layers_ranked_on_another_model_are_not_taken_over(
    command: Command, main: Callable[[], Any], overrides: list[str], message: str
) -> None:
    settings = UNRANKED if main is lrsa.train.main else OF_AN_EVALUATION
    with pytest.raises(ConfigError, match=message):
        command(main, *settings, *overrides, small=False)
    assert Record.load(only(Path.cwd(), "outputs/*/*/*")).status == "failed"


@pytest.mark.parametrize(
    ("main", "overrides"),
    [
        (lrsa.train.main, ["recipe=lrsa", "model.ranked_on=null"]),
        (
            lrsa.train.main,
            [
                "recipe=lrsa",
                "model.ranked_on.model_type=qwen3",
                "model.ranked_on.num_hidden_layers=2",
                "model.ranked_on.hidden_size=64",
            ],
        ),
        (lrsa.train.main, ["recipe=lrsa_uniform"]),
        (lrsa.evaluate.main, []),
        (lrsa.evaluate.main, [*SPARED, "evaluation.compressions=[1]"]),
    ],
    ids=["its-own", "alike", "uniform", "evaluated-uniform", "evaluated-full"],
)
def test_layers_of_its_own_ranking_are_spared(command: Command, main: Callable[[], Any], overrides: list[str]) -> None:
    settings = [*UNRANKED, "recipe.steps=1"] if main is lrsa.train.main else OF_AN_EVALUATION
    command(main, *settings, *overrides, small=False)
    run = only(Path.cwd(), "outputs/*/*/*")
    assert Record.load(run).status == "finished"
    for checkpoint in run.glob("checkpoints/last.ckpt"):
        assert "ranked_on" not in torch.load(checkpoint, weights_only=True)["lrsa"]["model"]


def test_resume_continues_bit_for_bit(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real data module: position in the data, schedule, draws, weights."""
    common = ["logger=none", "recipe=lrsa_mixed", "recipe.micro_batch_size=1", "trainer.checkpoint_every=2"]
    command(lrsa.train.main, *common, "run.study=whole")
    step = lrsa.train.PostTraining.training_step

    def die(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise NonFiniteLoss("preempted")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(lrsa.train.PostTraining, "training_step", die)
        with pytest.raises(NonFiniteLoss, match=r"preempted.*last good checkpoint is"):
            command(lrsa.train.main, *common, "run.study=cut")
    cut = only(Path.cwd(), "outputs/cut/*/*")
    assert Record.load(cut).status == "failed"
    command(lrsa.train.main, *common, "run.study=resumed", f"resume={cut}")
    whole, resumed = (only(Path.cwd(), f"outputs/{study}/*/*") for study in ("whole", "resumed"))
    one, other = (load_model(run / "model").state_dict() for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (Record.load(run) for run in (whole, resumed))
    assert first.training is not None and second.training is not None
    assert first.training["loss_curve"] == second.training["loss_curve"]
    assert first.outcomes() == second.outcomes()


def test_runs_from_before_and_since_a_setting_that_acts_elsewhere_resume(command: Command) -> None:
    common = ["logger=none", "recipe=lrsa_uniform", "recipe.steps=1", "evaluation.tasks={}", "trainer.save_model=false"]
    command(lrsa.train.main, *common, "run.study=first")
    checkpoint = only(Path.cwd(), "outputs/first/*/*/checkpoints/last.ckpt")
    written = torch.load(checkpoint, weights_only=True)
    assert "name" in written["lrsa"]["model"] and "retrieval_layers" not in written["lrsa"]["model"]
    written["lrsa"]["model"]["retrieval_layers"] = [0]  # as the versions wrote it that first had the field
    torch.save(written, since := checkpoint.with_name("since.ckpt"))
    for number, path in enumerate((checkpoint, since)):
        command(lrsa.train.main, *common, f"resume={path}", "model.retrieval_layers=[1,0]", f"run.study=again{number}")
        assert Record.load(only(Path.cwd(), f"outputs/again{number}/*/*")).status == "finished"
    written["lrsa"]["attention"]["dense_layers"] = [0]  # what it acts through is compared
    torch.save(written, since)
    with pytest.raises(ValueError, match=r"attention\.dense_layers: \[0\] in the checkpoint, \[\] now"):
        command(lrsa.train.main, *common, f"resume={since}", "run.study=other")


@pytest.mark.parametrize(
    ("main", "bad", "message"),
    [
        (lrsa.train.main, "attention.scorer=foo", "scorer='foo' is unknown: choose one of expected_attention, h2o"),
        (lrsa.train.main, "evaluation.length=40", "more than length=40"),
        (lrsa.evaluate.main, "evaluation.compressions=[0.5]", "[0.5] is below 1"),
    ],
)
def test_bad_input_is_a_message_and_no_traceback(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: Path,
    main: Callable[[], Any],
    bad: str,
    message: str,
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit):
        if main is lrsa.train.main:
            command(main, "logger=none", bad)
        else:
            command(main, "model=tiny_random", f"model.tokenizer={tokenizer}", "logger=none", bad, small=False)
    shown = capsys.readouterr().err
    assert message in shown and "error: " in shown and "Traceback" not in shown
