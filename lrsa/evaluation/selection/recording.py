"""What a forward pass keeps: notes of the selection of every compressed layer, and of the tokens that are looked for.

B samples of a batch, T tokens, H key/value heads, Y compressed layers, M tokens that are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.inspection import LayerInputs, kept_by
from lrsa.attention.layout import Geometry
from lrsa.data import Sample
from lrsa.data.gold import KINDS, Question
from lrsa.evaluation.selection.statistics import Wanted


@dataclass(frozen=True)
class Batch:
    """Samples that are read together, and what is looked for in them.

    ranked: bool ``[B, T]``, the tokens that are compressed when the (last) question of a row is answered.
    rows, positions: int64 ``[M]``, the tokens that are looked for; prompts: int64 ``[B]``, tokens before the first
    answer.
    """

    samples: list[Sample]
    ranked: Tensor
    rows: Tensor
    positions: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class Looked:
    """The tokens of all samples that are looked for, and by kind where they stand among them: int64 ``[M]`` each, the
    sample, the position, and what `Wanted` says of them."""

    sample: np.ndarray
    position: np.ndarray
    wanted: dict[str, Wanted]
    rows: dict[str, slice]


def look_for(samples: Sequence[Sample], questions: Sequence[Sequence[Question]], geometry: Geometry) -> Looked:
    """The tokens of `questions` that a layer chose among: a question counts, for a kind, if all of them were compressed
    when its answer begins. Sinks and the raw tail are held whatever the rule."""
    found: list[tuple[int, int]] = []
    wanted, rows = {}, {}
    for kind in KINDS:
        start = len(found)
        question: list[int] = []
        occurrence: list[int] = []
        depth: list[float] = []
        for index, (sample, asked) in enumerate(zip(samples, questions, strict=True)):
            for one in asked:
                compressed = range(geometry.sink, geometry.raw_start(geometry.selected_partitions(one.asked)))
                places = one.found[kind]
                if not places or not all(position in compressed for place in places for position in place):
                    continue
                for place in places:
                    label = occurrence[-1] + 1 if occurrence else 0
                    found += [(index, position) for position in place]
                    question += [len(depth)] * len(place)
                    occurrence += [label] * len(place)
                depth.append(places[0][0] / sample.context_length)
        rows[kind] = slice(start, len(found))
        wanted[kind] = Wanted(np.array(question, np.int64), np.array(occurrence, np.int64), np.array(depth))
    at = np.array(found, np.int64).reshape(-1, 2)
    return Looked(at[:, 0], at[:, 1], wanted, rows)


def batch_of(
    rows: list[Sample], indices: Sequence[int], looked: Looked, geometry: Geometry, device: torch.device
) -> tuple[Batch, np.ndarray]:
    """The batch, and which of the tokens looked for are in it."""
    ends = [geometry.raw_start(geometry.selected_partitions(row.answer_spans[-1][0])) for row in rows]
    at = torch.arange(max(len(row.input_ids) for row in rows))
    ranked = (at >= geometry.sink) & (at < torch.tensor(ends)[:, None])
    row_of = np.full(max(int(looked.sample.max(initial=0)), *indices) + 1, -1)
    row_of[list(indices)] = np.arange(len(indices))
    tokens = np.flatnonzero(row_of[looked.sample] >= 0)
    within = torch.from_numpy(row_of[looked.sample[tokens]]), torch.from_numpy(looked.position[tokens])
    prompts = torch.tensor([row.answer_spans[0][0] for row in rows])
    return Batch(rows, *(x.to(device) for x in (ranked, *within, prompts))), tokens


class Recorder:
    """Notes what each compressed layer of a forward pass over `batch` keeps, and what other rules would keep of the
    same inputs; for `selecting`, inside which it changes nothing.
    """

    def __init__(self, batch: Batch, rivals: Mapping[str, SparseAttentionConfig]) -> None:
        self.batch, self.rivals = batch, rivals
        self.kept: dict[int, Tensor] = {}  # bool [B, H, T] of each layer
        self.rival_kept: dict[str, list[Tensor]] = {name: [] for name in rivals}  # compressed tokens alone

    def __call__(self, inputs: LayerInputs) -> Tensor | None:
        layer = inputs.config.for_layer(inputs.layer_idx)
        if layer is None or layer.geometry.kept == 0:  # all or nothing: no choice to note
            return None
        kept = self.kept[inputs.layer_idx] = kept_by(inputs)
        for name, rival in self.rivals.items():
            # its layer's share of tokens, where a budget differs by layer
            rival = replace(rival, keep_ratio=inputs.config.keep_ratio, top_k=inputs.config.top_k)
            self.rival_kept[name].append(kept_by(inputs._replace(prompt_lengths=self.batch.prompts), rival))
        return kept

    def again(self, inputs: LayerInputs) -> Tensor | None:
        """What was kept by the layer then: for `selecting`, in another model's forward pass."""
        return self.kept.get(inputs.layer_idx)

    @property
    def layers(self) -> list[Tensor]:
        return [self.kept[layer] for layer in sorted(self.kept)]

    def held(self, selection: Sequence[Tensor]) -> np.ndarray:
        """bool ``[Y, M, H]``: which of the tokens that are looked for a `selection` of each layer holds."""
        return np.asarray(torch.stack([kept[self.batch.rows, :, self.batch.positions] for kept in selection]).cpu())

    def common(self, other: Sequence[Tensor]) -> np.ndarray:
        """``[3, Y, B, H]``: compressed tokens that this and the `other` selection keep in common, and each of them."""
        ranked = self.batch.ranked[:, None]
        counts = [
            torch.stack([(x & ranked).sum(-1) for x in (mine & theirs, mine, theirs)])
            for mine, theirs in zip(self.layers, other, strict=True)
        ]
        return np.asarray(torch.stack(counts, 1).cpu(), dtype=np.float64)
