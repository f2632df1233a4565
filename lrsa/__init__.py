"""Lag-Relative Sparse Attention (LRSA): post-train language models so that they live with a compressed KV cache."""

__version__ = "0.1.0"
