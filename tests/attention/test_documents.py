"""Padding and packing: a document's result does not depend on what stands beside it."""

import math

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, slots, sparse_attention, visibility_mask
from tests.attention.tensors import LOCAL, attend, forward_and_gradients, packed_ids, random_inputs

ROWS = {
    "right-pads": [[(0, 120)], [(0, 67), (-1, 53)], [(3, 5), (-1, 115)]],
    "left-pads": [[(0, 120)], [(-1, 53), (0, 67)], [(-1, 119), (0, 1)]],
    "packed": [[(4, 60), (2, 25), (9, 35)], [(0, 119), (1, 1)], [(1, 20), (0, 100)]],
    "pads-everywhere": [[(-1, 3), (0, 50), (-1, 7), (1, 57), (-1, 3)], [(-1, 120)], [(0, 59), (-1, 1), (1, 60)]],
}
rows = pytest.mark.parametrize("runs", ROWS.values(), ids=ROWS)
backends = pytest.mark.parametrize("backend", ["reference", "gather"])
scorers = pytest.mark.parametrize("scorer", LOCAL)
CONFIG = {"sink_size": 3, "lag_size": 8, "top_k": 3, "chunk_size": 11}


def documents(runs):
    """(row, slice) of each document."""
    for row, spans in enumerate(runs):
        start = 0
        for document, length in spans:
            if document >= 0:
                yield row, slice(start, start + length)
            start += length


@rows
@backends
@scorers
def test_a_document_in_a_row_equals_the_document_alone(scorer, backend, runs):
    config, ids = SparseAttentionConfig(scorer=scorer, **CONFIG), packed_ids(*runs)
    inputs = random_inputs(3, 4, 2, 120, 16)
    together = forward_and_gradients(attend(config, backend, document_ids=ids), *inputs)
    kept = kept_tokens(*inputs[1:], config, query=inputs[0], document_ids=ids)
    visible = visibility_mask(kept, config, document_ids=ids)
    direction = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(1))
    seen = torch.zeros_like(visible)
    for row, span in documents(runs):
        leaves = [x[row : row + 1, :, span].clone().requires_grad_() for x in inputs]
        out = sparse_attention(*leaves, config, backend=backend)
        alone = [out, *torch.autograd.grad(out, leaves, direction[row : row + 1, :, span])]
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1, :, span], part, rtol=1e-5, atol=2e-6)
        kept_alone = kept_tokens(*(x.detach() for x in leaves[1:]), config, query=leaves[0].detach())
        assert torch.equal(kept[row : row + 1, :, span], kept_alone)
        assert (kept_alone.sum(-1) == slots(config, span.stop - span.start)).all()
        block = visibility_mask(kept_alone, config)
        assert torch.equal(visible[row : row + 1, :, span, span], block)
        seen[row, :, span, span] = True
    assert not visible[~seen].any(), "a query sees past its document"
    pads = ids == -1
    assert all((x.transpose(1, 2)[pads] == 0).all() for x in together), "pads: output and gradients are zero"
    assert not kept.transpose(1, 2)[pads].any()


@rows
@backends
@scorers
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_what_a_pad_holds_reaches_nothing(scorer, backend, runs, poison):
    config, ids = SparseAttentionConfig(scorer=scorer, **CONFIG), packed_ids(*runs)
    inputs = random_inputs(3, 4, 2, 120, 16)
    clean = forward_and_gradients(attend(config, backend, document_ids=ids), *inputs)
    pads = (ids == -1)[:, None, :, None]
    poisoned = [x.masked_fill(pads, poison) for x in inputs]
    dirty = forward_and_gradients(attend(config, backend, document_ids=ids), *poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(
        kept_tokens(*poisoned[1:], config, query=poisoned[0], document_ids=ids),
        kept_tokens(*inputs[1:], config, query=inputs[0], document_ids=ids),
    )


@backends
def test_the_documents_own_numbers_and_integer_type_do_not_matter(backend):
    config = SparseAttentionConfig(**CONFIG)
    inputs = random_inputs(1, 4, 2, 120, 16)
    first = sparse_attention(*inputs, config, document_ids=packed_ids([(0, 70), (1, 50)]), backend=backend)
    other = packed_ids([(7, 70), (0, 50)]).to(torch.int32)
    assert torch.equal(sparse_attention(*inputs, config, document_ids=other, backend=backend), first)


@backends
def test_one_document_a_row_is_the_same_with_and_without_ids(backend):
    config = SparseAttentionConfig(**CONFIG)
    inputs = random_inputs(2, 4, 2, 120, 16)
    ids = torch.zeros(2, 120, dtype=torch.int64)
    torch.testing.assert_close(
        sparse_attention(*inputs, config, document_ids=ids, backend=backend),
        sparse_attention(*inputs, config, backend=backend), rtol=1e-6, atol=1e-6,
    )  # fmt: skip


@backends
def test_ids_that_change_in_place_are_read_again(backend):
    config = SparseAttentionConfig(**CONFIG)
    inputs = random_inputs(1, 4, 2, 120, 16)
    ids = packed_ids([(0, 120)])
    whole = sparse_attention(*inputs, config, document_ids=ids, backend=backend)
    ids[:, 60:] = 1
    changed = sparse_attention(*inputs, config, document_ids=ids, backend=backend)
    assert torch.equal(
        changed, sparse_attention(*inputs, config, document_ids=packed_ids([(0, 60), (1, 60)]), backend=backend)
    )
    assert not torch.allclose(whole, changed)


@backends
def test_dense_layers_respect_documents(backend):
    config = SparseAttentionConfig(**CONFIG, dense_layers=(0,))
    inputs = random_inputs(1, 4, 2, 120, 16)
    ids = packed_ids([(-1, 20), (0, 60), (1, 40)])
    out = sparse_attention(*inputs, config, document_ids=ids, backend=backend)
    for span in (slice(20, 80), slice(80, 120)):
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, span] for x in inputs), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, span], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (packed_ids([(0, 40), (1, 40), (0, 40)]), r"row 0: id 0 at token 80 comes back after another document"),
        (packed_ids([(0, 40), (-1, 40), (0, 40)]), r"row 0: id 0 at token 80 comes back"),
        (packed_ids([(0, 40), (-2, 80)]), r"row 0: id -2 at token 40 is negative.*pads are -1"),
        (torch.zeros(1, 120), r"must be integers \[B, T\] \(-1 for a pad\), not torch.float32"),
        (torch.zeros(1, 120, dtype=torch.bool), r"must be integers.*not torch.bool"),
        (torch.zeros(1, 119, dtype=torch.int64), r"document_ids must be \[B, T\] = \(1, 120\), not \(1, 119\)"),
        (torch.full((1, 120), -1), r"document_ids holds pads alone"),
    ],
    ids=["comes-back", "comes-back-after-a-pad", "negative", "float", "bool", "length", "pads-alone"],
)  # fmt: skip
@backends
def test_ids_that_make_no_sense_are_refused(ids, message, backend):
    with pytest.raises(ValueError, match=message):
        sparse_attention(*random_inputs(1, 2, 1, 120, 16), SparseAttentionConfig(**CONFIG), document_ids=ids,
                         backend=backend)  # fmt: skip
