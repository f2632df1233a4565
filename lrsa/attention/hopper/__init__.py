"""flash-attn-4's block-sparse kernels of Hopper, with the parts replaced that LRSA's short tiles wait for.

What a block computes is the library's. Ours are the mask (`mask`), the forward pass' walk over its tiles, the seams
between them, what loads and what stores (`forward`, `tiles`, `traffic`), and the backward pass' walk over the heads of
a group and its ways to memory (`backward`). Imported where the library is installed.
"""

from lrsa.attention.hopper.backward import backward
from lrsa.attention.hopper.forward import forward

__all__ = ["backward", "forward"]
