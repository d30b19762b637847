"""``%llm move``: some blocks of a loaded model to another device."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.commands.placement import add_placement_options, place_anew
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.report import Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(
        add("blocks", metavar="BLOCKS", help="layers.20-31, embed, or a regular expression; with commas"),
        "block",
    )
    completes(add("device", metavar="DEVICE", help="cuda:0, cpu or disk"), "device")
    add_placement_options(parser)


def _run(session: Session, found: argparse.Namespace) -> Report:
    return place_anew(session, session.edited(found.blocks, found.device, found.model), found)


MOVE = Command(
    "move",
    "move blocks of a loaded model to another device",
    _run,
    _add_arguments,
    ("%llm move layers.20-31 disk", "%llm move embed,head cpu --dry-run"),
)
