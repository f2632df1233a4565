"""The vectors recorded from the LagKV authors' own cache, row by row."""

import numpy as np
import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, slots, visibility_mask

ROWS = 742


@pytest.fixture(scope="module")
def vectors(shared_data):
    with np.load(shared_data / "conformance" / "lagkv_vectors.npz", allow_pickle=False) as archive:
        return dict(archive)


def _case(vectors, case):
    sink, lag, kept, chunk, weight = vectors[f"{case}.params"].tolist()
    config = SparseAttentionConfig(
        scorer_args={"value_weight": weight}, sink_size=int(sink), lag_size=int(lag), top_k=int(kept),
        chunk_size=int(chunk),
    )  # fmt: skip
    return config, torch.from_numpy(vectors[f"{case}.keys"]), torch.from_numpy(vectors[f"{case}.values"])


def test_the_file_holds_what_its_readme_says(vectors):
    cases = {name.split(".")[0] for name in vectors}
    rows = sum(2 * np.prod(vectors[f"{c}.keys"].shape[:2]) * len(vectors[f"{c}.bounds"]) for c in cases)
    assert cases == set("012345")
    assert rows == ROWS


@pytest.mark.parametrize("case", range(6))
def test_attended_positions_are_those_of_the_authors_cache(vectors, case):
    config, key, value = _case(vectors, case)
    tokens = key.shape[2]
    visible = visibility_mask(kept_tokens(key, value, config), config)
    for j, (start, stop) in enumerate(vectors[f"{case}.bounds"].tolist()):
        attended = torch.from_numpy(vectors[f"{case}.attended.{j}"].astype(np.int64))
        expected = torch.zeros((*key.shape[:2], tokens), dtype=torch.bool).scatter_(-1, attended, True)
        causal = torch.arange(tokens) <= torch.arange(start, stop)[:, None]
        assert torch.equal(visible[:, :, start:stop], expected[:, :, None] & causal), f"chunk {j}"


@pytest.mark.parametrize("case", range(6))
def test_cached_positions_are_those_of_the_authors_cache(vectors, case):
    config, key, value = _case(vectors, case)
    for j, (_, stop) in enumerate(vectors[f"{case}.bounds"].tolist()):
        cached = torch.from_numpy(vectors[f"{case}.cached.{j}"].astype(np.int64))
        kept = kept_tokens(key[:, :, :stop], value[:, :, :stop], config)
        assert torch.equal(kept, torch.zeros_like(kept).scatter_(-1, cached, True)), f"chunk {j}"
        assert cached.shape[-1] == slots(config, stop), f"chunk {j}"
