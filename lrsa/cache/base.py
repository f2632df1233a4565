"""What `SparseKVCache` and transformers ask of a layer that attends by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lrsa.attention import SparseAttentionConfig
from lrsa.cache.step import Step


class AttendingLayer(CacheLayerMixin):
    """Storage and arithmetic of one layer; `SparseKVCache` knows what was read. ``config`` None: a dense layer."""

    keys: Tensor | None
    values: Tensor | None
    queries: Tensor | None
    is_sliding = False
    is_croppable = False  # not into compressed history
    stored: Sequence[str]  # attributes that hold tensors ``[B, heads, ...]`` or None

    def __init__(self, config: SparseAttentionConfig | None, layer_idx: int, max_tokens: int | None) -> None:
        super().__init__()
        self.config, self.layer_idx, self.max_tokens = config, layer_idx, max_tokens
        self.reads_query = config is not None and config.build_scorer().reads_query
        self.columns = 0  # fed so far, pads included; transformers asks each layer

    @abstractmethod
    def attend(self, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str) -> Tensor:
        """Attend ``step``'s queries ``[B, Hq, T, D]`` to the past and to ``key``/``value`` ``[B, H, T, D]``, and take
        those in. Zeros at pads."""

    @abstractmethod
    def held(self, lengths: Sequence[int]) -> list[int]:
        """Keys that a head holds of each row, which has read ``lengths`` tokens."""

    @abstractmethod
    def kept(self, row: int, tokens: int, scale: float) -> Tensor:
        """Positions that row ``row``, ``tokens`` read, holds once all that is due is compressed: int64 ``[H, slots]``,
        ascending, on the CPU."""

    def take_back(self, columns: int) -> None:
        """Forget the last ``columns``, none of which is compressed."""
        self.columns -= columns

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self.columns = 0

    def select_rows(self, index: Tensor) -> None:
        """Rows ``index`` int64 ``[B']`` of all that is stored."""
        for name in self.stored:
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.index_select(0, index.to(x.device)))

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        return sum(x.nbytes for x in (getattr(self, name) for name in self.stored) if x is not None)

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """transformers' early initialisation; storage is made with the first block, when its length is known."""

    @property
    def batch_size(self) -> int:
        return -1 if self.keys is None else self.keys.shape[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise TypeError("a layer of SparseKVCache is updated by its cache: pass the SparseKVCache to the model")

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns with the new ones, and no offset; 5.2 passes cache positions, later versions a length."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.columns + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.2
