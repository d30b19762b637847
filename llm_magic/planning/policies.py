"""The placement policies behind ``--device-map auto|balanced|balanced_low_0|sequential|cpu``.

All of them place *units* (blocks that share a tensor are one unit), in model order. A unit that
stays where it computes needs its weights, buffers and KV cache there; one that is offloaded needs
its weights in a store (RAM beside a GPU, disk), its cache on the first computing device, and a
slot there to arrive in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from llm_magic.hookspecs import Planner
from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.plan import MemoryBudget, Workload
from llm_magic.planning.costs import (
    STREAMING_SLOTS,
    activation_bytes,
    logits_bytes,
    placeable,
    streamed_bytes,
    unified_pool,
)

Homes = dict[int, str]  # index of a unit -> device


@dataclass(frozen=True)
class Unit:
    """Blocks that move together. ``kept`` is what stays on the computing device: buffers, KV cache."""

    blocks: tuple[Block, ...]
    weights: int
    kept: int
    slot: int
    is_layer: bool
    logits: int


@dataclass(frozen=True)
class Task:
    """A model to spread over ``compute`` devices, the rest over ``stores`` (fastest first)."""

    units: tuple[Unit, ...]
    activations: int
    compute: tuple[str, ...]
    stores: tuple[str, ...]
    limits: Mapping[str, int]

    @cached_property
    def most_offloaded(self) -> int:
        """A GPU computes only when the map names it, so one unit must stay on one."""
        return len(self.units) - (self.compute != ("cpu",)) if self.stores else 0

    def names(self, homes: Homes) -> dict[str, str]:
        """Block name -> device."""
        return {block.name: homes[i] for i, unit in enumerate(self.units) for block in unit.blocks}


Choice = Callable[[list[int], int], list[int]]  # some units, how many of them -> which
Eviction = Callable[[Task, int], frozenset[int]]  # how many units to offload -> which


def auto(layout: ModelLayout, budget: MemoryBudget, machine: Machine, workload: Workload) -> dict[str, str]:
    """Fill the GPUs, then RAM, then disk, with the offloaded layers evenly among the resident ones."""
    return _on_gpus_or_cpu(layout, budget, machine, workload, lambda task: _fill(task, spread_layers))


def sequential(
    layout: ModelLayout, budget: MemoryBudget, machine: Machine, workload: Workload
) -> dict[str, str]:
    """Fill device after device in model order."""
    return _on_gpus_or_cpu(layout, budget, machine, workload, lambda task: _fill(task, last_units, _last))


def balanced(
    layout: ModelLayout, budget: MemoryBudget, machine: Machine, workload: Workload
) -> dict[str, str]:
    """Spread evenly over the GPUs when all of it fits there; otherwise as ``auto``."""
    return _on_gpus_or_cpu(layout, budget, machine, workload, lambda task: _even(task, task.compute))


def balanced_low_0(
    layout: ModelLayout, budget: MemoryBudget, machine: Machine, workload: Workload
) -> dict[str, str]:
    """As ``balanced``, with only as much on the first GPU as the others cannot take."""
    return _on_gpus_or_cpu(layout, budget, machine, workload, _low_0)


def cpu(layout: ModelLayout, _budget: MemoryBudget, _machine: Machine, _workload: Workload) -> dict[str, str]:
    """Put everything in RAM; the CPU computes."""
    return {block.name: "cpu" for block in layout.blocks}


POLICIES = (
    Planner("auto", "fill the GPUs, then RAM, then disk; offloaded layers evenly among the others", auto),
    Planner("balanced", "spread evenly over the GPUs", balanced),
    Planner("balanced_low_0", "spread over the GPUs, little on the first one", balanced_low_0),
    Planner("sequential", "fill one device after the other, in model order", sequential),
    Planner("cpu", "everything in RAM, computed by the CPU", cpu),
)


def units_of(layout: ModelLayout, workload: Workload) -> tuple[Unit, ...]:
    """Blocks joined by their ties, in the order in which the first of each runs."""
    head = next((b for b in reversed(layout.blocks) if b.kind == "head"), layout.blocks[-1])
    return tuple(_unit(blocks, head, layout, workload) for blocks in tied_groups(layout))


def tied_groups(layout: ModelLayout) -> tuple[tuple[Block, ...], ...]:
    """Every block once, with those that share tensors together (ties are transitive)."""
    group_of = {block.name: block.name for block in layout.blocks}
    for block in layout.blocks:
        for other in block.tied_to:
            old, new = group_of[other], group_of[block.name]
            if old != new:
                group_of = {name: new if group == old else group for name, group in group_of.items()}
    groups: dict[str, list[Block]] = {}
    for block in layout.blocks:
        groups.setdefault(group_of[block.name], []).append(block)
    return tuple(tuple(blocks) for blocks in groups.values())


def spread_layers(task: Task, count: int) -> frozenset[int]:
    """``count`` units to offload: layers evenly spaced, and only then embedding, norm and head.

    With the offloaded layers apart, the next one can arrive while resident ones compute.
    """
    layers = [i for i, unit in enumerate(task.units) if unit.is_layer]
    if count <= len(layers):
        return frozenset(_evenly(layers, count))
    others = [i for i, unit in enumerate(task.units) if not unit.is_layer]
    largest_first = sorted(others, key=lambda i: -task.units[i].weights)
    return frozenset(layers + largest_first[: count - len(layers)])


def last_units(task: Task, count: int) -> frozenset[int]:
    """``count`` units to offload: the last ones of the model."""
    return frozenset(range(len(task.units) - count, len(task.units)))


def _unit(blocks: tuple[Block, ...], head: Block, layout: ModelLayout, workload: Workload) -> Unit:
    return Unit(
        blocks=blocks,
        weights=sum(block.bytes for block in blocks),
        kept=sum(block.buffer_bytes + workload.cache_bytes(block) for block in blocks),
        slot=STREAMING_SLOTS * max(streamed_bytes(block, layout) for block in blocks),
        is_layer=any(block.kind in ("encoder", "decoder") for block in blocks),
        logits=logits_bytes(layout, workload) if head in blocks else 0,
    )


def _on_gpus_or_cpu(
    layout: ModelLayout,
    budget: MemoryBudget,
    machine: Machine,
    workload: Workload,
    place: Callable[[Task], Homes | None],
) -> dict[str, str]:
    """Try the GPUs; when their memory cannot even stream the model, the CPU; else the best there is."""
    units, activations = units_of(layout, workload), activation_bytes(layout, workload)
    tasks = [Task(units, activations, *tiers, budget.limits) for tiers in _tiers(machine)]
    for task in tasks:
        homes = place(task)
        if homes is not None:
            return task.names(homes)
    return tasks[0].names(_most_offloaded(tasks[0]))


def _tiers(machine: Machine) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(computing devices, stores) to try in turn. Shared memory is no store: moving there frees nothing."""
    stores = tuple(device.id for device in placeable(machine) if device.kind != "gpu")
    on_cpu = (("cpu",), tuple(name for name in stores if name != "cpu"))
    if not machine.gpus:
        return [on_cpu]
    beside_gpu = on_cpu[1] if unified_pool(machine) else stores
    gpus = (tuple(gpu.id for gpu in machine.gpus), beside_gpu)
    return [gpus, on_cpu] if machine.has("cpu") else [gpus]


def _fill(task: Task, evict: Eviction, choose: Choice | None = None) -> Homes | None:
    """Offload as few units as the computing devices allow; ``None`` when that does not fit."""
    counts = range(task.most_offloaded + 1)
    limits = task.limits

    def fits(count: int) -> bool:
        return _pack(task, evict(task, count), limits) is not None

    count = bisect_left(counts, True, key=fits)  # more offloaded, more room
    offloaded = evict(task, min(count, task.most_offloaded))
    resident = _pack(task, offloaded, limits)
    stored = _store(task, offloaded, choose or _evenly)
    return {**resident, **stored} if resident is not None and stored is not None else None


def _even(task: Task, devices: tuple[str, ...]) -> Homes | None:
    """The lowest equal load of ``devices`` that holds everything, or ``auto`` when none does."""
    full = {name: task.limits[name] for name in devices}

    def at(load: int) -> Homes | None:
        return _pack(task, frozenset(), {name: min(load, limit) for name, limit in full.items()})

    loads = range(max(full.values(), default=0) + 1)
    if not loads or at(loads[-1]) is None:
        return _fill(task, spread_layers)
    return at(bisect_left(loads, True, key=lambda load: at(load) is not None))


def _low_0(task: Task) -> Homes | None:
    first, others = task.compute[0], task.compute[1:]
    limits = {name: task.limits[name] for name in others}
    if others and _pack(task, frozenset(), limits) is not None:
        return _even(task, others)

    def at(load: int) -> Homes | None:
        return _pack(task, frozenset(), limits | {first: load})

    loads = range(task.limits[first] + 1)
    if at(loads[-1]) is None:
        return _fill(task, spread_layers)
    return at(bisect_left(loads, True, key=lambda load: at(load) is not None))


def _pack(task: Task, offloaded: frozenset[int], limits: Mapping[str, int]) -> Homes | None:
    """Put the units that stay onto the computing devices in order; ``None`` when they do not fit.

    The first device that gets one also carries what belongs to the offloaded units.
    """
    carried = sum(task.units[i].kept for i in offloaded)
    carried += max((task.units[i].slot for i in offloaded), default=0)
    carried += sum(task.units[i].logits for i in offloaded)
    devices = iter([name for name in task.compute if name in limits])
    device = next(devices, None)
    room = limits[device] - task.activations - carried if device else 0
    homes: Homes = {}
    for i, unit in enumerate(task.units):
        if i in offloaded:
            continue
        need = unit.weights + unit.kept + unit.logits
        while device is not None and need > room:
            device = next(devices, None)
            room = limits[device] - task.activations - (0 if homes else carried) if device else 0
        if device is None:
            return None
        homes[i], room = device, room - need
    return homes if homes or (room >= 0 and task.compute == ("cpu",)) else None


def _store(task: Task, offloaded: frozenset[int], choose: Choice, *, overflow: bool = False) -> Homes | None:
    """Homes of the offloaded units: the fast store as full as it gets, the others where ``choose`` says."""
    left = sorted(offloaded)
    homes: Homes = {}
    for store in task.stores[:-1]:
        slower = _overflow(task, left, task.limits[store], choose)
        homes.update({i: store for i in left if i not in slower})
        left = [i for i in left if i in slower]
    if not left:
        return homes
    if not task.stores:
        return None
    last = task.stores[-1]
    fits = sum(task.units[i].weights for i in left) <= task.limits[last]
    homes.update(dict.fromkeys(left, last))
    return homes if fits or overflow else None


def _overflow(task: Task, units: list[int], room: int, choose: Choice) -> set[int]:
    """The fewest chosen ones of ``units`` whose absence makes the others fit ``room``."""
    total = sum(task.units[i].weights for i in units)

    def fits(count: int) -> bool:
        return total - sum(task.units[i].weights for i in choose(units, count)) <= room

    return set(choose(units, bisect_left(range(len(units)), True, key=fits)))


def _evenly(items: list[int], count: int) -> list[int]:
    """``count`` of the items at equal distances, half a distance from either end."""
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _last(items: list[int], count: int) -> list[int]:
    return items[len(items) - count :]


def _most_offloaded(task: Task) -> Homes:
    """Where to show what lacks when nothing fits: everything in the stores that can be."""
    offloaded = spread_layers(task, task.most_offloaded)
    stored = _store(task, offloaded, _evenly, overflow=True) or {}
    return {i: stored.get(i, task.compute[0]) for i in range(len(task.units))}
