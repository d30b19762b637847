"""``%llm reset``: forget the current conversation."""

from __future__ import annotations

import argparse

from llm_magic.commands.chat import count_turns
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import line_report


def _run(session: Session, _: argparse.Namespace) -> Report:
    chat = session.chats.reset()
    session.forget_chat(chat.name)
    return line_report(f"{chat.name}: {count_turns(chat)} forgotten; the next cell begins anew.")


RESET = Command("reset", "forget the current conversation", _run, examples=("%llm reset",))
