"""``%llm unload``: give a model's memory back, and say how much came."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.hookspecs import Command
from llm_magic.session import Session, Unloaded
from llm_magic.units import format_bytes
from llm_magic.views.report import Report
from llm_magic.views.table import line_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(
        parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a loaded model"), "model"
    )


def _run(session: Session, found: argparse.Namespace) -> Report:
    return line_report(_words(session.unload(found.name)))


def _words(unloaded: Unloaded) -> str:
    names = {"cpu": "RAM"}
    freed = ", ".join(
        f"{format_bytes(count)} of {names.get(device, device)}"
        for device, count in unloaded.freed.items()
        if count
    )
    text = f"{unloaded.name} is unloaded; {freed or 'no memory'} came back."
    if unloaded.held_by:
        held_by = ", ".join(unloaded.held_by)
        text += f"\nIts weights are still held by: {held_by}. Free them with: del {held_by}"
    return text


UNLOAD = Command("unload", "unload a model and give its memory back", _run, _add_arguments, ("%llm unload",))
