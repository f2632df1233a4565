"""This project's tasks on any of lm-eval's models: its prompts, its scores, with the data that it reads."""

import runpy
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lrsa.evaluation.lm_eval_run
from lrsa.config import AttentionConf, EvaluationConf, LMEvalConf
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.lm_eval_model import LRSALM
from lrsa.evaluation.lm_eval_run import run_lm_eval
from lrsa.evaluation.lm_eval_tasks import FOLDER, SCORES, documents, task_names
from lrsa.models import load_model
from tests.data.conftest import byte_level, squad_rows, write_rows

LENGTH = 1000  # tokens a prompt, of few bytes each
LOCAL = {"limit": 4, "filler": None}

METRICS = (*SCORES, "string_match")


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tokenizer, and SQuAD's columns."""
    folder = tmp_path_factory.mktemp("lm-eval")
    byte_tokenizer.save_pretrained(folder)
    write_rows(folder / "squad.jsonl", squad_rows())
    return folder


def manager(folder: Path, **overrides: Any) -> TaskManager:
    metadata = {"tokenizer": str(folder), "max_seq_lengths": [LENGTH], "overrides": LOCAL | overrides}
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)


def evaluate(lm: LM, name: str, tasks: TaskManager, **options: Any) -> dict[str, float]:
    found = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=tasks, bootstrap_iters=0, **options)
    assert found is not None
    return {metric: found["results"][name][f"{metric},none"] for metric in METRICS}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)  # seconds, and of no account here


class Scripted(LM):
    """Answers what `answer` makes of a document."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.prompts = [request.args[0] for request in requests]
        assert all(request.args[1]["until"] == ["\n"] and not request.args[1]["do_sample"] for request in requests)
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise AssertionError("generation alone")

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize("task", ["needles", "passkey", "xquad"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda doc: f" {doc['answers'][0]}", 1.0),
        (lambda doc: doc["answers"][-1].upper() + ".", 1.0),  # any reference, normalised
        (lambda doc: "", 0.0),
        (lambda doc: "nothing of the sort", 0.0),
    ],
    ids=["oracle", "another wording", "empty", "wrong"],
)
def test_what_answers_score(task: str, answer: Any, expected: float, folder: Path) -> None:
    tasks = manager(folder, **({"path": str(folder / "squad.jsonl")} if task == "xquad" else {}))
    lm = Scripted(answer)
    assert evaluate(lm, f"lrsa_{task}", tasks) == dict.fromkeys(METRICS, expected)
    assert len(lm.prompts) == 4 and all(prompt.endswith("\nAnswer:") for prompt in lm.prompts)


def test_the_answer_is_in_the_context_and_only_there(folder: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    given = {"tokenizer": str(folder), "max_seq_lengths": [LENGTH], "overrides": LOCAL}
    rows = list(documents("needles", **given)["test"])
    floor = list(documents("needles", **given, context=False)["test"])
    assert [row["id"] for row in rows] == [row["id"] for row in floor] and len({row["text"] for row in rows}) == 4
    for row, bare in zip(rows, floor, strict=True):
        (answer,) = row["answers"]
        assert answer in row["text"] and answer not in bare["text"]
        assert bare["text"].startswith("Question: ") and row["text"].endswith("\n\n" + bare["text"])
        assert row["tokens"] == LENGTH and LENGTH - 20 <= len(byte_tokenizer(row["text"]).input_ids) < LENGTH
    again = list(documents("needles", **given | {"max_seq_lengths": LENGTH})["test"])
    assert again == rows
    longer = documents("needles", pretrained=str(folder), max_seq_lengths=[LENGTH + 9], overrides=LOCAL)["test"]
    assert {row["tokens"] for row in longer} == {LENGTH + 9}


def test_the_start_token_is_left_to_the_model(
    tmp_path: Path, folder: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    starting = byte_level()
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", starting.bos_token_id)]
    )
    starting.save_pretrained(tmp_path)
    texts = [documents("passkey", str(path), None, 300, LOCAL)["test"][0]["text"] for path in (tmp_path, folder)]
    assert "<s>" not in texts[0] and texts[0][:60] == texts[1][:60]


@pytest.fixture(scope="module")
def tiny(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = {"model_type": "llama", "vocab_size": len(byte_tokenizer), "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return load_model("fresh", None, config=config | {"max_position_embeddings": 2048}).eval()


@pytest.mark.parametrize("kind", [HFLM, LRSALM])
def test_a_model_answers(
    kind: type, tiny: PreTrainedModel, folder: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """lm-eval's own kind of model, and ours; a chat template on top."""
    lm = kind(pretrained=tiny, tokenizer=byte_tokenizer, batch_size=2)
    found = evaluate(lm, "lrsa_needles", manager(folder), apply_chat_template=True, gen_kwargs="max_gen_toks=4")
    assert all(0 <= value <= 1 for value in found.values())


def test_lrsa_eval_finds_them(
    tiny: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an include_path, under every compression, the tokenizer being the model's."""
    monkeypatch.setattr(  # lm-eval's own tasks take seconds
        lrsa.evaluation.lm_eval_run, "TaskManager", lambda **given: TaskManager(**{**given, "include_defaults": False})
    )
    metadata = {"max_seq_lengths": [LENGTH], "overrides": LOCAL}
    conf = LMEvalConf(tasks=["lrsa_needles"], metadata=metadata, gen_kwargs={"max_gen_toks": 4})
    evaluation = EvaluationConf(attention=AttentionConf(lag_size=32), compressions=[1, 4], bootstrap=100)
    result = run_lm_eval(tiny, byte_tokenizer, conf, evaluation, seed=0, progress=False)
    names = {f"lrsa_needles/{name},none/{column}" for name in METRICS for column in ("full", "4x")}
    assert names <= set(result.metrics)
    (fact,) = result.data
    assert fact["name"] == "lrsa_needles" and fact["n"] == 4
    runs = result.protocol["compressions"]
    assert runs["full"]["cache"]["cache_ratio"] == 1 < runs["4x"]["cache"]["cache_ratio"]
    assert runs["4x"]["truncation"]["truncated"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrsa_task": "needels"}, r"lrsa_task='needels' is unknown; valid: .*needles"),
        ({"tokenizer": None}, r"lrsa_needles counts its prompts in tokens: name a tokenizer in the metadata"),
        ({"max_seq_lengths": [256, 512]}, r"max_seq_lengths=\[256, 512\]: lrsa_needles takes one number .*length at a"),
        ({"max_seq_lengths": "4k"}, r"max_seq_lengths='4k'"),
        ({"tokenizer": "recall-tiny"}, r"cannot spell the prompt of needles-00000-0, which has its unknown token"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], message: str, folder: Path) -> None:
    usual = {"lrsa_task": "needles", "tokenizer": str(folder), "max_seq_lengths": [LENGTH], "overrides": LOCAL}
    with pytest.raises(EvaluationInputError, match=message):
        documents(**usual | given)


def test_every_task_of_conf_is_one_of_lm_eval() -> None:
    names = task_names()
    for name in names:
        file = FOLDER / f"lrsa_{name}.yaml"
        wanted = f"include: _lrsa_yaml\ntask: lrsa_{name}\ndataset_kwargs: {{lrsa_task: {name}}}\n"
        assert file.is_file() and file.read_text() == wanted, f"{file} must hold:\n{wanted}"
    tasks = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(tasks.all_tasks) == {"lrsa", *(f"lrsa_{name}" for name in names)}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_folder_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("lrsa.evaluation.lm_eval_tasks", run_name="__main__")
    assert capsys.readouterr().out == f"{FOLDER}\n"
