"""RULER's tasks in lm-eval: what would hang or mislead there is caught, and those that need no network run."""

import random
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from lm_eval.tasks import TaskManager
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lrsa.evaluation.lm_eval_run
from lrsa.config import AttentionConf, EvaluationConf, LMEvalConf, config_dir, register_configs
from lrsa.evaluation import load_tasks
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.lm_eval_ruler import (
    OFFLINE,
    best_reference,
    check_prompts,
    is_unmeasured,
    take_best_reference,
    without_downloads,
)
from lrsa.evaluation.lm_eval_run import run_lm_eval
from lrsa.evaluation.string_match import string_match_all


def test_variable_tracking_that_would_not_end_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """With the words of recall-tiny, lm-eval was seen to hang at 700 tokens, and to end at 900."""
    random.seed(5)
    np.random.seed(5)
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    check_prompts(["ruler_vt"], tokenizer, [1024, 4096])
    check_prompts(["ruler_vt"], tokenizer, None)
    check_prompts(["niah_single_1", "own"], tokenizer, [700])
    with pytest.raises(EvaluationInputError, match=r"ruler_vt may never end: .* a prompt of 700 takes \d+ tokens"):
        check_prompts(["ruler_vt"], tokenizer, [4096, 700])
    with pytest.raises(EvaluationInputError, match="ruler_vt may never end"):
        check_prompts(["ruler"], tokenizer, [700])
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state


def test_common_and_frequent_words_that_would_not_end_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("wonderwords")
    pytest.importorskip("scipy")
    check_prompts(["ruler_cwe", "ruler_fwe"], tokenizer, [1024, 4096])
    with pytest.raises(EvaluationInputError, match=r"ruler_cwe may never end: .* a prompt of 300 takes \d+ tokens"):
        check_prompts(["ruler_cwe"], tokenizer, [1024, 300])
    with pytest.raises(EvaluationInputError, match=r"ruler_fwe may never end: .* a prompt of 60 takes 200 tokens"):
        check_prompts(["ruler_fwe"], tokenizer, [60])


def test_nltk_is_asked_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    find = nltk.data.find
    for tasks in (["niah_single_1"], ["ruler_vt", "lrsa_needles"]):
        with without_downloads(tasks):
            assert nltk.data.find("tokenizers/punkt_tab") is None
    for tasks in (["niah_single_1", "niah_multivalue"], ["ruler"], ["niah_single_1", "ifeval"]):
        with without_downloads(tasks):
            assert nltk.data.find is find
    with pytest.raises(RuntimeError, match="within"), without_downloads(["niah_multikey_3"]):
        raise RuntimeError("within")
    assert nltk.data.find is find


def test_scores_of_lengths_that_were_not_run() -> None:
    assert is_unmeasured("4096,none", -1.0)
    assert not is_unmeasured("4096,none", 0.0) and not is_unmeasured("acc,none", -1.0)


@pytest.mark.parametrize(
    ("answer", "expected"), [("It was Ann North.", 1.0), (" bob\x01SOUTH ", 0.0), ("ann north and bob south", 1.0)]
)
def test_the_best_reference_counts(answer: str, expected: float) -> None:
    """lm-eval's own gives the first 1/2."""
    assert best_reference({"outputs": ["Ann North", "Bob South"], "max_length": 8192}, [answer]) == {"8192": expected}


def test_question_answering_is_scored_so(tmp_path: Path) -> None:
    import datasets

    rows = [{"input": "x", "outputs": ["a", "b"], "max_length": 4096}]
    task = {
        "task": "ruler_qa_squad",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "process_results": lambda doc, results: {"4096": 0.5},
        "metric_list": [{"metric": "4096", "aggregation": "mean", "higher_is_better": True}],
    }
    loaded = TaskManager(include_defaults=False).load([task])["tasks"]
    assert take_best_reference(loaded | {"ruler_vt": object()}) == {
        "ruler_qa_squad": "string match, the best reference, as RULER; lm-eval's own is their mean"
    }
    assert loaded["ruler_qa_squad"].process_results(rows[0], ["b"]) == {"4096": 1.0}


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch) -> EvaluationConf:
    """RULER's folder alone of lm-eval's, for indexing all takes seconds."""
    pytest.importorskip("wonderwords")
    own = Path(lm_eval.tasks.__file__).parent / "ruler"
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)

    def manager(include_path: list[str] | None = None, **given: Any) -> TaskManager:
        return TaskManager(include_path=[str(own), *(include_path or [])], **given | {"include_defaults": False})

    monkeypatch.setattr(lrsa.evaluation.lm_eval_run, "TaskManager", manager)
    attention = AttentionConf(sink_size=4, lag_size=16)
    return EvaluationConf(attention=attention, compressions=[1, 4], batch_size=4, bootstrap=100)


@pytest.mark.slow  # RULER's imports, and 4,096 tokens
def test_an_oracle_scores_here_as_there(ruler: EvaluationConf, tokenizer: PreTrainedTokenizerBase) -> None:
    """One that reads the answer, parts of it, nothing, or something else: of lm-eval's documents and of ours."""
    names = {"niah_single_1": "ruler_niah_single_1", "niah_multikey_2": "ruler_niah_multikey_2", "ruler_vt": "ruler_vt"}
    conf = LMEvalConf(tasks=list(names), metadata={"max_seq_lengths": [4096]})
    theirs, _ = lrsa.evaluation.lm_eval_run._load_tasks(tokenizer, conf, seed=0)
    register_configs()
    with initialize_config_dir(str(config_dir()), version_base=None):
        asked = [f"task=[{','.join(names.values())}]", "evaluation.length=4096", "model=recall_tiny", "mode=generate"]
        evaluation = OmegaConf.to_object(compose("eval", [*asked, "run.output_dir=unused", "~hydra"])).evaluation
    ours = {task.name: task.prompts for task in load_tasks(tokenizer, evaluation, 4096)}
    for task in theirs:
        references = [doc["outputs"] for doc in list(task.test_docs())[:20]]
        references += [list(ours[names[task.task_name]][index].answers[0]) for index in range(20)]
        for answers in references:
            half = " ".join(answers[: len(answers) // 2])
            for said in (f" {', '.join(answers)}.", half, "", "nothing of the sort", answers[-1].lower()):
                found = task.process_results({"outputs": answers, "max_length": 4096}, [said])
                assert found["4096"] == pytest.approx(string_match_all(said, answers))
            assert string_match_all(" ".join(answers), answers) == 1 and string_match_all("", answers) == 0


@pytest.mark.slow
def test_the_offline_tasks_run(
    ruler: EvaluationConf, recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capfd: Any
) -> None:
    conf = LMEvalConf(tasks=list(OFFLINE), metadata={"max_seq_lengths": [1024]}, limit=2)
    conf.gen_kwargs = {"max_gen_toks": 8}
    result = run_lm_eval(recall_model, tokenizer, conf, ruler, seed=0, progress=False)
    scores = {name for name in result.metrics if "stderr" not in name}
    assert scores == {f"{name}/1024,none/{column}" for name in OFFLINE for column in ("full", "4x")}
    assert all(0 <= value <= 1 for value in result.metrics.values()), "no -1 for lengths that were not run"
    assert {(fact["name"], fact["n"]) for fact in result.data} == {(name, 2) for name in OFFLINE}
    assert "nltk_data" not in "".join(capfd.readouterr())


@pytest.mark.slow  # RULER's imports
def test_what_cannot_be_downloaded_says_what_runs(
    ruler: EvaluationConf,
    recall_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import requests

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", unreachable)
    conf = LMEvalConf(tasks=["ruler_qa_squad"], metadata={"max_seq_lengths": [1024]})
    with pytest.raises(
        ConnectionError, match=r"\['ruler_qa_squad'\] need data .*no route to host.*niah_single_1, .*lrsa"
    ):
        run_lm_eval(recall_model, tokenizer, conf, ruler, seed=0)
