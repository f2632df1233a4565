"""Peers of other designs beside our attention: matched in pairs, gated, refused where they cannot run."""

from __future__ import annotations

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lrsa import bench
from lrsa.attention import SparseAttentionConfig
from lrsa.benchmark.block_peers import check_peers, fla, flash, moba, nsa, rows
from lrsa.benchmark.block_peers.blocks import Blocks, match
from lrsa.benchmark.report import report
from lrsa.config import BenchConf, config_dir
from tests import block_peers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ["lengths=[600]", "lags=[16]", "compressions=[4]", "sink_size=4", "head_dim=8", "rounds=2", "batch_size=1"]
HEADS = ["query_heads=16", "key_value_heads=1"]


def configured(*overrides: str) -> BenchConf:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir()), version_base=None):
        config = compose("bench", overrides=[*SMALL, *HEADS, "run.output_dir=x", "run.name=x", *overrides])
    return OmegaConf.to_object(config)  # type: ignore[return-value]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small flash-linear-attention of plain PyTorch, and nothing that keeps it from running here."""
    for name, module in block_peers.nsa_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fla, "obstacle", lambda conf, device: None)
    monkeypatch.setattr(fla, "installed", lambda: "0.6.0")


@pytest.mark.parametrize("tokens", [63, 64, 111, 256])
@pytest.mark.parametrize("blocks", [Blocks(1, 64), Blocks(3, 16), Blocks(40, 8)], ids=str)
def test_pairs_are_those_of_the_mask(blocks: Blocks, tokens: int) -> None:
    query = torch.randn(1, 1, tokens, 8)
    seen = moba.visible(query, query, blocks)[0, 0]
    assert blocks.pairs(tokens) == int(seen.sum()) and bool(seen.diagonal().all()) and not bool(seen.triu(1).any())
    means = sum((i + 1) // blocks.size for i in range(tokens))  # of the blocks that are over when a query comes
    assert nsa.pairs(blocks, tokens) == int(seen.sum()) + means


@pytest.mark.parametrize("peer", [nsa, moba], ids=["nsa", "moba"])
@pytest.mark.parametrize(("tokens", "lag", "factor"), [(8192, 128, 4), (32768, 1024, 8), (131072, 128, 8)])
def test_a_match_comes_as_close_as_blocks_can(peer, tokens: int, lag: int, factor: int) -> None:
    wanted = SparseAttentionConfig(sink_size=16, lag_size=lag, keep_ratio=1 / factor).geometry.pairs(tokens)
    blocks = peer.matched(wanted, tokens)
    off = [abs(peer.pairs(Blocks(n, blocks.size), tokens) - wanted) for n in range(blocks.count - 1, blocks.count + 2)]
    assert off[1] == min(off) and off[1] < 0.1 * wanted


def test_what_no_number_of_blocks_matches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keys a query at 131,072 tokens would take .*153x256 \(at most 128\)"):
        nsa.matched(SparseAttentionConfig(lag_size=1024, keep_ratio=0.5).geometry.pairs(131072), 131072)
    with pytest.raises(ValueError, match="no whole block"):
        match(10, 64, [64], lambda size: 9, lambda blocks: blocks.pairs(64))


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (["peers=[nsb]"], CUDA, "'nsb' is unknown: choose of nsa, moba"),
        (["peers=[nsa/64]"], CUDA, "16x64 is 16 blocks of 64 keys, this is '64'"),
        (["peers=[nsa/16x48]"], CUDA, "blocks of 16, 32, 64, .. keys"),
        (["peers=[nsa/40x64]"], CUDA, "half as many"),
        (["peers=[moba/1x512]"], CUDA, "two blocks or more"),
        (["peers=[nsa]", "query_heads=8"], CUDA, "16, 32, .. query heads a key/value head, query_heads=8 .* are 8"),
        (["peers=[nsa]"], CPU, "run on CUDA alone, this is device=cpu"),
        (["peers=[moba]"], CPU, "run on CUDA alone, this is device=cpu"),
        (["peers=[moba]", "head_dim=12"], CUDA, "head_dim=12"),
        (["peers=[moba]", "dtype=float32"], CUDA, "this is dtype=float32"),
        (
            ["peers=[nsa]", "lengths=[60]", "dtype=bfloat16"],
            CUDA,
            "cannot attend as many keys as lag 16, compression 4",
        ),
        (["peers=[nsa/16x64]", "dtype=bfloat16"], CUDA, "at 600 tokens is dense attention"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_peer_that_cannot_run_is_refused(overrides, device, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "installed", lambda: "0.6.0")
    with pytest.raises(ValueError, match=message):
        check_peers(configured(*overrides), device)


@pytest.mark.parametrize(("found", "state"), [(None, "is not installed"), ("0.4.1", "is 0.4.1, and too old")])
def test_the_package_is_asked_for(
    found: str | None, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fla, "installed", lambda: found)
    with pytest.raises(ValueError, match=rf"nsa cannot run here: fla-core .* {state}: pip install 'fla-core"):
        bench.run(configured("peers=[nsa]", "device=cpu", f"run.output_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()  # nothing was measured


def test_two_cases_with_the_same_blocks_are_measured_once(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = configured("peers=[nsa/4x32,nsa]", "lags=[16,17]", "compressions=[4]")
    found = rows.settings(conf)
    assert [(s.blocks, s.lag) for s in found] == [(Blocks(4, 32), None), (Blocks(2, 64), 16), (Blocks(2, 64), 17)]
    measured: list[Blocks] = []
    monkeypatch.setattr(
        rows, "_measured", lambda conf, setting, *rest: measured.append(setting.blocks) or {"gate": "x"}
    )
    made = list(rows.run(conf, torch.device("cpu")))
    assert measured == [Blocks(4, 32), Blocks(2, 64)]
    assert [(row["lag"], row["gate"]) for row in made] == [(None, "x"), (16, "x"), (17, "x")]


def test_agreement_is_of_the_blocks_that_were_a_choice() -> None:
    size, count, tokens = 4, 4, 72
    own = (torch.arange(tokens) // size)[None, :, None]
    generator = torch.Generator().manual_seed(0)

    def choice() -> torch.Tensor:
        third = 1 + (torch.rand(own.shape, generator=generator) * (own - 2).clamp(min=1)).long()
        return torch.stack([torch.zeros_like(own), own - 1, own, third.where(own > 2, -1)], -1)

    one, other = choice(), choice()
    assert nsa.free_agreement(one, one.flip(-1), size) == 1
    assert nsa.free_agreement(one, other, size) < 0.4, "chance, however many blocks are given"
    assert one.shape[-1] == count


def test_a_peer_is_gated_timed_and_recorded(stand_in: None, tmp_path: Path) -> None:
    conf = configured("peers=[nsa/4x16]", "device=cpu", "dtype=bfloat16", f"run.output_dir={tmp_path}")
    record = bench.run(conf)
    ours, peer = json.loads(record.path.read_text())["metrics"]["rows"]
    assert (peer["peer"], peer["blocks"], peer["block_size"]) == ("nsa", 4, 16)
    assert peer["gate"] == "passed" and 0 < peer["error"] <= peer["allowed_error"]
    assert 0.9 < peer["selection_agreement"] <= 1 and peer["package"] == "fla-core 0.6.0"
    dense, sparse = (peer["forward_backward"][name]["median"] for name in ("sdpa", "sparse"))
    assert peer["forward_backward_speedup"] == pytest.approx(dense / sparse)
    assert peer["keys_per_query"] * 600 == nsa.pairs(Blocks(4, 16), 600)
    assert ours["keys_per_query"] * ours["ideal_speedup"] == pytest.approx(
        peer["keys_per_query"] * peer["ideal_speedup"]
    )
    shown = report("kernels", vars(conf), [ours, peer], "cpu")
    assert shown.rows[1][1:5] == ["4x16", "-", "-", "nsa"] and all(len(r) == len(shown.columns) for r in shown.rows)


@pytest.mark.parametrize("wrong", ["output", "selection", "memory", "kernel"])
def test_a_peer_that_is_wrong_or_does_not_fit_gets_no_time(wrong: str, stand_in: None, monkeypatch) -> None:
    package = sys.modules["fla.ops.nsa"]
    right, chosen = package.parallel_nsa, sys.modules["fla.ops.nsa.parallel"].parallel_nsa_topk

    def broken(*args, **kwargs):
        if wrong == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB")
        if wrong == "kernel":
            raise ImportError("flash-attn\nis a second line")
        return right(*args, **kwargs) * (1.05 if wrong == "output" else 1)

    monkeypatch.setattr(package, "parallel_nsa", broken)
    if wrong == "selection":
        monkeypatch.setattr(
            sys.modules["fla.ops.nsa.parallel"], "parallel_nsa_topk", lambda **kwargs: chosen(**kwargs).clamp(max=0)
        )
    conf = configured("peers=[nsa/4x16]", "dtype=bfloat16")
    (row,) = rows.run(conf, CPU)
    said = {
        "output": "WRONG",
        "selection": "of its blocks right: WRONG",
        "memory": "out of memory",
        "kernel": "ImportError: flash-attn",
    }[wrong]
    assert "forward" not in row and row.get("gate") == (None if wrong in ("memory", "kernel") else "FAILED")
    (cells,) = report("kernels", vars(conf), [row], "cpu").rows
    assert said in cells[5] and not any(cells[6:])


def packed(lengths: list[int], heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.randn(int(starts[-1]), heads, 8), starts


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's flash attention, which has no CPU kernel, from formulas."""
    kernels = types.SimpleNamespace(
        _flash_attention_forward=block_peers.flash_forward, _flash_attention_backward=block_peers.flash_backward
    )
    monkeypatch.setattr(flash, "ATEN", kernels)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_under_the_names_of_flash_attn(causal: bool, flash_on_cpu: None) -> None:
    """As `fla.ops.moba` of fla-core 0.6.0 calls it: gradients are written where it says."""
    (query, starts), (key, _), (value, _) = (packed([5, 9, 1], 2) for _ in range(3))
    common = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 9, "max_seqlen_k": 9}
    common |= {"softmax_scale": 0.3, "causal": causal, "dropout_p": 0.0}
    out, log_sum, _, _ = flash.forward(q=query, k=key, v=value, **common)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    parts = [[x[a:b].transpose(0, 1) for x in leaves] for a, b in ((0, 5), (5, 14), (14, 15))]
    attended = [torch.nn.functional.scaled_dot_product_attention(*p, is_causal=causal, scale=0.3) for p in parts]
    expected = torch.cat([x.transpose(0, 1) for x in attended])
    torch.testing.assert_close(out, expected)
    grad, found = torch.randn_like(out), [torch.full_like(x, float("nan")) for x in (query, key, value)]
    rest = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
    flash.backward(
        dout=grad, q=query, k=key, v=value, out=out, softmax_lse=log_sum, dq=found[0], dk=found[1], dv=found[2],
        deterministic=True, **common, **rest,
    )  # fmt: skip
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, leaves, grad)))
    with pytest.raises(TypeError, match="softcap"):
        flash.forward(q=query, k=key, v=value, **common, softcap=1.0)


def test_flash_attn_is_kept_where_it_is_installed() -> None:
    names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_varlen_func")
    installed = types.SimpleNamespace(**dict.fromkeys(names, print))
    assert flash.provide(installed) == "flash-attn" and installed._flash_attn_varlen_forward is print
    missing = types.SimpleNamespace(**dict.fromkeys(names))
    assert flash.provide(missing) == flash.provide(missing) == f"torch {torch.__version__}"
    assert missing._flash_attn_varlen_backward is flash.backward


@pytest.mark.skipif(find_spec("fla") is None, reason="needs fla-core and triton: pip install 'lrsa[fla]'")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_packages_own_moba_passes_the_gate(dtype: str, flash_on_cpu: None) -> None:
    conf = configured("query_heads=4", "key_value_heads=2", "batch_size=2", f"dtype={dtype}")
    row = moba.gate(conf, Blocks(3, 512), CPU)
    assert 0 < row["error"] <= row["allowed_error"]
