"""What a grid comes to before anything runs: jobs, pruned combinations with their reason, errors, the dry run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf

import lrsa.evaluate
from lrsa.config import config_dir
from lrsa.results import Record
from lrsa.sweep.plan import Plan, expand, plan_jobs
from lrsa.sweep.predict import Measured
from lrsa.validation import ConfigError
from tests.sweep.conftest import TINY, Sweeps, records

SWEEPS = sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml"))
LAUNCHERS = sorted(path.stem for path in (config_dir() / "hydra" / "launcher").glob("*.yaml"))
JOBS = {"lag_by_ratio": 12, "chunk_size": 4, "top_k": 8, "scorers": 11, "budgets": 8, "seeds": 3, "inference": 15}
PRUNED = {"top_k": 1, "budgets": 1}
Planned = Callable[..., Plan]


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigLoader:
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path

    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    setup_globals()
    return Hydra.create_main_hydra2("train", create_config_search_path(str(config_dir()))).config_loader


@pytest.fixture
def planned(loader: ConfigLoader) -> Planned:
    """The plan of a command line, as the sweeper makes it."""

    def plan(*overrides: str, command: str = "train", elsewhere: bool = False) -> Plan:
        whole = loader.load_configuration(command, list(overrides), RunMode.MULTIRUN)
        params = whole.hydra.sweeper.params
        lines = [*(f"{key}={values}" for key, values in params.items()), *overrides]
        grid = expand(OverridesParser.create(config_loader=loader).parse_overrides(lines))
        return plan_jobs(lambda job: loader.load_sweep_config(whole, job), grid, elsewhere)

    yield plan
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "tune"])
def test_every_grid_is_planned(name: str, planned: Planned) -> None:
    """On the real experiment; as many jobs as its file says, each an arm and seed of its own."""
    if name == "inference":
        plan = planned(f"sweep={name}", "model=recall_tiny", "trainer=cpu", command="eval")
    else:
        recipe = ["recipe=lrsa_uniform"] if name == "seeds" else []
        plan = planned("experiment=smollm2_robustness", f"sweep={name}", "model=recall_tiny", "trainer=cpu", *recipe)
    assert (len(plan.jobs), len(plan.pruned), plan.repeated) == (JOBS[name], PRUNED.get(name, 0), [])
    assert len({(job.conf.run.arm, job.conf.run.seed) for job in plan.jobs}) == len(plan.jobs)
    for job in plan.jobs:
        trained = getattr(job.conf, "attention", job.conf.evaluation.attention)
        assert trained.lag_size == job.conf.evaluation.attention.lag_size
        if name in ("scorers", "budgets"):
            assert trained == job.conf.evaluation.attention, "evaluated with what it is trained with"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_composes(launcher: str, loader: ConfigLoader) -> None:
    config = loader.load_configuration("train", [f"hydra/launcher={launcher}"], RunMode.MULTIRUN)
    values = OmegaConf.to_container(config.hydra.launcher)
    assert isinstance(values, dict) and str(values["_target_"]).startswith("hydra_plugins.")


def test_the_search_composes_without_optuna(loader: ConfigLoader) -> None:
    config = loader.load_configuration("train", ["experiment=demo", "sweep=tune"], RunMode.MULTIRUN)
    sweeper = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    assert isinstance(sweeper, dict) and sweeper["direction"] == "maximize"
    assert sweeper["_target_"] == "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    lines = [f"{key}={values}" for key, values in sweeper["params"].items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    assert [one.get_key_element() for one in parsed if one.is_interval_sweep()] == [
        "recipe.learning_rate",
        "attention.scorer_args.value_weight",
    ]


def test_seven_knobs_and_what_cannot_be_combined(planned: Planned) -> None:
    plan = planned(
        *TINY,
        "attention=lag_relative,keydiff",
        "attention.keep_ratio=null",
        "attention.chunk_size=8",
        "attention.lag_size=16,32",
        "attention.top_k=8,24",
        "recipe.compressions=[]",
        "attention.budget=uniform,adaptive",
        "run.seed=3",
    )
    assert len(plan.jobs) == 16 - 7 and not plan.repeated
    reasons = {one.swept.replace("attention.", ""): " ".join(one.problems) for one in plan.pruned}
    too_many = {swept: reason for swept, reason in reasons.items() if "top_k=24 is more than lag_size=16" in reason}
    assert len(too_many) == 4 and all("lag_size=16" in swept and "top_k=24" in swept for swept in too_many)
    keydiff = {swept: reason for swept, reason in reasons.items() if "budget='adaptive'" in reason}
    assert len(keydiff) == 3 and all("=keydiff" in swept and "=adaptive" in swept for swept in keydiff)
    assert len({job.id for job in plan.jobs}) == len({job.folder for job in plan.jobs}) == len(plan.jobs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.sink_size=-1", "run.seed=0,1"], r"none of the 2 .*\n  - attention: sink_size=-1[^(]*$"),
        (["attention.lag_size=0", "run.seed=0"], r"none of the 1 .*lag_size=0"),
        (["attention.lag_size=0,-8"], r"none of the 2 .*lag_size=0: .*\(1 of them\)\n.*lag_size=-8: "),
        (
            ["recipe=dense,lrsa_uniform", "attention.budget=unifrom"],
            r"no combination .*with these values.*\n  - recipe=lrsa_uniform: .*",
        ),
        (["attention.scorer=lag_relative,newest"], r"no combination .*\n  - attention.scorer=newest: .*choose one of"),
        (["recipe.learning_rate=interval(0,1)"], r"interval\(0,1\): a grid takes lists and ranges"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_are_errors_and_no_empty_grid(planned: Planned, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(*TINY, *overrides)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


def test_what_does_not_compose_is_an_error(planned: Planned) -> None:
    with pytest.raises(ConfigCompositionException, match="lag_size=x"):
        planned(*TINY, "attention.lag_size=32,x")


def test_the_same_config_is_one_job(planned: Planned) -> None:
    plan = planned(*TINY, "recipe=dense,lrsa_uniform", "recipe.weight_decay=0.01,1e-2")
    assert len(plan.jobs) == 2 and len(plan.repeated) == 2


def test_where_jobs_run_elsewhere_this_machine_need_not_have_a_gpu(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu"):
        planned(*TINY, "trainer=gpu", "run.seed=0,1")
    plan = planned(*TINY, "trainer=gpu", "run.seed=0,1", elsewhere=True)
    assert [job.conf.trainer.accelerator for job in plan.jobs] == ["gpu", "gpu"]


# ---------------------------------------------------------------- the dry run


def test_the_dry_run_says_what_is_done_and_what_is_left(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    sweeps.run("recipe=dense,lrsa_uniform", "hydra.sweep.dir=runs/one")
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    sweeps.run(
        "recipe=dense,lrsa_uniform", "run.seed=0,1", "recipe.compressions=[],[4]", "resume=runs/one", "dry_run=true"
    )
    shown = capsys.readouterr().out
    assert "pruned 2: recipe.compressions=[4.0] draws a compression" in " ".join(shown.split())
    assert "6 jobs: 2 finished, 4 new. To do: about" in shown and "unknown" not in shown
    assert "runs/one/lrsa-seed0-" in shown and "on cpu" in shown
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before

    capsys.readouterr()
    sweeps.run("recipe=dense,lrsa_uniform", "data.length=256", "dry_run=true", "resume=null")
    shown = capsys.readouterr().out
    assert shown.count("unknown") == 2 * 2 + 2 and not list(Path().glob("multirun/*"))


def test_predictions_scale_what_was_measured(sweeps: Sweeps, planned: Planned) -> None:
    sweeps.run("recipe=dense,lrsa_uniform", "hydra.sweep.dir=runs")
    measured = Measured(["runs", "nowhere"])
    (record,) = [record for record in records(Path("runs")).values() if record.arm == "lrsa"]
    training, wall = record.training, record.wall_s
    assert training is not None and wall is not None

    def predicted(*overrides: str) -> Any:
        (job,) = planned(*TINY, *overrides).jobs
        return measured.predict(job.conf)

    same = predicted("run.seed=7")
    assert (same.source, same.bytes, same.differs) == (record.folder, training["peak_memory_bytes"], ())
    assert same.seconds == pytest.approx(wall) and same.device == "cpu"
    assert predicted("recipe.steps=40").seconds == pytest.approx(wall + 9 * training["seconds"])
    scored = sum(cell["seconds"] for cell in record.cells)
    assert predicted("evaluation.tasks.recall.limit=12").seconds == pytest.approx(wall + 2 * scored)
    other = predicted("attention.lag_size=16")
    assert other.differs == ("attention.lag_size", "evaluation.attention.lag_size") and other.seconds == same.seconds
    for measured_run in measured.records:  # which only says whose layers they are
        measured_run.config["model"] |= {"ranked_on": {"num_hidden_layers": 2}}
    ranked = predicted("model.retrieval_layers=[1]")  # which no layer of this recipe attends differently for
    assert (ranked.source, ranked.differs) == (record.folder, ())
    spared = predicted("attention.dense_layers=[1]")
    assert spared.differs == ("attention.dense_layers", "evaluation.attention.dense_layers")
    for change in ("model=recall_tiny", "recipe.batch_size=4", "data.length=256", "trainer.precision=bf16-mixed"):
        assert predicted(change).source is None and predicted(change).seconds is None, change
    for of_record, alike, unlike in ((None, "false", "true"), (True, "true", "false")):  # older records do not say
        for other in measured.records:
            other.config["trainer"] |= {"compile": of_record}
        assert predicted(f"trainer.compile={alike}").source == record.folder
        assert predicted(f"trainer.compile={unlike}").source is None
    for other in measured.records:
        other.config["recipe"] |= {"train": False}
    assert predicted("recipe=none").source is not None, "what trains nothing is never compiled"
    for other in measured.records:
        other.config["recipe"] |= {"train": True}
        other.config["trainer"] |= {"compile": False}
    new_task = predicted("task=[recall,passkey]", "evaluation.tasks.passkey.limit=3")
    assert new_task.seconds is None and new_task.bytes is not None

    measured.machine = {**measured.machine, "cpu": "another"}
    assert predicted().source is None


# ---------------------------------------------------------------- whose sweep it is


def test_the_plan_is_kept_and_another_sweep_is_not_continued(
    sweeps: Sweeps, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.run("run.seed=0", "attention.lag_size=16,32", "hydra.sweep.dir=runs")
    plan = json.loads(Path("runs/sweep.json").read_text())
    assert {job["folder"]: job["id"] for job in plan["jobs"]} == {
        name: record.id for name, record in records(Path("runs")).items()
    }
    assert [job["swept"] for job in plan["jobs"]] == ["attention.lag_size=16", "attention.lag_size=32"]
    for command, message in (
        (["run.seed=1", "resume=runs"], "none of the 1 jobs is among the 2 of that sweep"),
        (["run.seed=0", "resume=nowhere"], "resume=nowhere: with -m, the folder of a sweep"),
    ):
        with pytest.raises(SystemExit):
            sweeps.run(*command)
        assert message in capsys.readouterr().err


def test_evaluations_are_swept_too(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "model=recall_tiny",
        "trainer=cpu",
        "trainer.progress=false",
        "logger=none",
        "task=[recall]",
        "evaluation.tasks.recall.limit=3",
        "evaluation.compressions=[1,4]",
        "evaluation.length=240",
        "evaluation.bootstrap=100",
        "evaluation.attention.sink_size=4",
        "attention@evaluation.attention=lag_relative,tova",
        "evaluation.attention.lag_size=16,32",
    ]
    sweeps.run(*settings, "hydra.sweep.dir=runs", main=lrsa.evaluate.main, tiny=False)
    found: dict[str, Record] = records(Path("runs"))
    assert len(found) == 4 and all(record.status == "finished" for record in found.values())
    sweeps.run(*settings, "resume=runs", main=lrsa.evaluate.main, tiny=False)
    assert records(Path("runs")) == found
    assert "4 of 4 jobs are finished" in capsys.readouterr().out
