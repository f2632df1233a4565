"""The recurrent form: a transformers cache that compresses as it grows."""

from lrsa.cache.cache import SparseKVCache
from lrsa.cache.prefill import prefill
from lrsa.cache.report import CacheReport, LayerReport

__all__ = ["CacheReport", "LayerReport", "SparseKVCache", "prefill"]
