"""``%llm undo``: a loaded model back to the placement before."""

from __future__ import annotations

import argparse

from llm_magic.commands.placement import add_model_option, moved_report
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.report import Report


def _run(session: Session, found: argparse.Namespace) -> Report:
    return moved_report(session, session.undo(found.model))


UNDO = Command("undo", "take the last move or apply back", _run, add_model_option, ("%llm undo",))
