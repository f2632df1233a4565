"""flash-attn 2's variable-length functions, under its names and arguments, on the kernels that PyTorch carries.

`fla.ops.moba` calls two private functions of flash-attn 2, which PyPI has as source alone, to be built. PyTorch
carries kernels of the same make. Where flash-attn is installed, it is used; where not, the module is handed these.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ATEN: Any = torch.ops.aten
# Arguments of flash-attn that PyTorch's kernels have no say in: no dropout, no window, no slopes. Its
# backward pass is asked for with deterministic=True; here PyTorch's global switch decides, off by default and faster.
PLAIN: dict[str, Any] = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
PLAIN |= {"alibi_slopes": None}


def provide(module: ModuleType) -> str:
    """Give ``module`` (`fla.ops.moba.parallel`) what it did not find to import; says whose kernels it has."""
    ours = {
        "_flash_attn_varlen_forward": forward,
        "_flash_attn_varlen_backward": backward,
        "flash_attn_varlen_func": dense,
    }
    missing = [name for name in ours if getattr(module, name) is None]
    for name in missing:
        setattr(module, name, ours[name])
    return f"torch {torch.__version__}" if module._flash_attn_varlen_forward is forward else "flash-attn"


def forward(
    *, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: bool, **plain: Any,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    """Packed ``q [Tq, H, D]``, ``k``/``v [Tk, H, D]`` -> output ``[Tq, H, D]``, log-sum-exp ``[H, Tq]``, None, None."""
    _refuse(plain)
    out, log_sum, *_ = ATEN._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale
    )
    return out, log_sum, None, None


def backward(
    *, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float,
    causal: bool, deterministic: bool, **plain: Any,
) -> None:  # fmt: skip
    """Gradients of `forward`, into ``dq``, ``dk``, ``dv``."""
    _refuse(plain)
    no_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout
    found = ATEN._flash_attention_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, no_state,
        torch.empty(0, device=q.device), scale=softmax_scale,
    )  # fmt: skip
    for target, grad in zip((dq, dk, dv), found, strict=True):
        target.set_(grad)  # no copy: it would be charged to the peer


def dense(*args: Any, **kwargs: Any) -> Tensor:
    """In the place of what is called where no block is left to choose, which the benchmark never asks for."""
    raise RuntimeError("a single block is dense attention: ask for more, or for a longer length")


def _refuse(given: dict[str, Any]) -> None:
    if unknown := {name: value for name, value in given.items() if name not in PLAIN or PLAIN[name] != value}:
        raise TypeError(f"PyTorch's flash attention has no {unknown}: this fla-core is newer than this bridge to it")
