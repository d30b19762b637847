"""``%llm models`` (or ``list``): models on this computer."""

from __future__ import annotations

import argparse
from dataclasses import replace

from llm_magic.harmless.paths import without_paths
from llm_magic.hookspecs import Command
from llm_magic.library import local_models
from llm_magic.session import Session
from llm_magic.units import format_bytes
from llm_magic.views.report import Report
from llm_magic.views.table import table_report


def _run(session: Session, _: argparse.Namespace) -> Report:
    rows = [[m.source, m.kind, format_bytes(m.bytes), m.detail] for m in local_models()]
    rows += [[name, "alias", "", without_paths(source)] for name, source in session.aliases.items()]
    note = "%llm load with a name from the first column; %llm pull OWNER/NAME gets one from the hub."
    return table_report(("LOAD WITH", "KIND", "SIZE", ""), rows, note)


MODELS = Command("models", "list models on this computer", _run, examples=("%llm models",))
LIST = replace(MODELS, name="list", help="the same as models")
