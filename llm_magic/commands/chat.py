"""``%llm chat``: named conversations."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable

from llm_magic.arguments import completes
from llm_magic.chat import Chat, is_another_saved, save_chat, saved_chats
from llm_magic.errors import OptionError, SessionError
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.text.safe_html import escape_text, markdown_to_html
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack, table_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", choices=tuple(_ACTIONS), help="what to do")
    completes(
        parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a conversation"), "chat"
    )


def _run(session: Session, found: argparse.Namespace) -> Report:
    return _ACTIONS[found.action](session, found.name)


def _list(session: Session, name: str) -> Report:
    if name:
        raise OptionError("%llm chat list takes no name.", f"%llm chat show {name}")
    saved = saved_chats()
    rows = [
        [
            ("* " if n == session.chats.current.name else "") + n,
            _turns(session, n),
            "yes" * (n in saved),
        ]
        for n in dict.fromkeys([*session.chats.names(), *saved])
    ]
    return table_report(("CHAT", "TURNS", "SAVED"), rows, "%llm chat new|use|show|save|delete NAME")


def _turns(session: Session, name: str) -> str:
    try:
        return str(_known(session, name).turns)
    except SessionError:  # one damaged file does not hide the others
        return "damaged"


def _new(session: Session, name: str) -> Report:
    return line_report(f"{session.chats.new(name).name}: a new conversation begins with the next cell.")


def _use(session: Session, name: str) -> Report:
    chat = session.chats.use(_required(name, "use"))
    note = ""
    if is_another_saved(name, chat):
        note = f"\nAnother one is saved under this name: %llm reset, then {_use_of(name)}, brings it back."
    return line_report(f"{chat.name} goes on ({count_turns(chat)} so far).{note}")


def _show(session: Session, name: str) -> Report:
    chat = _known(session, name)
    if not chat.messages:
        saved = f" {_use_of(chat.name)} brings the saved one back." * (chat.name in saved_chats())
        return line_report(f"{chat.name} is empty.{saved}")
    return stack(*(_turn(message.role, message.content) for message in chat.messages))


def _save(session: Session, name: str) -> Report:
    chat = _to_save(session, name)
    name = name or chat.name
    if is_another_saved(name, chat):
        first = "" if chat is session.chats.current else f"{_use_of(name)}, then "
        raise SessionError(
            f"Another chat is saved as {name!r}.",
            f"{first}%llm chat save {session.chats.free_name()} keeps both.",
        )
    save_chat(chat, name)
    saved = "saved" if name == chat.name else f"saved as {name}"
    return line_report(
        f"{chat.name} is {saved} ({count_turns(chat)}). {_use_of(name)} brings it back, in any notebook."
    )


def _to_save(session: Session, name: str) -> Chat:
    """The chat of this name where there is one to save, else the current one."""
    named, current = session.chats.in_memory(name), session.chats.current
    chat = named if named is not None and named.messages else current
    if not chat.messages:
        raise SessionError(f"There is nothing to save: {chat.name} is empty.", "Ask something first.")
    return chat


def _delete(session: Session, name: str) -> Report:
    session.chats.delete(_required(name, "delete"))
    session.forget_chat(name)
    return line_report(f"{name} is deleted.")


_ACTIONS: dict[str, Callable[[Session, str], Report]] = {
    "list": _list,
    "new": _new,
    "use": _use,
    "show": _show,
    "save": _save,
    "delete": _delete,
}


def count_turns(chat: Chat) -> str:
    """How long a conversation is, in words: ``"1 turn"``, ``"3 turns"``."""
    return f"{chat.turns} turn{'s' * (chat.turns != 1)}"


def _use_of(name: str) -> str:
    return f"%llm chat use {shlex.quote(name)}"


def _required(name: str, action: str) -> str:
    if not name:
        raise OptionError(f"%llm chat {action} needs a name.", "%llm chat list shows them.")
    return name


def _known(session: Session, name: str) -> Chat:
    chat = session.chats.find(name) if name else session.chats.current
    if chat is None:
        raise SessionError(f"There is no chat {name!r}.", "%llm chat list shows them.")
    return chat


def _turn(role: str, content: str) -> Report:
    head = f'<div style="color:var(--jp-ui-font-color2,#757575);font-size:85%">{escape_text(role)}</div>'
    return Report(f"{role}: {content}", head + markdown_to_html(content))


CHAT = Command(
    "chat",
    "named conversations: list, new, use, show, save, delete",
    _run,
    _add_arguments,
    ("%llm chat new recipes", "%llm chat show", "%llm chat save recipes"),
)
