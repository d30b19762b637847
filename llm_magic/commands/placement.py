"""What ``move``, ``apply`` and ``undo`` share: their options, and what they show."""

from __future__ import annotations

import argparse
from dataclasses import replace

from llm_magic.arguments import add_max_memory, completes
from llm_magic.placing import Moved, Target, changes_in_words
from llm_magic.plan import Plan
from llm_magic.session import Session
from llm_magic.units import format_rate, format_seconds
from llm_magic.views.map import map_report
from llm_magic.views.plan import plan_report, warnings_report
from llm_magic.views.report import LiveMap, Report
from llm_magic.views.table import line_report, stack


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    add_max_memory(parser, "other limits, such as cpu=30GiB", None)
    parser.add_argument("--dry-run", action="store_true", help="show what would move, and the plan")
    add_model_option(parser)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add the name of a loaded model."""
    completes(
        parser.add_argument("-m", "--model", default="", metavar="NAME", help="one of the loaded models"),
        "model",
    )


def place_anew(session: Session, target: Target, found: argparse.Namespace) -> Report:
    """Do what the options say with a target, or show what it would mean."""
    if not found.dry_run:
        return moved_report(session, session.apply(target, found.model, found.max_memory))
    plan = session.propose(target, found.model, found.max_memory)
    now = session.model(found.model).plan
    changes = changes_in_words(now, plan) or ["nothing"]
    heading = "\n".join(["This would move:", *(f"  {line}" for line in changes), _forecasts(now, plan)])
    return stack(line_report(heading), plan_report(plan))


def moved_report(session: Session, moved: Moved) -> Report:
    """What moved and how long it took, the forecast before and after, and the new map."""
    if not moved.count:
        return line_report(f"Nothing changed: every block of {moved.name} is there already.")
    changes = changes_in_words(moved.before, moved.after)
    changes[-1] += f", {format_seconds(moved.seconds)}"
    news = tuple(text for text in moved.after.warnings if text not in moved.before.warnings)
    return stack(
        line_report("\n".join([*changes, _forecasts(moved.before, moved.after)])),
        warnings_report(replace(moved.after, warnings=news)),
        map_report(moved.after, session.model(moved.name).engine.memory(), LiveMap(moved.after, moved.name)),
    )


def _forecasts(before: Plan, after: Plan) -> str:
    rates = (
        ("decode", before.forecast.decode_tps, after.forecast.decode_tps),
        ("prefill", before.forecast.prefill_tps, after.forecast.prefill_tps),
    )
    words = [f"{name} {_rate(old).removesuffix(' tok/s')} → {_rate(new)}" for name, old, new in rates]
    return f"forecast: {' · '.join(words)}"


def _rate(tokens_per_s: float) -> str:
    return format_rate(tokens_per_s) if tokens_per_s else "unknown"
