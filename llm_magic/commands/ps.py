"""``%llm ps``: the loaded models."""

from __future__ import annotations

import argparse

from llm_magic.hookspecs import Command
from llm_magic.session import LoadedModel, Session
from llm_magic.units import format_bytes, format_rate
from llm_magic.views.map import processor_words
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, table_report

_HEADERS = ("NAME", "MODEL", "SIZE", "PROCESSOR", "CONTEXT", "SPEED")


def _run(session: Session, _: argparse.Namespace) -> Report:
    if not session.models:
        return line_report("No model is loaded. %llm load starter")
    rows = [_row(model, model.name == session.current) for model in session.models.values()]
    return table_report(
        _HEADERS, rows, "* answers %%llm cells; %llm use NAME changes it" if len(rows) > 1 else ""
    )


def _row(model: LoadedModel, is_current: bool) -> list[str]:
    held = sum(count for purposes in model.engine.memory().values() for count in purposes.values())
    return [
        ("* " if is_current else "") + model.name,
        model.plan.layout.name,
        format_bytes(held),
        processor_words(model.plan),
        str(model.plan.workload.context_length),
        format_rate(model.last.generation_tps) if model.last else "–",
    ]


PS = Command("ps", "list the loaded models and where they run", _run, examples=("%llm ps",))
