"""Loading, saving, switching the attention of models, and the logits of targets."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, masking_utils

from lrsa import models
from lrsa.attention import SparseAttentionConfig, huggingface
from lrsa.config import ModelConf
from lrsa.models import build_model, get_attention, load_model, load_tokenizer, set_attention, target_logits

SMALL = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
CONFIG = SparseAttentionConfig(sink_size=3, lag_size=8, top_k=3, dense_layers=(-1,))


def fresh(attention=CONFIG, **options):
    torch.manual_seed(0)
    return load_model("fresh", attention, config=SMALL, **options).eval()


def tokens(batch: int, length: int, seed: int = 0):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False, **kwargs).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, sparse logits, dense logits) of a model that was saved with sparse attention."""
    folder = tmp_path_factory.mktemp("model")
    model, ids = fresh(), tokens(2, 90)
    model.save_pretrained(folder)
    sparse = logits(model, ids)
    set_attention(model, None)
    dense = logits(model, ids)
    assert not torch.allclose(sparse, dense)
    return folder, sparse, dense


# ------------------------------------------------------------------ saving and loading


def test_load_model_gives_back_attention_and_logits(saved):
    folder, sparse, _ = saved
    model = load_model(folder).eval()
    assert get_attention(model) == CONFIG
    assert torch.equal(logits(model, tokens(2, 90)), sparse)


def test_auto_model_by_name_gives_the_same_logits(saved):
    folder, sparse, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lrsa").eval()
    assert torch.equal(logits(model, tokens(2, 90)), sparse)


def test_auto_model_in_a_process_that_only_imports_lrsa(saved):
    """`import lrsa` must be enough to register the attention, as the README says."""
    folder, sparse, _ = saved
    script = f"""
import lrsa, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, attn_implementation="lrsa").eval()
ids = torch.tensor({tokens(2, 90).tolist()})
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, {str(folder / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(folder / "logits.pt"), sparse, rtol=1e-5, atol=1e-5)


def test_a_plain_auto_model_is_dense(saved):
    """transformers does not store the attention's name: pinned here, said in the README."""
    folder, _, dense = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens(2, 90)), dense)


def test_the_attention_can_be_chosen_when_loading(saved):
    folder, sparse, dense = saved
    model = load_model(folder, None).eval()
    assert get_attention(model) is None
    assert torch.equal(logits(model, tokens(2, 90)), dense)
    other = SparseAttentionConfig(sink_size=3, lag_size=8, top_k=1)
    model = load_model(folder, other).eval()
    assert get_attention(model) == other
    assert not torch.allclose(logits(model, tokens(2, 90)), sparse)


def test_a_dense_model_saves_no_parameters(saved, tmp_path):
    model = load_model(saved[0], None)
    model.save_pretrained(tmp_path)
    assert "lrsa" not in json.loads((tmp_path / "config.json").read_text())
    assert get_attention(load_model(tmp_path)) is None


def test_bfloat16_weights_load_and_run(saved):
    model = load_model(saved[0], dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16
    assert logits(model, tokens(2, 90)).isfinite().all()


def test_rope_scaling_reaches_the_model():
    plain, scaled = fresh(None), fresh(None, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert not torch.allclose(logits(plain, tokens(1, 90)), logits(scaled, tokens(1, 90)))
    torch.testing.assert_close(scaled.model.rotary_emb.inv_freq * 4, plain.model.rotary_emb.inv_freq)


def test_build_model_reads_every_field():
    conf = ModelConf(name="fresh", config=SMALL, dtype="bfloat16", attention_backend="reference",
                     gradient_checkpointing=True)  # fmt: skip
    model = build_model(conf, CONFIG)
    assert model.dtype == torch.bfloat16
    assert get_attention(model) == CONFIG
    assert all(layer.self_attn.lrsa_backend == "reference" for layer in model.model.layers)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


# ------------------------------------------------------------------ switching


def test_set_attention_switches_a_live_model():
    model, ids = fresh(None), tokens(2, 90)
    dense = logits(model, ids)
    set_attention(model, CONFIG)
    sparse = logits(model, ids)
    assert not torch.allclose(sparse, dense)
    set_attention(model, CONFIG.with_compression(8))
    assert not torch.allclose(logits(model, ids), sparse)
    set_attention(model, CONFIG)
    assert torch.equal(logits(model, ids), sparse)
    set_attention(model, CONFIG.with_compression(1))
    assert torch.equal(logits(model, ids), dense)


def test_weights_and_optimiser_survive_a_switch():
    model = fresh(None)
    weights = list(model.parameters())
    set_attention(model, CONFIG)
    set_attention(model, None)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_the_backend_stays_until_another_is_named():
    model = fresh(backend="reference")
    set_attention(model, CONFIG.with_compression(2))
    assert all(layer.self_attn.lrsa_backend == "reference" for layer in model.model.layers)
    set_attention(model, CONFIG, backend="gather")
    assert all(layer.self_attn.lrsa_backend == "gather" for layer in model.model.layers)


def test_two_models_do_not_share_their_attention():
    first, second = fresh(), fresh(None)
    dense = logits(second, tokens(1, 90))
    set_attention(first, CONFIG.with_compression(8))
    assert get_attention(second) is None
    assert torch.equal(logits(second, tokens(1, 90)), dense)


def test_a_peft_model_switches_its_base():
    from peft import LoraConfig, get_peft_model

    model, ids = fresh(None), tokens(1, 90)
    dense = logits(model, ids)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    set_attention(wrapped, CONFIG)
    assert get_attention(wrapped) == CONFIG
    assert not torch.allclose(logits(wrapped, ids), dense)
    set_attention(wrapped, None)
    torch.testing.assert_close(logits(wrapped, ids), dense)


@pytest.mark.parametrize("bad", ["backend", "dense_layers"])
def test_a_refused_switch_changes_nothing(bad):
    model, ids = fresh(None), tokens(1, 90)
    dense = logits(model, ids)
    if bad == "backend":
        with pytest.raises(ValueError, match=r"backend='fast' is unknown: choose one of auto, reference, gather, flex"):
            set_attention(model, CONFIG, backend="fast")
    else:
        with pytest.raises(ValueError, match=r"layer 2 is not among 2 layers"):
            set_attention(model, SparseAttentionConfig(dense_layers=(2,)))
    assert get_attention(model) is None
    assert torch.equal(logits(model, ids), dense)


def test_flex_on_the_cpu_says_why():
    model = fresh(backend="flex")
    with pytest.raises(ValueError, match=r"backend='flex' cannot run here: .*CUDA"):
        logits(model, tokens(1, 90))


def test_an_architecture_that_was_never_compared_is_refused(monkeypatch):
    config = {"model_type": "falcon", "vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4,
              "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    with pytest.raises(ValueError, match=r"model_type='falcon' is not among .*llama, mistral"):
        load_model("fresh", CONFIG, config=config)
    monkeypatch.setattr(huggingface, "ARCHITECTURES", ("falcon",))  # it would silently stay dense
    with pytest.raises(ValueError, match=r"FalconForCausalLM cannot take another attention"):
        load_model("fresh", CONFIG, config=config)
    assert get_attention(load_model("fresh", None, config=config)) is None


# ------------------------------------------------------------------ what is not there


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["HuggingFaceTB/no-such-model", "./no/such/folder", "a name with blanks"])
def test_a_missing_model_names_the_local_alternative(name, load):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    message = str(error.value)
    assert name in message
    assert "hub" in message and "local folder with config.json" in message and "ships with lrsa" in message


def test_a_folder_without_weights_is_not_called_missing(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved[0] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"cannot be loaded: .*model.safetensors") as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "not a local folder" not in str(error.value)


def test_an_unknown_model_type_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"nonsense.*llama"):
        load_model("fresh", None, config={"model_type": "nonsense"})


# ------------------------------------------------------------------ GGUF


def test_a_gguf_file_is_read_once_a_process_and_each_model_is_its_own(monkeypatch):
    reads = []

    def read(folder, **options):
        reads.append(options["gguf_file"])
        model = fresh(None)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    models._read_gguf.cache_clear()
    monkeypatch.setattr(models, "_from_pretrained", read)
    first, second = (load_model("folder", CONFIG, gguf_file="a.gguf") for _ in range(2))
    scaled = load_model("folder", None, gguf_file="a.gguf", rope_scaling={"rope_type": "linear", "factor": 2.0})
    models._read_gguf.cache_clear()
    assert reads == ["a.gguf"]
    ids = tokens(1, 90)
    assert torch.equal(logits(first, ids), logits(fresh(), ids))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(logits(second, ids), logits(fresh(), ids))
    assert not hasattr(second.config, "quantization_config")
    assert scaled.config.rope_parameters["factor"] == 2.0 and "factor" not in second.config.rope_parameters


# ------------------------------------------------------------------ target logits


@pytest.mark.parametrize("attention", [None, CONFIG], ids=["dense", "sparse"])
def test_a_pass_over_whole_rows_never_asks_the_device(attention, monkeypatch):
    """On ``meta`` nothing has a value: who looks at one fails."""
    # transformers' own search for packed rows, once a pass.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know this device
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: contextlib.nullcontext())
    model = fresh(attention, backend="gather").to("meta")
    answers = torch.zeros((2, 40), dtype=torch.bool)
    answers[0, 5:8] = answers[1, 30:] = True
    found, targets = target_logits(model, tokens(2, 40).to("meta"), answers)
    torch.nn.functional.cross_entropy(found, targets).backward()
    assert found.shape == (13, model.config.vocab_size) and targets.shape == (13,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        target_logits(model, tokens(2, 40).to("meta"), answers.to("meta"))


@pytest.mark.parametrize("attention", [None, CONFIG], ids=["dense", "sparse"])
def test_target_logits_are_slices_of_all_logits(attention):
    model, ids = fresh(attention), tokens(3, 90)
    mask = torch.zeros(3, 90, dtype=torch.bool)
    mask[0, 40:44] = mask[0, 89] = mask[2, 1] = mask[2, 42] = True
    with torch.no_grad():
        found, targets = target_logits(model, ids, mask)
    whole = logits(model, ids)
    rows, columns = mask.nonzero(as_tuple=True)
    torch.testing.assert_close(found, whole[rows, columns - 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(targets, ids[rows, columns])
    assert found.dtype == torch.float32 and found.shape == (int(mask.sum()), 61)


@pytest.mark.parametrize("attention", [None, CONFIG], ids=["dense", "sparse"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_target_logits_of_documents_equal_the_documents_alone(layout, attention):
    model = fresh(attention)
    parts = {"right": [[(0, 90)], [(0, 55), (-1, 35)], [(-1, 90)]], "left": [[(-1, 30), (0, 60)], [(0, 90)]],
             "packed": [[(0, 50), (1, 40)], [(-1, 10), (2, 45), (3, 35)]]}[layout]  # fmt: skip
    documents = torch.tensor([[i for i, n in row for _ in range(n)] for row in parts])
    ids = tokens(len(parts), 90)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    expected, wanted = [], []
    for r, row in enumerate(parts):
        start = 0
        for document, n in row:
            if document >= 0:
                mask[r, start + n - 3 : start + n] = True
                expected.append(logits(model, ids[r : r + 1, start : start + n])[0, -4:-1])
                wanted.append(ids[r, start + n - 3 : start + n])
            start += n
    with torch.no_grad():
        found, targets = target_logits(model, ids, mask, documents)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-4)
    assert torch.equal(targets, torch.cat(wanted))


@pytest.mark.parametrize("name", ["oracle", "once"])
def test_target_logits_tell_where_the_prompt_ends(name):
    """Of rows padded on either side, where the first answer begins; nothing to an attention that does not ask."""
    options = {"scorer": "oracle"} if name == "oracle" else {"scorer": "tova", "schedule": "prefill_once"}
    model = fresh(SparseAttentionConfig(sink_size=3, lag_size=8, top_k=3, **options))
    ids, mask = tokens(3, 90), torch.zeros(3, 90, dtype=torch.bool)
    documents = torch.zeros(3, 90, dtype=torch.int64)
    documents[1, :20] = documents[2, 85:] = -1
    mask[:2, 80:] = True
    with torch.no_grad():
        found = target_logits(model, ids, mask, documents)[0].unflatten(0, (2, 10))
        for row, own in enumerate((slice(90), slice(20, 90))):
            alone = ids[row : row + 1, own]
            told, other = (
                model(input_ids=alone, use_cache=False, prompt_lengths=alone.shape[1] - n).logits[0, -11:-1]
                for n in (10, 30)
            )
            torch.testing.assert_close(found[row], told, rtol=1e-3, atol=1e-4)
            assert (told - other).abs().max() > 1e-2, "the length changes nothing"
        mask[0, 70] = True
        if name == "once":
            with pytest.raises(ValueError, match="row 0 has several answers"):
                target_logits(model, ids, mask, documents)
        else:
            expected = model(input_ids=ids[:1], use_cache=False, prompt_lengths=70).logits[0, -11:-1]
            again = target_logits(model, ids, mask, documents)[0][1:11]
            torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match=r"prompt_lengths= with schedule='chunked'"):
            fresh(CONFIG)(input_ids=ids, use_cache=False, prompt_lengths=70)


def test_target_logits_train():
    model, ids = fresh().train(), tokens(2, 90)
    mask = torch.zeros(2, 90, dtype=torch.bool)
    mask[:, 80:] = True
    found, targets = target_logits(model, ids, mask)
    torch.nn.functional.cross_entropy(found, targets).backward()
    whole = fresh().train()
    loss = torch.nn.functional.cross_entropy(whole(input_ids=ids).logits[:, 79:89].flatten(0, 1), ids[:, 80:].flatten())
    loss.backward()
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_target_logits_of_no_target():
    ids = tokens(2, 40)
    found, targets = target_logits(fresh(), ids, torch.zeros(2, 40, dtype=torch.bool))
    assert found.shape == (0, 61) and targets.shape == (0,)


def test_a_first_token_cannot_be_a_target():
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 0] = mask[1, 30] = True
    with pytest.raises(ValueError, match=r"answer_mask.*row 1.*first token"):
        target_logits(fresh(), tokens(2, 40), mask)


def test_a_packed_documents_first_token_cannot_be_a_target():
    model = fresh(None)
    ids, targets = tokens(1, 20), torch.zeros(1, 20, dtype=torch.bool)
    targets[0, 12] = True
    documents = torch.tensor([[0] * 12 + [1] * 8])
    with pytest.raises(ValueError, match=r"row 0 has the first token of the document at 12 as a target"):
        target_logits(model, ids, targets, documents)
