"""``%llm plan``: what a load would do, without loading."""

from __future__ import annotations

import argparse
from dataclasses import replace

from llm_magic.commands.source_options import add_source_options, read_source_options
from llm_magic.hookspecs import Command
from llm_magic.model import ModelSpec
from llm_magic.options import LoadOptions
from llm_magic.session import Session
from llm_magic.views.map import map_report
from llm_magic.views.plan import plan_report
from llm_magic.views.report import LiveMap, Report
from llm_magic.views.table import stack


def _run(session: Session, found: argparse.Namespace) -> Report:
    spec, options = read_source_options(found)
    return planned_report(session, spec, options)


def planned_report(session: Session, spec: ModelSpec, options: LoadOptions, name: str = "") -> Report:
    """Plan, and show the plan with its map, from which it may be loaded under a name.

    A terminal shows the plan alone.
    """
    plan = session.run("Planning", lambda progress: session.plan(spec, options, progress))
    picture = map_report(plan, live=LiveMap(plan, spec=spec, options=options, name=name))
    return stack(plan_report(plan), replace(picture, text=""))


PLAN = Command(
    "plan",
    "show where a model would go and how fast it would be, without loading it",
    _run,
    add_source_options,
    (
        "%llm plan starter --max-memory cpu=150MiB",
        "%llm plan Qwen/Qwen3-32B --machine examples/machines/rtx4090.json",
    ),
)
