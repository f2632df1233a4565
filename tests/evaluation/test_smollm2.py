"""Generation and parallel scoring agree token for token on a real model: SmolLM2, float32.

The model is not post-trained and would miss every reference, so an example's reference is what the model itself says
under the attention in question, spoiled in every third.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrsa.attention import SparseAttentionConfig
from lrsa.config import ExamplesConf
from lrsa.data import SampleSet
from lrsa.evaluation import generate_answers, score
from lrsa.evaluation.generate import stop_tokens
from lrsa.models import load_model, load_tokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ON_GPU = torch.cuda.is_available()
COUNT, TOKENS = (200, 2048) if ON_GPU else (6, 600)  # 200 take an hour on two cores
NEW = 12


@pytest.fixture(scope="module")
def setting(repository, shared_data):
    folder = Path(os.environ.get("LRSA_SMOLLM2", repository / "models" / "SmolLM2-135M-Instruct"))
    if not (folder / GGUF).is_file():
        pytest.skip(f"no {folder / GGUF}: `make model` puts it there, or LRSA_SMOLLM2 names its folder")
    tokenizer = load_tokenizer(folder, gguf_file=GGUF)
    model = load_model(folder, None, gguf_file=GGUF).eval().to("cuda" if ON_GPU else "cpu")
    conf = ExamplesConf(source="squad", path=str(shared_data / "data" / "squad"), split="validation", limit=COUNT)
    sets = [SampleSet(conf, tokenizer, TOKENS - shorter) for shorter in (0, 37, 90)]  # ragged batches
    samples = [sets[i % 3][i] for i in range(COUNT)]
    return model, tokenizer, stop_tokens(tokenizer, sets[0].prompt.end), samples


def self_referenced(setting, attention):
    """The samples with what the model says under ``attention`` as references, every third one spoiled at its end."""
    model, tokenizer, stop, samples = setting
    said = generate_answers(
        model, [_unanswered(sample) for sample in samples], attention, tokenizer=tokenizer, stop_ids=stop,
        batch_size=8, max_new_tokens=NEW,
    )  # fmt: skip
    references = []
    for number, (sample, answer) in enumerate(zip(samples, said.outcomes, strict=True)):
        ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"][:NEW] or [5]
        if number % 3 == 2:
            ids[-1] = (ids[-1] + 7) % 40_000
        start = sample.answer_spans[0][0]
        whole = sample.input_ids[:start] + ids
        references.append(replace(sample, input_ids=whole, answer_spans=[(start, len(whole))], length=len(whole)))
    return references


def _unanswered(sample):
    """With a reference of one token, which any limit fits."""
    start = sample.answer_spans[0][0]
    return replace(sample, input_ids=sample.input_ids[: start + 1], answer_spans=[(start, start + 1)], length=start + 1)


ATTENTIONS = {
    "dense": None,
    "lag_relative 2x": SparseAttentionConfig(keep_ratio=1 / 2),
    "lag_relative 4x": SparseAttentionConfig(),
    "tova 4x": SparseAttentionConfig(scorer="tova"),
    "snapkv 4x, L 64": SparseAttentionConfig(scorer="snapkv", lag_size=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_generation_matches_what_parallel_scoring_says(setting, attention):
    model, tokenizer, stop, _ = setting
    samples = self_referenced(setting, attention)
    generated = generate_answers(
        model, samples, attention, tokenizer=tokenizer, stop_ids=stop, batch_size=8, max_new_tokens=NEW
    )
    scored = score(model, samples, attention, batch_size=8, pad_id=0)
    found = [answer.exact for answer in generated.outcomes]
    assert found == [outcome.exact for outcome in scored]
    assert 0 < sum(found) < len(found), "one answer alone proves nothing"
