"""Every YAML composes, every experiment runs on a tiny model, and what cannot work is refused before anything runs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lrsa.attention import flash4, from_conf
from lrsa.attention.scorers import SCORERS
from lrsa.config import EvalConf, TrainConf, config_dir, register_configs
from lrsa.data import LRSADataModule
from lrsa.data.vocabulary import build_tokenizer
from lrsa.models import load_tokenizer
from lrsa.results import Record
from lrsa.train import run_training
from lrsa.validation import ConfigError, ConfigWarning, check_eval, check_train

CONF = config_dir()
TINY = ["model=tiny_random", "trainer=cpu", "logger=none", "data=demo_recall", "task=[recall]", "data.length=256"]


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
    extra = ["recipe.compressions=[]"] if (group, option) == ("attention", "dense") else []
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
    for recipe, scorer, compressions in (
        ("dense", "dense", []),
        ("lrsa", "lag_relative", [4]),
        ("lrsa_mixed", "lag_relative", [2, 4, 8]),
    ):
        conf = compose_train(*overrides, f"recipe={recipe}")
        assert conf.attention.scorer == scorer and conf.recipe.compressions == compressions
        assert conf.run.arm == conf.recipe.name == recipe and conf.run.study == "demo"
        inference = conf.evaluation.attention
        assert (inference.scorer, inference.sink_size, inference.lag_size) == ("lag_relative", 3, 32)
        assert inference.dense_layers == [0] and conf.evaluation.length == conf.data.length == 512
    assert from_conf(compose_train("recipe=dense").attention) is None
    assert compose_train("trainer=gpu").evaluation.precision == "bf16-mixed"
    assert compose_train("attention=tova").attention.scorer == "tova", "a recipe's attention can be overridden"


def test_the_real_run_is_what_it_says() -> None:
    conf = compose_train("experiment=smollm2_robustness")
    assert (conf.data.length, conf.attention.sink_size, conf.attention.lag_size) == (4096, 16, 128)
    assert (conf.recipe.steps, conf.recipe.batch_size, conf.recipe.learning_rate) == (300, 8, 2e-4)
    tasks = {name: task.limit for name, task in conf.evaluation.tasks.items()}
    assert tasks == {"needles": 320, "xquad": None, "hotpotqa": 300}
    assert conf.evaluation.compressions == [1, 2, 4, 8, 16]
    assert conf.trainer.precision == conf.evaluation.precision == "bf16-mixed"


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
    sizes = ["model=tiny_random", "trainer=cpu", "data.length=700", "recipe.steps=40"]
    conf = compose_train("experiment=smollm2_robustness", f"data={data}", *sizes)
    check_train(conf)
    module = LRSADataModule(conf.data, load_tokenizer(str(tiny_world / "tokenizer")), conf.recipe, conf.run.seed)
    drawn = {part["name"]: part["drawn"] for part in module.describe()}
    assert set(drawn) == set(conf.data.parts) and min(drawn.values()) > 0
    assert sum(part.weight for part in conf.data.parts.values()) == pytest.approx(1)
    for part in module.mixture.parts.values():
        sample = part.sample(0)
        assert len(sample.input_ids) == 700 and sample.answer_spans[-1][1] == 700
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


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.scorer=newest"], r"attention: .*'newest'.*lag_relative.*random.*recency.*tova"),
        (["model.attention_backend=cudnn"], r"attention_backend='cudnn'.*reference.*gather"),
        (["data.parts.needles.source=squat"], r"data\.parts\.needles\.source='squat'.*hotpotqa.*squad"),
        (["evaluation.tasks.recall.source=jsonl"], r"evaluation\.tasks\.recall\.path: a hub name, a local folder"),
        (["+evaluation.tasks.recall.args.depth=3"], r"evaluation\.tasks\.recall: .*'depth'.*valid"),
        (["attention.keep_ratio=1.5"], r"keep_ratio=1\.5"),
        (["attention.keep_ratio=0.5", "attention.top_k=3"], r"keep_ratio=0\.5 and top_k=3"),
        (["attention.chunk_size=0"], r"chunk_size=0"),
        (["attention.keep_ratio=null", "attention.top_k=500"], r"top_k=500.*lag_size=128"),
        (["recipe.micro_batch_size=3"], r"micro_batch_size=3 does not divide recipe\.batch_size=8"),
        (["recipe.compressions=[0.5]"], r"recipe\.compressions=\[0\.5\].*below 1"),
        (["evaluation.compressions=[1,0.25]"], r"evaluation\.compressions=\[1.*0\.25\].*below 1"),
        (["evaluation.compressions=[2,2]"], r"repeats a value"),
        (
            ["recipe=dense", "recipe.compressions=[4]"],
            r"recipe\.compressions=\[4.*scorer=dense.*recipe\.compressions=\[\]",
        ),
        (["attention@evaluation.attention=dense"], r"evaluation\.attention\.scorer=dense cannot compress.*\[1\]"),
        (["trainer.precision=16-mixed"], r"trainer\.precision='16-mixed'.*32-true, bf16-mixed"),
        (["trainer.accelerator=tpu"], r"trainer\.accelerator='tpu'.*cpu"),
        (["trainer.devices=2"], r"trainer\.devices=2"),
        (["recipe.warmup_steps=900"], r"warmup_steps=900 exceeds recipe\.steps=300"),
        (["recipe.min_learning_rate=1"], r"min_learning_rate=1\.0 is above recipe\.learning_rate=0\.0001"),
        (["logger.mode=on"], r"logger\.mode='on'.*offline"),
        (["resume=nowhere"], r"resume=nowhere: no checkpoint at nowhere"),
        (["model.dtype=int8"], r"model\.dtype='int8'.*float32"),
        (["model.gguf_file=a.gguf"], r"model\.gguf_file=a\.gguf"),
        (["data.parts.needles.weight=0"], r"all weights are 0"),
        (
            ["data.parts.needles.source=prose", "+data.parts.needles.args.targets=256"],
            r"data\.parts\.needles\.args\.targets=256 must be below data\.length=256",
        ),
        (
            ["data.parts.needles.source=prose", "+data.parts.needles.args.targets=many"],
            r"data\.parts\.needles: source 'prose' has no args",
        ),
        (["evaluation.tasks.recall.source=prose"], r"recall\.source=prose asks nothing: lrsa-eval mode=perplexity"),
        (["data.parts.needles.apart=true"], r"data\.parts\.needles\.apart=true is for tasks"),
        (["evaluation.tasks.recall.apart=true"], r"tasks\.recall\.apart=true .*recall\.questions=1: raise it"),
        (["data.parts.needles.limit=5"], r"data\.parts\.needles\.limit=5 bounds tasks alone"),
        (
            ["attention=snapkv_once"],
            r"attention\.schedule=prefill_once .* row of data\.parts\.needles\.questions=8 has no one end: set",
        ),
        (
            ["evaluation.attention.schedule=prefill_once", "evaluation.tasks.recall.questions=3"],
            r"a row of evaluation\.tasks\.recall\.questions=3 has no one end",
        ),
        (["attention.schedule=prefill_once", "attention.chunk_size=8"], r"chunk_size=8 with schedule='prefill_once'"),
        (["attention=oracle"], r"attention\.scorer=oracle looks ahead .* attention@evaluation\.attention=oracle"),
        (["attention=keydiff", "attention.budget=adaptive"], r"attention: budget='adaptive' .*'keydiff'.*snapkv, tova"),
        (
            ["attention=snapkv_adaptive", "model.attention_backend=gather"],
            r"attention_backend=gather cannot compute attention: budget='adaptive' keeps .* set it to auto",
        ),
        (
            ["attention@evaluation.attention=oracle", "model.attention_backend=flex"],
            r"attention_backend=flex cannot compute evaluation\.attention: scorer='oracle' ranks .* set it to auto",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_with_values_and_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_train(compose_train(*TINY, *overrides))
    text = " ".join(str(error.value).split())
    assert re.search(message, text), text


@pytest.mark.parametrize(("installed", "words"), [(None, "not installed"), ("4.0.0b9", "4.0.0b9, and too old")])
def test_a_backend_whose_package_is_missing_is_refused_at_once(installed, words, monkeypatch) -> None:
    monkeypatch.setattr(flash4, "_installed", lambda: installed)
    with pytest.raises(ConfigError, match=rf"attention_backend=flash4: flash-attn-4 is {words}: pip install"):
        check_train(compose_train(*TINY, "model.attention_backend=flash4"))
    monkeypatch.setattr(flash4, "_installed", lambda: "4.0.0")
    check_train(compose_train(*TINY, "model.attention_backend=flash4"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=lm-eval"], r"mode='lm-eval' is unknown; choose one of score, generate, lm_eval, perplexity"),
        (["mode=generate", "generate.max_new_tokens=0"], r"generate\.max_new_tokens=0: tokens, at least 1, or null"),
        (
            ["attention@evaluation.attention=snapkv_once", "evaluation.tasks.squad.questions=2"],
            r"row of evaluation\.tasks\.squad\.questions=2 has no one end",
        ),
        (
            ["mode=lm_eval", "lm_eval.tasks=[x]", "evaluation.attention.schedule=prefill_once"],
            r"schedule=prefill_once does not work with mode=lm_eval.*mode=generate",
        ),
        (["mode=generate", "generate.block_size=-1"], r"generate\.block_size=-1"),
        (["mode=lm_eval"], r"lm_eval\.tasks is empty"),
        (["mode=perplexity", "perplexity.windows=1"], r"perplexity\.windows=1: at least 2"),
        (["mode=perplexity", "perplexity.buckets=0"], r"perplexity\.buckets=0: .* at least 1"),
        (
            ["mode=perplexity", "perplexity.buckets=300", "evaluation.length=512"],
            r"perplexity\.buckets=300 of evaluation\.length=512 tokens are shorter than 2",
        ),
        (
            ["mode=perplexity", "attention@evaluation.attention=snapkv_once"],
            r"schedule=prefill_once does not work with mode=perplexity.*use schedule=chunked",
        ),
        (
            ["mode=perplexity", "attention@evaluation.attention=oracle"],
            r"scorer=oracle looks ahead, .* choose another for mode=perplexity",
        ),
        (
            ["mode=generate", "attention@evaluation.attention=oracle"],
            r"mode=generate needs a cache, which cannot hold evaluation\.attention: scorer='oracle' .* use mode=score",
        ),
        (
            ["mode=lm_eval", "lm_eval.tasks=[x]", "attention@evaluation.attention=snapkv_adaptive"],
            r"mode=lm_eval needs a cache, which cannot hold evaluation\.attention: budget='adaptive' .* use mode=score",
        ),
        (["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.include_path=/nowhere"], r"include_path=/nowhere is no folder"),
        (["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.limit=0"], r"lm_eval\.limit=0: at least 1"),
        (["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.gen_kwargs=5"], r"lm_eval\.gen_kwargs=5 is not a mapping"),
        (
            ["mode=lm_eval", "lm_eval.tasks=[x]", "lm_eval.limit=9", "lm_eval.metadata={max_seq_lengths: [512, 1024]}"],
            r"lm_eval\.limit=9 takes .* the first of lm_eval\.metadata\.max_seq_lengths=\[512, 1024\]: .*lrsa-eval -m",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_evaluations_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_eval(compose_eval("model=recall_tiny", "trainer=cpu", *overrides))
    text = " ".join(str(error.value).split())
    assert re.search(message, text), text


def test_every_mode_passes() -> None:
    modes = (["mode=score"], ["mode=generate"], ["mode=perplexity"], ["mode=lm_eval", "lm_eval.tasks=[niah_single_1]"])
    for overrides in modes:
        conf = compose_eval("model=recall_tiny", "trainer=cpu", *overrides, "evaluation.length=512")
        check_eval(conf)
    check_eval(compose_eval("mode=generate", "attention@evaluation.attention=oracle", "evaluation.compressions=[1]"))
    conf = compose_eval(*overrides, "lm_eval.limit=9", "lm_eval.metadata={max_seq_lengths: [4096]}", "trainer=cpu")
    check_eval(conf)
    assert conf.lm_eval.metadata == {"max_seq_lengths": [4096]}


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="3 setting") as error:
        check_train(
            compose_train(*TINY, "recipe.steps=0", "recipe.warmup_steps=0", "recipe.batch_size=0", "data.length=1")
        )
    for name in ("recipe.steps=0", "recipe.batch_size=0", "data.length=1"):
        assert name in str(error.value)


def test_samples_too_short_to_compress_warn() -> None:
    conf = compose_train(*TINY)
    with pytest.warns(ConfigWarning, match=r"data\.length=256 never compresses: .*16 \+ 2 \* 128 = 272"):
        check_train(conf)
    with pytest.warns(ConfigWarning, match=r"evaluation\.length=200"):
        check_eval(compose_eval(*TINY[:3], "task=[recall]", "evaluation.length=200"))


def test_a_compression_that_keeps_nothing_warns() -> None:
    with pytest.warns(ConfigWarning, match=r"\[16\.0\] keep nothing"):
        check_train(compose_train(*TINY, "attention.lag_size=8"))
