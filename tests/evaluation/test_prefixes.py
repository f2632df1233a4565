"""A context that several questions share is read once, and nothing but the time changes."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.cache import SparseKVCache, prefill
from lrsa.config import EvaluationConf, ExamplesConf, GenerateConf
from lrsa.data import Sample, SampleSet
from lrsa.evaluation import evaluate, generate_answers
from lrsa.evaluation.generate import _go_on
from lrsa.evaluation.prefixes import ReadContexts, can_share, plan
from lrsa.models import make_cache, set_attention
from lrsa.results.schema import CELL, check
from tests.architectures import model_of

from .conftest import RECALL_ARGS

LAG = SparseAttentionConfig(sink_size=4, lag_size=32, keep_ratio=0.25)
ONCE = replace(LAG, schedule="prefill_once", scorer="snapkv", scorer_args={}, keep_ratio=0.05)
ATTENTIONS = {
    "dense": None,
    "lag": LAG,
    "tova": replace(LAG, scorer="tova", scorer_args={}),
    "chunk": replace(LAG, chunk_size=48, keep_ratio=0.2),
    "one dense layer": replace(LAG, dense_layers=(0,)),
}
SEVERAL = ExamplesConf(source="needles", limit=3, questions=3, apart=True, args=RECALL_ARGS)


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """3 contexts of as many lengths, 3 questions each, of one or two tokens more or less; and one without company."""
    conf = replace(SEVERAL, limit=None)
    several = [one for index in range(3) for one in SampleSet(conf, tokenizer, 300 + 31 * index).asked(index)]
    longer = several[4]
    tokens = [*longer.input_ids[: longer.context_length], 50, 51, *longer.input_ids[longer.context_length :]]
    spans = [(start + 2, stop + 2) for start, stop in longer.answer_spans]
    several[4] = replace(longer, input_ids=tokens, answer_spans=spans, length=longer.length + 2)
    return [*several, SampleSet(replace(conf, questions=1, apart=False), tokenizer, 280)[7]]


@pytest.fixture
def options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "stop_ids": [tokenizer.eos_token_id]}


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_answers_are_those_of_separate_prompts(
    attention: SparseAttentionConfig | None,
    batch_size: int,
    recall_model: PreTrainedModel,
    samples: list[Sample],
    options: dict[str, Any],
) -> None:
    fed: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if (ids := kwargs["input_ids"]).shape[1] > 1:
            mask = kwargs["attention_mask"]
            fed.append(ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum()))

    separate = generate_answers(recall_model, samples, attention, batch_size=batch_size, share_context=False, **options)
    with recall_model.register_forward_pre_hook(count, with_kwargs=True):
        shared = generate_answers(recall_model, samples, attention, batch_size=batch_size, block_size=90, **options)
    assert [asdict(answer) for answer in shared.outcomes] == [asdict(answer) for answer in separate.outcomes]
    assert any(answer.exact for answer in shared.outcomes)
    assert attention != LAG or not all(answer.exact for answer in shared.outcomes)
    assert shared.cache["cache_slots"] == pytest.approx(separate.cache["cache_slots"])
    assert shared.cache["cache_bytes"] == pytest.approx(separate.cache["cache_bytes"])

    prompts = sum(sample.answer_spans[0][0] for sample in samples)
    saved = 2 * sum(sample.context_length for sample in samples[:9:3])
    assert separate.prefilled_tokens == prompts
    assert shared.prefilled_tokens == sum(fed) == prompts - saved < prompts / 2


@pytest.mark.parametrize(
    "attention", [a for a in ATTENTIONS.values() if a], ids=[a for a in ATTENTIONS if a != "dense"]
)
def test_the_same_tokens_are_kept(
    attention: SparseAttentionConfig, recall_model: PreTrainedModel, samples: list[Sample]
) -> None:
    """In a copy with pads before the contexts and between contexts and questions; and the next copy is untouched."""
    set_attention(recall_model, attention)
    prompts = [sample.input_ids[: sample.answer_spans[0][0]] for sample in samples[:6]]
    contexts = [samples[number].input_ids[: samples[number].context_length] for number in (0, 3)]
    read = ReadContexts(recall_model, contexts, 0, 500, None)
    with torch.no_grad():
        for _ in range(2):
            together = _go_on(recall_model, prompts, *read.copy([0, 0, 0, 1, 1, 1], last=False), 0, 20, None)
            assert isinstance(together.cache, SparseKVCache)
            for row, prompt in enumerate(prompts):
                alone = make_cache(recall_model)
                assert isinstance(alone, SparseKVCache)
                logits = prefill(recall_model, torch.tensor([prompt]), alone)
                torch.testing.assert_close(together.logits[row], logits[0], rtol=1e-4, atol=1e-4)
                for layer in range(len(alone.layers)):
                    assert torch.equal(together.cache.kept(layer)[row], alone.kept(layer)[0])
    assert together.mask is not None, "pads are there"


def test_a_prompt_that_is_compressed_once_is_read_whole(
    recall_model: PreTrainedModel, samples: list[Sample], options: dict[str, Any]
) -> None:
    """Its end, with the question in it, is where compression comes."""
    answers = generate_answers(recall_model, samples, ONCE, batch_size=4, **options)
    assert answers.prefilled_tokens == sum(sample.answer_spans[0][0] for sample in samples)


def test_who_can_share(recall_model: PreTrainedModel) -> None:
    assert can_share(recall_model, None) and can_share(recall_model, LAG) and not can_share(recall_model, ONCE)
    assert not can_share(model_of("gemma3_text", None), None), "pads count into a sliding window"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 20])
def test_every_prompt_is_in_one_round(batch_size: int) -> None:
    """Contexts 1 to 4 of 9, 3, 2 and 1 prompts; two prompts without; one that is nothing but its context."""
    contexts = [[10] * 5] * 9 + [[20] * 4] * 3 + [[30] * 6] * 2 + [[40] * 3, [], [], [30] * 6]
    prompts = [context + [index] * (1 + index % 3) for index, context in enumerate(contexts)]
    prompts[-1] = contexts[-1]
    jobs = plan(prompts, list(map(len, contexts)), batch_size, share=True)
    rounds = [indices for job in jobs for indices in job.rounds]
    assert sorted(index for indices in rounds for index in indices) == list(range(len(prompts)))
    assert max(map(len, rounds)) <= batch_size
    read = [tuple(context) for job in jobs for context in job.contexts]
    assert sorted(read) == sorted({tuple(contexts[0]), tuple(contexts[9]), tuple(contexts[12])}), "each once"
    for job in jobs:
        for index in (index for indices in job.rounds for index in indices if job.contexts):
            assert job.contexts[job.of[index]] == contexts[index]
    tokens = sum(job.tokens(number, prompts) for job in jobs for number in range(len(job.rounds)))
    assert tokens == sum(map(len, prompts)) - 8 * 5 - 2 * 4 - 1 * 6
    apart = plan(prompts, list(map(len, contexts)), batch_size, share=False)
    assert not any(job.contexts for job in apart) and sum(len(job.rounds) for job in apart) == -(-18 // batch_size)


def test_the_grid_asks_several_questions_over_one_context(
    recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = EvaluationConf(tasks={"one": SEVERAL}, compressions=[1, 4], length=300, batch_size=4, bootstrap=100)
    conf.attention.sink_size, conf.attention.lag_size = 4, 32
    cells, outcomes = evaluate(recall_model, tokenizer, conf, generate=GenerateConf(), progress=False)
    other, separate = evaluate(
        recall_model, tokenizer, conf, generate=GenerateConf(share_context=False), progress=False
    )
    scored, _ = evaluate(recall_model, tokenizer, conf, progress=False)
    assert list(map(asdict, outcomes)) == list(map(asdict, separate)) and len({o.id for o in outcomes}) == 9
    for cell, whole, score in zip(cells, other, scored, strict=True):
        check(cell, CELL)
        assert cell["n"] == 9 and cell["exact"] == whole["exact"] == score["exact"]
        assert cell["slots"] == whole["slots"] == score["slots"] == pytest.approx(cell["cache_slots"])
    assert cells[0]["prefilled_tokens"] == other[0]["prefilled_tokens"], "without a context there is nothing to share"
    assert cells[2]["prefilled_tokens"] < other[2]["prefilled_tokens"] / 2
