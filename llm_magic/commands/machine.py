"""``%llm machine``: devices, memory, and measured links."""

from __future__ import annotations

import argparse

from llm_magic.hookspecs import Command
from llm_magic.session import Session
from llm_magic.views.machine import machine_report
from llm_magic.views.report import LiveMachine, Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measure", action="store_true", help="measure the speeds again")


def _run(session: Session, found: argparse.Namespace) -> Report:
    title = "Measuring the machine" if found.measure else "Looking at the machine"
    machine = session.run(title, lambda _: session.machine(found.measure))
    if not session.models:
        return machine_report(machine, LiveMachine(machine))
    model = session.model()
    return machine_report(machine, LiveMachine(machine, model.plan, model.name))


MACHINE = Command(
    "machine",
    "show devices, memory and how fast bytes move",
    _run,
    _add_arguments,
    ("%llm machine", "%llm machine --measure"),
)
