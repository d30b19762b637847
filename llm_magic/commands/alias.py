"""``%llm alias``: a short name for a source."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.errors import OptionError
from llm_magic.harmless.paths import without_paths
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, table_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="the short name")
    completes(
        parser.add_argument("source", nargs="?", default="", metavar="SOURCE", help="what it stands for"),
        "source",
    )


def _run(session: Session, found: argparse.Namespace) -> Report:
    if not found.name:
        return table_report(
            ("ALIAS", "SOURCE"),
            [[name, without_paths(source)] for name, source in session.aliases.items()],
            "%llm alias NAME SOURCE",
        )
    if not found.source:
        raise OptionError(f"What should {found.name} stand for?", f"%llm alias {found.name} Qwen/Qwen3-8B")
    session.aliases[found.name] = found.source
    return line_report(f"%llm load {found.name} loads {without_paths(found.source)} from now on.")


ALIAS = Command(
    "alias", "give a source a short name", _run, _add_arguments, ("%llm alias big Qwen/Qwen3-32B",)
)
