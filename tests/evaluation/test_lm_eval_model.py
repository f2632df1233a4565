"""lm-eval's model: the same answers as lrsa's own, under any compression, with what was done to get them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.data import Sample
from lrsa.evaluation import generate_answers
from lrsa.evaluation.errors import EvaluationInputError, TruncationWarning
from lrsa.evaluation.lm_eval_args import choose_attention
from lrsa.evaluation.lm_eval_model import LRSALM
from lrsa.models import get_attention, load_model, set_attention

LAG = SparseAttentionConfig(sink_size=4, lag_size=32, keep_ratio=0.25)
SMALL = {"sink_size": 4, "lag_size": 32}
GREEDY = {"until": [], "max_gen_toks": 8, "do_sample": False}


def make(**options: Any) -> LRSALM:
    return LRSALM("recall-tiny", device="cpu", **{"batch_size": 5, **options})


def prompts_of(samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(sample.input_ids[: sample.answer_spans[0][0]]) for sample in samples]


def ask(lm: LRSALM, prompts: list[str], **settings: Any) -> list[str]:
    requests = [Instance("generate_until", {}, (p, GREEDY | settings), i) for i, p in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


def test_everything_kept_is_dense_and_less_is_not(
    recall_samples: list[Sample], tokenizer: PreTrainedTokenizerBase, recall_model: PreTrainedModel
) -> None:
    """And the text is that of `lrsa-eval mode=generate`: ragged batches, padded on the left."""
    prompts = prompts_of(recall_samples, tokenizer)
    models = {
        "dense": make(attention="dense"),
        "all": make(keep_ratio=1.0, **SMALL),
        "4x": make(compression=4, **SMALL),
    }
    said = {name: ask(lm, prompts) for name, lm in models.items()}
    ratio = {name: lm.protocol()["cache"]["cache_ratio"] for name, lm in models.items()}
    assert said["dense"] == said["all"] != said["4x"]
    assert ratio["dense"] == ratio["all"] == 1 and 2 < ratio["4x"] < 4
    for name, attention in (("dense", None), ("4x", LAG)):
        answers = generate_answers(
            recall_model, recall_samples, attention, tokenizer=tokenizer, stop_ids=[3], batch_size=8, max_new_tokens=8
        )
        assert said[name] == [answer.text for answer in answers.outcomes]


def test_a_query_based_rule_and_a_model_that_is_passed(
    recall_samples: list[Sample], tokenizer: PreTrainedTokenizerBase, recall_model: PreTrainedModel
) -> None:
    prompts = prompts_of(recall_samples[:10], tokenizer)
    tova = replace(LAG, scorer="tova", scorer_args={})
    set_attention(recall_model, tova)
    try:
        lm = LRSALM(recall_model, tokenizer=tokenizer, batch_size=4)
        said = ask(lm, prompts)
        assert lm.protocol()["attention"] == tova.to_dict()
    finally:
        set_attention(recall_model, None)
    assert said == ask(make(scorer="tova", keep_ratio=0.25, **SMALL), prompts)
    assert said != ask(make(scorer="lag_relative", keep_ratio=0.25, **SMALL), prompts)


@pytest.mark.parametrize("attention", [None, LAG], ids=["dense", "lag"])
def test_likelihoods_are_those_of_the_parallel_form(
    attention: SparseAttentionConfig | None, recall_samples: list[Sample], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows of a batch are padded on the right, and get what they get alone."""
    options = {"attention": "dense"} if attention is None else {"keep_ratio": 0.25, **SMALL}
    lm = make(**options)
    pairs = []
    for sample, prompt in zip(recall_samples[:6], prompts_of(recall_samples[:6], tokenizer), strict=True):
        pairs += [(prompt, " " + sample.answers[0][0]), (prompt, " river boat")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (prompt, continuation), (value, greedy) in zip(pairs, found, strict=True):
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        target = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = lm.model(torch.tensor([context + target]), use_cache=False).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(target)), target].sum()
        assert value == pytest.approx(float(expected), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == target)
    assert {greedy for _, greedy in found} == {True, False}
    assert get_attention(lm.model) == attention


def test_truncated_prompts_are_counted(recall_samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
    """Room is max_length less the answer's: 300 - 8 tokens."""
    samples = recall_samples[:10]
    prompts = prompts_of(samples, tokenizer)
    lost = [n - 292 for sample in samples if (n := sample.answer_spans[0][0]) > 292]
    assert 0 < len(lost) < 10
    lm = make(max_length=300, attention="dense")
    with pytest.warns(TruncationWarning, match=rf"{len(lost)} of 10 prompts lost their first tokens.*max_length=300"):
        ask(lm, prompts)
    expected = {
        "side": "left",
        "requests": 10,
        "truncated": len(lost),
        "tokens_lost": sum(lost),
        "most_lost": max(lost),
    }
    assert lm.protocol()["truncation"] == expected

    lm = make(max_length=300, attention="dense")
    lost = [n + 2 - 301 for sample in samples if (n := sample.answer_spans[0][0]) + 2 > 301]
    with pytest.warns(TruncationWarning, match=rf"{len(lost)} of 10 "):
        lm.loglikelihood([Instance("loglikelihood", {}, (p, " river boat"), 0) for p in prompts], disable_tqdm=True)
    assert lm.protocol()["truncation"]["tokens_lost"] == sum(lost)


def test_simple_evaluate_by_name(
    recall_samples: list[Sample], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)  # seconds, and of no account here
    rows = [
        {"question": f"Recall the code of {sample.id}", "answer": sample.answers[0][0]} for sample in recall_samples[:4]
    ]
    task = {
        "task": "recall",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {**GREEDY, "until": ["river"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    results = lm_eval.simple_evaluate(
        "lrsa",
        "pretrained=recall-tiny,compression=8,lag_size=32,sink_size=4,dense_layers=0",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=2,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert results is not None and 0 <= results["results"]["recall"]["exact_match,none"] <= 1
    protocol = results["config"]["lrsa"]
    assert protocol["attention"]["keep_ratio"] == 1 / 8 and protocol["attention"]["dense_layers"] == [0]
    assert protocol["chat_template"]["applied"] and len(protocol["chat_template"]["sha256"]) == 64
    assert protocol["stop_strings"] == ["<end>", "river"]
    assert protocol["decoding"] == [{"do_sample": False, "temperature": 0.0, "max_new_tokens": 8}]
    assert protocol["truncation"]["requests"] == 4 and protocol["truncation"]["truncated"] == 0
    assert results["config"]["model_dtype"] == "float32" and results["config"]["torch_seed"] == 1234


def test_the_stored_attention_is_the_default(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    load_model("recall-tiny", LAG).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for options, expected in (({}, LAG), ({"compression": 2}, LAG.with_compression(2)), ({"attention": "dense"}, None)):
        assert get_attention(LRSALM(str(tmp_path), device="cpu", **options).model) == expected


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (None, {}, None),
        (LAG, {}, LAG),
        (LAG, {"attention": "dense"}, None),
        (LAG, {"compression": 1}, None),
        (LAG, {"compression": 8}, replace(LAG, keep_ratio=1 / 8)),
        (LAG, {"top_k": 3}, replace(LAG, keep_ratio=None, top_k=3)),
        (LAG, {"lag_size": 64}, replace(LAG, lag_size=64)),
        (LAG, {"scorer": "tova"}, replace(LAG, scorer="tova", scorer_args={})),
        (LAG, {"scorer_args": {"value_weight": 0.0}}, replace(LAG, scorer_args={"value_weight": 0.0})),
        (replace(LAG, scorer_args={"value_weight": 0.5}), {"scorer": "tova"}, replace(LAG, scorer="tova")),
        (None, {"keep_ratio": 0.5}, SparseAttentionConfig(keep_ratio=0.5)),
        (None, {"dense_layers": "0:-1"}, SparseAttentionConfig(dense_layers=(0, -1))),
        (None, {"dense_layers": [1, 2]}, SparseAttentionConfig(dense_layers=(1, 2))),
    ],
)
def test_choose_attention(
    stored: SparseAttentionConfig | None, wanted: dict[str, Any], expected: SparseAttentionConfig | None
) -> None:
    assert choose_attention(stored, **wanted) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "lag_relative"}, r"attention='lag_relative' is unknown: stored or dense; .*scorer="),
        ({"attention": "dense", "top_k": 3}, r"attention=dense has no top_k"),
        ({"keep_ratio": 0.5, "compression": 2}, r"compression and keep_ratio all say how much is kept"),
        ({"dense_layers": "first"}, r"dense_layers='first': layer numbers"),
        ({"keep_ration": 0.5}, r"no arguments \['keep_ration'\]; valid: pretrained, .*keep_ratio, .*max_length"),
        ({"peft": "x"}, r"no arguments \['peft'\]"),
        ({"dtype": "int8"}, r"dtype='int8' is unknown; choose one of float32"),
        ({"scorer": "newest"}, r"'newest'.*lag_relative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_passed_model_keeps_its_attention(recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(EvaluationInputError, match="keeps its attention, but compression was given: use set_attention"):
        LRSALM(recall_model, tokenizer=tokenizer, compression=4)


def test_compression_at_the_prompts_end_is_refused() -> None:
    with pytest.raises(EvaluationInputError, match=r"schedule='prefill_once' does not work here.*where a prompt ends"):
        make(schedule="prefill_once", **SMALL)


def test_lm_eval_knows_the_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("lrsa") is LRSALM
