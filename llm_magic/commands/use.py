"""``%llm use``: which loaded model answers."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import line_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(parser.add_argument("name", metavar="NAME", help="a loaded model"), "model")


def _run(session: Session, found: argparse.Namespace) -> Report:
    return line_report(f"{session.use(found.name).name} answers %%llm cells now.")


USE = Command("use", "choose which loaded model answers", _run, _add_arguments, ("%llm use qwen",))
