"""Chat templates: a conversation to the text that the model reads, as transformers writes it.

A template comes with the model's files and is code of strangers: ``template_sandbox`` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError

from llm_magic.backends.accelerate.prompt.template_sandbox import OverBudgetError, Refusal, run
from llm_magic.errors import PromptError
from llm_magic.harmless.terminal import sanitize

TEMPLATE_LIMIT = 256 * 1024  # characters; the largest published templates have some 30,000

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "A TEXT TO BE SHOWN"
_PART_KEY = re.compile(r"\btext\b")  # the key of a part; templates of text alone have no use for it
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_NO_TEMPLATE = "To send the prompt without the model's template: %%llm --no-template"


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    variables: Mapping[str, object],
) -> str:
    """The text that ``tokenizer.apply_chat_template(..., tokenize=False)`` makes.

    Parameters
    ----------
    template
        Jinja source, as the model's files have it.
    messages
        Dictionaries with ``role``, ``content`` and whatever else the template knows.
    add_generation_prompt
        Whether to open the assistant's turn at the end.
    continue_final_message
        Whether to leave the last message open, so that the model goes on with it.
    variables
        Special tokens (``bos_token``, …) and options of the template (``enable_thinking``, ``tools``).

    Raises
    ------
    PromptError
        When the template is broken, refuses the conversation, asks for something unsafe, or needs
        more time or memory than any conversation does.
    """
    if len(template) > TEMPLATE_LIMIT:
        raise PromptError(
            f"The chat template has {len(template):,} characters, too many to run.", _NO_TEMPLATE
        )
    if continue_final_message and add_generation_prompt:
        raise PromptError(
            "A prompt cannot continue the last message and open a new one.", "Choose one of both."
        )
    chat = [_with_reasoning(_plain(message)) for message in messages]
    if _wants_parts(template, variables):
        chat = [_in_parts(message) for message in chat]
    tail = _open_last_message(chat, template) if continue_final_message else None
    names = {"tools": None, "documents": None, **_plain(variables), "messages": chat}
    rendered = _run(template, {**names, "add_generation_prompt": add_generation_prompt})
    return rendered if tail is None else _cut_after(rendered, tail)


def _wants_parts(template: str, variables: Mapping[str, object]) -> bool:
    """Whether it shows the text of a message only where that is in a list of parts, beside images.

    Many templates of models that see take both, and some drop a plain text without a word.
    """
    if not _PART_KEY.search(template):
        return False
    return not _shows(template, _PROBE, variables) and _shows(template, _parts_of(_PROBE), variables)


def _shows(template: str, content: object, variables: Mapping[str, object]) -> bool:
    names = {"tools": None, "documents": None, **_plain(variables), "add_generation_prompt": True}
    try:
        return _PROBE in run(template, {**names, "messages": [{"role": "user", "content": content}]})
    except Exception:  # a stranger's code: what is wrong with it shows when the conversation is rendered
        return False


def _parts_of(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": _parts_of(content)} if isinstance(content, str) else message


def _run(template: str, names: dict[str, Any]) -> str:
    try:
        return run(template, names)
    except Refusal as error:
        raise PromptError(f"The chat template refuses this: {_short(error)}", _NO_TEMPLATE) from None
    except OverBudgetError as error:
        raise PromptError(f"The chat template was stopped: {_short(error)}", _NO_TEMPLATE) from None
    except SecurityError as error:
        raise PromptError(f"The chat template does something unsafe: {_short(error)}", _NO_TEMPLATE) from None
    except Exception as error:  # a stranger's code: anything can come out of it
        what = f"{type(error).__name__}: {_short(error)}"
        raise PromptError(f"The chat template failed: {what}", _NO_TEMPLATE) from None


def _short(error: BaseException) -> str:
    text = " ".join(sanitize(str(error)[:1000]).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


# --- The last message, to be continued --------------------------------------------------------------


def _open_last_message(chat: list[dict[str, Any]], template: str) -> str:
    """Mark where the last message ends; returns its text."""
    content = chat[-1].get("content") if chat else None
    if content is None or "content" not in template:
        raise PromptError("There is no message to continue.", "Ask something first.")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(content):
        if "text" in part:
            text = str(part["text"])
            part["text"] = text + _CONTINUE_TAG
            return text
    raise PromptError("The last message has no text to continue.", "Ask a new question.")


def _cut_after(rendered: str, tail: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if tag not in rendered or tail.strip() not in rendered:
        raise PromptError("The chat template drops the message that is to be continued.", _NO_TEMPLATE)
    place = rendered.rindex(tag)
    # Where the template trimmed the message, the spacing before the tag was part of it.
    kept_spacing = rendered.startswith(_CONTINUE_TAG, place)
    return rendered[:place] if kept_spacing else rendered[:place].rstrip()


# --- What a template sees ---------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """The value rebuilt from JSON types, so that a template reaches no method of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] if isinstance(value, list) else tuple(map(_plain, value))
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    # Templates read a model's reasoning under different names.
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
