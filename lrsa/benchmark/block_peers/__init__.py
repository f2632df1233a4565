"""Trainable block-sparse attentions of others, timed beside ours in one process: `lrsa-bench peers=[nsa,moba]`.

They compute other functions (each query chooses blocks of keys anew, from the whole cache; nothing is forgotten), so
only speed and memory compare, and only at an equal number of attended keys. `nsa` and `moba` are set to attend as many
query-key pairs as LRSA does at each lag and compression; `nsa/16x64` asks for 16 blocks of 64 keys, whatever LRSA does.
"""

from lrsa.benchmark.block_peers.rows import check_peers, run

__all__ = ["check_peers", "run"]
