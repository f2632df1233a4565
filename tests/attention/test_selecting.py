"""A selection from outside: what a model keeps by itself, forced on it, changes no bit; another one does."""

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens
from lrsa.attention.inspection import LayerInputs, inspecting, kept_by, selecting
from lrsa.models import set_attention, target_logits
from tests.architectures import model_of, tokens

CONFIGS = {
    "lag_relative": SparseAttentionConfig(sink_size=4, lag_size=16),
    "reads queries": SparseAttentionConfig("snapkv", sink_size=4, lag_size=16, keep_ratio=1 / 8),
    "looks ahead": SparseAttentionConfig("oracle", sink_size=4, lag_size=16),
    "adaptive": SparseAttentionConfig("snapkv", sink_size=4, lag_size=16, budget="adaptive"),
    "once": SparseAttentionConfig(sink_size=4, lag_size=16, schedule="prefill_once"),
    "dense layers": SparseAttentionConfig(sink_size=4, lag_size=16, dense_layers=(0,)),
    "long chunks": SparseAttentionConfig(sink_size=4, lag_size=16, chunk_size=49),
}


def logits_of(model, padded: bool) -> torch.Tensor:
    ids = tokens(2, 150)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -28:-20] = True
    document_ids = torch.zeros_like(ids)
    document_ids[1, -20:] = -1
    with torch.no_grad():
        return target_logits(model, ids, answers, document_ids if padded else None)[0]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in CONFIGS
        for backend in ("reference", "gather")
        if backend == "reference" or not CONFIGS[name].mask_form_only
    ],
)
def test_forcing_a_models_own_selection_changes_no_bit(name: str, backend: str, padded: bool) -> None:
    config = CONFIGS[name]
    model = model_of("llama", None)
    set_attention(model, config, backend=backend)
    plain = logits_of(model, padded)
    kept: dict[int, torch.Tensor] = {}

    def record(inputs: LayerInputs) -> torch.Tensor | None:
        if inputs.config.for_layer(inputs.layer_idx) is None:
            return None
        kept[inputs.layer_idx] = kept_by(inputs)
        return kept[inputs.layer_idx]

    with selecting(record):
        assert torch.equal(logits_of(model, padded), plain)
    with selecting(lambda inputs: kept.get(inputs.layer_idx)):
        assert torch.equal(logits_of(model, padded), plain)
    assert len(kept) == model.config.num_hidden_layers - len(config.dense_layers)
    assert all(not held.all() and held.any() for held in kept.values())

    flipped = {layer: held.flip(1) for layer, held in kept.items()}  # another head's
    with selecting(lambda inputs: flipped.get(inputs.layer_idx)):
        assert not torch.equal(logits_of(model, padded), plain)
    assert torch.equal(logits_of(model, padded), plain), "nothing stays behind"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention needs CUDA")
@pytest.mark.parametrize("tokens_a_row", [2192, 2256], ids=["end of a partition", "within one"])
def test_on_a_gpu_neither_under_autocast(tokens_a_row: int) -> None:
    config = SparseAttentionConfig(sink_size=16, lag_size=128)
    model = model_of("llama", None).cuda()
    set_attention(model, config, backend="flex")
    ids = tokens(2, tokens_a_row).cuda()
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -8:] = True
    kept: list[torch.Tensor] = []

    def record(inputs: LayerInputs) -> torch.Tensor:
        kept.append(kept_by(inputs))
        return kept[-1]

    def scored() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return target_logits(model, ids, answers)[0]

    plain = scored()
    with selecting(record):
        assert torch.equal(scored(), plain)
    with selecting(lambda inputs: kept[inputs.layer_idx]):
        assert torch.equal(scored(), plain)
    with selecting(lambda inputs: kept[inputs.layer_idx].flip(1)):
        assert not torch.equal(scored(), plain)


def test_a_selection_that_does_not_fit_is_refused() -> None:
    model = model_of("llama", SparseAttentionConfig(sink_size=4, lag_size=16))
    refused = pytest.raises(ValueError, match="kept= has between 16 and 16 tokens a partition, the config keeps 4")
    with refused, selecting(lambda inputs: torch.ones(inputs.key.shape[:3], dtype=torch.bool)):
        logits_of(model, padded=False)
    logits_of(model, padded=False)


def test_the_innermost_is_asked_and_another_rule_reads_the_same_inputs() -> None:
    model = model_of("llama", SparseAttentionConfig(sink_size=4, lag_size=16))
    keydiff = SparseAttentionConfig("keydiff", sink_size=4, lag_size=16)
    asked, compared = [], []

    def compare(inputs: LayerInputs) -> None:
        own = kept_tokens(inputs.key, inputs.value, inputs.config, layer_idx=inputs.layer_idx)
        other = kept_tokens(inputs.key, inputs.value, keydiff, layer_idx=inputs.layer_idx)
        compared.append(bool((own == kept_by(inputs)).all() and (other == kept_by(inputs, keydiff)).all()))
        assert not torch.equal(own, other)

    with inspecting(compare), selecting(lambda _: asked.append("outer")), selecting(lambda _: asked.append("inner")):
        logits_of(model, padded=False)
    assert compared == [True] * model.config.num_hidden_layers and asked == ["inner"] * len(compared)
