import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.config import AttentionConf, EvaluationConf, ExamplesConf, GenerateConf
from lrsa.data import ContextTooLongError
from lrsa.evaluation import evaluate, load_tasks
from lrsa.evaluation.cells import measure_cache
from lrsa.models import get_attention, set_attention
from lrsa.results.schema import CELL, OUTCOME, check

from .conftest import RECALL_ARGS

RECALL = ExamplesConf(
    source="needles",
    limit=6,
    args={"needles": 4, "value_digits": 2, "key_words": 1, "statement": "{key}: {value}.", "question": "{key}?"},
)
ATTENTION = AttentionConf(sink_size=4, lag_size=16)


@pytest.fixture
def conf() -> EvaluationConf:
    return EvaluationConf(
        tasks={"one": RECALL}, attention=ATTENTION, compressions=[1, 2, 8], batch_size=4, bootstrap=200, length=160
    )


def test_the_grid_has_a_cell_a_column_and_an_outcome_an_example(
    conf: EvaluationConf, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = SparseAttentionConfig(lag_size=8)
    set_attention(model, before)
    cells, outcomes = evaluate(model, tokenizer, conf, progress=False)
    assert get_attention(model) == before
    assert [cell["compression"] for cell in cells] == [None, 1, 2, 8]
    assert len(outcomes) == 4 * 6
    for cell in cells:
        check(cell, CELL)
        assert cell["n"] == 6 and cell["exact_low"] <= cell["exact"] <= cell["exact_high"]
        assert cell["seconds"] > 0 and cell["tokens_per_second"] > 0
    for outcome in outcomes:
        check(vars(outcome), OUTCOME)
    ids = {factor: [o.id for o in outcomes if o.compression == factor] for factor in (None, 1, 2, 8)}
    assert len(set(ids[1])) == 6 and all(names == ids[1] for names in ids.values()), "paired between columns"
    ratios = [cell["measured_ratio"] for cell in cells]
    assert ratios[0] is None and ratios[1] == 1 and 1 < ratios[2] < 2 < ratios[3] < 8
    assert cells[0]["data_fingerprint"] != cells[1]["data_fingerprint"] == cells[2]["data_fingerprint"]
    nll = [cell["nll"] for cell in cells]
    assert len(set(nll)) == 4, "compression and floor act"


def test_the_grid_of_generated_answers(
    conf: EvaluationConf, recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Exact match of each cell is that of scoring; the cache held what the closed form says."""
    conf.tasks = {"one": ExamplesConf(source="needles", limit=12, args=RECALL_ARGS)}
    conf.length = 300
    settings = GenerateConf(block_size=64)
    cells, outcomes = evaluate(recall_model, tokenizer, conf, generate=settings, progress=False)
    scored, _ = evaluate(recall_model, tokenizer, conf, progress=False)
    assert len(outcomes) == 4 * 12
    for outcome in outcomes:
        check(vars(outcome), OUTCOME)
    for cell, other in zip(cells, scored, strict=True):
        check(cell, CELL)
        same = ("task", "compression", "n", "exact", "exact_low", "exact_high", "slots", "length", "measured_ratio")
        assert {name: cell[name] for name in same} == {name: other[name] for name in same}
        assert "nll" not in cell and "f1" not in other
        assert cell["exact"] <= cell["exact_match"] <= cell["f1"] <= cell["f1_high"]
        assert cell["exact_match"] <= cell["rouge_l"] <= cell["f1"], "these answers have neither articles nor repeats"
        assert cell["rouge_l_low"] <= cell["rouge_l"] <= cell["rouge_l_high"]
        assert cell["cache_slots"] == pytest.approx(cell["slots"])
        assert cell["max_new_tokens"] >= 16 and 0 <= cell["hit_limit"] <= 1
    texts = [{o.text for o in outcomes if o.compression == factor} for factor in (None, 1, 8)]
    assert texts[0] != texts[1] != texts[2], "compression and floor act"
    assert cells[1]["exact"] > cells[3]["exact"]


@pytest.mark.parametrize("generate", [None, GenerateConf()], ids=["score", "generate"])
def test_the_gold_documents_alone_are_the_ceiling(
    conf: EvaluationConf,
    recall_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generate: GenerateConf | None,
) -> None:
    conf.tasks = {"one": ExamplesConf(source="needles", limit=8, args=RECALL_ARGS)}
    conf.length, conf.ceiling, conf.compressions = 300, True, [1, 8]
    cells, outcomes = evaluate(recall_model, tokenizer, conf, generate=generate, progress=False)
    settings = [(cell["context"], cell["compression"]) for cell in cells]
    assert settings == [("none", None), ("gold", 1), ("full", 1), ("full", 8)]
    for row in [*cells, *map(vars, outcomes)]:
        check(row, CELL if "n" in row else OUTCOME)
    ids = [[o.id for o in outcomes if (o.context, o.compression) == setting] for setting in settings]
    assert len(set(ids[0])) == 8 and all(names == ids[0] for names in ids), "paired between columns"
    floor, gold, full, _ = cells
    assert floor["length"] < gold["length"] < 60 < full["length"]
    assert gold["measured_ratio"] is None and gold["slots"] == gold["length"]
    assert len({cell["data_fingerprint"] for cell in cells}) == 3
    if generate is None:
        assert len({cell["nll"] for cell in cells}) == 4, "each has a prompt of its own"
    names = [fact["name"] for fact in load_tasks(tokenizer, conf, None)[0].facts()]
    assert names == ["one", "one without context", "one with its gold documents alone"]


def test_rows_without_documents_have_a_ceiling_too(
    conf: EvaluationConf, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the river", "answer": "lake"}) + "\n")
    conf.tasks, conf.ceiling = {"own": ExamplesConf(source="jsonl", path=str(tmp_path / "rows.jsonl"))}, True
    cells, _ = evaluate(model, tokenizer, conf, progress=False)
    assert cells[0]["nll"] == cells[1]["nll"] == cells[2]["nll"], "nothing to leave out"


def test_no_floor_and_only_the_full_cache(
    conf: EvaluationConf, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf.floor, conf.compressions, conf.attention = False, [1], AttentionConf(scorer="dense")
    cells, outcomes = evaluate(model, tokenizer, conf, progress=False)
    assert [cell["compression"] for cell in cells] == [1] and len(outcomes) == 6
    conf.compressions = [1, 4]
    with pytest.raises(ValueError, match=r"scorer=dense cannot compress.*\[1, 4\]"):
        evaluate(model, tokenizer, conf, progress=False)


def test_prompts_that_do_not_fit_show_before_a_model_is_needed(
    conf: EvaluationConf, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf.length = 20
    with pytest.raises(ContextTooLongError) as error:
        load_tasks(tokenizer, conf, None)
    assert error.value.__notes__ == ["in evaluation.tasks.one"]


def test_measured_ratio_slots_and_bytes(model: PreTrainedModel) -> None:
    """S 16, L 128, K 32: 4x is 3.37x at 4,096 tokens. One of three layers dense. 2 KV heads of 8 channels."""
    attention = SparseAttentionConfig(sink_size=16, lag_size=128, keep_ratio=0.25)
    all_layers = measure_cache(model, attention, [4096], "32-true")
    assert round(all_layers["measured_ratio"], 2) == 3.37
    slots = all_layers["slots"]
    cell = measure_cache(
        model, SparseAttentionConfig(sink_size=16, lag_size=128, keep_ratio=0.25, dense_layers=(-1,)), [4096], "32-true"
    )
    assert cell["kept_per_layer"] == [slots, slots, 4096]
    assert cell["kv_bytes_per_layer"] == [2 * 2 * 8 * 4 * kept for kept in cell["kept_per_layer"]]
    assert cell["measured_ratio"] == pytest.approx(3 * 4096 / (2 * slots + 4096))
    half = measure_cache(model, attention, [4096, 100], "bf16-mixed")
    assert half["length"] == 2098 and half["slots"] == (slots + 100) / 2
    assert half["kv_bytes_per_layer"] == [2 * 2 * 8 * 2 * half["slots"]] * 3
    once = replace(attention, schedule="prefill_once", lag_size=32, dense_layers=(-1,))
    cell = measure_cache(model, once, [4096, 40], "32-true")
    held = 16 + 32 + int(0.25 * (4096 - 48))
    assert cell["kept_per_layer"] == [(held + 40) / 2, (held + 40) / 2, 2068]
