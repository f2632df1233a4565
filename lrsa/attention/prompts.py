"""``prompt_lengths``: where the prompts of a batch end, for attention that asks
(`SparseAttentionConfig.reads_prompt_lengths`).

One length a row of the batch ``[B, T]``, in tokens of the row's one document: pads are not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa.attention.config import ONCE, SparseAttentionConfig
from lrsa.attention.documents import find_documents

HOW_TO_TELL = (
    "pass prompt_lengths=, int64 [B] or an int, tokens of each row's prompt (pads not counted); through a model, as a "
    "keyword argument of its forward (target_logits does so, and lrsa-eval mode=score)"
)


def lengths_of_rows(
    given: Tensor | int, batch: int, document_ids: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """``[B]`` int64, one for all rows repeated; the same object where ``given`` is that already.

    Args:
        document_ids: as `sparse_attention` takes them, at most one document a row.
        device: of the result; None: wherever ``given`` is.

    Raises:
        ValueError: no integers, another shape, or a row that holds several documents.
    """
    lengths = torch.as_tensor(given, device=device)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape not in ((), (batch,)):
        raise ValueError(
            f"prompt_lengths must be an int or int64 [B] = {(batch,)}, not {lengths.dtype} {tuple(lengths.shape)}"
        )
    rows = [] if document_ids is None else [document.row for document in find_documents(document_ids)]
    if len(rows) > len(set(rows)):
        raise ValueError(
            "prompt_lengths has one length a row, but document_ids packs several documents into one, which then has no "
            "one end of the prompt: give each a row of its own"
        )
    lengths = lengths.long()
    return lengths if lengths.ndim else lengths.expand(batch)


def refuse_unread(given: Tensor | int | None, config: SparseAttentionConfig) -> None:
    """Raise ValueError for lengths that ``config`` would not read."""
    if given is not None and not config.reads_prompt_lengths:
        raise ValueError(
            f"prompt_lengths= with schedule={config.schedule!r} and scorer={config.scorer!r}, which do not ask where a "
            f"prompt ends: leave them out, or set schedule={ONCE!r}"
        )
