"""Likelihood of prose by position: against a hand-made loop, the model's own head, and what must be so."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.cache import SparseKVCache
from lrsa.config import AttentionConf, EvaluationConf, PerplexityConf
from lrsa.data.vocabulary import build_tokenizer
from lrsa.data.wordlists import HAYSTACK
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.perplexity import Windows, evaluate_prose, read_windows, stretches, token_nll
from lrsa.models import get_attention, set_attention
from lrsa.results.schema import POSITION_CELL, POSITION_OUTCOME, check
from tests.architectures import FAMILIES, model_of, tokens

LENGTH = 96
SETTINGS = PerplexityConf(windows=5, buckets=4)


@pytest.fixture
def conf() -> EvaluationConf:
    attention = AttentionConf(sink_size=4, lag_size=16)
    return EvaluationConf(attention=attention, compressions=[1, 2, 8], batch_size=2, bootstrap=200, length=LENGTH)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "prose"
    folder.mkdir()
    for number in range(2):
        paragraphs = [" ".join(HAYSTACK[k : k + 4]) for k in range(number, len(HAYSTACK) - 4, 3)]
        (folder / f"{number}.txt").write_text("\n\n".join(["A heading", *paragraphs]))
    return folder


@pytest.fixture
def windows(text: Path, tokenizer: PreTrainedTokenizerBase) -> Windows:
    return read_windows(tokenizer, PerplexityConf(text=str(text), windows=5), LENGTH)


def by_hand(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Token by token, each from a pass of its own over what precedes it."""
    nll = np.zeros((len(ids), ids.shape[1] - 1))
    with torch.no_grad():
        for row, window in enumerate(ids):
            for end in range(1, len(window)):
                logits = model(torch.tensor(window[None, :end]).long(), use_cache=False).logits[0, -1]
                nll[row, end - 1] = -logits.double().log_softmax(-1)[int(window[end])]
    return nll


def test_full_cache_equals_a_loop_by_hand(conf: EvaluationConf, model: PreTrainedModel, windows: Windows) -> None:
    before = SparseAttentionConfig(lag_size=8)
    nll = by_hand(model, windows.ids[:, :LENGTH])
    set_attention(model, before)
    cells, outcomes = evaluate_prose(model, windows, conf, SETTINGS, progress=False)
    assert get_attention(model) == before
    ranges = [(0, 96), (0, 24), (24, 48), (48, 72), (72, 96)]
    assert [tuple(cell["positions"]) for cell in cells] == ranges * 3
    for cell, (first, stop) in zip(cells, ranges, strict=False):
        mine = nll[:, max(first, 1) - 1 : stop - 1].mean(1)
        found = [o for o in outcomes if o.compression == 1 and o.positions == (first, stop)]
        assert [o.nll for o in found] == pytest.approx(mine, abs=1e-4)
        assert {o.tokens for o in found} == {stop - max(first, 1)}
        assert cell["nll"] == pytest.approx(mine.mean(), abs=1e-4) and cell["n"] == 5
        assert cell["nll_low"] <= cell["nll"] <= cell["nll_high"]
    for cell in cells:
        check(cell, POSITION_CELL)
    for outcome in outcomes:
        check({**vars(outcome), "positions": list(outcome.positions)}, POSITION_OUTCOME)
    assert len({(o.task, o.id, o.compression) for o in outcomes}) == len(outcomes) == 5 * 5 * 3


def test_compression_acts_where_it_compresses(conf: EvaluationConf, model: PreTrainedModel, windows: Windows) -> None:
    """S 4, L 16: the first partition is compressed at 36 tokens; what is before it is dense to the bit."""
    cells, outcomes = evaluate_prose(model, windows, conf, SETTINGS, progress=False)
    values = {(o.compression, o.positions, o.id): o.nll for o in outcomes if o.positions != (0, LENGTH)}
    early = [key for key in values if key[1] == (0, 24)]
    assert all(values[key] == values[1, key[1], key[2]] for key in early)
    late = [key for key in values if key[1] == (72, 96) and key[0] != 1]
    assert all(abs(values[key] - values[1, key[1], key[2]]) > 1e-4 for key in late)
    by = {(cell["compression"], tuple(cell["positions"])): cell["measured_ratio"] for cell in cells}
    assert by[1, (72, 96)] == by[8, (0, 24)] == 1 < by[2, (72, 96)] < by[8, (72, 96)] == by[8, (0, 96)]


def test_the_parallel_form_is_what_the_cache_computes(
    conf: EvaluationConf, model: PreTrainedModel, windows: Windows
) -> None:
    attention = SparseAttentionConfig(sink_size=4, lag_size=16, keep_ratio=1 / 8)
    set_attention(model, attention)
    ids = torch.from_numpy(windows.ids[:1]).long()
    cache, logits = SparseKVCache(attention, model.config), []
    with torch.no_grad():
        for position in range(LENGTH - 1):
            logits.append(model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits[0, -1])
        step_by_step = F.cross_entropy(torch.stack(logits), ids[0, 1:], reduction="none")
        assert torch.allclose(token_nll(model, ids)[0], step_by_step, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_in_chunks_is_the_models_own(family: str, at_once: int) -> None:
    model, ids = model_of(family, None), tokens(3, 12)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
        expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        sizes: list[int] = []
        handle = model.get_output_embeddings().register_forward_hook(lambda *found: sizes.append(found[2].shape[0]))
        assert torch.allclose(token_nll(model, ids, at_once), expected, atol=1e-5)
        handle.remove()
    assert max(sizes) == min(at_once, 33) and sum(sizes) == 33


def test_equal_logits_are_log_v(conf: EvaluationConf, model: PreTrainedModel, windows: Windows) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    cells, _ = evaluate_prose(model, windows, conf, SETTINGS, progress=False)
    vocabulary = model.config.vocab_size
    assert [cell["nll"] for cell in cells] == pytest.approx([math.log(vocabulary)] * len(cells), abs=1e-5)


def test_windows_are_the_text_in_order_without_overlap(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = read_windows(tokenizer, PerplexityConf(text=str(text), windows=10_000), 50)
    assert len(whole.ids) == whole.available > 10 and whole.lead == ()
    some = read_windows(tokenizer, PerplexityConf(text=str(text), windows=7), 50)
    rows = [int(np.flatnonzero((whole.ids == window).all(1))[0]) for window in some.ids]
    assert rows == [index * whole.available // 7 for index in range(7)]
    assert "heading" not in tokenizer.decode(whole.ids.flatten()) and some.fingerprint != whole.fingerprint
    shorter = read_windows(tokenizer, PerplexityConf(text=str(text), windows=10_000), 25)
    assert (shorter.ids[: 2 * len(whole.ids)].reshape(-1, 50) == whole.ids).all()
    facts = some.facts()
    assert facts["n"] == 7 and facts["length"] == 50 and facts["origin"] == "prose"


def test_a_tokenizer_that_begins_texts_begins_windows(text: Path) -> None:
    plain, begins = build_tokenizer(), build_tokenizer()
    bos = begins.bos_token_id
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    conf = PerplexityConf(text=str(text), windows=10_000)
    with_it, without = read_windows(begins, conf, 51), read_windows(plain, conf, 50)
    assert (with_it.ids[:, 0] == bos).all() and (with_it.ids[:, 1:] == without.ids).all()


def test_a_text_too_short_or_absent_names_the_setting(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        EvaluationInputError, match=r"two windows of evaluation\.length=50,000 take 100,000: give a longer"
    ):
        read_windows(tokenizer, PerplexityConf(text=str(text)), 50_000)
    with pytest.raises(FileNotFoundError) as error:
        read_windows(tokenizer, PerplexityConf(text="/nowhere"), 50)
    assert "perplexity.text" in error.value.__notes__[0]


def test_dense_attention_compresses_nothing(conf: EvaluationConf, model: PreTrainedModel, windows: Windows) -> None:
    conf.attention = AttentionConf(scorer="dense")
    with pytest.raises(ValueError, match="dense attention cannot compress 2x"):
        evaluate_prose(model, windows, conf, SETTINGS, progress=False)


@pytest.mark.parametrize(("length", "buckets"), [(4096, 8), (97, 4), (10, 5), (7, 1)])
def test_stretches_cover_the_window(length: int, buckets: int) -> None:
    whole, *parts = stretches(length, buckets)
    assert whole == (0, length) and len(parts) == (buckets if buckets > 1 else 0)
    assert [position for part in parts for position in range(*part)] == (list(range(length)) if parts else [])
