"""``%llm set``: defaults of prompts and loads."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.settings import Settings, change_setting, check_name, setting_names
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, table_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(parser.add_argument("key", nargs="?", default="", metavar="KEY", help="a setting"), "setting")
    parser.add_argument("value", nargs="*", metavar="VALUE", help="its new value; none clears it")


def _run(session: Session, found: argparse.Namespace) -> Report:
    key, equals, begun = found.key.partition("=")  # KEY=VALUE, as %config has it
    if not found.value and not equals:
        return _shown(session.settings, [check_name(key)] if key else setting_names())
    text = " ".join([begun, *found.value] if begun else found.value)
    value = change_setting(session.settings, key, text)
    return line_report(f"{key} is {value!r} from now on.")


def _shown(settings: Settings, names: list[str]) -> Report:
    rows = [[name, str(getattr(settings, name)), settings.traits()[name].help] for name in names]
    return table_report(("KEY", "VALUE", ""), rows, "%llm set KEY VALUE")


SET = Command(
    "set", "show or change defaults", _run, _add_arguments, ("%llm set", "%llm set temperature 0.2")
)
