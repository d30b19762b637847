"""The placement policies behind ``--device-map auto|balanced|balanced_low_0|sequential|cpu``.

All of them place *units* (blocks that share a tensor are one unit), in model order. A policy makes
candidates, homes with more and more units offloaded, and the first one that fits is taken: what a
candidate takes is counted by `costs.py`, as for every other plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from llm_magic.hookspecs import Planner
from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.plan import MemoryBudget, Workload
from llm_magic.planning.costs import (
    CACHES_GOING_BACK,
    activation_bytes,
    draft_bytes,
    logits_bytes,
    new_cache_bytes,
    placeable,
    slots_for,
    streamed_bytes,
    unified_pool,
)
from llm_magic.planning.forecast import make_forecast
from llm_magic.planning.setting import Setting
from llm_magic.planning.sweep import link_bytes_per_s
from llm_magic.planning.ways import (
    ANSWER_TOKENS,
    Placements,
    Uses,
    computing_places,
    evenly,
    place_blocks,
    shared_out,
)

Homes = dict[int, str]  # index of a unit -> device


@dataclass(frozen=True)
class Unit:
    """Blocks that move together. ``kept`` is what stays on the computing device: buffers, KV cache.

    ``new_cache`` is the part of the latter that one prefill pass adds.
    """

    blocks: tuple[Block, ...]
    weights: int
    kept: int
    new_cache: int
    largest: int  # bytes of a slot for it
    is_layer: bool
    looks_up: bool
    has_experts: bool
    logits: int

    @property
    def whole(self) -> int:
        """Bytes where it lives and computes."""
        return self.weights + self.kept + self.logits


@dataclass(frozen=True)
class Task:
    """A model to spread over ``compute`` devices, the rest over ``stores`` (fastest first).

    ``beside_cpu`` lets the CPU compute what they have no room for; with ``prefills`` they must take part
    in every layer all the same, if only in long sweeps. With ``splits`` each layer of a mixture that is in the
    stores must have everything but its experts where they compute. ``least_offloaded`` units are in the stores.
    ``keeps_tables`` treats tables as what has to be where it computes.
    """

    setting: Setting
    units: tuple[Unit, ...]
    activations: int
    compute: tuple[str, ...]
    stores: tuple[str, ...]
    beside_cpu: bool = False
    prefills: bool = False
    splits: bool = False
    least_offloaded: int = 0
    keeps_tables: bool = False
    _outcomes: dict[tuple[str, ...], tuple[Placements, Uses]] = field(default_factory=dict, compare=False)

    @property
    def limits(self) -> Mapping[str, int]:
        """Device -> bytes."""
        return self.setting.budget.limits

    @cached_property
    def most_offloaded(self) -> int:
        """A GPU computes only when the map names it, so one unit must stay on one."""
        return len(self.units) - (self.compute != ("cpu",)) if self.stores else 0

    @cached_property
    def tables(self) -> tuple[int, ...]:
        """Units of which a pass needs a few rows, the largest first: a store serves them as well as a GPU."""
        found = [i for i, unit in enumerate(self.units) if unit.looks_up and not self.keeps_tables]
        return tuple(sorted(found, key=lambda i: -self.units[i].weights))

    def slots(self, units: Sequence[Unit], device: str) -> int:
        """Bytes of the room in which these units arrive on a device."""
        sizes = [unit.largest for unit in units if not unit.looks_up]
        return min(slots_for(device), len(sizes)) * max(sizes, default=0)

    def names(self, homes: Homes) -> dict[str, str]:
        """Block name -> device."""
        return {block.name: homes[i] for i, unit in enumerate(self.units) for block in unit.blocks}

    def kept(self, units: Sequence[Unit]) -> int:
        """Bytes that offloaded units need on a computing device, beside slots.

        Those of a layer may be in RAM, and come along for a prompt, a layer's at a time; what is new goes back.
        """
        there = [unit for unit in units if not (self.beside_cpu and unit.is_layer)]
        visits = self.beside_cpu and self.prefills
        visitors = [unit for unit in units if visits and unit.is_layer]
        visiting = max((unit.kept for unit in visitors), default=0)
        visiting += CACHES_GOING_BACK * max((unit.new_cache for unit in visitors), default=0)
        return visiting + sum(unit.kept + unit.logits for unit in there)

    @cached_property
    def is_too_large(self) -> bool:
        """Whether all devices together lack room for it."""
        room = sum(self.limits.get(device, 0) for device in (*self.compute, *self.stores))
        return sum(unit.whole for unit in self.units) > room

    def outcome(self, homes: Homes) -> tuple[Placements, Uses]:
        """What happens to every block, and what that takes on every device."""
        key = tuple(homes.get(i, "") for i in range(len(self.units)))
        if key not in self._outcomes:
            place = place_blocks if self.beside_cpu else computing_places
            placed = place(self.setting, self.names(homes))
            self._outcomes[key] = placed, self.setting.uses(placed)
        return self._outcomes[key]

    def has_room(self, homes: Homes) -> bool:
        """Whether the computing devices can work so."""
        is_enough = (not self.prefills or all(self._has_part(homes))) and (
            not self.splits or self._is_split(homes)
        )
        return is_enough and not self.shortage(homes, self.compute)

    def has_layers(self, homes: Homes) -> bool:
        """Whether the computing devices have a part in some layer."""
        return any(self._has_part(homes))

    def _has_part(self, homes: Homes) -> list[bool]:
        """Of each layer, whether a computing device computes it, if only in long sweeps."""
        placed, _ = self.outcome(homes)
        layers = [place for place in placed if place.block.kind in ("encoder", "decoder")]
        return [bool({place.compute, place.prefill} & set(self.compute)) for place in layers or placed]

    def _is_split(self, homes: Homes) -> bool:
        """Whether every layer with experts in RAM is split, and there are some."""
        placed, _ = self.outcome(homes)
        in_ram = [p for p in placed if p.block.experts and (p.home == "cpu" or p.kept)]
        return bool(in_ram) and all(place.is_split for place in in_ram)

    def shortage(self, homes: Homes, devices: tuple[str, ...]) -> int:
        """Bytes that lack on some of the devices."""
        _, uses = self.outcome(homes)
        return sum(max(0, -use.spare) for use in uses if use.device in devices)


_STEPS = (
    4  # between the fewest units in the stores and the most: which number is best is looked for in such steps
)

Choice = Callable[[list[int], int], list[int]]  # some units, how many of them -> which
Residents = Callable[[Task, int], Homes | None]  # how many units to offload -> homes of the others


def auto(layout: ModelLayout, budget: MemoryBudget, machine: Machine, workload: Workload) -> dict[str, str]:
    """Fill the GPUs, then RAM, then disk, with the offloaded layers evenly among the resident ones."""
    return _on_gpus_or_cpu(layout, budget, machine, workload, lambda task: _fill(task, spread))


def sequential(
    layout: ModelLayout, budget: MemoryBudget, machine: Machine, workload: Workload
) -> dict[str, str]:
    """Fill device after device in model order."""
    return _on_gpus_or_cpu(layout, budget, machine, workload, lambda task: _fill(task, tail, _last))


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


def spread(task: Task, count: int) -> Homes | None:
    """Offload ``count`` layers, evenly among those that stay: the next one arrives while they compute.

    Tables go before layers. Several GPUs get a range of the model each, with a share of the offloaded layers
    as its bus is fast.
    """
    if len(task.compute) > 1 and count:
        tables = task.tables[:count]
        return _ranges(task, task.compute, frozenset(tables), count - len(tables))
    if len(task.compute) > 1:
        return _pack(task, frozenset(), task.limits)
    offloaded = _spread_units(task, count)
    return {i: task.compute[0] for i in range(len(task.units)) if i not in offloaded}


def tail(task: Task, count: int) -> Homes | None:
    """Offload the last ``count`` units of the model."""
    offloaded = frozenset(range(len(task.units) - count, len(task.units)))
    return _pack(task, offloaded, task.limits)


def _spread_units(task: Task, count: int) -> frozenset[int]:
    """``count`` units: tables, then layers evenly spaced, and only then norm, head and what is tied to it."""
    tables, layers = task.tables[:count], [i for i, unit in enumerate(task.units) if unit.is_layer]
    left = count - len(tables)
    mixtures = [i for i in layers if task.splits and task.units[i].has_experts]
    if left <= len(mixtures):  # of which most is where the CPU computes it
        layers = mixtures
    if left <= len(layers):
        return frozenset((*tables, *(evenly(layers, left) if left else ())))
    others = [i for i, unit in enumerate(task.units) if not unit.is_layer and i not in tables]
    largest_first = sorted(others, key=lambda i: -task.units[i].weights)
    return frozenset((*tables, *layers, *largest_first[: left - len(layers)]))


def _unit(blocks: tuple[Block, ...], head: Block, layout: ModelLayout, workload: Workload) -> Unit:
    return Unit(
        blocks=blocks,
        weights=sum(block.bytes for block in blocks),
        kept=sum(block.buffer_bytes + workload.cache_bytes(block) for block in blocks),
        new_cache=sum(new_cache_bytes(block, workload) for block in blocks),
        largest=max(streamed_bytes(block, layout) for block in blocks),
        is_layer=any(block.kind in ("encoder", "decoder") for block in blocks),
        looks_up=all(block.looks_up for block in blocks),
        has_experts=any(block.experts for block in blocks),
        logits=logits_bytes(layout, workload) if head in blocks else 0,
    )


def _on_gpus_or_cpu(
    layout: ModelLayout,
    budget: MemoryBudget,
    machine: Machine,
    workload: Workload,
    place: Callable[[Task], Homes | None],
) -> dict[str, str]:
    """Try the GPUs; when their memory cannot even stream the model, GPUs and CPU, or the CPU alone.

    When nothing fits, the answer shows what lacks. What no pass visits comes last.
    """
    setting = Setting(_without_idle(layout), machine, budget, workload)
    homes = _of_what_runs(setting, place)
    if len(machine.gpus) > 1 and any(block.looks_up for block in setting.layout.blocks):
        # A GPU that is too small for anything else may hold the table.
        others = _of_what_runs(setting, lambda task: place(replace(task, keeps_tables=True)))
        homes = min(homes, others, key=lambda homes: (_shortage(setting, homes), _answer_s(setting, homes)))
    return _with_idle(Setting(layout, machine, budget, workload), homes)


def _shortage(setting: Setting, homes: Mapping[str, str]) -> int:
    """Bytes that lack over all devices."""
    return sum(max(0, -use.spare) for use in setting.uses(place_blocks(setting, homes)))


def _of_what_runs(setting: Setting, place: Callable[[Task], Homes | None]) -> dict[str, str]:
    layout, machine, budget, workload = setting.layout, setting.machine, setting.budget, setting.workload
    units, activations = units_of(layout, workload), activation_bytes(layout, workload)
    tasks = [Task(setting, units, activations, *tiers) for tiers in _tiers(machine, budget)]
    streaming = [task for task in tasks if task.compute != ("cpu",)]
    both = [replace(task, beside_cpu=True, _outcomes={}) for task in streaming if not task.is_too_large]
    splitting = [replace(task, splits=True) for task in both if layout.details.get("routed_experts")]
    prefilling = [replace(task, prefills=True) for task in both]  # they share what comes of which homes
    streamed = _first(streaming, place)
    is_offloaded = streamed is None or any(streamed[block.name] in ("cpu", "disk") for block in layout.layers)
    split = _first(splitting, place) if is_offloaded else None
    if streamed is not None and split is None and not _would_room_help(layout, workload, streamed):
        return streamed
    # With keys and values in RAM more layers may stay on the GPUs.
    beside = _first(prefilling, place)
    if beside is not None:
        least = _offloaded(beside)
        most = _offloaded(streamed) if streamed else max(task.most_offloaded for task in prefilling)
        counts = {round(least + (most - least) * part / _STEPS) for part in range(1, _STEPS)}
        tasks_of = ([replace(task, least_offloaded=count) for task in prefilling] for count in sorted(counts))
        between = [_first(some, place) for some in tasks_of] if least < most else []
        found = [homes for homes in (streamed, split, beside, *between) if homes is not None]
        return min(found, key=lambda homes: _answer_s(setting, homes)) if len(found) > 1 else beside
    found = [homes for homes in (streamed, split) if homes is not None]
    return (
        min(found, key=lambda homes: _answer_s(setting, homes), default=None)
        or _first((*both, *tasks[len(streaming) :]), place)
        or tasks[0].names(_most_offloaded(tasks[0]))
    )


def _offloaded(homes: Mapping[str, str]) -> int:
    return sum(home in ("cpu", "disk") for home in homes.values())


def _would_room_help(layout: ModelLayout, workload: Workload, homes: Mapping[str, str]) -> bool:
    """Whether a layer fits where the keys and values of those in RAM would be."""
    kept = sum(workload.cache_bytes(block) for block in layout.layers if homes[block.name] == "cpu")
    return kept > min((block.bytes + workload.cache_bytes(block) for block in layout.layers), default=kept)


def _first(tasks: Sequence[Task], place: Callable[[Task], Homes | None]) -> dict[str, str] | None:
    """Block name -> device, by the first task that can be done."""
    for task in tasks:
        homes = place(task)
        if homes is not None and task.has_layers(homes):
            return task.names(homes)
    return None


def _answer_s(setting: Setting, homes: dict[str, str]) -> float:
    """Seconds of a token with its part of the prompt, once it is decided what computes where."""
    placed = place_blocks(setting, homes)
    forecast = make_forecast(setting, placed, setting.uses(placed))
    if not forecast.decode_tps or not forecast.prefill_tps:
        return math.inf
    prompt_s = setting.workload.prefill_tokens / forecast.prefill_tps
    return 1 / forecast.decode_tps + prompt_s / ANSWER_TOKENS


def _without_idle(layout: ModelLayout) -> ModelLayout:
    groups = [group for group in tied_groups(layout) if not all(block.is_idle for block in group)]
    used = {block.name for group in groups for block in group}
    return replace(layout, blocks=tuple(block for block in layout.blocks if block.name in used))


def _with_idle(setting: Setting, homes: dict[str, str]) -> dict[str, str]:
    """Blocks that no pass visits take no room from others: they are in RAM that is left, else on the disk."""
    idle = [block.name for block in setting.layout.blocks if block.name not in homes]
    stores = [device.id for device in placeable(setting.machine) if device.kind != "gpu"]
    if not idle or not stores:
        return homes | dict.fromkeys(idle, next(iter(homes.values()), "cpu"))
    in_first, in_last = (homes | dict.fromkeys(idle, stores[place]) for place in (0, -1))
    is_full = stores[-1] in homes.values() or bool(unified_pool(setting.machine))
    uses = setting.uses(place_blocks(setting, in_first))
    return in_last if is_full or any(use.spare < 0 for use in uses) else in_first


def _tiers(machine: Machine, budget: MemoryBudget) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(computing devices, stores) to try in turn. Shared memory is no store: moving there frees nothing."""
    stores = tuple(device.id for device in placeable(machine) if device.kind != "gpu")
    on_cpu = (("cpu",), tuple(name for name in stores if name != "cpu"))
    if not machine.gpus:
        return [on_cpu]
    beside_gpu = on_cpu[1] if unified_pool(machine) else stores
    gpus = tuple(gpu.id for gpu in machine.gpus)
    roomiest = max(gpus, key=lambda name: budget.limits.get(name, 0))
    tiers = [(gpus, beside_gpu), *([((roomiest,), beside_gpu)] if len(gpus) > 1 else [])]
    return [*tiers, on_cpu] if machine.has("cpu") else tiers


def _fill(task: Task, residents: Residents, choose: Choice = evenly) -> Homes | None:
    """Offload as few units as the computing devices allow; ``None`` when that does not fit."""
    counts = range(min(task.least_offloaded, task.most_offloaded), task.most_offloaded + 1)

    def homes_of(count: int, task: Task = task) -> Homes | None:
        """Homes that fit."""
        there = residents(task, count)
        if there is None or (len(there) < len(task.units) and not task.stores):
            return None
        homes = _stored(task, there, choose)
        return homes if task.has_room(homes) else None

    count = counts[0]
    if homes_of(count) is None:  # mostly: more offloaded, more room
        count += bisect_left(counts, True, key=lambda count: homes_of(count) is not None)
    count = min(count, task.most_offloaded)
    tables = len(task.tables)
    # A table goes only where its room lets another unit stay, or keys and values that the CPU had else.
    may_stay = 0 < tables < count and not task.beside_cpu
    kept = homes_of(count - tables, replace(task, keeps_tables=True)) if may_stay else None
    found = (homes for homes in (kept, homes_of(count)) if homes is not None)
    return next((homes for homes in found if not task.shortage(homes, task.stores)), None)


def _even(task: Task, devices: tuple[str, ...]) -> Homes | None:
    """The lowest equal load of ``devices`` that holds everything, or ``auto`` when none does."""
    full = {name: task.limits[name] for name in devices}

    def at(load: int) -> Homes | None:
        return _pack(task, frozenset(), {name: min(load, limit) for name, limit in full.items()})

    loads = range(max(full.values(), default=0) + 1)
    if not loads or at(loads[-1]) is None:
        return _fill(task, spread)
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
        return _fill(task, spread)
    return at(bisect_left(loads, True, key=lambda load: at(load) is not None))


def _pack(task: Task, offloaded: frozenset[int], limits: Mapping[str, int]) -> Homes | None:
    """Put the units that stay onto the computing devices in order; ``None`` when they do not fit."""
    names = [name for name in task.compute if name in limits]
    carried = _carried(task, offloaded, names)
    devices = iter(names)
    device = next(devices, None)
    room = limits[device] - carried[device] if device else 0
    homes: Homes = {}
    for i, unit in enumerate(task.units):
        if i in offloaded:
            continue
        while device is not None and unit.whole > room:
            device = next(devices, None)
            room = limits[device] - carried[device] if device else 0
        if device is None:
            return None
        homes[i], room = device, room - unit.whole
    return homes if homes or (room >= 0 and task.compute == ("cpu",)) else None


def _carried(task: Task, offloaded: frozenset[int], devices: list[str]) -> Counter[str]:
    """Bytes on each device beside its own units: for work, for the draft, for what is offloaded."""
    carried = Counter(dict.fromkeys(devices, task.activations))
    draft = task.setting.layout.draft
    if draft and devices:
        carried[devices[0]] += draft_bytes(draft, task.setting.workload)
    units = [task.units[i] for i in sorted(offloaded)]
    speeds = [link_bytes_per_s(task.setting.machine, name) for name in devices if name != "cpu"] or [1.0]
    shared: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit, share in zip(units, shared_out([unit.weights for unit in units], speeds), strict=True):
        shared[devices[share]].append(unit)
    for name, some in shared.items():
        carried[name] += task.kept(some) + task.slots(some, name)
    return carried


def _ranges(task: Task, devices: tuple[str, ...], tables: frozenset[int], count: int) -> Homes | None:
    """A contiguous range of the model for each GPU, with ``count`` offloaded layers shared among them.

    ``tables`` are offloaded as well. Every range is as long as its GPU has room for; ``None`` when they do
    not reach the model's end.
    """
    speeds = [link_bytes_per_s(task.setting.machine, name) for name in devices]
    shares = Counter(shared_out([1] * count, speeds))
    homes: Homes = {}
    start = 0
    for number, device in enumerate(devices):
        end = _longest_range(task, device, start, tables, shares[number], is_first=not number)
        offloaded = _in_range(task, start, end, tables, shares[number], is_first=not number)
        has_none = offloaded.issuperset(range(start, end))
        if has_none and end < len(task.units) and len(devices) > 1:  # it has no room: without it
            return _ranges(task, tuple(name for name in devices if name != device), tables, count)
        homes.update({i: device for i in range(start, end) if i not in offloaded})
        start = end
    return homes if start == len(task.units) and homes else None


def _longest_range(
    task: Task, device: str, start: int, tables: frozenset[int], count: int, *, is_first: bool
) -> int:
    """Where a range must end so that the GPU holds it with ``count`` of its layers offloaded."""

    def is_too_long(end: int) -> bool:
        offloaded = _in_range(task, start, end, tables, count, is_first=is_first)
        units = [task.units[i] for i in offloaded]
        held = task.slots(units, device)
        draft = task.setting.layout.draft if is_first else None
        held += draft_bytes(draft, task.setting.workload) if draft else 0
        held += task.kept(units)
        held += sum(task.units[i].whole for i in range(start, end) if i not in offloaded)
        return held + task.activations > task.limits[device]

    ends = range(start + 1, len(task.units) + 1)
    return start + bisect_left(ends, True, key=is_too_long)


def _in_range(
    task: Task, start: int, end: int, tables: frozenset[int], count: int, *, is_first: bool
) -> frozenset[int]:
    """Tables, and ``count`` layers of a range, evenly; the one that a later range begins with stays, to mark it."""
    layers = [i for i in range(start if is_first else start + 1, end) if task.units[i].is_layer]
    here = tables.intersection(range(start, end))
    return here.union(evenly(layers, min(count, len(layers))))


def _stored(task: Task, residents: Homes, choose: Choice) -> Homes:
    """All homes: residents as given, the others in the fastest stores that have room for them."""
    offloaded = [i for i in range(len(task.units)) if i not in residents]
    room = dict(task.limits)
    while True:
        stored = _in_stores(task, offloaded, room, choose)
        lacks = task.shortage(residents | stored, task.stores[:-1])
        held = sum(task.units[i].weights for i, home in stored.items() if home in task.stores[:-1])
        if not lacks or not held:
            return residents | stored
        room[task.stores[0]] = held - lacks  # buffers for what comes from the disk take room too


def _in_stores(task: Task, offloaded: list[int], room: Mapping[str, int], choose: Choice) -> Homes:
    """The fast store as full as it gets, the others where ``choose`` says."""
    left, homes = list(offloaded), Homes()
    for store in task.stores[:-1]:
        slower = _overflow(task, left, room[store], choose)
        homes.update({i: store for i in left if i not in slower})
        left = [i for i in left if i in slower]
    homes.update(dict.fromkeys(left, task.stores[-1]) if task.stores else {})
    return homes


def _overflow(task: Task, units: list[int], room: int, choose: Choice) -> set[int]:
    """The fewest chosen ones of ``units`` whose absence makes the others fit ``room``; of tables first."""
    total = sum(task.units[i].weights for i in units)
    tables = [i for i in task.tables if i in units]
    others = [i for i in units if i not in tables]

    def chosen(count: int) -> list[int]:
        left = count - len(tables)
        return tables[:count] + (choose(others, left) if left > 0 else [])

    def fits(count: int) -> bool:
        return total - sum(task.units[i].weights for i in chosen(count)) <= room

    slower = chosen(bisect_left(range(len(units)), True, key=fits))
    kept = slower[len(tables) :]  # a table goes only where its room lets another unit stay
    return set(kept if total - sum(task.units[i].weights for i in kept) <= room else slower)


def _last(items: list[int], count: int) -> list[int]:
    return items[len(items) - count :]


def _most_offloaded(task: Task) -> Homes:
    """Where to show what lacks when nothing fits: everything in the stores that can be."""
    offloaded = _spread_units(task, task.most_offloaded)
    residents = {i: task.compute[0] for i in range(len(task.units)) if i not in offloaded}
    return _stored(task, residents, evenly) if task.stores else residents
