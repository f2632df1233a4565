"""Memory of the gather form: linear in T, the backward pass included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lrsa.attention import SparseAttentionConfig, reference, sparse_attention
from tests.attention.tensors import attend, forward_and_gradients, packed_ids, random_inputs

HEADS, GROUPS, DIM = 3, 3, 32


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor] = tensor.untyped_storage()
        storages = {s.data_ptr(): s.nbytes() for s in self.alive.values()}
        self.peak = max(self.peak, sum(storages.values()))
        self.largest = max(self.largest, *storages.values()) if storages else self.largest
        return out


def peak_bytes(tokens: int, config: SparseAttentionConfig, backend: str) -> int:
    leaves = [x.requires_grad_() for x in random_inputs(1, HEADS * GROUPS, HEADS, tokens, DIM)]
    with Peak() as peak:
        sparse_attention(*leaves, config, backend=backend).square().sum().backward()
    return peak.peak


def saved_bytes(tokens: int, config: SparseAttentionConfig, backend: str) -> int:
    storages: dict[int, int] = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.requires_grad_() for x in random_inputs(1, HEADS * GROUPS, HEADS, tokens, DIM)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = sparse_attention(*leaves, config, backend=backend)
    del out
    return sum(storages.values())


@pytest.mark.parametrize("lag", [64, 512])
@pytest.mark.parametrize("measure", [saved_bytes, peak_bytes])
def test_memory_of_gather_doubles_with_the_length(measure, lag):
    config = SparseAttentionConfig(sink_size=16, lag_size=lag, keep_ratio=0.25)
    once, twice = measure(2048, config, "gather"), measure(4096, config, "gather")
    assert twice <= 2.1 * once


def test_the_measure_sees_quadratic_memory():
    config = SparseAttentionConfig(sink_size=16, lag_size=64, keep_ratio=0.25)
    assert peak_bytes(1024, config, "reference") > 3.5 * peak_bytes(512, config, "reference")


def test_the_mask_form_takes_a_head_at_a_time():
    """Without gradients: as much for four rows as for one, but for inputs, output and the mask itself."""
    config = SparseAttentionConfig(sink_size=16, lag_size=64, keep_ratio=0.25)

    def peak(batch):
        inputs = random_inputs(batch, HEADS * GROUPS, HEADS, 1024, DIM)
        with torch.no_grad(), Peak() as peak:
            sparse_attention(*inputs, config, backend="reference")
        return peak.peak

    logits = GROUPS * 1024**2 * 4
    whole = peak(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MOST_LOGITS", 1)
        assert peak(4) - peak(1) < 3 * logits < 0.3 * (whole - peak(4))


@pytest.mark.parametrize("most", [1, 2 * 111**2 * 2])
def test_the_mask_form_in_parts_is_the_same(most, monkeypatch):
    ids = packed_ids([(0, 60), (1, 51)], [(0, 111)], [(-1, 11), (2, 100)])
    for document_ids in (None, ids):
        run = attend(SparseAttentionConfig(sink_size=3, lag_size=8), "reference", document_ids=document_ids)
        inputs = random_inputs(3, 4, 2, 111, 16)
        whole = forward_and_gradients(run, *inputs)
        monkeypatch.setattr(reference, "MOST_LOGITS", most)
        for part, x in zip(forward_and_gradients(run, *inputs), whole, strict=True):
            torch.testing.assert_close(part, x)
        monkeypatch.undo()


def test_gather_saves_little_more_than_its_inputs_and_output():
    config = SparseAttentionConfig(sink_size=16, lag_size=64, keep_ratio=0.25)
    query = 2048 * HEADS * GROUPS * DIM * 4
    key = query // GROUPS
    assert saved_bytes(2048, config, "gather") < 1.05 * (2 * query + 2 * key + 2 * key * 0.27)


def test_a_dense_layer_of_gather_has_linear_memory_too():
    config = SparseAttentionConfig(sink_size=16, lag_size=64, keep_ratio=0.25, dense_layers=(0,))
    assert peak_bytes(4096, config, "gather") <= 2.1 * peak_bytes(2048, config, "gather")


@pytest.mark.slow
def test_resident_memory_of_the_process_doubles_at_most():
    """What no operator reports: workspaces inside kernels and the allocator's own."""
    script = """
import resource, sys, torch
from lrsa.attention import SparseAttentionConfig, sparse_attention
torch.set_num_threads(1)
def run(tokens):
    x = [torch.randn(1, h, tokens, 64, requires_grad=True) for h in (9, 3, 3)]
    sparse_attention(*x, SparseAttentionConfig(), backend="gather").sum().backward()
run(1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = [
        int(subprocess.run([sys.executable, "-c", script, str(t)], capture_output=True, check=True, text=True).stdout)
        for t in (8192, 16384)
    ]
    assert grown[1] <= 2.4 * grown[0]  # the first 1,024 tokens' memory is used again and not counted
