"""Named conversations, and the folder where a person may save them."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llm_magic.errors import SessionError
from llm_magic.events import Message
from llm_magic.folders import data_folder, make_private
from llm_magic.harmless.terminal import sanitize

_NAME = re.compile(r"[\w][\w .-]{0,63}")


@dataclass
class Chat:
    """One conversation: the system prompt it began with, and its turns."""

    name: str
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """Number of answers in it."""
        return sum(message.role == "assistant" for message in self.messages)


class Chats:
    """The conversations of a session, by name."""

    def __init__(self) -> None:
        self.current = Chat("default")
        self._chats: dict[str, Chat] = {"default": self.current}

    def names(self) -> list[str]:
        """Names of the conversations in memory."""
        return list(self._chats)

    def in_memory(self, name: str) -> Chat | None:
        """The conversation with this name, wherever else one is saved; ``None`` when there is none."""
        return self._chats.get(name)

    def find(self, name: str) -> Chat | None:
        """The conversation with this name, in memory or saved; ``None`` when there is none.

        An empty one in memory hides no saved one: every session begins with an empty ``default``.

        Raises
        ------
        SessionError
            When it is saved in a file that is damaged.
        """
        chat = self.in_memory(name)
        if (chat is None or not chat.messages) and name in saved_chats():
            return read_chat(name)
        return chat

    def holds(self, chat: Chat) -> bool:
        """Whether this very conversation is in memory: neither deleted nor begun anew."""
        return self.in_memory(chat.name) is chat

    def keep(self, chat: Chat, make_current: bool = True) -> None:
        """Take a conversation in, in place of one of the same name."""
        if make_current or self.current.name == chat.name:
            self.current = chat
        self._chats[chat.name] = chat

    @contextmanager
    def answering(self, chat: Chat, make_current: bool) -> Iterator[None]:
        """Around an answer: its conversation is there from the beginning, and commands may take it away meanwhile.

        A new one in which nothing was said in the end is forgotten.
        """
        before, is_new = self.current, not self.holds(chat)
        if is_new:
            self.keep(chat, make_current)
        try:
            yield
        finally:
            if is_new and not chat.messages and self.holds(chat):
                del self._chats[chat.name]
                self._leave(chat.name, before.name)

    def reset(self) -> Chat:
        """Begin the current conversation anew; returns what is forgotten, for an answer under way to end in."""
        forgotten = self.current
        self.keep(Chat(forgotten.name))
        return forgotten

    def new(self, name: str = "") -> Chat:
        """Start an empty conversation and make it the current one.

        Raises
        ------
        SessionError
            When a conversation of this name exists already.
        """
        self.keep(self.begin(name))
        return self.current

    def begin(self, name: str = "") -> Chat:
        """An empty conversation under a name that none has yet; nothing is kept of it.

        Raises
        ------
        SessionError
            When a conversation of this name exists already.
        """
        if self.find(name) is not None:
            quoted = shlex.quote(name)
            raise SessionError(
                f"There is a chat {name!r} already.", f"%llm chat use {quoted} · %llm chat delete {quoted}"
            )
        return Chat(check_chat_name(name or self.free_name()))

    def use(self, name: str) -> Chat:
        """Make a conversation the current one.

        Raises
        ------
        SessionError
            When there is no such conversation.
        """
        chat = self.find(name)
        if chat is None:
            raise _unknown(check_chat_name(name))
        self.keep(chat)
        return chat

    def delete(self, name: str) -> None:
        """Forget a conversation, in memory and on disk.

        Raises
        ------
        SessionError
            When there is no such conversation.
        """
        if name not in self._chats and name not in saved_chats():
            raise _unknown(name)
        self._chats.pop(name, None)
        _file(name).unlink(missing_ok=True)
        self._leave(name)

    def free_name(self) -> str:
        """A name that no conversation has yet."""
        taken = {*self._chats, *saved_chats()}
        return next(f"chat-{n}" for n in range(1, len(taken) + 2) if f"chat-{n}" not in taken)

    def _leave(self, name: str, before: str = "default") -> None:
        """Go from a conversation that is gone to the one of before."""
        if self.current.name == name:
            self.current = self.in_memory(before) or self._chats.setdefault("default", Chat("default"))


def save_chat(chat: Chat, name: str = "") -> str:
    """Write a conversation to its file, readable by its owner alone; returns the name it was saved under."""
    name = name or chat.name
    file = _file(name)
    make_private(file.parent)
    turns = [{"role": m.role, "content": m.content} for m in chat.messages]
    text = json.dumps({"system": chat.system, "messages": turns}, ensure_ascii=False, indent=1)
    # A new file in place of the old one: whole, and closed to others whatever the old one was.
    descriptor, temporary = tempfile.mkstemp(prefix=".saving-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as open_file:
            open_file.write(text)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    return name


def read_chat(name: str) -> Chat:
    """A saved conversation.

    Raises
    ------
    SessionError
        When there is none, or its file is damaged.
    """
    try:
        data = json.loads(_file(name).read_text(encoding="utf-8"))
        messages = [Message(sanitize(str(m["role"])), sanitize(str(m["content"]))) for m in data["messages"]]
        return Chat(name, sanitize(str(data.get("system", ""))), messages)
    except FileNotFoundError:
        raise _unknown(name) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise SessionError(f"The saved chat {name!r} is damaged.", f"%llm chat delete {name}") from None


def is_another_saved(name: str, chat: Chat) -> bool:
    """Whether what is saved under a name is something else than the beginning of ``chat``."""
    try:
        return name in saved_chats() and not _goes_on(read_chat(name).messages, chat.messages)
    except SessionError:  # whatever is in a damaged file, this is not it
        return True


def _goes_on(begun: list[Message], messages: list[Message]) -> bool:
    """Whether all that was saved is in ``messages``; its last answer may have been continued."""
    if len(begun) > len(messages):
        return False
    here = [Message(m.role, sanitize(m.content)) for m in messages[: len(begun)]]  # as a file is read
    if begun and here[-1].content.startswith(begun[-1].content):
        here[-1] = Message(here[-1].role, begun[-1].content)
    return here == begun


def saved_chats() -> list[str]:
    """Names of the saved conversations."""
    files = (data_folder() / "chats").glob("*.json")
    return sorted(file.stem for file in files if _NAME.fullmatch(file.stem) and file.is_file())


def _unknown(name: str) -> SessionError:
    return SessionError(f"There is no chat {name!r}.", f"%llm chat list · %llm chat new {name}")


def check_chat_name(name: str) -> str:
    """The name itself, when it can be a file name.

    Raises
    ------
    SessionError
        When it cannot.
    """
    if not _NAME.fullmatch(name):
        raise SessionError(
            f"{name!r} cannot name a chat.", "Use letters, digits, spaces, dots, '-' and '_', at most 64."
        )
    return name


def _file(name: str) -> Path:
    check_chat_name(name)
    return data_folder() / "chats" / f"{name}.json"
