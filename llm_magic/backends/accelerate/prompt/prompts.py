"""A request to the text and the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from llm_magic.errors import PromptError
from llm_magic.events import Message, Request


@dataclass(frozen=True)
class TokenizedPrompt:
    """The final prompt.

    Attributes
    ----------
    text
        What the tokenizer got.
    ids
        Its tokens; for an encoder-decoder model, those of the encoder.
    beginning
        Tokens of the answer that is continued, for an encoder-decoder model's decoder.
    """

    text: str
    ids: list[int]
    beginning: tuple[int, ...] = ()


def tokenize(request: Request, tokenizer: Any, is_encoder_decoder: bool) -> TokenizedPrompt:
    """Render the conversation and tokenize it.

    Raises
    ------
    PromptError
        When it is empty, or the chat template refuses it.
    """
    if not request.messages or not request.messages[-1].content.strip():
        raise PromptError("The prompt is empty.", "Write something under %%llm.")
    if is_encoder_decoder:
        return _for_encoder(request, tokenizer)
    template = tokenizer.get_chat_template() if request.use_template and tokenizer.chat_template else ""
    if template:
        text = _render(template, request, tokenizer)
        # The template has written the beginning-of-sequence token already.
        ids = _ids(tokenizer, text, add_special_tokens=False)
    else:
        text = _plain(request)
        ids = _ids(tokenizer, text)
    if not ids:
        raise PromptError("The prompt has no tokens.", "Write something under %%llm.")
    return TokenizedPrompt(text, ids)


def lasting(request: Request, tokenizer: Any, prompt: TokenizedPrompt) -> int:
    """Tokens of a prompt that the conversation's next prompt begins with, by the template: all of them as a rule.

    A template may open the assistant's turn with something that it leaves out later, the beginning of reasoning.
    """
    template = tokenizer.get_chat_template() if request.use_template and tokenizer.chat_template else ""
    if not template or request.continue_last:
        return len(prompt.ids)
    later = (*request.messages, Message("assistant", "x"), Message("user", "x"))
    try:
        text = _render(template, replace(request, messages=later), tokenizer, opens_turn=False)
    except PromptError:
        return len(prompt.ids)
    ids = _ids(tokenizer, text, add_special_tokens=False)
    same = (first == second for first, second in zip(prompt.ids, ids, strict=False))
    return sum(takewhile(bool, same))


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    # Not verbose: it would warn of texts beyond the context, which are refused with what to do about it.
    return list(tokenizer(text, verbose=False, **options).input_ids)


def _render(template: str, request: Request, tokenizer: Any, *, opens_turn: bool = True) -> str:
    from llm_magic.backends.accelerate.prompt import chat_template

    variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}

    def render(messages: Sequence[Message]) -> str:
        text: str = chat_template.render(
            template,
            [{"role": message.role, "content": message.content} for message in messages],
            add_generation_prompt=opens_turn and not request.continue_last,
            continue_final_message=request.continue_last,
            variables=variables,
        )
        return text

    try:
        return render(request.messages)
    except PromptError:
        merged = _system_into_user(request.messages)
        if merged is None:
            raise
        return render(merged)


def _system_into_user(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The same conversation for a template without a system role; ``None`` when there is nothing to merge."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return None
    first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
    return first, *messages[2:]


def _plain(request: Request) -> str:
    """The text for a model without a template: one message as it is, a conversation as a transcript."""
    messages = request.messages
    if not request.use_template:
        return "\n".join(message.content for message in messages)
    if len(messages) == 1:
        return messages[0].content
    names = {"user": "User: ", "assistant": "Assistant: "}
    lines = [names.get(message.role, "") + message.content for message in messages]
    return "\n".join(lines if request.continue_last else [*lines, "Assistant:"])


def _for_encoder(request: Request, tokenizer: Any) -> TokenizedPrompt:
    """Encoder-decoder models map one text to another: system text and the last question."""
    messages = list(request.messages)
    beginning: tuple[int, ...] = ()
    if request.continue_last and messages[-1].role == "assistant":
        beginning = tuple(_ids(tokenizer, messages.pop().content, add_special_tokens=False))
    system = [message.content for message in messages if message.role == "system"]
    questions = [message.content for message in messages if message.role == "user"]
    text = "\n".join([*system, *questions[-1:]])
    return TokenizedPrompt(text, _ids(tokenizer, text), beginning)
