"""A cache filled with a prompt, in as many equal rows as fit."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrsa.benchmark.engines import Engine
from lrsa.benchmark.timing import peak, reset_peak, summary
from lrsa.cache import prefill

ENOUGH_SECONDS = 5.0  # of timed prefill: no further round is begun
SPARE_MEMORY = 1 << 30  # bytes left free when the largest batch is estimated: workspaces, fragments


class Filled:
    """``ids [1, T]`` in a cache of ``engine``; rows beyond the first are copies of it."""

    def __init__(
        self, engine: Engine, model: PreTrainedModel, ids: Tensor, capacity: int, device: torch.device
    ) -> None:
        self._engine, self._model, self._ids, self._capacity = engine, model, ids, capacity
        self._device = device
        self.cache: Any = None
        self.rows = 0

    def timed(self, rounds: int) -> tuple[Tensor, dict[str, Any]]:
        """Fill one row ``rounds`` times, after once that compiles: logits ``[1, V]``; milliseconds and peak bytes."""
        logits = self._fill()
        times: list[float] = []
        while not times or (len(times) < rounds and sum(times) < 1e3 * ENOUGH_SECONDS):
            self.drop()
            reset_peak(self._device)
            begin = time.perf_counter()
            logits = self._fill()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(1e3 * (time.perf_counter() - begin))
        timing = summary(times)
        speed = 1e3 * self._ids.shape[1] / timing.median
        return logits, {"ms": vars(timing), "tokens_per_second": speed, "peak_memory": peak(self._device)}

    def _fill(self) -> Tensor:
        self._engine.attach(self._model)
        self.cache = self._engine.make_cache(self._model, self._capacity)
        self.rows = 1
        return prefill(self._model, self._ids, self.cache)

    def grow(self, rows: int) -> None:
        """Come to ``rows`` equal rows.

        Raises:
            torch.OutOfMemoryError: they do not fit. The cache is dropped, and filled anew when next asked for.
        """
        free_memory(self._device)
        try:
            if self.cache is None:
                self._fill()
            if rows != self.rows:
                self._engine.repeat(self.cache, rows)
                self.rows = rows
        except Exception as error:
            self.drop()
            raise_out_of_memory(error)
            raise

    def most_rows(self) -> int:
        """Rows that free memory has room for, going by the bytes of the rows there are and a step's activations.

        0 on the CPU, which pages rather than run out.
        """
        if self._device.type != "cuda":
            return 0
        if self.cache is None:
            self.grow(1)
        free_memory(self._device)
        free = torch.cuda.mem_get_info(self._device)[0]
        held = self._engine.held(self.cache)
        row = (held["bytes"] + held["buffer_bytes"]) / self.rows
        config = self._model.config
        activations = 16 * config.vocab_size + 64 * (config.hidden_size + config.intermediate_size)
        return self.rows + max(0, int((free - SPARE_MEMORY) // (row + activations)))

    def tokens(self) -> int:
        """Read by each row so far."""
        return int(self.cache.get_seq_length())

    def drop(self) -> None:
        self.cache, self.rows = None, 0
        free_memory(self._device)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's libraries have words of their own for it."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def raise_out_of_memory(error: BaseException) -> None:
    """As PyTorch's exception, whatever it was before; returns where the error is another one."""
    if is_out_of_memory(error):
        raise torch.OutOfMemoryError(str(error)) from None


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
