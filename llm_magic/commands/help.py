"""``%llm help``: every command, or one."""

from __future__ import annotations

import argparse

from llm_magic.arguments import Parser, completes
from llm_magic.cell import cell_parser
from llm_magic.hookspecs import Command
from llm_magic.plugins import pick
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack, table_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(
        parser.add_argument("command", nargs="?", default="", metavar="COMMAND", help="a command"), "command"
    )


def _run(session: Session, found: argparse.Namespace) -> Report:
    if found.command.lstrip("%") == "llm" and found.command.startswith("%%"):
        return cell_help()
    if found.command:
        return command_help(pick(session.plugins.commands, found.command, "command"))
    rows = [[f"%llm {c.name}", c.help] for c in session.plugins.commands.values()]
    note = "%llm help COMMAND · %llm help %%llm lists the options of prompt cells"
    return table_report(("COMMAND", ""), rows, note)


def command_parser(command: Command) -> Parser:
    """The parser of a command."""
    parser = Parser(f"%llm {command.name}", command.help)
    command.add_arguments(parser)
    return parser


def command_help(command: Command) -> Report:
    """Arguments and examples of a command."""
    examples = "\n".join(command.examples)
    return stack(line_report(command.help), _arguments(command_parser(command)), line_report(examples))


def cell_help() -> Report:
    """Options of a prompt cell, and examples."""
    examples = (
        "%%llm\n%%llm answer << -t 0.2 -n 200\n%%llm -f json --system 'Answer in JSON.'\n%%llm --chat recipes"
    )
    return stack(_arguments(cell_parser()), line_report(examples))


def _arguments(parser: Parser) -> Report:
    rows = [[_usage(action), (action.help or "").replace("%%", "%")] for action in parser.described()]
    return table_report((parser.prog, ""), rows) if rows else line_report(f"{parser.prog} takes no options.")


def _usage(action: argparse.Action) -> str:
    metavar = action.metavar
    values = " ".join(metavar) if isinstance(metavar, tuple) else metavar or ""
    if not values and action.choices:
        values = "|".join(map(str, action.choices))
    return f"{', '.join(action.option_strings)} {values}".strip()


HELP = Command(
    "help", "list the commands, or explain one", _run, _add_arguments, ("%llm help", "%llm help load")
)
