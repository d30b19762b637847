"""``%llm set``: defaults of prompts and loads."""

from __future__ import annotations

import argparse

from llm_magic.arguments import completes
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.settings import change_setting, setting_names
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, table_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(parser.add_argument("key", nargs="?", default="", metavar="KEY", help="a setting"), "setting")
    parser.add_argument("value", nargs="*", metavar="VALUE", help="its new value; none clears it")


def _run(session: Session, found: argparse.Namespace) -> Report:
    settings = session.settings
    if not found.value:
        names = [name for name in setting_names() if found.key in ("", name)] or setting_names()
        rows = [[n, str(getattr(settings, n)), settings.traits()[n].help] for n in names]
        return table_report(("KEY", "VALUE", ""), rows, "%llm set KEY VALUE")
    value = change_setting(settings, found.key, " ".join(found.value))
    return line_report(f"{found.key} is {value!r} from now on.")


SET = Command(
    "set", "show or change defaults", _run, _add_arguments, ("%llm set", "%llm set temperature 0.2")
)
