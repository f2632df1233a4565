"""A word-level tokenizer for demonstration models: a few hundred words that cover the synthetic tasks and haystack."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrsa.data.synthetic import NEEDLES_ARGS, PASSKEY_ARGS
from lrsa.data.wordlists import ADJECTIVES, HAYSTACK, NOUNS

SPECIAL = ("<pad>", "<unk>", "<bos>", "<end>", "<user>")
# Short wording for contexts of a few hundred tokens; conf/data/demo_recall.yaml and conf/task/recall.yaml use it.
RECALL_STATEMENT = "The code of {key} is {value}."
RECALL_QUESTION = "Recall the code of {key}"

# An answer follows the question's last word, without a mark in between: with the key as that word, two layers learn
# recall in minutes (an induction head: find what came after this word before), where a mark costs them hours.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }} <end>"
    "{% else %}<user> {{ message['content'] }} {% endif %}{% endfor %}"
)


def words(texts: Iterable[str]) -> list[str]:
    """Lower-cased words and punctuation marks of `texts`, each once, in order of appearance."""
    found: dict[str, None] = {}
    for text in texts:
        for word in re.findall(r"[^\W\d_]+|[^\w\s]", text.lower()):
            found.setdefault(word)
    return list(found)


def build_tokenizer(extra_words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of `recall-tiny`: lower case, one token a word, a digit or a punctuation mark; a chat template.

    The same words give the same ids on every machine. Unknown words become `<unk>`.
    """
    templates = [RECALL_STATEMENT, RECALL_QUESTION]
    for args in (NEEDLES_ARGS, PASSKEY_ARGS):
        templates += [args["statement"], args["question"], args["instruction"]]
    filled = [re.sub(r"\{\w+\}", " ", template) for template in templates]
    found = words([*filled, *HAYSTACK, *NOUNS, *ADJECTIVES, *extra_words, "- , . : ? !"])
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *"0123456789", *found])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
