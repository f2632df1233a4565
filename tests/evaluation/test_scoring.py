from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.cache import prefill
from lrsa.data import Sample
from lrsa.evaluation import Outcome, score
from lrsa.models import get_attention, make_cache, set_attention

SPARSE = SparseAttentionConfig(sink_size=2, lag_size=8, keep_ratio=0.25)
VOCABULARY = 400


def make_sample(name: str, length: int, spans: list[tuple[int, int]], seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed + length)
    return Sample(
        id=name,
        input_ids=torch.randint(1, VOCABULARY, (length,), generator=generator).tolist(),
        answer_spans=spans,
        question_ids=tuple(f"{name}-q{number}" for number in range(len(spans))),
        answers=(("",),) * len(spans),
        gold_depth=(),
        length=length,
    )


SAMPLES = [
    make_sample("a", 61, [(55, 61)]),
    make_sample("b", 40, [(39, 40)]),
    make_sample("c", 61, [(30, 33), (57, 61)], seed=5),
    make_sample("d", 52, [(45, 52)]),
    make_sample("e", 61, [(58, 61)], seed=9),
]


@torch.no_grad()
def grow_prompts(
    model: PreTrainedModel, sample: Sample, attention: SparseAttentionConfig | None
) -> list[tuple[list[int], float]]:
    """By hand, a position at a time: (arg-max tokens, NLL a token) of each answer, the reference fed back."""
    set_attention(model, attention)
    ahead = attention is not None and attention.build_scorer().reads_future
    given = {"prompt_lengths": sample.answer_spans[0][0]} if ahead else {}
    answers = []
    for start, stop in sample.answer_spans:
        predicted, total = [], 0.0
        for position in range(start, stop):
            ids = torch.tensor([sample.input_ids[:position]])
            logits = model(ids, use_cache=False, **given).logits[0, -1]
            predicted.append(int(logits.argmax()))
            total -= float(logits.log_softmax(-1)[sample.input_ids[position]])
        answers.append((predicted, total / (stop - start)))
    set_attention(model, None)
    return answers


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "attention",
    [
        None,
        SPARSE,
        replace(SPARSE, scorer="tova"),
        replace(SPARSE, scorer="h2o", budget="adaptive"),
        replace(SPARSE, scorer="oracle"),
    ],
    ids=["dense", "lag", "tova", "adaptive", "oracle"],
)
def test_one_pass_equals_growing_the_prompt(
    attention: SparseAttentionConfig | None, batch_size: int, model: PreTrainedModel
) -> None:
    """Lengths differ, so batches are padded, grouped and put back into order."""
    # Two samples whose references are what the model would say: without them `exact` would always be False.
    said = []
    for sample in SAMPLES[:2]:
        tokens = list(sample.input_ids)
        ((start, stop),) = sample.answer_spans
        for position in range(start, stop):
            grown = replace(sample, input_ids=tokens, answer_spans=[(start, position + 1)])
            tokens[position] = grow_prompts(model, grown, attention)[0][0][-1]
        said.append(replace(sample, id=f"{sample.id}-said", input_ids=tokens))
    samples = [*SAMPLES, *said]
    outcomes = iter(score(model, samples, attention, batch_size=batch_size, pad_id=0, task="t", compression=4))
    for sample in samples:
        for number, (predicted, nll) in enumerate(grow_prompts(model, sample, attention)):
            outcome, (start, stop) = next(outcomes), sample.answer_spans[number]
            assert outcome.id == (sample.question_ids[number] if sample.id == "c" else sample.id)
            assert outcome.exact == (predicted == sample.input_ids[start:stop])
            assert outcome.exact == sample.id.endswith("said")
            assert outcome.nll == pytest.approx(nll, rel=1e-4)
            assert (outcome.task, outcome.compression, outcome.tokens) == ("t", 4, stop - start)
    assert next(outcomes, None) is None


ONCE = replace(SPARSE, schedule="prefill_once", scorer="tova")


def test_once_compressed_prompts_score_as_they_decode(model: PreTrainedModel) -> None:
    """Reference tokens fed to a cache one at a time: the likelihood that ragged batches of the parallel form give."""
    samples = [sample for sample in SAMPLES if sample.id != "c"]
    outcomes = score(model, samples, ONCE, batch_size=3, pad_id=0)
    set_attention(model, ONCE)
    for sample, outcome in zip(samples, outcomes, strict=True):
        ((start, stop),) = sample.answer_spans
        cache, total = make_cache(model), 0.0
        logits = prefill(model, torch.tensor([sample.input_ids[:start]]), cache)
        for token in sample.input_ids[start:stop]:
            total -= float(logits[0].log_softmax(-1)[token])
            logits = prefill(model, torch.tensor([[token]]), cache)
        assert outcome.nll == pytest.approx(total / (stop - start), rel=1e-4)
    set_attention(model, None)
    dense = score(model, samples, None, batch_size=3, pad_id=0)
    assert any(abs(a.nll - b.nll) > 1e-3 for a, b in zip(dense, outcomes, strict=True))


def test_a_sample_with_several_answers_has_no_one_prompt(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"sample c has 2 answers, but schedule='prefill_once'.*mode=generate"):
        score(model, SAMPLES, ONCE, batch_size=3, pad_id=0)


def test_compression_changes_the_scores(model: PreTrainedModel) -> None:
    """Otherwise the test above could not tell sparse from dense."""
    dense, sparse = (score(model, SAMPLES, a, batch_size=8, pad_id=0) for a in (None, SPARSE))
    assert any(abs(a.nll - b.nll) > 1e-3 for a, b in zip(dense, sparse, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [None, SPARSE], ids=["dense", "sparse"])
def test_the_model_is_left_as_it_was(
    before: SparseAttentionConfig | None, training: bool, model: PreTrainedModel
) -> None:
    model.train(training)
    set_attention(model, before)
    score(model, SAMPLES, SPARSE.with_compression(2), batch_size=2, pad_id=0)
    assert get_attention(model) == before and model.training == training


def test_the_model_is_left_as_it_was_after_an_error(model: PreTrainedModel) -> None:
    def fail(samples: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model.train(), SAMPLES, SPARSE, batch_size=2, pad_id=0, on_batch=fail)
    assert get_attention(model) is None and model.training


def test_progress_counts_samples_and_tokens(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    score(model, SAMPLES, None, batch_size=2, pad_id=0, on_batch=lambda n, tokens: seen.append((n, tokens)))
    assert [n for n, _ in seen] == [2, 2, 1]
    assert sum(tokens for _, tokens in seen) == sum(sample.length for sample in SAMPLES)


def test_autocast_is_bfloat16(model: PreTrainedModel) -> None:
    exact = score(model, SAMPLES, None, batch_size=5, pad_id=0)
    rounded = score(model, SAMPLES, None, batch_size=5, pad_id=0, precision="bf16-mixed")
    assert [o.nll for o in exact] != [o.nll for o in rounded]
    assert [o.nll for o in exact] == pytest.approx([o.nll for o in rounded], rel=0.05)
    with pytest.raises(ValueError, match="choose 32-true or bf16-mixed"):
        score(model, SAMPLES, None, batch_size=5, pad_id=0, precision="16-mixed")


def test_outcomes_are_plain_values(model: PreTrainedModel) -> None:
    (outcome,) = score(model, SAMPLES[:1], None, batch_size=1, pad_id=0)
    assert isinstance(outcome, Outcome) and type(outcome.exact) is bool and type(outcome.nll) is float
    assert outcome.depth is None, "nothing says where its gold passage stands"
