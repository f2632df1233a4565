from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.config import ExamplesConf
from lrsa.data import Sample, SampleSet
from lrsa.evaluation import Answer, generate, generate_answers, score
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.generate import MARGIN, stop_tokens, token_limit
from lrsa.models import get_attention, make_cache, set_attention
from lrsa.results.schema import OUTCOME, check

from .conftest import RECALL_ARGS

LAG = SparseAttentionConfig(sink_size=4, lag_size=32, keep_ratio=0.25)
ATTENTIONS = {
    "dense": None,
    "lag": LAG,
    "lag 8x": replace(LAG, keep_ratio=0.125),
    "tova": replace(LAG, scorer="tova", scorer_args={}),
    "chunk": replace(LAG, chunk_size=48, keep_ratio=0.2),
    "one dense layer": replace(LAG, dense_layers=(0,)),
    "once": replace(LAG, schedule="prefill_once", scorer="snapkv", scorer_args={}, keep_ratio=0.05),
}


@pytest.fixture
def options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "stop_ids": [tokenizer.eos_token_id], "batch_size": 8}


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_token_exact_match_is_that_of_parallel_scoring(
    attention: SparseAttentionConfig | None,
    recall_model: PreTrainedModel,
    recall_samples: list[Sample],
    options: dict[str, Any],
) -> None:
    """On every example, in ragged batches; and one by one each row gets the same text."""
    answers = generate_answers(recall_model, recall_samples, attention, task="t", compression=4, **options)
    scored = score(recall_model, recall_samples, attention, batch_size=8, pad_id=0, task="t", compression=4)
    for answer, outcome in zip(answers.outcomes, scored, strict=True):
        assert (answer.task, answer.id, answer.compression) == (outcome.task, outcome.id, outcome.compression)
        assert (answer.exact, answer.tokens) == (outcome.exact, outcome.tokens)
        assert answer.exact_match >= answer.exact and answer.f1 >= answer.exact_match
    found = {answer.exact for answer in answers.outcomes}
    assert found == ({True} if attention is None else {True, False}), "both are met, or the test shows nothing"
    alone = generate_answers(recall_model, recall_samples, attention, **options | {"batch_size": 1})
    assert [a.text for a in alone.outcomes] == [a.text for a in answers.outcomes]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_captured_step_writes_the_same(
    name: str,
    recall_model: PreTrainedModel,
    recall_samples: list[Sample],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Caches that a graph takes go on in one, whose loop runs uncaptured on a CPU (on a GPU: `test_smollm2.py`)."""
    expected = generate_answers(recall_model, recall_samples, ATTENTIONS[name], **options)
    used = []

    class Step(generate.GraphedStep):
        def __call__(self, tokens: Tensor) -> Tensor:
            used.append(len(tokens))
            return super().__call__(tokens)

    monkeypatch.setattr(generate, "GraphedStep", Step)
    monkeypatch.setattr(generate, "UNCAPTURED", 2)
    monkeypatch.setattr(generate, "CAPTURES_ON", ("cpu",))
    found = generate_answers(recall_model, recall_samples, ATTENTIONS[name], **options)
    assert found.outcomes == expected.outcomes
    assert bool(used) == (name != "once")


@pytest.mark.parametrize("attention", [None, LAG], ids=["dense", "lag"])
def test_the_text_is_what_transformers_generates(
    attention: SparseAttentionConfig | None,
    recall_model: PreTrainedModel,
    recall_samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> None:
    samples = recall_samples[:6]
    answers = generate_answers(recall_model, samples, attention, max_new_tokens=9, **options)
    set_attention(recall_model, attention)
    for sample, answer in zip(samples, answers.outcomes, strict=True):
        prompt = torch.tensor([sample.input_ids[: sample.answer_spans[0][0]]])
        cache = make_cache(recall_model)
        out = recall_model.generate(prompt, past_key_values=cache, max_new_tokens=9, do_sample=False, eos_token_id=3)
        new = out[0, prompt.shape[1] :].tolist()
        assert answer.generated_tokens == len(new)
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
        assert answer.hit_limit == (new[-1] != 3)
    set_attention(recall_model, None)


@pytest.mark.parametrize("attention", [None, LAG, ATTENTIONS["once"]], ids=["dense", "lag", "once"])
def test_reading_the_prompt_in_blocks_changes_nothing(
    attention: SparseAttentionConfig | None,
    recall_model: PreTrainedModel,
    recall_samples: list[Sample],
    options: dict[str, Any],
) -> None:
    whole = generate_answers(recall_model, recall_samples[:8], attention, **options)
    blocks = generate_answers(recall_model, recall_samples[:8], attention, block_size=50, **options)
    assert blocks == whole


def test_the_cache_is_measured_after_the_prompts(
    recall_model: PreTrainedModel, recall_samples: list[Sample], options: dict[str, Any]
) -> None:
    """2 layers, 2 KV heads of 32 channels, float32. 24 rows in batches of 9: the last one is smaller."""
    lengths = [sample.answer_spans[0][0] for sample in recall_samples]
    slot_bytes = 2 * 2 * 2 * 32 * 4
    options["batch_size"] = 9
    dense = generate_answers(recall_model, recall_samples, None, **options).cache
    mean = sum(lengths) / len(lengths)
    assert dense["cache_slots"] == pytest.approx(mean) and dense["cache_ratio"] == pytest.approx(1)
    assert dense["cache_bytes"] == pytest.approx(slot_bytes * mean)
    assert dense["cache_buffer_bytes"] > 0, "pads take memory too"
    sparse = generate_answers(recall_model, recall_samples, LAG, **options).cache
    slots = sum(LAG.geometry.slots(length) for length in lengths) / len(lengths)
    assert sparse["cache_slots"] == pytest.approx(slots) and sparse["cache_ratio"] == pytest.approx(mean / slots)
    assert sparse["cache_bytes"] == pytest.approx(slot_bytes * slots)
    once = ATTENTIONS["once"]
    found = generate_answers(recall_model, recall_samples, once, **options).cache
    slots = sum(4 + 32 + int(0.05 * (length - 36)) for length in lengths) / len(lengths)
    assert found["cache_slots"] == pytest.approx(slots) and found["cache_ratio"] == pytest.approx(mean / slots)
    assert found["cache_bytes"] == pytest.approx(slot_bytes * slots)


def test_several_questions_a_context(
    recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    """Each has its own prompt, with the references of the earlier ones in it, and its own references."""
    conf = ExamplesConf(source="needles", limit=4, questions=3, args=RECALL_ARGS)
    samples = [SampleSet(conf, tokenizer, 300)[index] for index in range(4)]
    seen: list[tuple[int, int]] = []
    options |= {"share_context": False, "on_batch": lambda *found: seen.append(found)}
    answers = generate_answers(recall_model, samples, None, **options)
    scored = score(recall_model, samples, None, batch_size=4, pad_id=0)
    assert [(a.id, a.exact) for a in answers.outcomes] == [(o.id, o.exact) for o in scored]
    assert len(answers.outcomes) == 12 and sum(a.exact for a in answers.outcomes) >= 10
    assert all(a.exact_match and a.f1 == 1 for a in answers.outcomes if a.exact)
    assert [rows for rows, _ in seen] == [8, 4]
    written = sum(a.generated_tokens for a in answers.outcomes)
    assert sum(tokens for _, tokens in seen) == written + sum(start for s in samples for start, _ in s.answer_spans)


def test_references_are_all_that_a_question_has(
    recall_model: PreTrainedModel,
    recall_samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> None:
    sample = recall_samples[0]
    (said,) = generate_answers(recall_model, [sample], None, **options).outcomes
    other = replace(sample, answers=(("nothing of this", f"The {said.text.upper()}!"),))
    (answer,) = generate_answers(recall_model, [other], None, **options).outcomes
    assert answer.exact_match and answer.f1 == 1
    wrong = replace(sample, answers=(("nothing of this",),))
    (answer,) = generate_answers(recall_model, [wrong], None, **options).outcomes
    assert answer.exact and not answer.exact_match and answer.f1 == 0
    for none in ((), ((),)):  # a conversation's turn: its own words
        (answer,) = generate_answers(recall_model, [replace(sample, answers=none)], None, **options).outcomes
        assert answer.exact and answer.exact_match


def test_limit(
    model: PreTrainedModel, recall_samples: list[Sample], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    """By default the longest reference, in whichever wording, and a margin."""
    samples = recall_samples[:3]
    reference = samples[0].answer_spans[0][1] - samples[0].answer_spans[0][0]
    assert token_limit(tokenizer, samples) == reference + MARGIN
    longer = replace(samples[0], answers=((samples[0].answers[0][0], " ".join(["river"] * 30)),))
    assert token_limit(tokenizer, [longer]) == 30 + MARGIN
    answers = generate_answers(model, samples, None, **options | {"stop_ids": [399]})
    assert answers.max_new_tokens == reference + MARGIN
    for answer in answers.outcomes:  # a model of no sense finds no end
        assert answer.hit_limit and answer.generated_tokens == reference + MARGIN and answer.text
    with pytest.raises(EvaluationInputError, match=rf"max_new_tokens={reference - 1} is below the {reference} tokens"):
        generate_answers(model, samples, None, max_new_tokens=reference - 1, **options)


def test_stop_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    end, user = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<user>")
    assert stop_tokens(tokenizer) == stop_tokens(tokenizer, " <end>") == {end: "<end>"}
    assert stop_tokens(tokenizer, "river <user>") == {user: "<user>", end: "<end>"}


def test_a_reference_that_cannot_be_generated_is_refused(
    model: PreTrainedModel, recall_samples: list[Sample], options: dict[str, Any]
) -> None:
    sample = recall_samples[0]
    start = sample.answer_spans[0][0]
    tokens = list(sample.input_ids)
    tokens[start] = 3
    with pytest.raises(EvaluationInputError, match=rf"{sample.id} has the stop token 3 before its end"):
        generate_answers(model, [replace(sample, input_ids=tokens)], None, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: at least 1"),
        ({"block_size": 0}, "block_size=0: at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"stop_ids": []}, "stop_ids is empty"),
        ({"precision": "16-mixed"}, "choose 32-true or bf16-mixed"),
    ],
)
def test_settings_that_make_no_sense(
    change: dict[str, Any], message: str, model: PreTrainedModel, recall_samples: list[Sample], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_answers(model, recall_samples[:1], None, **options | change)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [None, LAG], ids=["dense", "sparse"])
def test_the_model_is_left_as_it_was(
    before: SparseAttentionConfig | None,
    training: bool,
    model: PreTrainedModel,
    recall_samples: list[Sample],
    options: dict[str, Any],
) -> None:
    model.train(training)
    set_attention(model, before)
    generate_answers(model, recall_samples[:2], LAG.with_compression(2), max_new_tokens=4, **options)
    assert get_attention(model) == before and model.training == training

    def fail(rows: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, recall_samples[:2], LAG, max_new_tokens=4, on_batch=fail, **options)
    assert get_attention(model) == before and model.training == training


@pytest.mark.parametrize("attention", [None, LAG], ids=["dense", "lag"])
def test_autocast(
    attention: SparseAttentionConfig | None,
    recall_model: PreTrainedModel,
    recall_samples: list[Sample],
    options: dict[str, Any],
) -> None:
    exact = generate_answers(recall_model, recall_samples[:8], attention, **options)
    rounded = generate_answers(recall_model, recall_samples[:8], attention, precision="bf16-mixed", **options)
    scored = score(recall_model, recall_samples[:8], attention, batch_size=8, pad_id=0, precision="bf16-mixed")
    agree = sum(a.exact == o.exact for a, o in zip(rounded.outcomes, scored, strict=True))
    assert agree >= 6, "rounding may turn an answer, not most"
    assert rounded.cache["cache_slots"] == exact.cache["cache_slots"]


def test_outcomes_are_plain_values(
    recall_model: PreTrainedModel, recall_samples: list[Sample], options: dict[str, Any]
) -> None:
    (answer,) = generate_answers(recall_model, recall_samples[:1], LAG, **options).outcomes
    assert isinstance(answer, Answer)
    check(vars(answer), OUTCOME)
    assert all(type(value) in (str, bool, int, float) for value in vars(answer).values())
    assert generate_answers(recall_model, [], None, **options).outcomes == []


def test_outcomes_say_how_deep_the_answer_stood(
    recall_model: PreTrainedModel, recall_samples: list[Sample], options: dict[str, Any]
) -> None:
    answers = generate_answers(recall_model, recall_samples[:4], None, **options).outcomes
    scored = score(recall_model, recall_samples[:4], None, batch_size=4, pad_id=0)
    depths = [sample.gold_depth[0] for sample in recall_samples[:4]]
    assert [answer.depth for answer in answers] == [outcome.depth for outcome in scored]
    assert [answer.depth for answer in answers] == pytest.approx(depths, abs=1e-4) and len(set(depths)) == 4
    two = replace(recall_samples[0], gold_depth=(0.1, 0.9))
    assert two.depth is None and replace(two, gold_depth=()).depth is None
