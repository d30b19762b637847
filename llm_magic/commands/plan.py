"""``%llm plan``: what a load would do, without loading."""

from __future__ import annotations

import argparse

from llm_magic.commands.source_options import add_source_options, read_source_options
from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.plan import plan_report
from llm_magic.views.report import Report


def _run(session: Session, found: argparse.Namespace) -> Report:
    spec, options = read_source_options(found)
    return plan_report(session.run("Planning", lambda progress: session.plan(spec, options, progress)))


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
