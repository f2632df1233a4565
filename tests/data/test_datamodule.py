"""The training stream: collation, mixture, resuming, and the cache of tokens."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from omegaconf import OmegaConf

from lrsa.config import DataConf, ExamplesConf, RecipeConf
from lrsa.data import LRSADataModule, Sample, SampleSet, collate
from lrsa.data.datamodule import Mixture, ResumableSampler
from lrsa.data.tokens import TokenStore, token_store
from tests.data.conftest import write_rows

ARGS = {"needles": 4, "value_digits": 3, "key_words": 1, "instruction": ""}


def sample(name: str, size: int, spans: list[tuple[int, int]]) -> Sample:
    return Sample(name, list(range(1, size + 1)), spans, (name,), (("x",),), (), size)


def make(tokenizer, *, steps=6, micro=2, seed=0, length=200, **parts) -> LRSADataModule:
    parts = parts or {
        "a": ExamplesConf(source="needles", weight=3.0, args=ARGS),
        "b": ExamplesConf(source="passkey", weight=1.0, args={"instruction": ""}),
    }
    recipe = RecipeConf(steps=steps, batch_size=4, micro_batch_size=micro)
    return LRSADataModule(DataConf(length=length, parts=parts), tokenizer, recipe, seed)


def test_collate_pads_right_and_marks_targets() -> None:
    batch = collate([sample("a", 5, [(3, 5)]), sample("b", 3, [(0, 1), (2, 3)])], pad_id=9)
    assert batch["ids"] == ["a", "b"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]]
    assert batch["answer_mask"].int().tolist() == [[0, 0, 0, 1, 1], [1, 0, 1, 0, 0]]
    assert batch["document_ids"].tolist() == [[0] * 5, [0, 0, 0, -1, -1]]
    assert batch["input_ids"].dtype == batch["document_ids"].dtype == torch.int64
    assert batch["answer_mask"].dtype == torch.bool


def test_collate_without_pads_has_no_document_ids() -> None:
    assert collate([sample("a", 4, []), sample("b", 4, [(1, 2)])], pad_id=0)["document_ids"] is None


def test_loader_yields_micro_batches_with_loss_on_answers_only(words_tokenizer) -> None:
    batches = list(make(words_tokenizer).train_dataloader())
    assert len(batches) == 12 and all(batch["input_ids"].shape == (2, 200) for batch in batches)
    end = words_tokenizer.eos_token_id
    for batch in batches:
        for row in range(2):
            targets = batch["input_ids"][row][batch["answer_mask"][row]].tolist()
            assert targets[-1] == end and set(words_tokenizer.decode(targets[:-1])) <= set("0123456789 ")


def test_where_answers_are_stays_with_who_asks(words_tokenizer) -> None:
    data = make(words_tokenizer)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["input_ids"].device.type == "meta" and moved["answer_mask"] is batch["answer_mask"]
    assert moved["ids"] == batch["ids"]


def test_resume_gives_the_rest_of_the_same_stream(words_tokenizer) -> None:
    whole = [batch["input_ids"] for batch in make(words_tokenizer).train_dataloader()]
    again = make(words_tokenizer)
    again.load_state_dict({"start_sample": 8})
    rest = [batch["input_ids"] for batch in again.train_dataloader()]
    assert len(rest) == 8 and all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert again.state_dict() == {"start_sample": 8}


def test_stream_does_not_depend_on_micro_batches_or_steps(words_tokenizer) -> None:
    a = torch.cat([b["input_ids"] for b in make(words_tokenizer, micro=2).train_dataloader()])
    b = torch.cat([b["input_ids"] for b in make(words_tokenizer, micro=4, steps=9).train_dataloader()])
    assert torch.equal(a, b[: len(a)]), "a longer run begins like a shorter one"
    c = torch.cat([b["input_ids"] for b in make(words_tokenizer, seed=1).train_dataloader()])
    assert not torch.equal(a, c)


def test_mixture_follows_the_weights_and_each_part_in_order(words_tokenizer) -> None:
    mixture = make(words_tokenizer, steps=500).mixture
    names = [name for name, _ in mixture.plan]
    assert abs(names.count("a") / len(names) - 0.75) < 0.03
    for part in ("a", "b"):
        numbers = [number for name, number in mixture.plan if name == part]
        assert numbers == list(range(len(numbers)))


def test_devices_share_the_stream_without_overlap(words_tokenizer) -> None:
    mixture = make(words_tokenizer).mixture
    both = [list(ResumableSampler(mixture, 8, 2, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert both[0][:4] == [8, 9, 12, 13] and both[1][:4] == [10, 11, 14, 15]
    assert sorted(both[0] + both[1]) == list(range(8, 24))


def test_lightning_resumes_at_the_right_sample(words_tokenizer, tmp_path) -> None:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Recorder(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

        def training_step(self, batch, index):
            self.seen.append(tuple(batch["ids"]))
            return (self.weight * batch["input_ids"].float().mean()).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    def run(checkpoint=None):
        module, saver = Recorder(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        trainer = L.Trainer(
            max_steps=6, max_epochs=-1, accelerator="cpu", accumulate_grad_batches=2, callbacks=[saver], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=make(words_tokenizer), ckpt_path=checkpoint)
        return module.seen

    whole = run()
    assert run(tmp_path / "step=3.ckpt") == whole[6:] and len(whole) == 12


def test_too_long_is_found_before_the_first_step(squad_folder, bytes_tokenizer) -> None:
    part = ExamplesConf(source="squad", path=str(squad_folder), questions=8)
    with pytest.raises(ValueError, match="more than length=700") as caught:
        make(bytes_tokenizer, length=700, squad=part).setup("fit")
    assert "q-" in str(caught.value)


def test_bad_mixtures(words_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"batch_size=4 is not a multiple of recipe.micro_batch_size=3"):
        make(words_tokenizer, micro=3)
    with pytest.raises(ValueError, match="weights"):
        _ = make(words_tokenizer, a=ExamplesConf(source="passkey", weight=0.0)).mixture
    with pytest.raises(ValueError, match=r"data.parts is empty"):
        LRSADataModule(DataConf(), words_tokenizer, RecipeConf(), 0)
    with pytest.raises(ValueError, match="unknown source") as caught:
        _ = make(words_tokenizer, odd=ExamplesConf(source="squat")).mixture
    assert "data.parts.odd" in caught.value.__notes__[0]


def test_hydra_nodes_are_accepted(words_tokenizer) -> None:
    node = OmegaConf.merge(OmegaConf.structured(ExamplesConf), {"source": "needles", "args": ARGS})
    plain = ExamplesConf(source="needles", args=ARGS)
    a, b = (SampleSet(conf, words_tokenizer, 200) for conf in (node, plain))
    assert a.fingerprint == b.fingerprint and a[0] == b[0]


def test_padded_rows_of_own_data(tmp_path, bytes_tokenizer) -> None:
    rows = [{"prompt": "The sky?", "answer": "Clear " * k} for k in (1, 2, 3, 4)]
    part = ExamplesConf(source="jsonl", path=str(write_rows(tmp_path / "train.jsonl", rows)))
    module = make(bytes_tokenizer, micro=4, steps=1, length=300, own=part)
    (batch,) = module.train_dataloader()
    pads = batch["document_ids"] == -1
    assert pads.any() and not (pads & batch["answer_mask"]).any()
    assert module.describe()[0]["name"] == "own"


def test_mixture_is_a_dataset(words_tokenizer) -> None:
    mixture = make(words_tokenizer).mixture
    assert isinstance(mixture, Mixture) and len(mixture) == 24 and mixture[23].length == 200


def test_token_cache_is_used_and_survives_corruption(tmp_path, bytes_tokenizer, caplog, monkeypatch) -> None:
    texts = ["The sky is clear.", "", "Café « déjà »", "The grass grows."]
    first = TokenStore(bytes_tokenizer, tmp_path)
    first.preload(texts)
    (file,) = (tmp_path / "tokens").iterdir()
    expected = [ids.tolist() for ids in first.encode(texts)]

    def refuse(self, texts):
        assert not texts, "tokenised although cached"
        return []

    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "_tokenise", refuse)
        second = TokenStore(bytes_tokenizer, tmp_path)
        second.preload(texts)
        assert [ids.tolist() for ids in second.encode(texts)] == expected
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a zip"):
        file.write_bytes(broken)
        third = TokenStore(bytes_tokenizer, tmp_path)
        with caplog.at_level(logging.WARNING):
            third.preload(texts)
        assert [ids.tolist() for ids in third.encode(texts)] == expected
        assert "unreadable" in caplog.text
        caplog.clear()
        assert file.read_bytes() == whole or file.stat().st_size == len(whole), "rebuilt"
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [file.name], "no temporary file stays"


def test_an_unwritable_cache_costs_only_the_cache(tmp_path, bytes_tokenizer, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    store = TokenStore(bytes_tokenizer, tmp_path / "file")
    store.preload(["The sky is clear."])
    assert len(store.get("The sky is clear.")) and "was not written" in caplog.text


def test_equal_tokenizers_share_a_store_that_later_changes_do_not_reach(bytes_tokenizer, tmp_path) -> None:
    mine, other = copy.deepcopy(bytes_tokenizer), copy.deepcopy(bytes_tokenizer)
    store = token_store(mine, tmp_path)
    assert token_store(other, tmp_path) is store
    mine.chat_template = "{{ messages[0]['content'] }}"
    assert token_store(mine, tmp_path) is not store
    assert token_store(other, tmp_path).tokenizer.chat_template == other.chat_template
    alive = weakref.ref(other)
    del other
    gc.collect()
    assert alive() is None
