"""``%llm log``: past answers of this notebook."""

from __future__ import annotations

import argparse

from llm_magic.errors import OptionError
from llm_magic.hookspecs import Command
from llm_magic.result import Generation
from llm_magic.session import Session
from llm_magic.units import format_rate
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, table_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("number", nargs="?", type=int, metavar="N", help="show this answer whole")
    parser.add_argument("-n", "--last", type=int, default=20, metavar="COUNT", help="how many to list")


def _run(session: Session, found: argparse.Namespace) -> Report | Generation:
    if not session.log:
        return line_report("No answers yet.")
    number: int | None = found.number
    if number is not None:
        if not 1 <= number <= len(session.log):
            raise OptionError(
                f"There is no answer {number}.", f"Answers are numbered 1 to {len(session.log)}."
            )
        generation = session.log[number - 1]
        return generation.with_continuation(session.continued_by(generation))
    first = max(0, len(session.log) - max(1, found.last))
    rows = [_row(n, generation) for n, generation in enumerate(session.log[first:], first + 1)]
    return table_report(
        ("N", "MODEL", "TOKENS", "SPEED", "END", "PROMPT", "ANSWER"), rows, "%llm log N shows one whole"
    )


def _row(number: int, generation: Generation) -> list[str]:
    footprint = generation.footprint
    return [
        str(number),
        footprint.model,
        str(footprint.generated_tokens),
        format_rate(footprint.generation_tps) if footprint.generation_tps else "–",
        generation.finish_reason,
        _short(generation.turn.prompt),
        _short(generation.text),
    ]


def _short(text: str, width: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


LOG = Command("log", "list past answers, or show one", _run, _add_arguments, ("%llm log", "%llm log 3"))
