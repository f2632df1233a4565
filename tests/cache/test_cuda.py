"""On a GPU, in bfloat16: the cache errs no more against the mask form than twice what dense attention itself errs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from lrsa.attention import SparseAttentionConfig
from lrsa.cache.graphed import GraphedStep
from lrsa.models import load_model, make_cache, set_attention
from tests.attention.tensors import LOCAL
from tests.cache.feeding import feed, parallel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "initializer_range": 0.05,
}  # fmt: skip
LAG, TOKENS = 64, 2300


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    exact = load_model("fresh", None, config=SHAPE).eval().cuda()
    lowered = load_model("fresh", None, config=SHAPE, dtype=torch.bfloat16).eval().cuda()
    lowered.load_state_dict(exact.state_dict())
    exact.load_state_dict(lowered.state_dict())  # the same rounded weights in both
    ids = torch.randint(512, (2, TOKENS), generator=torch.Generator().manual_seed(0)).cuda()
    return exact, lowered, ids, error(parallel(lowered, ids), parallel(exact, ids))


@pytest.mark.parametrize("chunk", [LAG, 2 * LAG, 3 * LAG + 1])
@pytest.mark.parametrize("scorer", LOCAL)
def test_forms_and_feedings_agree(models, scorer, chunk):
    _, model, ids, dense_error = models
    config = SparseAttentionConfig(
        scorer=scorer, sink_size=16, lag_size=LAG, top_k=0 if scorer == "recency" else 16, chunk_size=chunk
    )
    set_attention(model, config, backend="reference")
    mask_form = parallel(model, ids)
    for backend in ("gather", "flex"):
        set_attention(model, config, backend=backend)
        assert error(parallel(model, ids), mask_form) <= 2 * dense_error, backend
    for sizes in ([TOKENS], 3 * LAG + 1, [2200, *[1] * 100]):
        assert error(feed(model, make_cache(model), ids, sizes), mask_form) <= 2 * dense_error, sizes


@pytest.mark.parametrize("scorer", ["lag_relative", "tova"])
def test_a_captured_step_is_an_ordinary_one(models, scorer):
    _, model, ids, dense_error = models
    set_attention(model, SparseAttentionConfig(scorer=scorer, sink_size=16, lag_size=LAG, top_k=16), backend="auto")
    cache, plain = make_cache(model, TOKENS), make_cache(model, TOKENS)
    for one in (cache, plain):
        feed(model, one, ids[:, :2200], 2200)
    expected = feed(model, plain, ids[:, 2200:], 1)
    with GraphedStep(model, cache) as step:
        assert step.captured
        found = torch.stack([step(ids[:, i]).clone() for i in range(2200, TOKENS)], 1)
    assert error(found, expected) <= dense_error
    assert [k.tolist() for k in cache.kept(0)] == [k.tolist() for k in plain.kept(0)]


def test_prompts_in_batches_of_any_size_share_their_kernels(models):
    """A kernel takes ten seconds to compile, and rows of one length come in groups of any size."""
    _, model, ids, dense_error = models
    config = SparseAttentionConfig(sink_size=16, lag_size=LAG, top_k=16)
    rows = ids.repeat(4, 1)
    set_attention(model, config, backend="auto")
    alone = feed(model, make_cache(model), rows[:1], TOKENS)
    compiled = []
    for size in (2, 3, 7, 8):
        found = feed(model, make_cache(model), rows[:size], TOKENS)
        assert error(found[:1], alone) <= dense_error, size
        compiled.append(counters["stats"]["unique_graphs"])
    assert len(set(compiled)) == 1, compiled
