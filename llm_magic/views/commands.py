"""A placement as ``%llm`` commands: what a person would type to get it."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llm_magic.folders import display_path
from llm_magic.plan import Plan, Workload
from llm_magic.units import exact_bytes
from llm_magic.views.words import grouped

_BY_HAND = "hand"


def command_of(plan: Plan, before: Plan | None = None, model: str = "") -> str:
    """Lines to paste into cells.

    Parameters
    ----------
    plan
        The placement that is wanted.
    before
        The one that is in force in a loaded model; ``None`` when nothing is loaded.
    model
        Name of the loaded model.

    Returns
    -------
    str
        ``%llm move …`` for each device that gets blocks, or ``%llm load SOURCE …``; empty where
        nothing changes.
    """
    if model:
        return "\n".join(_moves(plan, before or plan, model))
    words = ["%llm load", shlex.quote(_source(plan.source))]
    if plan.budget.explicit:
        limits = ",".join(
            f"{device}={exact_bytes(plan.budget.limits[device])}" for device in sorted(plan.budget.explicit)
        )
        words += ["--max-memory", limits]
    words += ["-c", str(plan.workload.context_length)]
    if plan.workload.prefill_tokens != Workload.prefill_tokens:
        words += ["-ub", str(plan.workload.prefill_tokens)]
    for name in ("dtype", "revision", "quantize", "quantize-head", "draft"):
        value = plan.options.get(name, "")
        value = _source(value) if value and name == "draft" else value
        words += [f"--{name}", shlex.quote(value)] if value and value != "auto" else []
    if plan.policy == _BY_HAND:
        words += ["--device-map", "map.json"]
    elif plan.policy != "auto":
        words += ["--device-map", shlex.quote(plan.policy)]
    return " ".join(words)


def _source(source: str) -> str:
    """A source as it is typed, without the folders of this computer; never one that means another model."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    shown = display_path(path)
    return shown if shown.startswith(("~", ".")) else f"./{shown}"


def _moves(plan: Plan, before: Plan, model: str) -> list[str]:
    routes: defaultdict[str, list[str]] = defaultdict(list)
    for old, new in zip(before.placements, plan.placements, strict=True):
        if old.home != new.home:
            routes[new.home].append(new.block.label)
    return [f"%llm move {typed(labels)} {home} -m {model}" for home, labels in routes.items()]


def typed(labels: Sequence[str]) -> str:
    """Blocks as they are typed in ``%llm move``: ``"layers.0-3,layers.7,head"``."""
    parts = []
    for group in grouped(labels):
        family, _, numbers = group.rpartition(".")
        if not family:
            parts.append(group)
            continue
        parts += [f"{family}.{run}".replace("–", "-") for run in numbers.split(", ")]
    return ",".join(parts)
