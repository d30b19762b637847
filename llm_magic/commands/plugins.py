"""``%llm plugins``: what is installed, what it brings, and what is broken."""

from __future__ import annotations

import argparse

from llm_magic.hookspecs import Command
from llm_magic.plugins import PluginStatus
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import table_report


def _run(session: Session, _: argparse.Namespace) -> Report:
    return table_report(("PLUGIN", "PACKAGE", "BRINGS"), [_row(status) for status in session.plugins.status])


def _row(status: PluginStatus) -> list[str]:
    if status.error:
        return [status.name, status.package, f"BROKEN: {status.error}"]
    names = [item.split(" ", 1) for item in status.provides]
    kinds = dict.fromkeys(kind for kind, _ in names)
    brings = "; ".join(f"{kind}s: " + ", ".join(n for k, n in names if k == kind) for kind in kinds)
    return [status.name, status.package, brings or "observes only"]


PLUGINS = Command("plugins", "list plugins and what they bring", _run, examples=("%llm plugins",))
