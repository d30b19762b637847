"""A loaded model's blocks in another place: what is asked for, what it may take, and what moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llm_magic.errors import PlanError
from llm_magic.events import Progress
from llm_magic.hookspecs import Engine
from llm_magic.machine import Machine
from llm_magic.plan import Placement, Plan
from llm_magic.planning.planner import refusal
from llm_magic.units import format_bytes, format_seconds
from llm_magic.views.words import TIERS, grouped, processor

Target = str | Mapping[str, str] | Plan
"""A placement as people give it: a policy or a ``.json`` file by name, a device map, or a plan."""

_WAYS = {
    "resident": "stay on {place.compute}",
    "streamed": "streamed to {place.compute} now",
    "split": "experts computed by the CPU now, the rest by {place.compute}",
    "cpu": "computed by the CPU now",
    "read": "read from the disk in every sweep now",
    "kept": "kept in RAM as well now",
    "looked-up": "looked up for {target} now",
    "idle": "not used for text",
}


@dataclass(frozen=True)
class Moved:
    """A loaded model's placement before and after, and what it took to get there.

    Attributes
    ----------
    name
        Name of the loaded model.
    before, after
        Its plans.
    bytes
        ``(source, target) -> bytes`` that were copied. A block whose bytes are in the model's
        files is dropped from RAM, and not written to the disk.
    seconds
        How long the engine took.
    """

    name: str
    before: Plan
    after: Plan
    bytes: Mapping[tuple[str, str], int]
    seconds: float

    @property
    def count(self) -> int:
        """Blocks whose home or way is another one."""
        return len(changed(self.before, self.after))

    def __repr__(self) -> str:
        if not self.count:
            return f"<Moved {self.name}: nothing changed>"
        lines = "; ".join(changes_in_words(self.before, self.after))
        return f"<Moved {self.name}: {lines}, {format_seconds(self.seconds)}>"


def carry_out(name: str, engine: Engine, plan: Plan, progress: Progress) -> Moved:
    """Have the engine of the model called ``name`` do what a plan says; what it raises comes out."""
    before, started = engine.plan, time.perf_counter()
    moved = engine.apply(plan, progress)
    return Moved(name, before, engine.plan, moved, time.perf_counter() - started)


def changed(before: Plan, after: Plan) -> list[tuple[Placement, Placement]]:
    """Placements before and after, of the blocks that are treated in another way."""
    pairs = zip(before.placements, after.placements, strict=True)
    return [(old, new) for old, new in pairs if _how(old) != _how(new)]


def changes_in_words(before: Plan, after: Plan) -> list[str]:
    """What another plan changes: ``"layers.20–31 (82.0 MiB) RAM → disk"``, a line for each route."""
    return [*_homes_in_words(before, after), *_ways_in_words(before, after)]


def as_if_unloaded(machine: Machine, held: Mapping[str, Mapping[str, int]]) -> Machine:
    """The machine as a new plan for a loaded model may use it: what that model holds counts as free.

    Parameters
    ----------
    machine
        As it is now.
    held
        Device -> purpose -> bytes, as the model's engine says. What lies on a disk stays there.
    """
    sizes = {device: sum(purposes.values()) for device, purposes in held.items()}
    shared = sum(sizes.get(device.id, 0) for device in machine.devices if device.unified)
    devices = []
    for device in machine.devices:
        given_back = shared if device.unified else sizes.get(device.id, 0)
        free = min(device.total_bytes, device.free_bytes + given_back)
        devices.append(device if device.kind == "disk" else replace(device, free_bytes=free))
    return replace(machine, devices=tuple(devices))


def limits_of(plan: Plan) -> dict[str, int]:
    """The limits that the user gave for a plan, by device."""
    return {device: plan.budget.limits[device] for device in sorted(plan.budget.explicit)}


def refusal_to_move(plan: Plan) -> PlanError:
    """The error for a placement that does not fit, with a remedy that a loaded model can take."""
    remedy = next((text for text in plan.remedies if "--max-memory" in text), "")
    return PlanError(
        refusal(plan).message,
        remedy or "Nothing moved. Move other blocks away first: %llm move BLOCKS disk makes room.",
    )


def _how(placement: Placement) -> tuple[str, str, bool, str, bool]:
    if placement.block.is_idle:
        return placement.home, "", False, "", False
    return placement.home, placement.compute, placement.kept, placement.prefill, placement.is_split


def _homes_in_words(before: Plan, after: Plan) -> Iterator[str]:
    routes: dict[tuple[str, str], list[Placement]] = {}
    for old, new in changed(before, after):
        if old.home != new.home:
            routes.setdefault((old.home, new.home), []).append(new)
    for (source, target), places in routes.items():
        yield f"{_sized(places)} {_tier(source)} → {_tier(target)}"


def _ways_in_words(before: Plan, after: Plan) -> Iterator[str]:
    ways: dict[str, list[Placement]] = {}
    for old, new in changed(before, after):
        if old.home == new.home:
            visits = f", prompts by {new.prefill}" if new.prefill else ""
            ways.setdefault(_way_in_words(old, new, after) + visits, []).append(new)
    for words, places in ways.items():
        yield f"{_sized(places)} {words}"


def _way_in_words(old: Placement, new: Placement, after: Plan) -> str:
    if new.way == "read" and after.mapped:
        return "used in the page cache now"
    if new.way == old.way and new.compute != old.compute and not new.is_looked_up:
        return f"computed by {processor(new.compute)} now"
    return _WAYS[new.way].format(place=new, target=processor(new.compute))


def _tier(device: str) -> str:
    return TIERS.get(device, device)


def _sized(places: list[Placement]) -> str:
    """``"layers.20–31 (82.0 MiB)"``."""
    labels = ", ".join(grouped(place.block.label for place in places))
    return f"{labels} ({format_bytes(sum(place.block.bytes for place in places))})"
