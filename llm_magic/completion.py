"""Completion after ``%llm`` and ``%%llm``: commands, options, and the names that they take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

from llm_magic.arguments import Parser
from llm_magic.cell import cell_parser
from llm_magic.chat import saved_chats
from llm_magic.commands.help import command_parser
from llm_magic.session import Session
from llm_magic.settings import setting_names

Matcher = Callable[[CompletionContext], SimpleMatcherResult]


def make_matcher(session: Session) -> Matcher:
    """An IPython matcher (API version 2) for this session."""

    def llm_matcher(context: CompletionContext) -> SimpleMatcherResult:
        line = context.line_with_cursor[: context.cursor_position].lstrip()
        first, _, rest = line.partition(" ")
        if first not in ("%llm", "%%llm") or not line[len(first) :]:
            return {"completions": [], "suppress": False}
        found = sorted(set(complete(session, rest, is_cell=first == "%%llm")))
        matched = context.token.rsplit("=", 1)[-1] if "=" in context.token else context.token
        completions = [SimpleCompletion(text=text, type="llm") for text in found]
        return {
            "completions": completions,
            "matched_fragment": _typed(rest) or matched,
            "suppress": bool(completions),
        }

    mark: Callable[[Matcher], Matcher] = context_matcher(identifier="llm_magic")
    return mark(llm_matcher)


def complete(session: Session, typed: str, is_cell: bool) -> list[str]:
    """What may stand where the cursor is.

    Parameters
    ----------
    session
        Whose commands, models and chats are offered.
    typed
        The line up to the cursor, after the magic's name.
    is_cell
        Whether it is the line of a ``%%llm`` cell.
    """
    words = typed.split()
    last = _typed(typed)
    before = words[:-1] if last else words
    if is_cell:
        return _starting(last, _after(session, cell_parser(), before, last))
    if not before:
        return _starting(last, session.plugins.commands)
    command = session.plugins.commands.get(before[0])
    if command is None:
        return []
    return _starting(last, _after(session, command_parser(command), before[1:], last))


def _after(session: Session, parser: Parser, before: list[str], last: str) -> Iterable[str]:
    pending = parser.action_of(before[-1]) if before else None
    if pending is not None and pending.nargs != 0:
        return _values(session, pending, last)
    if last.startswith("-"):
        return parser.options()
    positionals = parser.positionals()
    given = sum(1 for word in _without_options(parser, before))
    if given < len(positionals):
        return [*_values(session, positionals[given], last), *([] if last else parser.options())]
    return [] if last else parser.options()


def _without_options(parser: Parser, words: list[str]) -> Iterable[str]:
    skip = False
    for word in words:
        action = parser.action_of(word)
        if not skip and action is None:
            yield word
        skip = action is not None and action.nargs != 0


def _values(session: Session, action: argparse.Action, last: str) -> list[str]:
    if action.choices:
        return [str(choice) for choice in action.choices]
    kind = getattr(action, "completes", "")
    if kind == "source":
        return ["starter", *session.aliases, *_paths(last)]
    if kind == "planner":
        return [*session.plugins.planners, *_paths(last, ".json")]
    if kind == "file":
        return _paths(last)
    if kind == "device":
        return _limits(session, last) if action.option_strings else _devices(session)
    tables: dict[str, Callable[[], Iterable[str]]] = {
        "model": lambda: session.models,
        "chat": lambda: {*session.chats.names(), *saved_chats()},
        "command": lambda: [*session.plugins.commands, "%%llm"],
        "format": lambda: session.plugins.formats,
        "backend": lambda: session.plugins.backends,
        "setting": setting_names,
        "block": lambda: _blocks(session, last),
    }
    return list(tables.get(kind, list)())


def _blocks(session: Session, last: str) -> list[str]:
    """Labels of the current model, also after others and a comma."""
    if not session.models:
        return []
    prefix = last.rpartition(",")[0] + "," if "," in last else ""
    return [f"{prefix}{block.label}" for block in session.model().plan.layout.blocks]


def _limits(session: Session, last: str) -> list[str]:
    """``cpu=``, also after other limits and a comma."""
    prefix = last.rpartition(",")[0] + "," if "," in last else ""
    return [f"{prefix}{device}=" for device in _devices(session)]


def _devices(session: Session) -> list[str]:
    if session.models:
        return [use.device for use in session.model().plan.uses]
    return ["0", "cpu", "disk"]


def _paths(last: str, suffix: str = "") -> list[str]:
    folder = Path(last).parent if not last.endswith("/") else Path(last)
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []
    wanted = (".gguf", ".json") if not suffix else (suffix,)
    return [
        entry.as_posix() + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.is_dir() or entry.suffix in wanted
    ]


def _starting(last: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(last)]


def _typed(text: str) -> str:
    return "" if not text or text[-1].isspace() else text.rsplit(maxsplit=1)[-1]
