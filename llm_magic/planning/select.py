"""Blocks as people name them, and the device map with some of them elsewhere: for moving blocks."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping

from llm_magic.errors import PlanError
from llm_magic.model import Block, ModelLayout
from llm_magic.plan import Plan
from llm_magic.planning.policies import tied_groups

_RANGE = re.compile(r"(.+\.)(\d+)\s*[-–]\s*(\d+)")
_LONGEST = 400  # characters of one expression, so that none can take long
_NESTED = re.compile(r"[*+}?]\s*\)?\s*[*+{]")  # repetitions of repetitions take exponential time


def select_blocks(layout: ModelLayout, text: str) -> tuple[Block, ...]:
    r"""The blocks that ``text`` means, in model order.

    Parameters
    ----------
    text
        Labels (``layers.3``, ``embed``, ``head``), ranges (``layers.20-31``), module names
        (``model.layers.3``, or ``model.layers`` for all in it), regular expressions that match a
        whole label or name (``layers\..*[02468]``); several of them separated by commas.

    Raises
    ------
    PlanError
        When a part means no block, with the closest name.
    """
    parts = [part.strip() for part in _split(text)]
    if not any(parts):
        raise PlanError("No blocks are named.", "Name some, such as layers.20-31; `%llm map` shows all.")
    chosen = {block.name for part in parts if part for block in _matching(layout, part)}
    return tuple(block for block in layout.blocks if block.name in chosen)


def edited(plan: Plan, changes: Mapping[str, str]) -> dict[str, str]:
    """The plan's device map with some blocks elsewhere; blocks that share a tensor go together.

    Parameters
    ----------
    changes
        Block name -> device.

    Raises
    ------
    PlanError
        When blocks that share a tensor are sent to different devices.
    """
    homes = plan.device_map | dict(changes)
    for group in tied_groups(plan.layout):
        wanted = dict.fromkeys(changes[block.name] for block in group if block.name in changes)
        if len(wanted) > 1:
            labels = " and ".join(block.label for block in group)
            raise PlanError(
                f"{labels} share a tensor and cannot go to {' and '.join(wanted)}.",
                f"Put them all on {next(iter(wanted))}.",
            )
        homes.update({block.name: home for block in group for home in wanted})
    return homes


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside of brackets: ``layers.(1{1,2}),head`` has two."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _matching(layout: ModelLayout, part: str) -> list[Block]:
    named = [b for b in layout.blocks if part in (b.label, b.name) or b.name.startswith(f"{part}.")]
    found = named or _in_range(layout, part) or _by_pattern(layout, part)
    if not found:
        raise _unknown(layout, part)
    return found


def _in_range(layout: ModelLayout, part: str) -> list[Block]:
    """``layers.20-31``: both ends must be blocks, or the range is a slip."""
    match = _RANGE.fullmatch(part)
    if match is None:
        return []
    prefix, (first, last) = match[1], sorted((int(match[2]), int(match[3])))
    known = {label: block for block in layout.blocks for label in (block.label, block.name)}
    ends = [f"{prefix}{first}", f"{prefix}{last}"]
    if missing := [end for end in ends if end not in known]:
        raise _unknown(layout, missing[-1])
    return [known[f"{prefix}{i}"] for i in range(first, last + 1) if f"{prefix}{i}" in known]


def _by_pattern(layout: ModelLayout, part: str) -> list[Block]:
    if len(part) > _LONGEST or _NESTED.search(part):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it matches or it does not
            pattern = re.compile(part)
    except (re.error, OverflowError, RecursionError):
        return []
    return [b for b in layout.blocks if pattern.fullmatch(b.label) or pattern.fullmatch(b.name)]


def _unknown(layout: ModelLayout, part: str) -> PlanError:
    known = [name for block in layout.blocks for name in (block.label, block.name)]
    family, _, index = part.rpartition(".")
    numbers = [
        int(n) for f, _, n in (name.rpartition(".") for name in known) if f == family and n.isdecimal()
    ]
    close = difflib.get_close_matches(part[:200], known, 1, 0.5)
    if numbers and index.isdecimal():
        hint = f"It has {family}.{min(numbers)}-{max(numbers)}."
    else:
        hint = f"Did you mean {close[0]}?" if close else "`%llm map` shows the names of the blocks."
    return PlanError(f"The model has no block {part[:200]!r}.", hint)
