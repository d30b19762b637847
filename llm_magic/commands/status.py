"""``%llm`` alone: a card with the model, its placement, its speeds and what to do next."""

from __future__ import annotations

import argparse

from llm_magic.hookspecs import Command
from llm_magic.session import LoadedModel, Session
from llm_magic.units import format_bytes, format_count, format_rate
from llm_magic.views.map import placement_bar
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack, table_report
from llm_magic.views.words import moved_bytes, share_words


def _run(session: Session, _: argparse.Namespace) -> Report:
    if not session.models:
        return line_report(
            "No model is loaded.\n"
            "%llm load starter   a small model to begin with\n"
            "%llm models         models on this computer\n"
            "%llm help           every command"
        )
    model = session.model()
    text, html = placement_bar(model.plan)
    return stack(
        line_report(_headline(model)),
        Report(text, html),
        table_report(
            ("", ""),
            _facts(session, model),
            "%llm map · %llm move · %llm bench · %llm ps · %llm unload · %llm help",
        ),
    )


def _headline(model: LoadedModel) -> str:
    layout = model.plan.layout
    return f"{model.name}: {layout.name}, {format_count(layout.parameters)} parameters, {layout.dtype}"


def _facts(session: Session, model: LoadedModel) -> list[list[str]]:
    plan, last = model.plan, model.last
    cache = sum(purposes.get("kv_cache", 0) for purposes in model.engine.memory().values())
    planned = sum(use.kv_cache for use in plan.uses)
    forecast = format_rate(plan.forecast.decode_tps) if plan.forecast.decode_tps else "unknown"
    measured = f", measured {format_rate(last.generation_tps)}" if last else ""
    moved = moved_bytes(plan)
    limit = f", {share_words(last.limit_share)} of the limit" if last and last.limit_share else ""
    runs = " · ".join(model.engine.status())
    chat = session.chats.current
    return [
        ["context", f"{plan.workload.context_length} tokens"],
        ["KV cache", f"{format_bytes(cache)} in use of {format_bytes(planned)}"],
        ["speed", f"forecast {forecast}{measured}; bound by {plan.forecast.bound_by}"],
        *([["each token", f"{format_bytes(moved)} moved{limit}"]] if moved else []),
        *([["runs", runs]] if runs else []),
        ["chat", f"{chat.name}, {chat.turns} turn{'s' * (chat.turns != 1)}"],
        *(["note", warning] for warning in plan.warnings),
    ]


STATUS = Command(
    "status", "the model, its placement and speeds; the same as %llm alone", _run, examples=("%llm",)
)
