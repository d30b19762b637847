"""``%llm ps``: the loaded models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from llm_magic.harmless.terminal import sanitize
from llm_magic.hookspecs import Command
from llm_magic.session import LoadedModel, Session
from llm_magic.units import format_bytes, format_rate
from llm_magic.views.map import processor_words
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack, table_report
from llm_magic.views.words import moved_bytes, share_words, wrapped

_HEADERS = ("NAME", "MODEL", "SIZE", "PROCESSOR", "CONTEXT", "SPEED")


def _run(session: Session, _: argparse.Namespace) -> Report:
    if not session.models:
        return line_report("No model is loaded. %llm load starter")
    rows = [_row(model, model.name == session.current) for model in session.models.values()]
    note = "* answers %%llm cells; %llm use NAME changes it" if len(rows) > 1 else ""
    return stack(table_report(_HEADERS, rows, note), line_report("\n".join(_how_they_run(session))))


def _how_they_run(session: Session) -> Iterator[str]:
    """A line for each model: what moves for a token, how near the limit that comes, how decoding goes."""
    for model in session.models.values():
        moved = model.last.moved_bytes if model.last else moved_bytes(model.plan)
        words = [f"{format_bytes(moved)} moved per token"] if moved else []
        if model.last and model.last.limit_share:
            words.append(f"{share_words(model.last.limit_share)} of the limit")
        words += model.engine.status()
        if words:
            yield wrapped(sanitize(f"{model.name}: {' · '.join(words)}"))


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
