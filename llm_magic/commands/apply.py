"""``%llm apply``: another placement for a loaded model."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping

from llm_magic.arguments import completes
from llm_magic.commands.placement import add_placement_options, place_anew
from llm_magic.errors import OptionError
from llm_magic.hookspecs import Command
from llm_magic.placing import Target
from llm_magic.plan import Plan
from llm_magic.session import Session
from llm_magic.views.report import Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(
        parser.add_argument(
            "plan",
            metavar="PLAN",
            help="a policy, a .json device map, or a variable that holds a map or a plan",
        ),
        "planner",
    )
    add_placement_options(parser)


def _run(session: Session, found: argparse.Namespace) -> Report:
    session.model(found.model)  # without one, that is what to say
    return place_anew(session, _target(session, found.plan), found)


def _target(session: Session, text: str) -> Target:
    """A policy first, then a file, then a variable of the notebook."""
    if text in session.plugins.planners or text.lower().endswith(".json"):
        return text
    if text not in session.notebook.namespace:
        raise OptionError(
            f"There is no placement policy, .json file or variable {text!r}.", _hint(session, text)
        )
    value = session.notebook.namespace[text]
    if not isinstance(value, Mapping | Plan):
        raise OptionError(
            f"The variable {text} holds no placement, but a value of type {type(value).__name__}.",
            'Give it a map, such as {"": "cpu", "layers.3": "disk"}, or a plan.',
        )
    return value


def _hint(session: Session, text: str) -> str:
    if session.model().plan.machine.has(text):
        return f"%llm move BLOCKS {text} moves blocks there."
    close = difflib.get_close_matches(text, session.plugins.planners, n=1, cutoff=0.65)
    policies = ", ".join(sorted(session.plugins.planners))
    return f"Did you mean {close[0]}?" if close else f"Policies: {policies}."


APPLY = Command(
    "apply",
    "place a loaded model anew: only the blocks that change move",
    _run,
    _add_arguments,
    ("%llm apply balanced", "%llm apply map.json --dry-run", "%llm apply my_map"),
)
