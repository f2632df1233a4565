"""Likelihood of prose by position in a window, under compression: one pass a window, in the parallel form.

B windows, T tokens each, V the vocabulary. A token is predicted from what precedes it in its window, so a window's
first one is not. What was compressed away can be missed late in the window alone, which a mean over all of it hides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig, from_conf
from lrsa.config import EvaluationConf, PerplexityConf
from lrsa.data.filler import Filler
from lrsa.data.tokens import default_cache_dir, digest, leading_ids, token_store
from lrsa.evaluation.cells import Cell, measure_cache
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.progress import CellProgress
from lrsa.evaluation.scoring import autocast, evaluating
from lrsa.results.statistics import bootstrap_mean

TASK = "prose"
LOGITS_AT_ONCE = 1024  # tokens; their logits take 200 MB in float32 where V is 49k


@dataclass(frozen=True)
class PositionOutcome:
    """One window's tokens at `positions`, half-open, under one compression; `nll` is their mean, in nats a token."""

    task: str
    id: str
    compression: float  # 1: full cache
    positions: tuple[int, int]
    nll: float
    tokens: int  # predicted ones: a window's first is not


@dataclass(frozen=True)
class Windows:
    """Token ids ``[n, T]`` of prose, cut without overlap, and where they are from."""

    ids: NDArray[np.int32]
    origin: str
    available: int  # windows of which these were taken, evenly spread
    lead: tuple[int, ...]  # tokens that the tokenizer begins every text with; a window begins with them too

    @property
    def fingerprint(self) -> str:
        return digest([str(self.ids.shape), self.ids.tobytes().hex()])

    def facts(self) -> dict[str, Any]:
        """For the record."""
        count, length = self.ids.shape
        return {
            "name": TASK,
            "origin": self.origin,
            "fingerprint": self.fingerprint,
            "n": count,
            "length": length,
            "available": self.available,
            "lead": list(self.lead),
            "template": None,
            "truncation": "none",
        }


def read_windows(tokenizer: PreTrainedTokenizerBase, conf: PerplexityConf, length: int) -> Windows:
    """Cut `conf.text` into windows of `length` tokens, at most `conf.windows` of them, spread evenly over it.

    The text is read as filler is: its paragraphs in order, without headings and rules; `@validation` after its name
    takes the books that training with `source: prose` leaves out.

    Raises:
        EvaluationInputError: the text does not fill two windows.
        FileNotFoundError, ConnectionError, ValueError: as `lrsa.data.filler` raises, with a note naming the setting.
    """
    try:
        filler = Filler(conf.text, token_store(tokenizer, default_cache_dir()))
    except (ValueError, OSError) as error:
        error.add_note("in perplexity.text, which is read as filler is; it has no built-in sentences")
        raise
    lead = leading_ids(tokenizer)
    prose, room = filler.prose(), length - len(lead)
    available = len(prose) // room
    if available < 2:
        raise EvaluationInputError(
            f"perplexity.text={conf.text} ({filler.origin}) has {len(prose):,} tokens, and two windows of "
            f"evaluation.length={length:,} take {2 * room:,}: give a longer text, or lower evaluation.length"
        )
    count = min(conf.windows, available)
    starts = [index * available // count * room for index in range(count)]
    ids = np.stack([np.concatenate([lead, prose[start : start + room]]) for start in starts]).astype(np.int32)
    return Windows(ids, filler.origin, available, lead)


def token_nll(model: PreTrainedModel, input_ids: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Negative log-likelihood ``[B, T - 1]`` in nats, float32, of the tokens 1 to T - 1 of ``input_ids [B, T]``.

    at_once: tokens whose logits ``[at_once, V]`` are in memory together.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), input_ids[:, 1:].flatten()
    parts = [
        F.cross_entropy(head(states).float(), wanted, reduction="none")
        for states, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True)
    ]
    return torch.cat(parts).view(len(input_ids), -1)


def evaluate_prose(
    model: PreTrainedModel,
    windows: Windows,
    conf: EvaluationConf,
    settings: PerplexityConf,
    progress: bool = True,
) -> tuple[list[Cell], list[PositionOutcome]]:
    """Mean likelihood of the whole window and of each of `settings.buckets` stretches, at every compression.

    Returns:
        cells, with the fields of `lrsa.results.schema.POSITION_CELL`: slots, ratio and bytes are those after the
        stretch's last token; and all outcomes, one a window, stretch and compression.

    Raises:
        ValueError: compressions above 1 asked of dense attention.
    """
    attention = from_conf(conf.attention)
    cells: list[Cell] = []
    outcomes: list[PositionOutcome] = []
    with CellProgress("reading", progress) as bar:
        for factor in conf.compressions:
            if attention is None and factor != 1:
                raise ValueError(f"dense attention cannot compress {factor:g}x: choose a sparse evaluation.attention")
            used = None if attention is None else attention.with_compression(factor)
            title = f"{TASK} {'full' if factor == 1 else f'{factor:g}x'}"
            bar.start(title, len(windows.ids))
            clock = time.perf_counter()
            nll = _read(model, windows, used, conf, bar)
            seconds = time.perf_counter() - clock
            for positions in stretches(windows.ids.shape[1], settings.buckets):
                found = _outcomes(nll, factor, positions)
                estimate = bootstrap_mean([outcome.nll for outcome in found], conf.bootstrap)
                values = {"nll": estimate.mean, "nll_low": estimate.low, "nll_high": estimate.high}
                cell = {"task": found[0].task, "compression": factor, "positions": list(positions), "n": len(found)}
                held = measure_cache(model, used, [positions[1]], conf.precision)
                cells.append({**cell, **values, **held, "data_fingerprint": windows.fingerprint})
                outcomes += found
                if found[0].task == TASK:
                    cells[-1] |= {"seconds": seconds, "tokens_per_second": windows.ids.size / seconds}
                    said = f"NLL {estimate.mean:.3f}, perplexity {np.exp(estimate.mean):.2f}, n {len(found)}"
                    bar.finish(f"{title}: {said}, {seconds:.1f} s")
    return cells, outcomes


def _read(
    model: PreTrainedModel,
    windows: Windows,
    attention: SparseAttentionConfig | None,
    conf: EvaluationConf,
    bar: CellProgress,
) -> NDArray[np.float64]:
    """`token_nll` of all windows, ``[n, T - 1]``."""
    rows = []
    with evaluating(model, attention), torch.no_grad(), autocast(model.device, conf.precision):
        for start in range(0, len(windows.ids), conf.batch_size):
            batch = torch.from_numpy(windows.ids[start : start + conf.batch_size]).long().to(model.device)
            rows.append(token_nll(model, batch).cpu())
            bar.advance(len(batch), batch.numel())
    return torch.cat(rows).double().numpy()


def _outcomes(nll: NDArray[np.float64], compression: float, positions: tuple[int, int]) -> list[PositionOutcome]:
    """One a window: means over the tokens at `positions` that are predicted, of ``nll [n, T - 1]``."""
    first, stop = max(positions[0], 1), positions[1]
    whole = positions == (0, nll.shape[1] + 1)
    task = TASK if whole else f"{TASK} {positions[0]} to {stop - 1}"
    return [
        PositionOutcome(task, f"window-{row:05d}", compression, positions, float(mean), stop - first)
        for row, mean in enumerate(nll[:, first - 1 : stop - 1].mean(1))
    ]


def stretches(length: int, buckets: int) -> Sequence[tuple[int, int]]:
    """Half-open ranges of positions: the whole window, then its `buckets` equal parts."""
    edges = [index * length // buckets for index in range(buckets + 1)]
    return [(0, length), *(pairwise(edges) if buckets > 1 else ())]
