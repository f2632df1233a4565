"""`lrsa-eval` in each of its modes: what ends up in the record, and what a table makes of it."""

import contextlib
import dataclasses
import gzip
import json
import sys
import types
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from lrsa.config import EvalConf, TableConf
from lrsa.data.wordlists import HAYSTACK
from lrsa.evaluate import SAMPLES_FILE, other_model, run_evaluation
from lrsa.evaluation.errors import EvaluationInputError, TruncationWarning
from lrsa.models import load_model
from lrsa.results import Record, RecordError
from lrsa.results.figures import position_figure
from lrsa.results.positions import position_frame
from lrsa.results.selection import read_selection
from lrsa.table import build
from lrsa.tracking.run import results_figure
from lrsa.validation import ConfigError

TINY = [
    "model=recall_tiny",
    "trainer=cpu",
    "trainer.progress=false",
    "logger=none",
    "task=[recall]",
    "evaluation.tasks.recall.limit=12",
    "evaluation.length=320",
    "evaluation.attention.sink_size=4",
    "evaluation.attention.lag_size=32",
    "evaluation.compressions=[1,4]",
    "evaluation.bootstrap=100",
]


pytestmark = pytest.mark.usefixtures("hydra_configs")


def configure(folder: Path, *overrides: str) -> EvalConf:
    conf = OmegaConf.to_object(compose("eval", [*TINY, *overrides, f"run.output_dir={folder}"]))
    assert isinstance(conf, EvalConf)
    return conf


def test_generated_answers_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluation(configure(tmp_path / "one", "mode=generate", "generate.block_size=100", "run.arm=one"))
    shown = capsys.readouterr().out
    assert "recall: exact match, %" in shown and "recall: F1, %" in shown
    assert "recall: string match, %" in shown
    record = Record.load(tmp_path / "one")
    assert record.status == "finished" and record.config["mode"] == "generate"
    assert [cell["compression"] for cell in record.cells] == [None, 1, 4]
    protocol = record.protocol
    assert protocol is not None
    assert (protocol["decoding"], protocol["truncation"], protocol["padding"]) == ("greedy", "none", "left")
    assert protocol["tasks"]["recall"] == {"prompt": "chat", "stop_tokens": {"3": "<end>"}}
    assert protocol["cache"]["block_size"] == 100 and len(protocol["chat_template"]["sha256"]) == 64
    assert set(record.metrics) >= {
        "exact/recall/4x",
        "exact_match/recall/4x",
        "f1/recall/floor",
        "rouge_l/recall/4x",
        "string_match/recall/4x",
    }
    assert record.data[0]["template"].endswith("{answer} <end>")
    rows = record.outcomes()
    assert len(rows) == 36 and all(isinstance(row["text"], str) for row in rows)

    scored = run_evaluation(configure(tmp_path / "two", "run.arm=one"))
    assert scored.protocol is None and "nll" in scored.outcomes()[0]
    same = [{key: row[key] for key in ("id", "compression", "exact", "tokens")} for row in rows]
    assert same == [{key: row[key] for key in same[0]} for row in scored.outcomes()]

    options = {"records": [str(tmp_path)], "output": str(tmp_path / "table"), "figure": False, "bootstrap": 100}
    table = build(TableConf(metric="string_match", **options)).table
    assert "String match, %" in (tmp_path / "table" / "table.md").read_text()
    table = build(TableConf(metric="f1", **options)).table  # the scored run of the same arm has none, so does not clash
    text = (tmp_path / "table" / "table.md").read_text()
    assert "F1, %" in text and table.rows[0].cells[1].interval is not None


def test_the_suite_runs_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks without a download; the two that read SQuAD and HotpotQA, from stand-ins."""
    text = "The tower of town {} was built in {}. It stands by the river and has an old bell."
    row = {"answers": {"text": ["1001"], "answer_start": [0]}, "title": "T", "answer": "1001"}
    for name in ("squad", "hotpotqa", "prose"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in ("squad", "hotpotqa"):
        lines = []
        for number in range(3):
            said, asked = text.format(number, 1001), f"When was tower {number} built?"
            more = {"supporting_facts": {"title": ["T"]}, "context": {"title": ["T"], "sentences": [[said]]}}
            more = {"context": said} if name == "squad" else more
            lines.append(json.dumps({**row, "id": f"{name}{number}", "question": asked, **more}) + "\n")
        (tmp_path / "data" / name / "validation.jsonl").write_text("".join(lines))
    (tmp_path / "data" / "prose" / "a.txt").write_text("Rain fell on the town. People ran home and slept.\n\n" * 9)
    monkeypatch.setenv("LRSA_DATA", str(tmp_path / "data"))
    overrides = [
        "model=tiny_random",
        "trainer=cpu",
        "logger=none",
        "trainer.progress=false",
        "evaluation.bootstrap=100",
    ]
    overrides += ["mode=generate", "task=[suite]", "evaluation.length=1300", "evaluation.compressions=[4]"]
    conf = OmegaConf.to_object(compose("eval", [*overrides, f"run.output_dir={tmp_path / 'run'}"]))
    assert isinstance(conf, EvalConf) and len(conf.evaluation.tasks) == 18
    conf.evaluation.floor = False
    for task in conf.evaluation.tasks.values():
        task.limit = 1
    conf.evaluation.tasks["ruler_cwe"].args |= {"common_repeats": 6, "uncommon_repeats": 1}
    record = run_evaluation(conf)
    assert [cell["task"] for cell in record.cells] == list(conf.evaluation.tasks)
    assert all(cell["n"] == 1 and 0 <= cell["string_match"] <= 1 for cell in record.cells)
    assert {cell["measured_ratio"] > 2 for cell in record.cells} == {True}
    templates = {fact["name"]: fact["template"] for fact in record.data}
    assert "they are: {answer}" in templates["ruler_vt"] and "Answer: {answer}" in templates["ruler_qa_1"]


def test_lm_eval_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    import lrsa.evaluation.lm_eval_run

    # Seconds each, and of no account here: what lm-eval knows of the machine, and its own ten thousand tasks.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    monkeypatch.setattr(
        lrsa.evaluation.lm_eval_run, "TaskManager", lambda **given: TaskManager(**{**given, "include_defaults": False})
    )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "own.yaml").write_text(
        "task: own\ncustom_dataset: !function docs.rows\noutput_type: generate_until\ntest_split: test\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: river\ngeneration_kwargs: {until: [], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tasks / "docs.py").write_text(
        "import datasets\ndef rows(lengths, **_):\n"
        "    return {'test': datasets.Dataset.from_list([{'text': 'the river ' * n} for n in lengths])}\n"
    )
    conf = configure(
        tmp_path / "run",
        "mode=lm_eval",
        "lm_eval.tasks=[own]",
        f"lm_eval.include_path={tasks}",
        "lm_eval.metadata={lengths: [20, 90, 60]}",
        "lm_eval.gen_kwargs={max_gen_toks: 5}",
        "lm_eval.max_length=150",
    )
    with pytest.warns(TruncationWarning, match="1 of 3 prompts"):
        record = run_evaluation(conf)
    loaded = Record.load(record.folder)
    assert loaded.status == "finished" and loaded.cells == []
    assert set(loaded.metrics) >= {"own/exact_match,none/full", "own/exact_match,none/4x"}
    assert loaded.protocol is not None
    run = loaded.protocol["compressions"]["4x"]
    assert run["truncation"] == {"side": "left", "requests": 3, "truncated": 1, "tokens_lost": 35, "most_lost": 35}
    assert run["decoding"][0]["max_new_tokens"] == 5 and run["cache"]["cache_ratio"] > 1
    assert loaded.data[0]["name"] == "own" and loaded.data[0]["n"] == 3
    with gzip.open(loaded.folder / SAMPLES_FILE, "rt") as lines:
        samples = [json.loads(line) for line in lines]
    assert len(samples) == 6 and {sample["compression"] for sample in samples} == {1.0, 4.0}
    assert "exact_match,none" in capsys.readouterr().out


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text("\n\n".join(" ".join(HAYSTACK[k : k + 4]) for k in range(0, len(HAYSTACK) - 4)))
    return file


def test_prose_by_position_and_its_table(tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["mode=perplexity", f"perplexity.text={prose}", "perplexity.buckets=4", "evaluation.length=160"]
    one = run_evaluation(configure(tmp_path / "runs/one", *options, "run.arm=one"))
    assert "prose 120 to 159: difference to full, nats" in capsys.readouterr().out
    record = Record.load(one.folder)
    windows = record.data[0]["n"]
    assert record.status == "finished" and record.data[0]["name"] == "prose" and windows > 5
    stretches = [[0, 160], [0, 40], [40, 80], [80, 120], [120, 160]]
    found = [(cell["compression"], cell["positions"]) for cell in record.cells]
    assert found == [(factor, positions) for factor in (1, 4) for positions in stretches]
    assert len(record.outcomes()) == 2 * 5 * windows
    assert set(record.metrics) >= {"nll/prose/4x", "nll/prose 120 to 159/full"}
    assert results_figure(record) is not None

    run_evaluation(configure(tmp_path / "runs/two", *options, "run.arm=two", "evaluation.attention.sink_size=20"))
    common = {"records": [str(tmp_path / "runs")], "metric": "nll", "bootstrap": 200}
    _, written, table, _ = build(TableConf(reference="full", output=str(tmp_path / "full"), **common))
    assert {path.name for path in written} >= {"table.md", "position.pdf", "position.png"}
    text = (tmp_path / "full/table.md").read_text()
    assert "**Difference to full, nats**, paired by example:" in text and "NLL, nats a token, with" in text
    assert f"| prose 120 to 159 | one | {windows} |" in text and "| 4x (1.00x to " in text
    gain = table.differences[-1].cells
    assert gain[0].interval and gain[0].interval.mean == 0 and gain[1].interval and gain[1].interval.mean != 0
    frame = position_frame(table)
    assert len(frame) == 2 * 2 * 4 and list(frame["middle"].unique()) == [20, 60, 100, 140]
    axes = position_figure(frame).axes
    assert [panel.get_title(loc="left") for panel in axes] == ["one", "two"]
    assert axes[0].get_ylabel() == "NLL above full cache, nats a token"
    assert axes[0].get_title(loc="right") == f"n = {windows}", "no difference without its n"
    between = build(TableConf(figure=False, output=str(tmp_path / "arms"), **common)).table
    assert between.reference == "one" and between.differences[-1].arm == "two"
    assert position_figure(position_frame(between)).axes[0].get_ylabel() == "NLL of prose, nats a token"
    with pytest.raises(RecordError, match="no cell of the arms"):
        build(TableConf(**(common | {"metric": "exact"})))


def test_a_window_that_the_text_does_not_fill_is_told(tmp_path: Path, prose: Path) -> None:
    options = ["mode=perplexity", f"perplexity.text={prose}", "evaluation.length=100000"]
    with pytest.raises(EvaluationInputError, match=r"give a longer text, or lower evaluation\.length"):
        run_evaluation(configure(tmp_path / "run", *options))
    assert Record.load(tmp_path / "run").status == "failed"


def test_rules_of_the_mask_form_are_scored(tmp_path: Path) -> None:
    """What only `backend=reference` computes, chosen by itself; the sizes are those of a uniform budget."""
    cells = {}
    for attention in ("lag_relative", "oracle", "snapkv_adaptive"):
        options = [f"attention@evaluation.attention={attention}", "evaluation.batch_size=5", "evaluation.floor=false"]
        record = run_evaluation(configure(tmp_path / attention, *options))
        cells[attention] = Record.load(record.folder).cells
    full, compressed = zip(*cells.values(), strict=True)
    assert full[0]["nll"] == full[1]["nll"] == full[2]["nll"]
    assert len({cell["nll"] for cell in compressed}) == 3
    assert len({(cell["slots"], cell["measured_ratio"]) for cell in compressed}) == 1
    assert cells["oracle"][1]["exact"] >= cells["lag_relative"][1]["exact"]


def test_a_limit_below_the_references_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="max_new_tokens=2 is below the 3 tokens of the reference"):
        run_evaluation(configure(tmp_path, "mode=generate", "generate.max_new_tokens=2"))
    record = Record.load(tmp_path)
    assert record.status == "failed" and record.protocol is not None


@pytest.fixture
def half_press(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for kvpress, which wants an older transformers: a press that drops every second token of the cache."""

    @dataclasses.dataclass
    class HalfPress:
        compression_ratio: float = 0.0
        window: int = 3

        @contextlib.contextmanager
        def __call__(self, model):
            caches = []

            def before(module, args, kwargs):
                caches.append(kwargs["past_key_values"])

            handle = model.register_forward_pre_hook(before, with_kwargs=True)
            yield
            handle.remove()
            for layer in caches[0].layers:
                layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    module = types.ModuleType("kvpress")
    module.HalfPress = HalfPress  # type: ignore[attr-defined]
    module.WrapperPress = dataclasses.make_dataclass("WrapperPress", [])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", module)


def test_a_peers_press_compresses_and_is_measured(tmp_path: Path, half_press: None) -> None:
    options = ["mode=generate", "generate.peer=kvpress/HalfPress", "evaluation.batch_size=1", "run.arm=peer"]
    run_evaluation(configure(tmp_path / "one", *options, "generate.peer_args={window: 5}", "evaluation.floor=false"))
    record = Record.load(tmp_path / "one")
    full, half = record.cells
    assert full["measured_ratio"] == 1 and half["measured_ratio"] == pytest.approx(2, abs=0.1)
    assert half["slots"] == half["cache_slots"] == pytest.approx(half["length"] / 2, abs=5)  # the question stays whole
    assert half["exact"] < full["exact"]
    assert record.protocol is not None
    assert record.protocol["cache"]["compressed"] == "kvpress/HalfPress"
    assert record.protocol["cache"]["peer_args"] == {"window": 5}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generate.peer=vllm", "evaluation.batch_size=1"], "kvpress/<Press>"),
        (["generate.peer=kvpress/NoPress", "evaluation.batch_size=1"], "it has HalfPress, WrapperPress"),
        (["generate.peer=kvpress/WrapperPress", "evaluation.batch_size=1"], "no compression_ratio of its own"),
        (
            ["generate.peer=kvpress/HalfPress", "evaluation.batch_size=1", "generate.peer_args={size: 5}"],
            "takes no size",
        ),
        (["generate.peer=kvpress/HalfPress"], "evaluation.batch_size=8 must be 1"),
        (
            ["generate.peer=kvpress/HalfPress", "evaluation.batch_size=1", "generate.block_size=9"],
            "block_size=9 must be",
        ),
        (["generate.peer_args={size: 5}"], "belong to generate.peer"),
    ],
)
def test_a_peer_that_cannot_work_is_refused_at_once(
    tmp_path: Path, half_press: None, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_evaluation(configure(tmp_path, "mode=generate", *overrides))


def test_kvpress_itself(tmp_path: Path) -> None:
    pytest.importorskip("kvpress", reason="kvpress needs transformers < 5.3: make test-peers")
    ratios = {}
    for press in ("LagKVPress", "SnapKVPress", "KnormPress"):
        args = "{window_size: 16}" if press == "SnapKVPress" else "{}"
        options = [
            "mode=generate",
            f"generate.peer=kvpress/{press}",
            "evaluation.batch_size=1",
            "evaluation.floor=false",
        ]
        run_evaluation(configure(tmp_path / press, *options, f"generate.peer_args={args}"))
        full, compressed = Record.load(tmp_path / press).cells
        assert full["exact"] > compressed["exact"]
        ratios[press] = compressed["measured_ratio"]
    assert all(ratio == pytest.approx(4, abs=0.3) for ratio in ratios.values()), ratios


def test_selection_and_what_stands_beside_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = load_model("recall-tiny")
    for name, weight in other.named_parameters():
        if "k_proj" in name:
            weight.data = weight.data.flip(0)
    other.save_pretrained(tmp_path / "other")
    more = ["mode=selection", f"selection.against={tmp_path / 'other'}", "selection.name=flipped", "run.arm=as shipped"]
    record = run_evaluation(configure(tmp_path / "run", *more, "selection.scorer_samples=4"))
    shown = capsys.readouterr().out
    for said in ("What survives until the answer", "Agreement", "The swap", "What as shipped has over flipped"):
        assert said in shown
    assert [(cell["task"], cell["compression"], cell["n"]) for cell in record.cells] == [("recall", 4, 12)]
    assert {fact["name"] for fact in record.data} == {"recall"}
    scored = run_evaluation(configure(tmp_path / "scored"))
    assert record.outcomes() == [row for row in scored.outcomes() if row["compression"] == 4]
    assert record.metrics["exact/recall/4x"] == scored.metrics["exact/recall/4x"]
    assert record.metrics["selection/recall/exact.own.own/4x"] == record.metrics["exact/recall/4x"]
    assert 0.25 < record.metrics["selection/recall/agreement.own.oracle/4x"] < 1
    found = read_selection(record.folder)
    assert found["names"] == {"own": "as shipped", "against": "flipped"} and len(found["cells"]) == 1
    assert (
        (record.folder / "selection_4x.png").stat().st_size > 5_000 < (tmp_path / "run/selection_4x.pdf").stat().st_size
    )

    alone = run_evaluation(
        configure(tmp_path / "alone", "mode=selection", "selection.scorers=[]", "selection.figure=false")
    )
    assert "The swap" not in capsys.readouterr().out and not list(alone.folder.glob("*.png"))
    assert alone.outcomes() == record.outcomes()


def test_what_mode_selection_cannot_do_is_said_at_once(tmp_path: Path) -> None:
    several = [
        "evaluation.compressions=[1]",
        "selection.scorers=[oracle,snapkw,oracle]",
        "selection.scorer_samples=0",
        "selection.against=/nowhere/model.gguf",
        "evaluation.attention.schedule=prefill_once",
    ]
    with pytest.raises(ConfigError) as error:
        run_evaluation(configure(tmp_path / "run", "mode=selection", *several))
    for said in (
        r"compresses nothing, and mode=selection looks at what is kept: add one above 1",
        "['snapkw'] unknown; choose of expected_attention, h2o",
        "repeats a value",
        "selection.scorer_samples=0: samples, at least 1",
        "selection.against=/nowhere/model.gguf is not a file",
        "schedule=prefill_once does not work with mode=selection",
    ):
        assert said in str(error.value)
    with pytest.raises(ConfigError, match=r"compressions=64 keeps none of a partition's 32 tokens"):
        run_evaluation(configure(tmp_path / "run", "mode=selection", "evaluation.compressions=[4,64]"))
    assert not (tmp_path / "run").exists()


def test_the_other_model_is_loaded_as_the_first(tmp_path: Path) -> None:
    conf = configure(tmp_path, "model=smollm2_gguf", "model.dtype=bfloat16").model
    folder = other_model(conf, "runs/model")
    assert (folder.name, folder.gguf_file, folder.dtype) == ("runs/model", None, "bfloat16")
    file = other_model(folder, "models/base.gguf")
    assert (file.name, file.gguf_file, file.dtype) == ("models", "base.gguf", "bfloat16")
