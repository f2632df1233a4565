"""Small tokenizers and a small SQuAD-like folder, all made on the spot."""

import gzip
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lrsa.data.vocabulary import build_tokenizer
from lrsa.data.wordlists import ADJECTIVES, HAYSTACK, NOUNS

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of SmolLM2, GPT-2 or Llama 3, with a few hundred merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*HAYSTACK, *NOUNS, *ADJECTIVES], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def words_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def write_rows(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8") as out:
        out.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return file


def squad_rows(articles: int = 6, paragraphs: int = 5, seed: int = 0) -> list[dict]:
    """Every paragraph names its article and number, so that a test can tell where a passage is from."""
    rng = random.Random(seed)
    rows = []
    for article in range(articles):
        for paragraph in range(paragraphs):
            answer = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
            mark = f"Article {article} paragraph {paragraph}."
            context = f"{mark} {' '.join(rng.sample(HAYSTACK, 3))} The prize was a {answer}. Café « déjà »."
            for number in range(2):
                rows.append(
                    {
                        "id": f"q-{article}-{paragraph}-{number}",
                        "title": f"Title_{article}",
                        "context": context,
                        "question": f"What was prize {number} of article {article} paragraph {paragraph}?",
                        "answers": {"text": [answer, f"a {answer}"], "answer_start": [context.index(answer)] * 2},
                    }
                )
    return rows


@pytest.fixture(scope="session")
def squad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squad")
    write_rows(folder / "train.jsonl.gz", squad_rows())
    write_rows(folder / "validation.jsonl", squad_rows(seed=1))
    return folder
