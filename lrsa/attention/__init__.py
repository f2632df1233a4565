"""Query, key, value -> output: the attention of LRSA and of its rivals.

`api` validates and dispatches; `config` and `layout` fix the function; `scorers` rank, `selection` picks; `reference`,
`gather`, `flex` and `flash4` compute it, `once` under its own schedule; `blocks` and `rows` are what block-sparse
kernels read, `sinks` what they leave out, `hopper` such kernels; `fused` says where this project's own ones in Triton
run (`selection_kernel`, `rows_kernel`, `sinks_kernel`, `decode_kernel`);
`documents` handles padding and packing, `prompts` knows where a prompt ends; `huggingface` is the bridge to
transformers, `compiled` and `operators` are what of it a compiled layer traces.
"""

from lrsa.attention.api import BACKENDS, kept_tokens, slots, sparse_attention, visibility_mask
from lrsa.attention.config import DENSE, SparseAttentionConfig, from_conf
from lrsa.attention.selection import checkpoint_contexts

__all__ = [
    "BACKENDS",
    "DENSE",
    "SparseAttentionConfig",
    "checkpoint_contexts",
    "from_conf",
    "kept_tokens",
    "slots",
    "sparse_attention",
    "visibility_mask",
]
