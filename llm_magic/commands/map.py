"""``%llm map``: where every block of a loaded model lives."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.map import map_report
from llm_magic.views.report import LiveMap, Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(
        parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a loaded model"), "model"
    )


def _run(session: Session, found: argparse.Namespace) -> Report:
    model = session.model(found.name)
    return map_report(model.plan, model.engine.memory(), LiveMap(model.plan, model.name))


MAP = Command("map", "show where every block of the model lives", _run, _add_arguments, ("%llm map",))
