"""From a conversation to token ids, with and without a chat template."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.prompt.prompts import lasting, tokenize
from llm_magic.errors import PromptError
from llm_magic.events import Message, Request, Sampling
from tests import tiny

SYSTEM, HI, HEY, WHY = (
    Message("system", "Be short."),
    Message("user", "Hi"),
    Message("assistant", "Hey"),
    Message("user", "Why?"),
)


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    return tiny.save_tokenizer(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return tiny.save_tokenizer(tmp_path, chat_template=False)


@pytest.mark.parametrize("messages", [(HI,), (SYSTEM, HI), (SYSTEM, HI, HEY, WHY)])
def test_a_template_gives_what_transformers_gives(chat: Any, messages: tuple[Message, ...]) -> None:
    prompt = tokenize(Request(messages), chat, False)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    assert prompt.ids == chat.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    assert prompt.text == chat.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    assert prompt.ids.count(chat.bos_token_id) == 1


def test_continuing_gives_what_transformers_gives(chat: Any) -> None:
    prompt = tokenize(Request((HI, HEY), continue_last=True), chat, False)
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]
    assert prompt.ids == chat.apply_chat_template(plain, continue_final_message=True)["input_ids"]


def test_a_template_without_a_system_role_gets_it_with_the_question(chat: Any) -> None:
    chat.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    )
    assert (
        tokenize(Request((SYSTEM, HI, HEY, WHY)), chat, False).text
        == "<user>Be short.\n\nHi<assistant>Hey<user>Why?"
    )


def test_a_template_that_fails_is_an_error_of_the_prompt(chat: Any) -> None:
    chat.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(PromptError):
        tokenize(Request((SYSTEM, HI)), chat, False)


@pytest.mark.parametrize(
    ("messages", "continue_last", "text"),
    [
        ((HI,), False, "Hi"),
        ((SYSTEM, HI), False, "Be short.\nUser: Hi\nAssistant:"),
        ((HI, HEY, WHY), False, "User: Hi\nAssistant: Hey\nUser: Why?\nAssistant:"),
        ((HI, HEY), True, "User: Hi\nAssistant: Hey"),
    ],
)
def test_a_model_without_a_template(
    base: Any, messages: tuple[Message, ...], continue_last: bool, text: str
) -> None:
    prompt = tokenize(Request(messages, continue_last=continue_last), base, False)
    assert prompt.text == text
    assert prompt.ids == base(text).input_ids


def test_no_template_on_request(chat: Any) -> None:
    assert tokenize(Request((SYSTEM, HI), use_template=False), chat, False).text == "Be short.\nHi"


def test_an_encoder_gets_the_instructions_and_the_last_question(base: Any) -> None:
    assert tokenize(Request((SYSTEM, HI, HEY, WHY)), base, True).text == "Be short.\nWhy?"
    going_on = tokenize(Request((SYSTEM, HI, HEY), continue_last=True), base, True)
    assert going_on.text == "Be short.\nHi"
    assert list(going_on.beginning) == base("Hey", add_special_tokens=False).input_ids


@pytest.mark.parametrize("messages", [(), (Message("user", " \n"),), (SYSTEM, Message("user", ""))])
def test_nothing_to_answer(chat: Any, messages: tuple[Message, ...]) -> None:
    with pytest.raises(PromptError, match="empty"):
        tokenize(Request(messages), chat, False)


@pytest.mark.parametrize(
    ("opening", "lasts"),
    [("<|assistant|>", True), ("<|assistant|><think>", False), ("<|assistant|>\n", False)],
)
def test_how_much_of_a_prompt_the_next_one_begins_with(tmp_path: Path, opening: str, lasts: bool) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"
    )
    asked = Request((Message("user", "One two"),), Sampling())
    prompt = tokenize(asked, tokenizer, False)
    count = lasting(asked, tokenizer, prompt)
    assert (count == len(prompt.ids)) == lasts
    assert tokenizer.decode(prompt.ids[:count]).endswith("</s><|assistant|>")


def test_a_prompt_lasts_where_no_template_tells_otherwise(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path, chat_template=False)
    asked = Request((Message("user", "One two"),), Sampling())
    prompt = tokenize(asked, tokenizer, False)
    assert lasting(asked, tokenizer, prompt) == len(prompt.ids)
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one question') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    prompt = tokenize(asked, tokenizer, False)
    assert lasting(asked, tokenizer, prompt) == len(prompt.ids)


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("use_template", [False, True])
def test_the_tokenizer_says_nothing_of_long_prompts(
    chat: Any, caplog: pytest.LogCaptureFixture, is_encoder_decoder: bool, use_template: bool
) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)  # it hands nothing on
    request = Request((Message("user", "word " * tiny.CONTEXT),), use_template=use_template)
    try:
        prompt = tokenize(request, chat, is_encoder_decoder)
        lasting(request, chat, prompt)
    finally:
        library.removeHandler(caplog.handler)
    assert len(prompt.ids) > chat.model_max_length
    assert caplog.messages == []
