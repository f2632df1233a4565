"""lm-eval's tasks over compressions: the same documents in each, everything said in the result."""

from pathlib import Path

import lm_eval.evaluator
import pytest
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lrsa.evaluation.lm_eval_run
from lrsa.attention import SparseAttentionConfig
from lrsa.config import AttentionConf, EvaluationConf, LMEvalConf
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.lm_eval_run import run_lm_eval
from lrsa.models import get_attention, set_attention
from lrsa.results import schema

TASKS = {
    "docs.py": """
import random
import datasets
from transformers import AutoTokenizer

def needles(tokenizer=None, **metadata):
    assert len(AutoTokenizer.from_pretrained(tokenizer)) > 100
    words = ["river", "boat", "stone", "lantern", "oasis", "panda", "melon", "anchor"]
    rows = []
    for number in range(6):
        pairs = [(key, random.choice(words)) for key in random.sample(words, 8)]
        text = " ".join(f"The code of {key} is {value} {value}." for key, value in pairs) * 3
        key, value = random.choice(pairs)
        rows.append({"text": f"{text} Recall the code of {key}", "answer": f"{value} {value}", "words": words})
    return {"test": datasets.Dataset.from_list(rows)}
""",
    "needles.yaml": """
task: own_needles
custom_dataset: !function docs.needles
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
""",
    "choice.yaml": """
task: own_choice
custom_dataset: !function docs.needles
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: "{{words}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "group.yaml": """
group: own_group
task: [own_choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Seconds each, and of no account here: what lm-eval knows of the machine, and its own ten thousand tasks.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    monkeypatch.setattr(
        lrsa.evaluation.lm_eval_run, "TaskManager", lambda **given: TaskManager(**{**given, "include_defaults": False})
    )
    for name, text in TASKS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def evaluation() -> EvaluationConf:
    attention = AttentionConf(sink_size=4, lag_size=16)
    return EvaluationConf(attention=attention, compressions=[1, 4], batch_size=4, bootstrap=100)


def test_tasks_and_groups_over_compressions(
    folder: Path, evaluation: EvaluationConf, recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = LMEvalConf(tasks=["own_needles", "own_group"], include_path=str(folder), apply_chat_template=True)
    before = SparseAttentionConfig(lag_size=8)
    set_attention(recall_model, before)
    try:
        result = run_lm_eval(recall_model, tokenizer, conf, evaluation, seed=3, progress=False)
        assert get_attention(recall_model) == before
    finally:
        set_attention(recall_model, None)
    names = {"own_needles/exact_match,none", "own_choice/acc,none", "own_group/acc,none"}
    assert set(result.metrics) >= {f"{name}/{column}" for name in names for column in ("full", "4x")}
    assert all(isinstance(value, float) for value in result.metrics.values())

    protocol = result.protocol
    assert protocol["mode"] == "lm_eval" and protocol["lm_eval"] == lm_eval.__version__
    assert protocol["seeds"] == {"random": 3, "numpy": 3, "torch": 3, "fewshot": 1234}
    assert protocol["chat_template"]["applied"] and len(protocol["chat_template"]["sha256"]) == 64
    assert protocol["tasks"]["own_needles"]["version"] == 2.0
    full, compressed = (protocol["compressions"][column] for column in ("full", "4x"))
    assert full["attention"] == "dense" and compressed["attention"]["keep_ratio"] == 0.25
    assert full["cache"]["cache_ratio"] == 1 < compressed["cache"]["cache_ratio"]
    for run in (full, compressed):
        assert run["stop_strings"] == ["<end>"] and run["truncation"]["truncated"] == 0
        assert run["truncation"]["requests"] == 6 + 6 * 8

    assert [(fact["name"], fact["n"]) for fact in result.data] == [("own_choice", 6), ("own_needles", 6)]
    for fact in result.data:
        schema.check(fact, schema.RECORD["data"][0])
        assert "sha256" in fact["template"]
    asked = [
        [sample["prompt_hash"] for sample in result.samples if sample["compression"] == factor] for factor in (1, 4)
    ]
    assert len(asked[0]) == 12 and asked[0] == asked[1], "each compression gets the same documents"
    answers = [[sample["resps"] for sample in result.samples if sample["compression"] == factor] for factor in (1, 4)]
    assert answers[0] != answers[1], "compression acts"


def test_a_seed_gives_the_same_documents_and_answers(
    folder: Path, evaluation: EvaluationConf, recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = LMEvalConf(tasks=["own_needles"], include_path=str(folder), limit=4)
    evaluation.compressions = [2]
    one, two, other = (run_lm_eval(recall_model, tokenizer, conf, evaluation, seed, False) for seed in (0, 0, 1))
    assert one.samples == two.samples and one.data == two.data and one.data[0]["n"] == 4
    assert one.data[0]["fingerprint"] != other.data[0]["fingerprint"]
    assert one.data[0]["template"] is None and not one.protocol["chat_template"]["applied"]


def test_an_unknown_task_names_near_ones(
    folder: Path, evaluation: EvaluationConf, recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = LMEvalConf(tasks=["own_needels"], include_path=str(folder))
    with pytest.raises(EvaluationInputError, match=r"knows no own_needels but own_needles.*include_path=FOLDER"):
        run_lm_eval(recall_model, tokenizer, conf, evaluation, 0)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (
            "import no_such_package",
            EvaluationInputError,
            r"not installed \(No module named 'no_such_package'\): pip .*ruler",
        ),
        ("raise ImportError('install x')", EvaluationInputError, r"\['broken'\] need a package .*install x.*longbench"),
        ("raise PermissionError('gated')", ConnectionError, r"\['broken'\] need data .*PermissionError: gated"),
        (
            "raise RuntimeError('failed') from OSError('no route')",
            ConnectionError,
            r"RuntimeError: failed.* RULER's niah_single_1",
        ),
        ("raise ValueError('line 3 is empty')", ValueError, "^line 3 is empty$"),
        ("raise ZeroDivisionError('a mistake')", ZeroDivisionError, "^a mistake$"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_task_that_cannot_be_loaded(
    code: str,
    kind: type[Exception],
    message: str,
    folder: Path,
    evaluation: EvaluationConf,
    recall_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (folder / "broken.py").write_text(f"def rows(**_):\n    {code}\n")
    (folder / "broken.yaml").write_text("task: broken\ncustom_dataset: !function broken.rows\ntest_split: test\n")
    conf = LMEvalConf(tasks=["broken"], include_path=str(folder))
    with pytest.raises(kind, match=message) as found:
        run_lm_eval(recall_model, tokenizer, conf, evaluation, seed=0)
    assert type(found.value) is kind
