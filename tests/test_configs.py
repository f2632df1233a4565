"""Every YAML composes, and every experiment runs on a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lrsa.attention import from_conf
from lrsa.attention.scorers import SCORERS
from lrsa.config import EvalConf, TrainConf, config_dir, register_configs
from lrsa.data import LRSADataModule
from lrsa.data.vocabulary import build_tokenizer
from lrsa.models import load_tokenizer
from lrsa.results import Record
from lrsa.train import run_training
from lrsa.validation import ConfigError, check_eval, check_train

CONF = config_dir()
TINY = [
    "model=tiny_random", "trainer=cpu", "logger=none", "data=demo_recall", "task=[recall]", "data.length=256",
    "recipe=lrsa_uniform",
]  # fmt: skip


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def tasks_of(option: str) -> list[str]:
    """A task's own name, or those that a group of tasks lists."""
    listed = OmegaConf.load(CONF / "task" / f"{option}.yaml").get("defaults")
    return [option] if listed is None else [task for one in listed for task in tasks_of(one)]


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register_configs()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        yield
    GlobalHydra.instance().clear()


def compose_train(*overrides: str) -> TrainConf:
    conf = OmegaConf.to_object(compose("train", [*overrides, "run.output_dir=unused"]))
    assert isinstance(conf, TrainConf)
    return conf


def compose_eval(*overrides: str) -> EvalConf:
    conf = OmegaConf.to_object(compose("eval", [*overrides, "run.output_dir=unused"]))
    assert isinstance(conf, EvalConf)
    return conf


# ---------------------------------------------------------------- composition


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, option)
        for group in ("attention", "model", "recipe", "trainer", "logger", "data", "task", "experiment")
        for option in options(group)
    ],
)
def test_every_option_composes(group: str, option: str) -> None:
    override = f"task=[{option}]" if group == "task" else f"{group}={option}"
    extra = ["recipe=lrsa_uniform"] if group in ("attention", "model") else []  # a budget or layers of their own
    extra += ["recipe.compressions=[]"] if (group, option) == ("attention", "dense") else []
    extra += ["data=demo_recall", "data.parts.needles.questions=1"] if option == "snapkv_once" else []
    extra += ["data.parts.own.path=rows.jsonl"] if (group, option) == ("data", "jsonl") else []
    extra += ["evaluation.tasks.own.path=rows.jsonl"] if (group, option) == ("task", "own") else []
    conf = compose_train(override, *extra)
    if group == "task":
        assert list(conf.evaluation.tasks) == tasks_of(option)
    if group == "trainer" and option in ("gpu", "fsdp"):
        return  # no GPU here is one of the problems that check_train reports
    if group == "attention" and option in SCORERS and SCORERS[option].reads_future:
        with pytest.raises(ConfigError, match=f"1 setting.*\n.*attention.scorer={option} looks ahead"):
            check_train(conf)
    elif group != "experiment" or conf.trainer.accelerator != "gpu":
        check_train(conf)


@pytest.mark.parametrize("option", [name for name in options("attention") if name != "dense"])
def test_every_sparse_attention_evaluates(option: str) -> None:
    conf = compose_eval(f"attention@evaluation.attention={option}")
    assert conf.evaluation.attention.scorer == option.removesuffix("_once").removesuffix("_adaptive")
    assert (conf.evaluation.attention.schedule == "prefill_once") == option.endswith("_once")
    assert (conf.evaluation.attention.budget == "adaptive") == option.endswith("_adaptive")
    check_eval(conf)


@pytest.mark.parametrize("task", options("task"))
def test_every_task_evaluates(task: str) -> None:
    assert list(compose_eval(f"task=[{task}]").evaluation.tasks) == tasks_of(task)


def test_the_suite_is_rulers_thirteen_and_five_more() -> None:
    ruler, suite = tasks_of("ruler"), tasks_of("suite")
    assert len(ruler) == 13 and suite[:13] == ruler
    assert suite[13:] == ["passkey64", "babi_qa1", "babi_qa2", "babi_qa3", "kv_retrieval"]
    tasks = compose_eval("mode=generate", "task=[suite]").evaluation.tasks
    assert {name: task.limit for name, task in tasks.items() if task.limit != 100} == {"passkey64": 110}


def test_every_choice_of_lm_eval_tasks_composes_and_is_known() -> None:
    """Composed, checked, and each name one of lm-eval's (its folders are indexed, no data is loaded) or ours."""
    import lm_eval.tasks

    from lrsa.evaluation.lm_eval_tasks import FOLDER

    own = Path(lm_eval.tasks.__file__).parent
    names = ("ruler", "longbench", "longbench2", "infinitebench", "babilong")
    manager = lm_eval.tasks.TaskManager(include_path=[*(own / name for name in names), FOLDER], include_defaults=False)
    assert set(options("lm_eval")) >= {*names, "ruler_qa", "lrsa"}
    for option in options("lm_eval"):
        conf = compose_eval("mode=lm_eval", f"lm_eval={option}")
        check_eval(conf)
        assert conf.lm_eval.tasks and set(conf.lm_eval.tasks) <= set(manager.all_tasks)
    assert compose_eval("lm_eval.tasks=[x]").lm_eval.tasks == ["x"]
    long = compose_eval("mode=lm_eval", "lm_eval=ruler", "lm_eval.metadata={max_seq_lengths: [8192]}")
    assert long.lm_eval.metadata == {"max_seq_lengths": [8192]}


def test_recipes_set_the_training_attention_and_studies_the_geometry() -> None:
    overrides = ["experiment=demo", "attention.sink_size=3", "attention.dense_layers=[0]"]
    for recipe, arm, scorer, compressions in (
        ("dense", "dense", "dense", []),
        ("lrsa_uniform", "lrsa", "lag_relative", [4]),
        ("lrsa_mixed", "lrsa_mixed", "lag_relative", [2, 4, 8]),
        ("lrsa", "lrsa", "lag_relative", [1, 1, 4, 8]),
    ):
        conf = compose_train(*overrides, f"recipe={recipe}")
        assert conf.attention.scorer == scorer and conf.recipe.compressions == compressions
        assert conf.run.arm == conf.recipe.name == arm and conf.run.study == "demo"
        assert conf.attention.budget == conf.evaluation.attention.budget
        assert (conf.attention.budget == "concentrated") == (recipe == "lrsa")
        inference = conf.evaluation.attention
        assert (inference.scorer, inference.sink_size, inference.lag_size) == ("lag_relative", 3, 32)
        assert inference.dense_layers == [0] and conf.evaluation.length == conf.data.length == 512
    assert from_conf(compose_train("recipe=dense").attention) is None
    assert compose_train("trainer=gpu").evaluation.precision == "bf16-mixed"
    assert compose_train("attention=tova").attention.scorer == "tova", "a recipe's attention can be overridden"


def test_the_hybrid_is_trained_and_tested_with_the_layers_and_bytes_of_the_default_recipe() -> None:
    conf = compose_train("experiment=smollm2_lossless", "recipe=hybrid", "trainer=cpu")
    check_train(conf)
    rival = compose_train("experiment=smollm2_lossless", "recipe=lrsa")
    assert conf.recipe.compressions == rival.recipe.compressions and conf.data == rival.data
    trained, tested = from_conf(conf.attention), from_conf(conf.evaluation.attention)
    assert trained == tested and trained.scorer == "recency" and trained.equal_bytes_at == 4096
    for factor in (4, 8):
        for index in range(30):
            one = trained.with_compression(factor).for_layer(index, 30)
            other = from_conf(rival.attention).with_compression(factor).for_layer(index, 30)
            assert (one is None) == (other is None)
            assert one is None or one.held(4096) == pytest.approx(other.held(4096), rel=0.03)


@pytest.mark.parametrize("model", ["smollm2", "smollm2_gguf"])
def test_the_default_recipe_spares_the_layers_that_the_model_names(model: str) -> None:
    conf = compose_train(f"model={model}")
    layers = conf.model.retrieval_layers
    assert len(set(layers)) == len(layers) > 0 and max(layers) < 30, "SmolLM2-135M has 30"
    assert conf == compose_train(f"model={model}", "recipe=lrsa") and conf.recipe.compressions == [1, 1, 4, 8]
    for attention in (conf.attention, conf.evaluation.attention):
        assert (attention.budget, attention.dense_layers) == ("concentrated", layers)
    assert from_conf(conf.attention) == from_conf(conf.evaluation.attention)
    check_train(conf)
    other = compose_train(f"model={model}", "model.retrieval_layers=[3,1]")
    assert other.attention.dense_layers == other.evaluation.attention.dense_layers == [3, 1]


@pytest.mark.parametrize("model", ["smollm2", "smollm2_gguf"])
def test_what_the_layers_were_ranked_on_is_smollm2(model: str) -> None:
    shape = compose_train("model=smollm2_random").model.config
    ranked_on = compose_train(f"model={model}").model.ranked_on
    assert shape is not None and ranked_on and ranked_on == {name: shape[name] for name in ranked_on}
    assert {compose_train(f"model={other}").model.ranked_on is None for other in ("recall_tiny", "tiny_random")} == {
        True
    }


def test_studies_of_the_uniform_recipe_have_it_without_being_told() -> None:
    for study in ("demo", "qwen2_5_7b", "llama3_1_8b", "smollm2_robustness", "smollm2_recipe", "smollm2_qa"):
        conf = compose_train(f"experiment={study}")
        assert (conf.run.arm, conf.recipe.compressions) == ("lrsa", [4]), study
        assert conf.attention.budget == conf.evaluation.attention.budget == "uniform", study


def test_the_real_run_is_what_it_says() -> None:
    conf = compose_train("experiment=smollm2_robustness")
    assert (conf.data.length, conf.attention.sink_size, conf.attention.lag_size) == (4096, 16, 128)
    assert (conf.recipe.steps, conf.recipe.batch_size, conf.recipe.learning_rate) == (300, 8, 2e-4)
    tasks = {name: task.limit for name, task in conf.evaluation.tasks.items()}
    assert tasks == {"needles": 320, "xquad": None, "hotpotqa": 300}
    assert conf.evaluation.compressions == [1, 2, 4, 8, 16]
    assert conf.trainer.precision == conf.evaluation.precision == "bf16-mixed"


def test_the_confirmation_study_trains_every_arm_alike_and_reads_no_book_that_is_held_out() -> None:
    recipes = ("none", "dense", "lrsa_random", "lrsa")
    confs = [compose_train("experiment=smollm2_lossless", f"recipe={name}") for name in recipes]
    assert [conf.run.arm for conf in confs] == ["none", "dense", "random", "lrsa"]
    assert confs[2].recipe.random_share == 1 and confs[2].recipe.compressions == [1, 4, 8]
    assert compose_train("experiment=smollm2_lossless") == confs[3] and confs[3].recipe.compressions == [1, 1, 4, 8]
    assert (confs[3].attention.budget, confs[3].attention.dense_layers) == (
        "concentrated",
        confs[3].model.retrieval_layers,
    )
    for conf in confs:
        assert (conf.run.study, conf.recipe.steps, conf.recipe.learning_rate) == ("smollm2_lossless", 1000, 2e-4)
        assert conf.evaluation.attention == confs[3].evaluation.attention and conf.evaluation.compressions == [
            1,
            2,
            4,
            8,
        ]
        assert from_conf(conf.evaluation.attention) == from_conf(confs[3].attention), "as the default recipe trains"
        assert {name: task.limit for name, task in conf.evaluation.tasks.items()} == {
            "needles": 320,
            "xquad": None,
            "hotpotqa": 300,
        }
        texts = [part.filler or f"@{part.split}" for part in conf.data.parts.values()]
        assert texts == ["Salesforce/wikitext:wikitext-2-raw-v1@train"] * 2 + ["@train"]
        assert not {part.source for part in conf.data.parts.values()} & {"vt", "kv", "passkey"}, "what is untouched"
    untouched = compose_eval("mode=generate", "task=[untouched]").evaluation.tasks
    assert {task.source for task in untouched.values()} == {"vt", "kv", "passkey"}


@pytest.mark.parametrize(
    "override", ["recipe.stepz=3", "recipe.steps=many", "data.parts.needles.source=3=4", "evaluation.tasks=5"]
)
def test_unknown_fields_and_wrong_types_are_refused(override: str) -> None:
    from hydra.errors import HydraException

    with pytest.raises((HydraException, OmegaConfBaseException)):
        compose_train("data=demo_recall", override)


# ---------------------------------------------------------------- experiments


def sweep_arms(experiment: str) -> list[str]:
    config = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
    params: DictConfig = config.hydra.sweeper.params or OmegaConf.create({})
    return [f"{key}={value}" for key, values in params.items() for value in str(values).split(",")] or ["run.seed=0"]


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and stand-ins for the hub's data sets in their own columns."""
    folder = tmp_path_factory.mktemp("world")
    rows = {"squad": [], "hotpotqa": []}  # type: dict[str, list[dict[str, Any]]]
    for number in range(24):
        text = (
            f"Town {number} was built in {1000 + number} by people from Hill {number}. "
            "It lies by the river and has an old market and a tower."
        )
        rows["squad"].append(
            {
                "id": f"s{number}",
                "title": f"Town_{number}",
                "context": text,
                "question": f"When was town {number} built?",
                "answers": {"text": [str(1000 + number)], "answer_start": [0]},
            }
        )
        rows["hotpotqa"].append(
            {
                "id": f"h{number}",
                "question": f"Which river is near town {number}?",
                "answer": "the river",
                "supporting_facts": {"title": [f"Town {number}"], "sent_id": [0]},
                "context": {"title": [f"Town {number}", f"Hill {number}"], "sentences": [[text], ["A hill of stone."]]},
            }
        )
    for name, entries in rows.items():
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in (entries if split == "train" else entries[16:]))
            (folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "prose").mkdir()
    for title in ("story", "tale"):
        lines = (
            f"The rain of {title} night {k} fell on town {500 + k} for hours. People ran home by the old road, "
            "past the tower and the market, and shut their doors.\n\n"
            for k in range(100)
        )
        (folder / "prose" / f"{title}.txt").write_text("".join(lines), encoding="utf-8")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("data", [name for name in options("data") if name.startswith("recipe")])
def test_every_recipe_mixture_gives_samples(data: str, tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the experiments below, but for the training: a batch of each part."""
    monkeypatch.setenv("LRSA_DATA", str(tiny_world))
    sizes = ["model=tiny_random", "trainer=cpu", "data.length=800", "recipe.steps=40"]
    conf = compose_train("experiment=smollm2_robustness", f"data={data}", *sizes)
    check_train(conf)
    module = LRSADataModule(conf.data, load_tokenizer(str(tiny_world / "tokenizer")), conf.recipe, conf.run.seed)
    drawn = {part["name"]: part["drawn"] for part in module.describe()}
    assert set(drawn) == set(conf.data.parts) and min(drawn.values()) > 0
    assert sum(part.weight for part in conf.data.parts.values()) == pytest.approx(1)
    for part in module.mixture.parts.values():
        sample = part.sample(0)
        assert len(sample.input_ids) == 800 and sample.answer_spans[-1][1] == 800
    trained = [part for part in conf.data.parts.values() if part.path]
    assert {part.split for part in trained} <= {"train", "train[fit]"}, "nothing that is tested on"
    assert all((part.filler or "@train").endswith("@train") for part in conf.data.parts.values())


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_runs_on_a_tiny_model(
    experiment: str, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms of its sweep, through training, evaluation and record; only sizes are overridden."""
    monkeypatch.setenv("LRSA_DATA", str(tiny_world))
    arms = sweep_arms(experiment)
    tasks = list(compose_train(f"experiment={experiment}").evaluation.tasks)
    for number, arm in enumerate(arms):
        conf = compose_train(
            f"experiment={experiment}",
            arm,
            "model=tiny_random",
            "model.retrieval_layers=[1]",
            f"model.tokenizer={tiny_world / 'tokenizer'}",
            "trainer=cpu",
            "logger=none",
            "trainer.progress=false",
            "data.length=700",
            "attention.sink_size=4",
            "attention.lag_size=32",
            "recipe.steps=2",
            "recipe.batch_size=2",
            "recipe.micro_batch_size=1",
            "recipe.warmup_steps=1",
            "evaluation.bootstrap=100",
            *(f"evaluation.tasks.{task}.limit=2" for task in tasks),
        )
        conf.run.output_dir = str(tmp_path / str(number))
        run_training(conf, overrides=[arm])
        record = Record.load(tmp_path / str(number))
        assert record.status == "finished" and record.arm == conf.run.arm
        assert record.training is not None and record.training["steps"] == 2
        assert len(record.training["loss_curve"]["loss"]) == 2
        assert {cell["task"] for cell in record.cells} == set(tasks)
        columns = conf.evaluation.floor + conf.evaluation.ceiling + len(conf.evaluation.compressions)
        assert len(record.cells) == columns * len(tasks)
        assert len(record.outcomes()) == 2 * len(record.cells)
        assert {part["name"] for part in record.data} >= {*conf.data.parts, *tasks}
        assert (tmp_path / str(number) / "model" / "model.safetensors").exists()
