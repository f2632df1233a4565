"""What the selection does: counted on selections made by hand, and on two models whose passes are looked into here."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig, from_conf, kept_tokens
from lrsa.attention.inspection import LayerInputs, inspecting, selecting
from lrsa.attention.layout import Geometry
from lrsa.config import AttentionConf, EvaluationConf, ExamplesConf, SelectionConf
from lrsa.data import Sample, build_samples
from lrsa.data.datamodule import pad_id_of
from lrsa.data.gold import Question, gold_questions
from lrsa.evaluation import Outcome, load_tasks, score
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.scoring import evaluating
from lrsa.evaluation.selection import analyse
from lrsa.evaluation.selection.recording import look_for
from lrsa.evaluation.selection.statistics import Wanted, agreement, survival, swap
from lrsa.models import load_model
from tests.evaluation.conftest import RECALL_ARGS

GEOMETRY = Geometry(sink=4, lag=16, kept=4, chunk=16)
RIVALS = SelectionConf(scorers=["oracle", "random"], scorer_samples=4)

# ---------------------------------------------------------------- by hand


def test_survival_of_a_selection_made_by_hand() -> None:
    """Two questions: the first has two occurrences of two tokens, the second one of one token."""
    wanted = Wanted(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 1, 1, 2]), np.array([0.1, 0.95]))
    held = np.array(
        [
            [[1, 0], [0, 1], [0, 0], [1, 1], [0, 0]],  # layer 0: the heads together hold the first occurrence
            [[0, 0], [1, 0], [0, 0], [0, 0], [1, 0]],  # layer 1: the second question's alone
        ],
        dtype=bool,
    )
    found = survival(held, wanted, np.array([0.5, 0.25]), 200)
    assert found is not None and (found["n"], found["tokens"]) == (2, 5)
    assert found["by_layer_and_head"] == [[0.25, 0.25], [0.625, 0.0]]
    assert found["by_layer"] == [0.25, 0.3125] and found["survival"] == pytest.approx(0.28125)
    assert found["base"] == 0.375 and found["enrichment"] == pytest.approx(0.75)
    assert found["enrichment_by_layer"] == [0.5, 1.25]
    assert found["whole"] == {"by_layer": [0.5, 0.5], "through": [0.5, 0.0], "in_a_layer": 1.0, "anywhere": 1.0}
    first, last = found["by_depth"]
    assert (first["from"], first["n"], first["survival"]) == (0.0, 1, pytest.approx(0.3125))
    assert (last["to"], last["n"], last["survival"]) == (1.0, 1, 0.25)
    assert survival(held[:, :0], Wanted(*(np.array([], int) for _ in range(3))), np.ones(2), 200) is None


def test_an_occurrence_must_be_whole_in_one_place() -> None:
    """Half of one occurrence and half of another make none."""
    wanted = Wanted(np.zeros(4, int), np.array([0, 0, 1, 1]), np.array([0.5]))
    halves = np.array([[[1], [0], [0], [1]]], dtype=bool)
    found = survival(halves, wanted, np.ones(1), 200)
    assert found is not None and found["survival"] == 0.5 and found["whole"]["anywhere"] == 0
    across = survival(np.concatenate([halves, ~halves]), wanted, np.ones(2), 200)
    assert across is not None and across["whole"]["anywhere"] == 1 and across["whole"]["in_a_layer"] == 0


def test_agreement_of_selections_made_by_hand() -> None:
    """One layer, two samples, one head: 4 of 16 tokens, of which 4 and 1 are in common."""
    common = np.array([[4.0, 1.0], [4.0, 4.0], [4.0, 4.0]])[:, None, :, None]
    found = agreement(common, np.array([16.0, 16.0]), 200)
    assert (found["n"], found["shared"], found["chance"]) == (2, 0.625, 0.25)
    assert found["by_layer"] == [0.625] and found["jaccard_by_layer"] == [pytest.approx((1 + 1 / 7) / 2)]
    assert found["shared_low"] <= 0.625 <= found["shared_high"]


def test_the_swap_tells_selection_from_use() -> None:
    """Right where the own selection is, whatever the weights; the own weights find answers a nat likelier."""
    scored = {
        (weights, selection): [
            Outcome("t", f"q{k}", 4, selection == "own", 1.0 + (weights == "against") + k, 2) for k in range(20)
        ]
        for weights in ("own", "against")
        for selection in ("own", "against")
    }
    found = swap(scored, 200)
    assert found["n"] == 20 and found["ids"][3] == "q3" and len(found["cells"]) == 4
    exact = {name: of["exact"] for name, of in found["effects"].items()}
    nll = {name: of["nll"] for name, of in found["effects"].items()}
    selections = {"selection_under_own_weights", "selection_under_against_weights"}
    assert {name for name, value in exact.items() if value == 1} == {"both", *selections}
    assert {name for name, value in exact.items() if value == 0} == {"use_of_own_selection", "use_of_against_selection"}
    assert {name for name, value in nll.items() if value == pytest.approx(-1)} == set(nll) - selections
    cell = next(c for c in found["cells"] if (c["weights"], c["selection"]) == ("against", "own"))
    assert cell["values"]["nll"][2] == 4.0 and cell["exact"] == 1


def test_only_what_was_compressed_is_looked_for() -> None:
    """S 4, L 16, 100 tokens before the answer: partitions 0 to 3 are compressed, positions 4 to 67."""
    assert GEOMETRY.raw_start(GEOMETRY.selected_partitions(100)) == 68
    sample = Sample("s", [0] * 104, [(100, 104)], ("q",), (("a",),), (0.5,), 104, context_length=96)

    def places(*places: tuple[int, ...]) -> tuple[int, list[int]]:
        question = Question("q", 100, {"answer": list(places), "key": [], "passage": []})
        looked = look_for([sample], [[question]], GEOMETRY)
        return looked.wanted["answer"].n, looked.position.tolist()

    assert places((4, 5), (66, 67)) == (1, [4, 5, 66, 67])
    assert places((3, 4)) == places((67, 68)) == places((10,), (90,)) == places() == (0, [])


# ---------------------------------------------------------------- on models


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    """recall-tiny with other keys: another selection."""
    model = load_model("recall-tiny").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_proj" in name:
                weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def configure(batch_size: int = 4, **more) -> EvaluationConf:
    task = ExamplesConf(source="needles", limit=6, args=RECALL_ARGS, **more)
    attention = AttentionConf(sink_size=4, lag_size=16)
    return EvaluationConf(
        tasks={"recall": task}, attention=attention, compressions=[1, 4], batch_size=batch_size, floor=False,
        length=260, bootstrap=200,
    )  # fmt: skip


def passes(model: PreTrainedModel, samples: list[Sample], used: SparseAttentionConfig) -> Iterator[list[torch.Tensor]]:
    """What each layer keeps of each sample, read alone."""
    for sample in samples:
        kept: list[torch.Tensor] = []

        def look(inputs: LayerInputs, kept: list[torch.Tensor] = kept) -> None:
            kept.append(kept_tokens(inputs.key, inputs.value, inputs.config, layer_idx=inputs.layer_idx))

        with evaluating(model, used), torch.no_grad(), inspecting(look):
            model(torch.tensor([sample.input_ids]), use_cache=False)
        yield kept


@pytest.mark.parametrize("more", [{}, {"questions": 3}, {"questions": 3, "apart": True}], ids=["one", "three", "apart"])
def test_two_models_against_a_loop(
    more: dict, recall_model: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = configure(**more)
    tasks = load_tasks(tokenizer, conf, None)
    cells, outcomes, (found,) = analyse(recall_model, other, tokenizer, conf, RIVALS, tasks, progress=False)
    samples = build_samples(tasks[0].prompts)
    attention = from_conf(conf.attention)
    assert attention is not None
    used = attention.with_compression(4)
    assert used is not None
    options = {"batch_size": 4, "pad_id": pad_id_of(tokenizer), "task": "recall", "compression": 4}
    plain = score(recall_model, samples, used, **options)
    assert outcomes == plain, "the model by itself is scored as mode=score does, to the bit"
    assert [(cell["compression"], cell["n"]) for cell in cells] == [(4, len(plain))]
    assert cells[0]["exact"] == sum(outcome.exact for outcome in plain) / len(plain)

    values = {(c["weights"], c["selection"]): c["values"]["nll"] for c in found["swap"]["cells"]}
    assert values["own", "own"] == [outcome.nll for outcome in plain]
    assert values["against", "against"] == [outcome.nll for outcome in score(other, samples, used, **options)]
    assert values["own", "against"] != values["own", "own"]

    shares, jaccard, held = [], [], {"own": [], "against": []}
    questions = gold_questions(tasks[0].prompts, samples)
    forced: list[float] = []
    for sample, asked, mine, theirs in zip(
        samples, questions, passes(recall_model, samples, used), passes(other, samples, used), strict=True
    ):
        stop = GEOMETRY.raw_start(GEOMETRY.selected_partitions(sample.answer_spans[-1][0]))
        a, b = (torch.stack(layers)[:, 0, :, 4:stop] for layers in (mine, theirs))
        shares.append(((a & b).sum(-1) / a.sum(-1)).mean(1))
        jaccard.append(((a & b).sum(-1) / (a | b).sum(-1)).mean(1))
        for one in asked:
            last = GEOMETRY.raw_start(GEOMETRY.selected_partitions(one.asked))
            (answer,) = one.found["answer"]
            if answer[0] >= 4 and answer[-1] < last:
                for name, layers in (("own", mine), ("against", theirs)):
                    held[name].append(torch.stack(layers)[:, 0][:, :, list(answer)].double().mean((1, 2)))
        with selecting(lambda inputs, kept=theirs: kept[inputs.layer_idx]):
            forced += [outcome.nll for outcome in score(recall_model, [sample], used, **options)]
    assert values["own", "against"] == pytest.approx(forced, abs=1e-5)
    between = next(p["found"] for p in found["agreement"] if (p["of"], p["with"]) == ("own", "against"))
    assert between["by_layer"] == pytest.approx(torch.stack(shares).mean(0).tolist())
    assert between["jaccard_by_layer"] == pytest.approx(torch.stack(jaccard).mean(0).tolist())
    assert between["chance"] == 0.25 < between["shared"] < 1
    for name, each in held.items():
        of = found["survival"][name]["answer"]
        assert 0 < len(each) == of["n"] and of["base"] == 0.25
        assert of["by_layer"] == pytest.approx(torch.stack(each).mean(0).tolist())
    assert found["survival"]["own"]["answer"]["by_layer"] != found["survival"]["against"]["answer"]["by_layer"]
    rivals = {(p["of"], p["with"]): p["found"] for p in found["agreement"]}
    assert set(rivals) == {("own", "against"), *((m, r) for m in ("own", "against") for r in RIVALS.scorers)}
    assert abs(rivals["own", "random"]["shared"] - 0.25) < 0.05 and rivals["own", "random"]["n"] == 4
    assert 0.25 < rivals["own", "oracle"]["shared"] < 1
    rules = {(rule["of"], rule["by"]): rule["found"] for rule in found["survival_by_rule"]}
    assert set(rules) == set(rivals) - {("own", "against")}
    by_random, own = rules["own", "random"]["passage"], found["survival"]["own"]["passage"]
    assert abs(by_random["enrichment"] - 1) < 0.5 and 0 < by_random["n"] < own["n"], "of four samples alone"


def test_a_model_agrees_with_itself_and_its_own_selection_changes_nothing(
    recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = configure()
    tasks = load_tasks(tokenizer, conf, None)
    twin = copy.deepcopy(recall_model)
    _, _, (found,) = analyse(recall_model, twin, tokenizer, conf, SelectionConf(scorers=[]), tasks, progress=False)
    cells = found["swap"]["cells"]
    assert len(cells) == 4 and all(cell["values"] == cells[0]["values"] for cell in cells), "to the bit"
    assert [(p["with"], p["found"]["shared"]) for p in found["agreement"]] == [("against", 1.0)]
    assert {of["nll"] for of in found["swap"]["effects"].values()} == {0.0}


@pytest.mark.parametrize(
    ("attention", "layers", "shares"),
    [({"dense_layers": [0]}, [1, 2], [0.25, 0.25]), ({"budget": "pyramid"}, [0, 1], [0.5, 0.25])],
    ids=["dense layer", "layer that keeps nothing"],
)
def test_one_model_alone_and_layers_that_do_not_choose(
    attention: dict, layers: list, shares: list, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = configure()
    conf.attention = AttentionConf(scorer="snapkv", sink_size=4, lag_size=16, **attention)
    settings = SelectionConf(scorers=["lag_relative"])
    tasks = load_tasks(tokenizer, conf, None)
    _, _, (found,) = analyse(model, None, tokenizer, conf, settings, tasks, progress=False)
    assert found["swap"] is None and found["layers"] == layers and list(found["survival"]) == ["own"]
    assert found["survival"]["own"]["passage"]["base_by_layer"] == shares
    (rival,) = found["agreement"]
    assert rival["found"]["chance_by_layer"] == shares, "it keeps as many tokens as the layer"
    conf.attention.scorer = "lag_relative"
    _, _, (found,) = analyse(model, None, tokenizer, conf, settings, tasks, progress=False)
    (rule,) = found["survival_by_rule"]
    assert rule["found"] == found["survival"]["own"], "a rule that is the model's own keeps what it keeps"


def test_what_cannot_be_compared_is_refused(
    model: PreTrainedModel, recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = configure()
    tasks = load_tasks(tokenizer, conf, None)
    settings = SelectionConf(against="another")
    with pytest.raises(EvaluationInputError, match=r"selection\.against=another has another shape than the model"):
        analyse(recall_model, model, tokenizer, conf, settings, tasks, progress=False)
    conf.attention.dense_layers = [0, 1]
    with pytest.raises(EvaluationInputError, match=r"no layer chooses at 4x: each is dense .*dense_layers=\[0, 1\]"):
        analyse(recall_model, None, tokenizer, conf, settings, tasks, progress=False)


def test_prompts_that_are_never_compressed_leave_nothing_to_count(
    recall_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    conf = configure()
    conf.attention.lag_size = 128
    tasks = load_tasks(tokenizer, conf, None)
    _, outcomes, (found,) = analyse(
        recall_model, copy.deepcopy(recall_model), tokenizer, conf, RIVALS, tasks, progress=False
    )
    assert len(outcomes) == 6 and set(found["survival"]["own"].values()) == {None}
    assert {pair["found"] for pair in found["agreement"]} == {None}
