"""A decode step touches what it must: nothing of the cache's size is made anew."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lrsa.models import make_cache
from tests.architectures import model_of, tokens
from tests.cache.feeding import feed
from tests.cache.test_feeding import config_of


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("scorer", ["lag_relative", "tova"])
def test_no_decode_step_copies_the_cache(scorer):
    model, ids = model_of("llama", config_of(scorer)), tokens(1, 600)
    cache = make_cache(model, max_tokens=620)
    feed(model, cache, ids, 600)
    layer_bytes = cache.report().layers[0].bytes // 2  # of keys alone
    for step in range(18):  # two partitions are compressed on the way
        with Largest() as largest:
            feed(model, cache, ids[:, step : step + 1], 1)
        # The mask and its float form: a number a slot where the cache has 2 x 2 x 16 of them.
        assert largest.bytes < layer_bytes / 4, f"step {step}"
