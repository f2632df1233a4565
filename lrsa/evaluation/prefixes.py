"""Questions over one context: the context is read once, and each question goes on from a copy of the cache.

B rows, T tokens. What a row holds after a context and then a question is what it holds after both at once (feeding
changes nothing), so the answers are those of separate prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.config import ONCE
from lrsa.cache import prefill
from lrsa.evaluation.scoring import batches_of_similar_length
from lrsa.models import make_cache


@dataclass(frozen=True)
class Job:
    """`rounds` of prompts, by index, that are answered together. `contexts`: what a prompt of each round begins with
    and the job reads once; `of[i]` tells which of them prompt i has. Without contexts each prompt is read whole.
    """

    rounds: list[list[int]]
    contexts: list[list[int]]
    of: dict[int, int]

    def tokens(self, number: int, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens read for round `number`; the contexts count in the first."""
        indices = self.rounds[number]
        whole = sum(len(prompts[index]) for index in indices)
        if not self.contexts:
            return whole
        contexts = 0 if number else sum(map(len, self.contexts))
        return whole - sum(len(self.contexts[self.of[index]]) for index in indices) + contexts


def can_share(model: PreTrainedModel, attention: SparseAttentionConfig | None) -> bool:
    """Whether a prompt may be read in two parts, and a batch of second parts of several lengths be padded in between.

    Schedule ``prefill_once`` compresses at the end of the prompt, question included, so that a context alone is
    nothing yet. A sliding-window layer counts the pads between into its window.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return (attention is None or attention.schedule != ONCE) and "sliding_attention" not in kinds


def plan(prompts: Sequence[Sequence[int]], contexts: Sequence[int], batch_size: int, share: bool) -> list[Job]:
    """All prompts in rounds of at most `batch_size`, the longest first. `contexts[i]`: tokens of prompt i that are
    context. With `share`, prompts whose context is the same are in one job, together with others while they fit.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, tokens) in enumerate(zip(prompts, contexts, strict=True)):
        if share and 0 < tokens < len(prompt):
            groups.setdefault(tuple(prompt[:tokens]), []).append(index)
    shared = {context: members for context, members in groups.items() if len(members) > 1}
    jobs: list[Job] = []
    room = 0
    for context in sorted(shared, key=lambda context: (-len(context), shared[context])):
        members = sorted(shared[context], key=lambda index: (-len(prompts[index]), index))
        if len(members) > room:
            jobs.append(Job([[]], [], {}))
            room = batch_size
        job = jobs[-1]
        job.of.update(dict.fromkeys(members, len(job.contexts)))
        job.contexts.append(list(context))
        if len(members) <= room:
            job.rounds[0] += members
        else:
            job.rounds[:] = [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
        room = max(0, room - len(members))
    alone = sorted(set(range(len(prompts))) - {index for members in shared.values() for index in members})
    batches = batches_of_similar_length([len(prompts[index]) for index in alone], batch_size)
    return jobs + [Job([[alone[number] for number in batch]], [], {}) for batch in batches]


class ReadContexts:
    """Contexts in a cache, a row each, read when the first copy is asked for.

    Args:
        room: most tokens that a copy's row may come to.
    """

    def __init__(
        self, model: PreTrainedModel, contexts: list[list[int]], pad_id: int, room: int, block_size: int | None
    ) -> None:
        self._model, self._contexts, self._pad_id = model, contexts, pad_id
        self._room, self._block_size = room, block_size
        self._cache: Cache | None = None
        self._mask = torch.empty(0)

    def copy(self, rows: Sequence[int], last: bool) -> tuple[Cache, Tensor]:
        """A cache whose row i has read context `rows[i]`, and its mask ``[B, columns]``, 0 at pads. `last`: no other
        copy will be asked for, so that none needs to stay.
        """
        model, index = self._model, torch.tensor(rows, device=self._model.device)
        if self._cache is None:
            ids, mask = left_pad(self._contexts, self._pad_id, 0, model.device)
            cache = make_cache(model, max_tokens=self._room)
            prefill(model, ids, cache, mask, self._block_size)
            self._cache, self._mask = cache, torch.ones_like(ids) if mask is None else mask
        cache = self._cache if last else copy.deepcopy(self._cache)
        self._cache = None if last else self._cache
        cache.batch_select_indices(index)
        return cache, self._mask[index]


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, room: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Ids ``[B, T]`` with pads on the left, and their mask ``[B, T + room]``, 1 at tokens, old and new; None without
    pads."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.ones((len(prompts), width + room), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, : width - len(prompt)] = 0
    return ids.to(device), None if bool(mask.all()) else mask.to(device)
