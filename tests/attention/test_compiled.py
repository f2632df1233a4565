"""The attention inside of a compiled layer: the backends' operators and what is traced around them, on the CPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel

import lrsa.models
from lrsa.attention import SparseAttentionConfig, compiled, flash4, flex, operators, selection
from lrsa.attention.dense import attend_dense, attend_dense_backward
from lrsa.attention.layout import Geometry
from lrsa.models import load_model, set_attention, target_logits
from tests.attention import block_sparse
from tests.attention.tensors import random_inputs

TOKENS = 300
PUBLISHED = SparseAttentionConfig(sink_size=16, lag_size=48)
SHAPE = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[True, False], ids=["hopper", "elsewhere"])
def everywhere(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The GPU's backends on the CPU: FlexAttention by its slow definition, flash-attn-4's kernels by a stand-in."""
    monkeypatch.setattr(flash4, "kernels", lambda: block_sparse)
    monkeypatch.setattr(flash4, "hopper_kernels", lambda: block_sparse.HOPPER)
    monkeypatch.setattr(flash4, "_chip", lambda device: flash4.Chip(128, 132, request.param))
    monkeypatch.setattr(flash4, "suits_hopper", lambda geometry, group, dim: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # which refuses a gradient here
    monkeypatch.setattr(flex, "_compiled", lambda: flex._fused)

    def layouts(model: PreTrainedModel, tokens: int, device: torch.device) -> dict[str, flex.Layout]:
        configs = (SparseAttentionConfig.from_json(text) for text in model.lrsa_layers)
        return {config.to_json(): flex.layout_of(config.geometry, tokens, device) for config in configs}

    for backend in (flex, flash4):
        monkeypatch.setattr(backend, "obstacle", lambda query: None)
    monkeypatch.setattr(lrsa.models, "whole_rows", layouts)


def gradients(model: PreTrainedModel, attention: SparseAttentionConfig, backend: str) -> dict[str, Tensor]:
    set_attention(model, attention, backend=backend)
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (2, TOKENS), generator=generator)
    logits, targets = target_logits(model, ids, torch.arange(TOKENS).expand(2, -1) >= TOKENS - 5)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compile_layers(model: PreTrainedModel, backend: str = "aot_eager") -> None:
    for layer in model.model.layers:
        layer.compile(backend=backend, dynamic=False, fullgraph=True)


def compared(backend: str, checkpointing: bool, compiler: str = "aot_eager") -> None:
    torch.manual_seed(0)
    model = load_model("fresh", None, config=SHAPE, gradient_checkpointing=checkpointing).train()
    ratios = PUBLISHED, PUBLISHED.with_compression(2)
    expected = [gradients(model, attention, backend) for attention in ratios]
    counters.clear()
    compile_layers(model, compiler)
    for _ in range(2):
        for attention, wanted in zip(ratios, expected, strict=True):
            for name, value in gradients(model, attention, backend).items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], "a compilation a ratio, whole"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("backend", ["gather", "flex", "flash4"])
def test_layers_are_traced_whole_with_every_backend(backend: str, checkpointing: bool) -> None:
    compared(backend, checkpointing)


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("backend", ["gather", "flash4"])
def test_fused_kernels_take_the_operators_results(backend: str) -> None:
    """Inductor checks that shapes and strides are as announced; it calls the C++ compiler."""
    compared(backend, True, "inductor")


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("sink", [0, 16])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("attend_spans", torch.float32), ("attend_spans", torch.bfloat16), ("attend_blocks", torch.float32)],
)
def test_an_operator_returns_what_it_says(name: str, dtype: torch.dtype, sink: int) -> None:
    query, key, value = (x.requires_grad_() for x in random_inputs(2, 4, 2, 200, 16, dtype=dtype))
    partitions = Geometry(sink, 32, 8, 32).selected_partitions(200)
    index = torch.arange(8 * partitions).expand(2, 2, -1).contiguous() + sink
    extra = [index]
    if name == "attend_spans":
        seen = torch.cat([torch.arange(sink), index[0, 0]])
        extra = [x.detach()[:, :, seen].requires_grad_() for x in (key, value)]
    inputs = query, key, value, *extra, [sink, 32, 8, 32], 0.25
    tests = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(getattr(operators, name), inputs, test_utils=tests)
    gradient = getattr(torch.ops.lrsa, f"{name}_backward").default
    made = getattr(operators, name)(*inputs)
    saved = [x.detach() for x in (torch.randn_like(made[0]), *inputs[:-2], *made)]
    torch.library.opcheck(gradient, (*saved, *inputs[-2:]), test_utils=tests[:2])


def test_a_gradients_gradient_is_refused() -> None:
    query, key, value = (x.requires_grad_() for x in random_inputs(1, 2, 1, 40, 16))
    buffers = [x.detach()[:, :, :4].requires_grad_() for x in (key, value)]
    out, _ = operators.attend_spans(query, key, value, *buffers, [4, 8, 0, 8], 0.25)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(grad.sum(), query)


def test_the_gradient_of_the_first_tokens_is_autograds() -> None:
    query, key, value = (x.double().requires_grad_() for x in random_inputs(2, 6, 2, 16, 8))
    grad = torch.randn_like(query)
    expected = torch.autograd.grad(attend_dense(query, key, value, 0.3), (query, key, value), grad)
    for one, other in zip(attend_dense_backward(grad, query, key, value, 0.3), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_layer_scores_as_a_training_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU scores are compiled with gradients on, and are not without."""
    modes, scoring = [], selection.scoring
    monkeypatch.setattr(selection, "scoring", lambda key: modes.append(torch.is_grad_enabled()) or scoring(key))
    model = load_model("fresh", None, config=SHAPE).train()
    gradients(model, PUBLISHED, "gather")
    compile_layers(model)
    gradients(model, PUBLISHED, "gather")
    assert modes == [True] * 6


def test_layers_are_told_their_own_config() -> None:
    model = load_model("fresh", None, config=SHAPE)
    layers = [layer.self_attn for layer in model.model.layers]
    set_attention(model, SparseAttentionConfig(lag_size=48, dense_layers=(-1,), budget="pyramid"))
    *sparse, dense = [layer.lrsa_layer for layer in layers]
    assert dense == compiled.DENSE_LAYER and len(set(sparse)) == 2 and set(model.lrsa_layers) == set(sparse)
    assert [int(layer.lrsa_index) for layer in layers] == [0, 1, 2]
    assert "lrsa_index" not in "".join(model.state_dict())
    set_attention(model, SparseAttentionConfig(schedule="prefill_once"))
    assert {layer.lrsa_layer for layer in layers} == {None} and model.lrsa_layers == ()
