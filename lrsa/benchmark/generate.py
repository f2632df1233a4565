"""Generation: prefill and graphed decoding, dense against sparse, a correctness gate before each number.

All rows of a batch are the same prompt, filled once and copied: what a step costs does not depend on what the cache
holds, and prefill's memory shall not decide how many rows fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lrsa.benchmark import peers
from lrsa.benchmark.cases import cases
from lrsa.benchmark.engines import Dense, Engine, Sparse, bytes_per_slot, weight_bytes
from lrsa.benchmark.filled import Filled, free_memory, is_out_of_memory, raise_out_of_memory
from lrsa.benchmark.gate import (
    EXACT,
    allowed_error,
    exactness,
    one_pass,
    random_tokens,
    relative_error,
    shallow_model,
    step_errors,
    worst,
)
from lrsa.benchmark.timing import consecutive, peak, reset_peak, summary
from lrsa.cache.graphed import GraphedStep
from lrsa.config import BenchConf
from lrsa.evaluation.peers import PREFIX, press_fields
from lrsa.models import build_model

Row = dict[str, Any]
OWN_ENGINES = ("dense", "lrsa")


def run(conf: BenchConf, device: torch.device) -> Iterator[Row]:
    """One row a prompt length, engine and batch: prefill time, decode tokens/s, memory, bytes, and the speed-ups.

    A cell that fails, or does not fit, is a row with its reason under ``failed``; the others go on.
    """
    check_engines(conf.engines)
    torch.manual_seed(conf.run.seed)
    if conf.model.config is not None:
        with torch.device(device):  # a large model's fresh weights never see the CPU
            model = build_model(conf.model, None)
    else:
        model = build_model(conf.model, None).to(device)
    model.eval().requires_grad_(False)
    shallow = shallow_model(model)
    for length in conf.lengths:
        cells = _Cells(conf, device, model, shallow, length)
        for engine in _engines(conf):
            try:
                yield from cells.measure(engine)
            except Exception as error:
                yield cells.about(engine) | {"batch": None, "failed": _reason(error)}
            free_memory(device)
        for name, compression in product(filter(_is_peer, conf.engines), conf.compressions):
            yield cells.measure_peer(name, compression)
            free_memory(device)


def check_engines(engines: Sequence[str]) -> None:
    """Raise ValueError for a name that is none, or a peer that cannot be had here."""
    for name in engines:
        if _is_peer(name):
            press_fields(name)
        elif name not in OWN_ENGINES:
            raise ValueError(f"engines: {name!r} is unknown: choose of {', '.join(OWN_ENGINES)}, kvpress/<Press>")


def _is_peer(name: str) -> bool:
    return name.startswith(PREFIX)


def _engines(conf: BenchConf) -> Iterator[Engine]:
    if "dense" in conf.engines:
        yield Dense()  # first: the others are compared with it
    for config, compression in cases(conf) if "lrsa" in conf.engines else ():
        yield Sparse(config, compression)


@dataclass
class _Cells:
    """The cells of one prompt length."""

    conf: BenchConf
    device: torch.device
    model: Any
    shallow: Any
    length: int
    rivals: dict[int, Row] = field(default_factory=dict)  # the dense cells, by batch

    @property
    def steps(self) -> int:
        """Timed in each cell: whole chunks, so that compression has its true share of them."""
        chunk = max(self.conf.lags)
        return -(-self.conf.decode_steps // chunk) * chunk

    @property
    def warm_up(self) -> int:
        """Steps before the timed ones: a compression is among them, whose first one at a batch allocates."""
        return max(self.conf.lags) + 3

    @property
    def gate_steps(self) -> int:
        """Enough for a compression to be among them."""
        return max(self.conf.lags) + 2

    @property
    def capacity(self) -> int:
        """Tokens that a row comes to when every cell has run."""
        cells = 1 + len(self.conf.batches) + 2
        return self.length + self.gate_steps + cells * (self.steps + self.warm_up)

    def about(self, engine: Engine) -> Row:
        return {
            "length": self.length,
            "engine": engine.name,
            "lag": engine.lag,
            "compression": engine.compression,
        }

    def measure_peer(self, name: str, compression: float) -> Row:
        """One row at batch 1, as the peer generates by itself."""
        row: Row = {"length": self.length, "engine": f"{name} {compression:g}x", "lag": max(self.conf.lags)}
        row["compression"] = compression
        try:
            ids = random_tokens(self.model, self.length, self.conf.run.seed)
            row |= peers.measure(name, compression, self.model, ids, self.conf, self.device)
        except Exception as error:
            return row | {"batch": 1, "failed": _reason(error)}
        return self._compared(compression, row)

    def measure(self, engine: Engine) -> Iterator[Row]:
        """Gate, prefill, then a row for each batch, from one row to the most that fit."""
        seed, lag = self.conf.run.seed, max(self.conf.lags)
        exact = exactness(engine, self.shallow, self.conf.sink_size + 4 * lag + 37, lag + 3, seed)
        row = self.about(engine) | {"batch": 1, "gate": "FAILED", "exact_error": exact, "allowed_exact_error": EXACT}
        if exact > EXACT:
            yield row
            return
        row["kernels"] = engine.kernels(self.model, self.length)
        ids = random_tokens(self.model, self.length + self.gate_steps, seed)
        row["reference"] = self.conf.backends[0]
        expected = one_pass(self.model, engine, ids, self.gate_steps + 1, row["reference"])
        allowed = max(allowed_error(self.model), 2 * self._noise(engine, ids, expected))
        filled = Filled(engine, self.model, ids[:, : self.length], self.capacity, self.device)
        logits, prefill = filled.timed(self.conf.rounds)
        errors = [relative_error(logits, expected[:1])]
        reset_peak(self.device)
        with GraphedStep(self.model, filled.cache) as step:
            errors += step_errors(step, ids[:, self.length :], expected[1:])
            row |= {"prefill_error": errors[0], "error": worst(errors), "allowed_error": allowed}
            if row["error"] > row["allowed_error"]:
                yield row
                return
            row["gate"] = "passed"
            first = self._decoded(engine, filled, step)
        del step, logits, expected
        yield self._compared(engine.compression, row | {"prefill": prefill} | first)
        yield from self._larger(engine, filled, row)

    def _noise(self, engine: Engine, ids: Tensor, expected: Tensor) -> float:
        """Error between two backends that both compute one pass over ``ids``. The fewer tokens a partition keeps, the
        more it moves a deep model of random weights in bfloat16 that rounding decides between two of them."""
        if engine.compression is None or self.device.type != "cuda" or self.conf.backends[0] == "flex":
            return 0.0
        other = one_pass(self.model, engine, ids, len(expected), "flex")
        return worst([relative_error(a[None], b[None]) for a, b in zip(other, expected, strict=True)])

    def _larger(self, engine: Engine, filled: Filled, row: Row) -> Iterator[Row]:
        wanted = {*self.conf.batches, *self.rivals} - {1}
        done = 1
        for batch in sorted(wanted):
            try:
                cell = row | self._at_batch(engine, filled, batch)
            except torch.OutOfMemoryError as error:
                yield row | {"batch": batch, "failed": _reason(error)}
                continue
            done = batch
            yield self._compared(engine.compression, cell)
        batch = filled.most_rows() if self.conf.largest_batch else 0
        while batch > done:
            try:
                cell = row | self._at_batch(engine, filled, batch)
            except torch.OutOfMemoryError:
                batch -= max(1, batch // 32)
                continue
            yield self._compared(engine.compression, cell | {"largest": True})
            return

    def _at_batch(self, engine: Engine, filled: Filled, batch: int) -> Row:
        filled.grow(batch)
        reset_peak(self.device)
        try:
            with GraphedStep(self.model, filled.cache) as step:
                return self._decoded(engine, filled, step)
        except Exception as error:
            filled.drop()
            raise_out_of_memory(error)
            raise

    def _decoded(self, engine: Engine, filled: Filled, step: GraphedStep) -> Row:
        """Time greedy steps; the cache reads on."""
        batch = filled.rows
        tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)

        def greedy() -> None:
            tokens.copy_(step(tokens).argmax(-1))

        consecutive(greedy, self.warm_up, self.device)
        before = filled.tokens()
        times = consecutive(greedy, self.steps, self.device)
        mean = sum(times) / len(times)
        slots = sum(engine.slots(t) for t in range(before, before + self.steps)) / self.steps
        decode = {
            "ms": vars(summary(times)),
            "mean_ms": mean,
            "worst_ms": max(times),
            "steps": self.steps,
            "graphed": step.captured,
            "tokens_per_second": 1e3 * batch / mean,  # of all steps, those that compress included
            "peak_memory": peak(self.device),
        }
        read = {"weights": weight_bytes(self.model), "cache": round(slots * batch * bytes_per_slot(self.model))}
        cache = engine.held(filled.cache) | {"tokens": filled.tokens()}
        return {"batch": batch, "decode": decode, "cache": cache, "bytes_per_step": read}

    def _compared(self, compression: float | None, cell: Row) -> Row:
        """``cell`` with its speed-up over dense at the same batch, else at dense's largest, and what the bytes say."""
        if compression is None:
            self.rivals[cell["batch"]] = cell
        if compression is None or not self.rivals:
            return cell
        rival = self.rivals[cell["batch"] if cell["batch"] in self.rivals else max(self.rivals)]
        moved = [sum(x["bytes_per_step"].values()) / x["batch"] for x in (rival, cell)]  # a token
        speed = [x["decode"]["tokens_per_second"] for x in (rival, cell)]
        cell |= {
            "against_batch": rival["batch"],
            "speedup": speed[1] / speed[0],
            "predicted_speedup": moved[0] / moved[1],
        }
        if "prefill" in cell and "prefill" in rival:
            cell["prefill_speedup"] = rival["prefill"]["ms"]["median"] / cell["prefill"]["ms"]["median"]
        return cell


def _reason(error: BaseException) -> str:
    return "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:500]
