"""Chat templates, cut at the places where user text and answers go, so that answer spans are known exactly.

A prompt is `head user₀ tail | lead answer₀ end | turn user₁ tail | lead answer₁ end | ...`. Everything before the
first bar is what `apply_chat_template(..., add_generation_prompt=True)` renders: generation starts from exactly those
tokens. `lead answer end` is what the model has to write, `end` being the end-of-turn token. Where a task begins the
answer for the model, `lead prefix` belong to the prompt, and ` answer end` is what it has to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_USER = ("LRSAUSERZERO", "LRSAUSERONE")
_ANSWER = "LRSAANSWERZERO"


@dataclass(frozen=True)
class Prompt:
    """The fixed texts around user texts and answers; see the module's docstring."""

    head: str
    tail: str
    lead: str
    end: str
    turn: str
    question: str = "{question}"  # how a question is written
    prefix: str = ""  # how an answer is begun for the model; of the record's template, examples have their own

    def ask(self, question: str, answer_prefix: str) -> str:
        """From the question to where the model goes on. Labels that a source's own wording brings are said once."""
        begun = self.lead + answer_prefix if answer_prefix else ""
        text = self.question.replace("{question}", question) + self.tail + begun
        return text.replace("Question: Question:", "Question:", 1).replace("Answer: Answer:", "Answer:", 1)

    def template(self, context: str, turns: bool) -> str:
        """One string for the record, with named gaps; `turns`: a second question follows."""
        begun = f"{self.prefix} " if self.prefix else ""
        asked = f"{self.question}{self.tail}{self.lead}{begun}{{answer}}{self.end}"
        return f"{self.head}{context}{asked}" + (f"{self.turn}{asked}" if turns else "")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generate: bool) -> str:
    try:
        # date_string: templates that would write today's date write this one, so that prompts do not change by the day
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, date_string="01 Jan 2025"
        )
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"the tokenizer's chat template fails on this conversation: {error}") from error
    return str(text)


def _need_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(f"{type(tokenizer).__name__} has no chat template: set `prompt: plain`")


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return [*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[str, int]:
    """What ends an answer, and how much of `after` it takes: up to the first special token, else the EOS token."""
    found = [(after.find(token), token) for token in _special(tokenizer) if token in after]
    if found:
        start, token = min(found, key=lambda hit: (hit[0], -len(hit[1])))
        return after[: start + len(token)], start + len(token)
    if tokenizer.eos_token is None:
        raise ValueError(
            "neither the chat template nor the tokenizer ends a turn with a token: set tokenizer.eos_token"
        )
    return tokenizer.eos_token, 0


def chat_prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Cut the tokenizer's own chat template. ValueError where a longer conversation does not extend a shorter one."""
    _need_template(tokenizer)
    first = {"role": "user", "content": _USER[0]}
    answer = {"role": "assistant", "content": _ANSWER}
    opening = _render(tokenizer, [first], True)
    closed = _render(tokenizer, [first, answer], False)
    longer = _render(tokenizer, [first, answer, {"role": "user", "content": _USER[1]}], True)
    head, _, tail = opening.partition(_USER[0])
    lead, _, rest = longer.removeprefix(opening).partition(_ANSWER)
    end, taken = _end_of_turn(tokenizer, closed.partition(_ANSWER)[2])
    turn, _, last_tail = rest.partition(_USER[1])
    ends_alike = rest.startswith(end) or taken == 0
    if not longer.startswith(opening) or last_tail != tail or not ends_alike:
        raise ValueError(
            "the tokenizer's chat template rewrites earlier turns (a longer conversation does not begin with the "
            "shorter one), so training and generation prompts would differ: set `prompt: plain`"
        )
    return Prompt(head, tail, lead, end, turn[taken:])


def plain_prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """`Question: ... Answer: ...` for tokenizers without a template; an answer ends with the EOS token."""
    if tokenizer.eos_token is None:
        raise ValueError("`prompt: plain` ends each answer with the EOS token, and the tokenizer has none")
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts_with_bos = tokenizer.bos_token is not None and len(full) > len(bare) and full[0] == tokenizer.bos_token_id
    head = tokenizer.bos_token if starts_with_bos else ""
    return Prompt(head, "\nAnswer:", " ", tokenizer.eos_token, "\n\n", "Question: {question}")


PROMPTS = {"chat": chat_prompt, "plain": plain_prompt}


def make_prompt(kind: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """`chat` or `plain`."""
    if kind not in PROMPTS:
        raise ValueError(f"prompt={kind!r} is unknown; valid: {', '.join(PROMPTS)}")
    return PROMPTS[kind](tokenizer)


def conversation_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]
) -> list[tuple[list[str], bool]]:
    """A whole conversation as (texts, is_target) pieces; a target is what the assistant writes: [answer, end of turn].

    The text after the last end of turn is left out. ValueError where the prompt that generation would start from is
    not a prefix of the rendered conversation.
    """
    _need_template(tokenizer)
    rows = [{"role": role, "content": content} for role, content in messages]
    whole = _render(tokenizer, rows, False)
    pieces: list[tuple[list[str], bool]] = []
    position = 0
    for index, row in enumerate(rows):
        if row["role"] != "assistant":
            continue
        prompt = _render(tokenizer, rows[:index], True)
        content = row["content"].strip()
        at = whole.find(content, len(prompt))
        if not whole.startswith(prompt) or at < 0:
            raise ValueError(
                f"message {index}: the chat template renders the conversation so far differently from the prompt that "
                "generation would start from (or rewrites the answer), so the answer's tokens cannot be told"
            )
        stop = at + len(content)
        end, taken = _end_of_turn(tokenizer, whole[stop:])
        pieces += [([whole[position : len(prompt)]], False), ([whole[len(prompt) : stop], end], True)]
        position = stop + taken
    return pieces
