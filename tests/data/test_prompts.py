"""Chat templates of several families: the prompt of generation is a prefix of the training sample, text and tokens."""

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import SampleSet
from lrsa.data.prompts import chat_prompt, conversation_pieces
from tests.data.conftest import CHATML, byte_level, write_rows

TEMPLATES = {
    "chatml with a default system prompt": CHATML,
    "llama 3": (
        "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    ),
    "no end of turn": (
        "{% for m in messages %}{% if m['role'] == 'user' %}### Question:\n{{ m['content'] }}\n\n"
        "{% else %}### Answer:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Answer:\n{% endif %}"
    ),
}
REWRITES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if loop.last %}NOW {% endif %}{{ m['content'] }}|"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TURNS = [{"role": "user", "content": "The sky?"}, {"role": "assistant", "content": "Clear."}]
MORE = [*TURNS, {"role": "user", "content": "The grass?"}, {"role": "assistant", "content": "It grows."}]


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    return byte_level(TEMPLATES[request.param])


def test_generation_prompt_is_a_prefix(tokenizer, tmp_path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [{"prompt": "The sky?", "answer": "Clear."}, {"messages": MORE}][:1])
    sample = SampleSet(ExamplesConf(source="jsonl", path=str(file)), tokenizer, None)[0]
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    ((start, stop),) = sample.answer_spans
    assert sample.input_ids[:start] == tokenizer(prompt, add_special_tokens=False).input_ids
    answer = tokenizer.decode(sample.input_ids[start:stop])
    assert answer.strip() in ("Clear.<|im_end|>", "Clear.</s>")
    assert stop == sample.length


def test_conversation_and_prompt_agree(tokenizer) -> None:
    pieces = conversation_pieces(tokenizer, [(m["role"], m["content"]) for m in MORE])
    assert [target for _, target in pieces] == [False, True, False, True]
    prompt = chat_prompt(tokenizer)
    text = "".join(part for parts, _ in pieces for part in parts)
    turn = f"{prompt.tail}{prompt.lead}{{}}{prompt.end}"
    expected = f"{prompt.head}The sky?{turn.format('Clear.')}{prompt.turn}The grass?{turn.format('It grows.')}"
    assert text == expected


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewrites earlier turns.*prompt: plain"):
        chat_prompt(byte_level(REWRITES))


def test_no_template_names_the_way_out(tmp_path) -> None:
    tokenizer = byte_level(None)
    with pytest.raises(ValueError, match="prompt: plain"):
        chat_prompt(tokenizer)
    file = write_rows(tmp_path / "train.jsonl", [{"prompt": "The sky?", "answer": "Clear."}])
    conf = ExamplesConf(source="jsonl", path=str(file), prompt="plain")
    sample = SampleSet(conf, tokenizer, None)[0]
    assert tokenizer.decode(sample.input_ids) == "Question: The sky?\nAnswer: Clear.<|im_end|>"


def test_small_tokenizer_is_stable_and_round_trips(words_tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    assert 300 <= len(words_tokenizer) <= 600
    words_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = again.apply_chat_template(MORE, tokenize=False)
    ids = words_tokenizer(text, add_special_tokens=False).input_ids
    assert again(text, add_special_tokens=False).input_ids == ids and words_tokenizer.unk_token_id not in ids
    assert again.chat_template == words_tokenizer.chat_template
    assert words_tokenizer.convert_ids_to_tokens(ids)[:5] == ["<bos>", "<user>", "the", "sky", "?"]
