"""Which layers need the full cache: the search against a loop of plain forward passes, and what it must not do."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig, from_conf
from lrsa.config import AttentionConf, EvaluationConf, ExamplesConf, LayersConf
from lrsa.data import Sample, build_samples
from lrsa.evaluation import Task, load_tasks
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.layers import rank_layers
from lrsa.models import get_attention, load_model, set_attention
from tests.evaluation.conftest import RECALL_ARGS


def configure(lag_size: int = 16, **attention) -> EvaluationConf:
    """Two tasks of different sizes: a mean over tasks is not one over examples."""
    few = ExamplesConf(source="needles", limit=2, args=RECALL_ARGS)
    more = ExamplesConf(source="needles", limit=5, seed=1, questions=2, args=RECALL_ARGS)
    return EvaluationConf(
        tasks={"few": few, "more": more}, batch_size=3, floor=False, length=260, bootstrap=200,
        attention=AttentionConf(sink_size=4, lag_size=lag_size, top_k=2, **attention),
    )  # fmt: skip


@pytest.fixture
def deep(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Fresh weights, 4 layers, which differ in what they need."""
    return fresh(tokenizer)


def fresh(tokenizer: PreTrainedTokenizerBase, **more) -> PreTrainedModel:
    torch.manual_seed(8)
    config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
    }
    return load_model("fresh", None, config={**config, **more}).eval()


def plainly(model: PreTrainedModel, tasks: list[Task], used: SparseAttentionConfig | None) -> tuple[float, float]:
    """NLL and exact match, a sample and an answer at a time."""
    set_attention(model, used)
    of_tasks = []
    for task in tasks:
        of_answers = [pair for sample in build_samples(task.prompts) for pair in answers(model, sample)]
        of_tasks.append(torch.tensor(of_answers).mean(0))
    set_attention(model, None)
    nll, exact = torch.stack(of_tasks).mean(0).tolist()
    return nll, exact


@torch.no_grad()
def answers(model: PreTrainedModel, sample: Sample) -> list[tuple[float, float]]:
    ids = torch.tensor(sample.input_ids)
    logits = model(ids[None], use_cache=False).logits[0]
    found = []
    for first, stop in sample.answer_spans:
        told, wanted = logits[first - 1 : stop - 1], ids[first:stop]
        found.append((float(F.cross_entropy(told, wanted)), float((told.argmax(-1) == wanted).all())))
    return found


@pytest.mark.parametrize(("name", "depth", "count"), [("deep", 4, 3), ("recall_model", 2, 1)], ids=["fresh", "recall"])
def test_it_chooses_what_a_loop_chooses_and_chooses_it_again(
    name: str, depth: int, count: int, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    deep, conf = request.getfixturevalue(name), configure()
    tasks, attention = load_tasks(tokenizer, conf, None), from_conf(conf.attention)
    assert attention is not None
    found = rank_layers(deep, tokenizer, conf, LayersConf(count=count), tasks, progress=False)

    full, none = plainly(deep, tasks, None), plainly(deep, tasks, attention)
    assert (found["full"]["nll"], found["full"]["exact"]) == pytest.approx(full, abs=1e-4)
    assert (found["rounds"][0]["nll"], found["rounds"][0]["exact"]) == pytest.approx(none, abs=1e-4)
    assert found["rounds"][0]["layer"] is None and found["rounds"][0]["candidates"] == []
    assert {name: of["n"] for name, of in found["full"]["tasks"].items()} == {"few": 2, "more": 10}
    dense: list[int] = []
    for round_ in found["rounds"][1:]:
        nlls, exact = {}, {}
        for layer in set(range(depth)) - set(dense):
            nlls[layer], exact[layer] = plainly(deep, tasks, replace(attention, dense_layers=(*dense, layer)))
        assert {tried["layer"]: tried["nll"] for tried in round_["candidates"]} == pytest.approx(nlls, abs=1e-4)
        assert {tried["layer"]: tried["exact"] for tried in round_["candidates"]} == pytest.approx(exact)
        dense.append(min(nlls, key=lambda layer: nlls[layer]))
        assert round_["layer"] == dense[-1] and round_["nll"] == pytest.approx(nlls[dense[-1]], abs=1e-4)
        best, second, *_ = sorted([*nlls.values(), torch.inf])
        assert second - best > 1e-3, "no tie that rounding decides"
    assert found["order"] == dense == {"deep": [1, 0, 2], "recall_model": [1]}[name]
    assert found["start"] == [] and len(found["rounds"]) == count + 1
    again = rank_layers(deep, tokenizer, conf, LayersConf(count=count), tasks, progress=False)
    assert again == found, "to the bit"


def test_all_layers_ranked_are_the_full_cache_and_the_model_stays_as_it_was(
    deep: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = configure()
    before = SparseAttentionConfig(sink_size=8, lag_size=32)
    set_attention(deep, before)
    deep.train()
    told: list[dict] = []
    found = rank_layers(
        deep, tokenizer, conf, LayersConf(count=4), load_tasks(tokenizer, conf, None), progress=False,
        on_round=lambda found: told.append(copy.deepcopy(found)),
    )  # fmt: skip
    assert sorted(found["order"]) == [0, 1, 2, 3]
    assert found["rounds"][-1]["nll"] == pytest.approx(found["full"]["nll"], abs=1e-4)
    assert abs(found["rounds"][0]["nll"] - found["full"]["nll"]) > 0.01, "compression acts"
    assert [len(each["order"]) for each in told] == [0, 1, 2, 3, 4] and told[-1] == found
    assert get_attention(deep) == before and deep.training


def test_the_start_set_is_dense_from_the_start_and_goes_on_where_a_search_ended(
    deep: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tasks = load_tasks(tokenizer, configure(), None)
    whole = rank_layers(deep, tokenizer, configure(), LayersConf(count=3), tasks, progress=False)
    first, *_ = whole["order"]
    conf = configure(dense_layers=[first - 4])  # counted from the last
    rest = rank_layers(deep, tokenizer, conf, LayersConf(count=2), tasks, progress=False)
    assert rest["start"] == [first] and rest["order"] == whole["order"]
    assert rest["rounds"][0]["nll"] == whole["rounds"][1]["nll"]
    assert rest["rounds"][1:] == whole["rounds"][2:], "its candidates among them: the start set is not tried again"


def test_of_equals_the_earlier_layer(deep: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing is compressed under a lag this long."""
    conf = configure(lag_size=256, dense_layers=[1])
    found = rank_layers(deep, tokenizer, conf, LayersConf(count=2), load_tasks(tokenizer, conf, None), progress=False)
    assert len({tried["nll"] for tried in found["rounds"][1]["candidates"]}) == 1
    assert found["order"] == [1, 0, 2]


def test_layers_that_slide_a_window_are_not_tried(tokenizer: PreTrainedTokenizerBase) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = fresh(
        tokenizer, model_type="qwen3", head_dim=8, layer_types=kinds, sliding_window=64, use_sliding_window=True
    )
    conf = configure()
    tasks = load_tasks(tokenizer, conf, None)
    found = rank_layers(model, tokenizer, conf, LayersConf(count=1), tasks, progress=False)
    assert [tried["layer"] for tried in found["rounds"][1]["candidates"]] == [1, 3]
    with pytest.raises(EvaluationInputError, match=r"layers\.count=3, but 2 of the model's 4 layers can be added"):
        rank_layers(model, tokenizer, conf, LayersConf(count=3), tasks, progress=False)


@pytest.mark.parametrize(
    ("dense", "count", "said"),
    [
        ([], 5, r"layers\.count=5, but 4 of the model's 4 layers .* set layers\.count to 1 to 4"),
        ([2], 4, r"layers\.count=4, but 3 of .*dense_layers=\[2\] already; set layers\.count to 1 to 3"),
        ([0, 1, 2, 3], 1, r"layers\.count=1, but 0 of .* take some out of dense_layers"),
        ([4], 1, r"evaluation\.attention\.dense_layers=\(4,\): layer 4 is not among 4 layers: name layers of 0 to 3"),
    ],
    ids=["too many", "too many besides", "none left", "outside"],
)
def test_what_the_model_has_not_is_refused(
    dense: list[int], count: int, said: str, deep: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(EvaluationInputError, match=said):
        rank_layers(deep, tokenizer, configure(dense_layers=dense), LayersConf(count=count), [], progress=False)


def test_a_likelihood_that_is_no_number_ranks_nothing(
    deep: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    deep.lm_head.weight.data[0] = torch.nan
    conf = configure()
    with pytest.raises(EvaluationInputError, match=r"tasks\.few: the references' NLL is nan with every layer dense"):
        rank_layers(deep, tokenizer, conf, LayersConf(count=1), load_tasks(tokenizer, conf, None), progress=False)
