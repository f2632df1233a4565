"""The oracle: what the rest of the prompt attends to, and nothing of the answer."""

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from lrsa.attention.scorers import SCORERS, observed
from tests.attention.tensors import LOCAL, packed_ids, prompt, random_inputs

TOKENS, LENGTH = 120, 101
CONFIG = {"sink_size": 3, "lag_size": 8, "top_k": 3}
ORACLE = SparseAttentionConfig(scorer="oracle", **CONFIG)


def inputs_of(seed: int = 0, batch: int = 1):
    query, key, value = random_inputs(batch, 4, 2, TOKENS, 16, seed)
    return 2 * query, key, value


def dense_weights(query, key, scale=0.25):
    """``[B, H, T, T]`` float64: softmax over all keys up to a query, mean over the group."""
    query, key = query.double().unflatten(1, (key.shape[1], -1)), key.double()[:, :, None]
    future = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    return (query @ key.mT * scale).masked_fill(future, -torch.inf).softmax(-1).mean(2)


def expected(query, key, length):
    """Kept tokens from the formula, a partition and a head at a time."""
    weights = dense_weights(query, key)
    kept = torch.ones(key.shape[:3], dtype=torch.bool)
    for p in range(ORACLE.geometry.compressed(key.shape[2])):
        start, end, behind = (ORACLE.geometry.raw_start(p + n) for n in range(3))
        first = behind if behind < length else end
        mass = weights[:, :, first:length, start:end].sum(2)
        kept[:, :, start:end] = False
        highest = mass.sort(dim=-1, descending=True, stable=True).indices[..., :3]
        kept[:, :, start:end].scatter_(-1, highest, True)
    return kept


@pytest.mark.parametrize("length", [TOKENS, LENGTH, 83, 40, 19, 12, 5, 0])
def test_the_formula(length):
    """The last partitions' lags end behind the shorter prompts, and some partitions themselves."""
    query, key, value = inputs_of(batch=2)
    kept = kept_tokens(key, value, ORACLE, query=query, prompt_lengths=length)
    assert torch.equal(kept, expected(query, key, length))


def test_lengths_a_row_and_partitions_in_parts(monkeypatch):
    query, key, value = inputs_of(batch=3)
    lengths = torch.tensor([LENGTH, 40, TOKENS])
    whole = kept_tokens(key, value, ORACLE, query=query, prompt_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(whole[row : row + 1], expected(query[row : row + 1], key[row : row + 1], length))
    for most in (1, 3 * 4 * TOKENS * 7):
        monkeypatch.setattr(observed, "MOST_LOGITS", most)
        assert torch.equal(kept_tokens(key, value, ORACLE, query=query, prompt_lengths=lengths.int()), whole)


def test_a_prompt_that_ends_before_a_partition_says_nothing_of_it():
    query, key, value = inputs_of()
    kept = kept_tokens(key, value, ORACLE, query=query, prompt_lengths=30)
    later = kept[..., ORACLE.geometry.raw_start(4) : ORACLE.geometry.raw_start(13)].unflatten(-1, (9, 8))
    assert torch.equal(later, (torch.arange(8) < 3).expand_as(later)), "ties fall to the earlier position"


@pytest.mark.parametrize("budget", ["uniform", "adaptive"])
def test_the_answer_is_never_looked_at(budget):
    config = SparseAttentionConfig(scorer="oracle", budget=budget, **CONFIG)
    query, key, value = inputs_of()
    kept = kept_tokens(key, value, config, query=query, prompt_lengths=LENGTH)
    answer = torch.arange(TOKENS) >= LENGTH
    for other in (30 * random_inputs(1, 4, 2, TOKENS, 16, seed=5)[0], torch.full_like(query, torch.nan)):
        changed = [torch.where(answer[:, None], other[:, : x.shape[1]], x) for x in (query, key, value)]
        assert torch.equal(kept_tokens(*changed[1:], config, query=changed[0], prompt_lengths=LENGTH), kept)
    assert not torch.equal(kept_tokens(key, value, config, query=query, prompt_lengths=LENGTH - 20), kept)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_padded_row_is_the_row_alone(left):
    """A length counts the row's own tokens, whatever pads stand before them."""
    query, key, value = inputs_of(batch=3)
    tokens, lengths = [TOKENS, 67, 90], torch.tensor([LENGTH, 60, 90])
    runs = [[(-1, TOKENS - n), (0, n)] if left else [(0, n), (-1, TOKENS - n)] for n in tokens]
    ids = packed_ids(*([run for run in row if run[1]] for row in runs))
    options = {"document_ids": ids, "prompt_lengths": lengths}
    poisoned = [x.masked_fill((ids == -1)[:, None, :, None], torch.nan) for x in (query, key, value)]
    kept = kept_tokens(*poisoned[1:], ORACLE, query=poisoned[0], **options)
    out = sparse_attention(*poisoned, ORACLE, **options)
    for row, (n, length) in enumerate(zip(tokens, lengths.tolist(), strict=True)):
        span = slice(TOKENS - n, None) if left else slice(n)
        own = [x[row : row + 1, :, span] for x in (query, key, value)]
        alone = kept_tokens(*own[1:], ORACLE, query=own[0], prompt_lengths=length)
        assert torch.equal(kept[row : row + 1, :, span], alone)
        expected_out = sparse_attention(*own, ORACLE, prompt_lengths=length)
        torch.testing.assert_close(out[row : row + 1, :, span], expected_out, rtol=1e-5, atol=2e-6)
        assert kept[row].sum() == alone.sum(), "a pad is kept"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scorer", LOCAL)
def test_no_rule_keeps_more_of_what_the_prompt_attends_to(scorer, seed):
    """In each partition that later prompt queries look back on, each head: the most attention K tokens can have."""
    query, key, value = inputs_of(seed)
    weights = dense_weights(query, key)

    def mass(name):
        config = SparseAttentionConfig(scorer=name, **CONFIG)
        kept = kept_tokens(key, value, config, query=query, **prompt(name, LENGTH))
        found = []
        for p in range(ORACLE.geometry.compressed(LENGTH)):
            start, end, behind = (ORACLE.geometry.raw_start(p + n) for n in range(3))
            seen = weights[:, :, behind:LENGTH, start:end].sum(2)
            found.append((seen * kept[..., start:end]).sum(-1))
        return torch.stack(found)

    best, other = mass("oracle"), mass(scorer)
    assert (best >= other - 1e-6).all()
    assert best.sum() > other.sum()


def test_heads_that_share_keep_more_of_it():
    """One partition, K 3 and no safeguard: of both heads' tokens the six that are attended to most."""
    adaptive = SparseAttentionConfig(scorer="oracle", budget="adaptive", **CONFIG)
    query, key, value = inputs_of(batch=8)
    seen = dense_weights(query, key)[:, :, 19:27, 3:11].sum(2)
    together, apart = (
        seen * kept_tokens(key, value, config, query=query, prompt_lengths=27)[..., 3:11]
        for config in (adaptive, ORACLE)
    )
    torch.testing.assert_close(together.sum((1, 2)), seen.flatten(1).topk(6).values.sum(-1))
    assert (together > 0).sum() == (apart > 0).sum() == 8 * 6
    assert together.sum() > apart.sum()


# ------------------------------------------------------------------ what it needs, and who refuses it


def test_without_the_prompts_length_it_says_how_to_pass_it():
    query, key, value = inputs_of()
    message = r"scorer 'oracle' .* pass prompt_lengths=, int64 \[B\] or an int, .*\(target_logits does"
    with pytest.raises(ValueError, match=message):
        sparse_attention(query, key, value, ORACLE)
    with pytest.raises(ValueError, match=message):
        kept_tokens(key, value, ORACLE, query=query)
    with pytest.raises(ValueError, match=r"'oracle' reads queries: pass query="):
        kept_tokens(key, value, ORACLE, prompt_lengths=LENGTH)


@pytest.mark.parametrize("lengths", [torch.tensor([5, 6]), torch.tensor([5.0]), 5.5, True])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match=r"prompt_lengths must be an int or int64 \[B\] = \(1,\), not torch\."):
        sparse_attention(*inputs_of(), ORACLE, prompt_lengths=lengths)


def test_packed_documents_have_no_length_of_their_own():
    ids = packed_ids([(0, 70), (1, 50)])
    with pytest.raises(ValueError, match="one length a row, but document_ids packs several documents"):
        sparse_attention(*inputs_of(), ORACLE, prompt_lengths=60, document_ids=ids)


@pytest.mark.parametrize("backend", ["gather", "flex"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scorer": "oracle"}, "scorer='oracle' ranks"),
        ({"scorer": "h2o", "budget": "adaptive"}, "budget='adaptive'"),
    ],
)
def test_other_backends_say_why_not(backend, options, reason):
    config = SparseAttentionConfig(**CONFIG, **options)
    told = prompt(config.scorer, LENGTH)
    with pytest.raises(
        ValueError, match=rf"backend='{backend}' cannot compute this: {reason}.*; use 'reference' or 'a"
    ):
        sparse_attention(*inputs_of(), config, backend=backend, **told)
    found, mask_form = (sparse_attention(*inputs_of(), config, backend=b, **told) for b in ("auto", "reference"))
    assert torch.equal(found, mask_form)


def test_a_dense_layer_needs_neither_length_nor_mask_form():
    config = SparseAttentionConfig(scorer="oracle", dense_layers=(0,), **CONFIG)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs_of(), is_causal=True, enable_gqa=True)
    for backend in ("auto", "gather", "reference"):
        torch.testing.assert_close(sparse_attention(*inputs_of(), config, backend=backend), dense)


def test_every_rule_says_what_it_is():
    for scorer in SCORERS.values():
        assert scorer.reads_query or not scorer.reads_future
