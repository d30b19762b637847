"""``%llm doctor``: what is wrong with this installation, and how to mend it."""

from __future__ import annotations

import argparse

from llm_magic.doctor import diagnose
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import table_report

_MARKS = {"ok": "✓", "warning": "!", "problem": "✗"}


def _run(session: Session, _: argparse.Namespace) -> Report:
    findings = diagnose(f"{s.name}: {s.error}" for s in session.plugins.status if s.error)
    rows = [[_MARKS[f.level], f"{f.what} → {f.next_step}" if f.next_step else f.what] for f in findings]
    problems = sum(f.level == "problem" for f in findings)
    return table_report(("", "FOUND"), rows, f"{problems} problems" if problems else "No problem found.")


DOCTOR = Command("doctor", "check the installation and say how to mend it", _run, examples=("%llm doctor",))
