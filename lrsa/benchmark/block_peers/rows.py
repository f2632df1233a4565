"""Rows of the peers beside those of `lrsa.benchmark.kernels`: the same inputs, the same dense kernels, taking turns."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lrsa.benchmark.block_peers import moba, nsa
from lrsa.benchmark.block_peers.blocks import Blocks
from lrsa.benchmark.cases import cases
from lrsa.benchmark.filled import free_memory
from lrsa.benchmark.kernels import against_ideal, dense_kernels, make_inputs, measure, with_gradients
from lrsa.config import BenchConf

log = logging.getLogger(__name__)
PEERS: dict[str, ModuleType] = {"nsa": nsa, "moba": moba}


@dataclass(frozen=True)
class Setting:
    """A peer at one length; ``lag`` and ``compression`` are those of LRSA whose pairs it has, if it was matched."""

    peer: str
    length: int
    blocks: Blocks
    lag: int | None = None
    compression: float | None = None


def check_peers(conf: BenchConf, device: torch.device) -> None:
    """Before anything is measured.

    Raises:
        ValueError: a peer that is unknown, cannot run here, or cannot attend as many keys as asked; and why.
    """
    for spec in conf.peers:
        name, _ = _parsed(spec)
        if why := PEERS[name].obstacle(conf, device):
            raise ValueError(f"peers: {name} cannot run here: {why}")
    settings(conf)


def settings(conf: BenchConf) -> list[Setting]:
    """What will be timed, in order; settings that two cases have in common are measured once.

    Raises:
        ValueError: see `check_peers`.
    """
    found: list[Setting] = []
    for length in conf.lengths:
        for spec in conf.peers:
            name, blocks = _parsed(spec)
            if blocks is not None:
                if blocks.pairs(length) >= length * (length + 1) // 2:
                    raise ValueError(f"peers: {spec} at {length:,} tokens is dense attention: ask for fewer blocks")
                found.append(Setting(name, length, blocks))
                continue
            for config, compression in cases(conf):
                try:
                    blocks = PEERS[name].matched(config.geometry.pairs(length), length)
                except ValueError as error:
                    where = f"lag {config.lag_size}, compression {compression:g}"
                    raise ValueError(f"peers: {name} cannot attend as many keys as {where}: {error}") from error
                found.append(Setting(name, length, blocks, config.lag_size, compression))
    return list(dict.fromkeys(found))


def run(conf: BenchConf, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a setting, fields as those of `lrsa.benchmark.kernels.run`; what breaks off or does not fit says so."""
    measured: dict[tuple[str, int, Blocks], dict[str, Any]] = {}
    for setting in settings(conf):
        peer, what = PEERS[setting.peer], (setting.peer, setting.length, setting.blocks)
        row: dict[str, Any] = {"length": setting.length, "peer": setting.peer, "package": peer.package()}
        row |= {"blocks": setting.blocks.count, "block_size": setting.blocks.size}
        row |= {"lag": setting.lag, "compression": setting.compression}
        if what not in measured:
            try:
                measured[what] = _measured(conf, setting, peer, device)
            except torch.OutOfMemoryError:
                measured[what] = {"failed": "out of memory"}
            except Exception as error:  # in code of others: what was measured stands, and the next one may do better
                log.exception("%s %s at %s tokens broke off", setting.peer, setting.blocks, setting.length)
                measured[what] = {"failed": f"{type(error).__name__}: {error}"}
            free_memory(device)
        yield row | measured[what]


def _measured(conf: BenchConf, setting: Setting, peer: ModuleType, device: torch.device) -> dict[str, Any]:
    inputs = make_inputs(conf, setting.length, device)
    function, own = peer.prepare(inputs, setting.blocks)
    with_gradients(function, own)()  # before the gate: Triton tunes a kernel by its first inputs, so these
    row = peer.gate(conf, setting.blocks, device)
    agrees = row.get("selection_agreement", 1) >= row.get("allowed_agreement", 0)
    row["gate"] = "passed" if row["error"] <= row["allowed_error"] and agrees else "FAILED"
    if row["gate"] == "passed":
        row |= measure(function, own, dense_kernels(inputs), inputs, conf.rounds)
        row |= against_ideal(peer.pairs(setting.blocks, setting.length), setting.length)
    return row


def _parsed(spec: str) -> tuple[str, Blocks | None]:
    """Name, and the blocks it is to have, if it says."""
    name, _, asked = spec.partition("/")
    if name not in PEERS:
        raise ValueError(f"peers: {name!r} is unknown: choose of {', '.join(PEERS)}, as nsa or nsa/16x64")
    if not asked:
        return name, None
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", asked)
    blocks = Blocks(*map(int, numbers.groups())) if numbers else None
    why = f"16x64 is 16 blocks of 64 keys, this is {asked!r}" if blocks is None else PEERS[name].invalid(blocks)
    if why:
        raise ValueError(f"peers: {spec} asks for what cannot be: {why}")
    return name, blocks
