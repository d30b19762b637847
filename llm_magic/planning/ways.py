"""What happens to every block in a sweep, given its home: which device computes it, and what stays in RAM.

Offloaded blocks are shared over the buses of all GPUs that the map names. Of those in RAM, some are
computed by the CPU where they are, when that answers faster than streaming them: CPU and buses work
at once. Prompts, which a CPU reads slowly, are another matter: for them these blocks stream too. The
CPU also takes blocks whose keys and values a GPU has no room for. Of a mixture's layer nearly all bytes
are experts, of which a token needs a few: the CPU computes these, and the GPU keeps the rest of as many
layers as it has room for. Of blocks on disk, copies of as many as RAM has room for are kept there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llm_magic.model import Block
from llm_magic.plan import DeviceUse, Placement
from llm_magic.planning.costs import (
    CACHE_PIECES,
    activation_bytes,
    cache_piece_bytes,
    can_prefill_in_parts,
    reads_mapped,
    streamed_bytes,
    unified_pool,
)
from llm_magic.planning.forecast import engine_of
from llm_magic.planning.setting import Setting
from llm_magic.planning.sweep import (
    Engine,
    Sweep,
    block_sweep,
    can_record_layers,
    in_long_sweep,
    link_bytes_per_s,
    seconds,
    sweep_of,
    tokens_before,
)

ANSWER_TOKENS = 64
"""Tokens of the answer that the CPU's share is chosen for; few, so that nobody waits long for the first.

A CPU may decode as fast as a bus brings weights, but it reads a prompt much slower than a GPU, where
its blocks cannot stream to one for that.
"""

WORTH_IT = 1.05
"""Decode rate that computing on the CPU must gain."""

_UNEVEN = 1.1  # of the least time of the busiest bus: a layer stays beside its neighbours up to here

Placements = tuple[Placement, ...]
Uses = tuple[DeviceUse, ...]


def place_blocks(setting: Setting, homes: Mapping[str, str]) -> Placements:
    """Every block with its home, the device that computes it, and whether a copy is kept in RAM."""
    placed = computing_places(setting, homes)
    if not any(place.is_offloaded for place in placed):
        return placed
    kept = _with_kept(setting, placed)
    whole = _whole(setting, placed, kept)
    split = _split(setting, kept)
    return whole if split is None or _answers_sooner(setting, whole, split) else split


def _whole(setting: Setting, placed: Placements, kept: Placements) -> Placements:
    """With blocks computed by one device each; ``kept`` are ``placed`` with copies in RAM."""
    if not lacking(setting, kept):
        return _with_cpu(setting, kept)
    relieved = _relieved(setting, kept)
    if not lacking(setting, relieved):
        return relieved
    # Copies may have taken the room of keys and values.
    return _with_kept(setting, _relieved(setting, placed))


def lacking(setting: Setting, placed: Placements) -> tuple[str, ...]:
    """The GPUs that have no room for what is planned on them."""
    gpus = {gpu.id for gpu in setting.machine.gpus}
    return tuple(use.device for use in setting.uses(placed) if use.device in gpus and use.spare < 0)


def computing_places(setting: Setting, homes: Mapping[str, str]) -> Placements:
    """Blocks where they are computed before the CPU takes some over: on the map's GPUs, else on the CPU."""
    gpus = {gpu.id for gpu in setting.machine.gpus}
    sought = dict.fromkeys(homes[block.name] for block in setting.layout.blocks if not block.is_idle)
    used = [home for home in sought if home in gpus]
    if len(used) < 2:
        return _placed(setting, homes, [used[0] if used else "cpu"] * len(setting.layout.blocks))
    beside = _placed(setting, homes, _beside_neighbours(setting, homes, used))
    if not any(place.is_offloaded for place in beside):
        return beside
    even = _placed(setting, homes, _evenly_shared(setting, homes, used))
    is_even = _busiest_s(setting, beside) <= _UNEVEN * _busiest_s(setting, even)
    if is_even and _fits(setting, beside):
        return beside
    return even if _fits(setting, even) else beside


def shared_out(sizes: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """Contiguous shares of ``sizes`` in proportion to ``speeds``: the index of the share of each.

    Speeds that are unknown (0) count as equal.
    """
    speeds = speeds if all(speeds) else [1.0] * len(speeds)
    total, passed, shares = sum(sizes), 0, []
    ends = [sum(speeds[: i + 1]) / sum(speeds) for i in range(len(speeds))]
    for size in sizes:
        middle = (passed + size / 2) / max(total, 1)
        shares.append(next((i for i, end in enumerate(ends) if middle < end), len(ends) - 1))
        passed += size
    return shares


def evenly(items: list[int], count: int) -> list[int]:
    """``count`` of the items at equal distances, half a distance from either end."""
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


# --- Which GPU


def _placed(setting: Setting, homes: Mapping[str, str], devices: Sequence[str]) -> Placements:
    """Placements with the device that computes each block if it is not on a GPU."""
    gpus = {gpu.id for gpu in setting.machine.gpus}
    placed = []
    for block, device in zip(setting.layout.blocks, devices, strict=True):
        computing = _computing(block, homes[block.name], device, gpus)
        placed.append(Placement(block, _home(block, homes[block.name], computing), computing))
    return tuple(placed)


def _home(block: Block, home: str, computing: str) -> str:
    """What has no bytes is read from no disk."""
    is_empty = not (block.bytes or block.tied_to or block.is_idle)
    return computing if home == "disk" and is_empty else home


def _computing(block: Block, home: str, device: str, gpus: set[str]) -> str:
    """Where a block computes; ``device`` if it is on no GPU."""
    return home if home in gpus and not block.is_idle else device


def _beside_neighbours(setting: Setting, homes: Mapping[str, str], used: Sequence[str]) -> list[str]:
    """The GPU of the block before, so that hidden states cross between GPUs as rarely as they can."""
    device, devices = used[0], []
    for block in setting.layout.blocks:
        device = homes[block.name] if homes[block.name] in used else device
        devices.append(device)
    return devices


def _evenly_shared(setting: Setting, homes: Mapping[str, str], used: Sequence[str]) -> list[str]:
    """Contiguous shares of what is offloaded, in proportion to the buses."""
    layout = setting.layout
    stay = [homes[b.name] in used or b.is_idle or b.looks_up for b in layout.blocks]
    sizes = [0 if s else streamed_bytes(b, layout) for b, s in zip(layout.blocks, stay, strict=True)]
    speeds = [link_bytes_per_s(setting.machine, device) for device in used]
    return [used[share] for share in shared_out(sizes, speeds)]


def _busiest_s(setting: Setting, placed: Placements) -> float:
    """Seconds of the bus that carries the most for its speed; every block counts as a whole."""
    carried = Counter[str]()
    for place in placed:
        if place.is_offloaded:
            carried[place.compute] += streamed_bytes(place.block, setting.layout)
    speeds = {device: link_bytes_per_s(setting.machine, device) or 1.0 for device in carried}
    return max((size / speeds[device] for device, size in carried.items()), default=0.0)


def _fits(setting: Setting, placed: Placements) -> bool:
    return all(use.spare >= 0 for use in setting.uses(placed))


# --- What stays in RAM of the disk's blocks


def _with_kept(setting: Setting, placed: Placements) -> Placements:
    """Keep as many copies as RAM has room for, always of the same blocks.

    A cyclic sweep would push every one out of a cache that is too small for all.
    """
    read = [i for i, p in enumerate(placed) if p.way == "read" and p.block.bytes and not p.block.tied_to]
    is_possible = setting.machine.has("cpu") and not unified_pool(setting.machine)
    if not read or not is_possible or reads_mapped(setting.machine, setting.uses(placed), placed):
        return placed

    def overflows(count: int) -> bool:
        kept = _kept(placed, evenly(read, count))
        return any(use.spare < 0 for use in setting.uses(kept) if use.device == "cpu")

    if not overflows(len(read)):  # then nothing is read, and no buffers are needed
        return _kept(placed, read)
    count = bisect_left(range(len(read)), True, key=overflows)
    return _kept(placed, evenly(read, count - 1)) if count > 1 else placed


def _kept(placed: Placements, chosen: Sequence[int]) -> Placements:
    them = set(chosen)
    return tuple(replace(place, kept=True) if i in them else place for i, place in enumerate(placed))


# --- What the CPU computes


@dataclass(frozen=True)
class _Swap:
    """What changes when the CPU computes a block: in a sweep that decodes, in a prefill, and in one that it visits."""

    decode: Sweep
    prefill: Sweep
    visit: Sweep


def _with_cpu(setting: Setting, placed: Placements) -> Placements:
    """Let the CPU compute so many blocks in RAM, spread evenly, that it and the buses finish together."""
    shares = _shares_of(setting, placed)
    alone = shares and shares.streamed
    if not shares or not alone:
        return placed
    best, least_s = placed, alone.decode_s / WORTH_IT + alone.prefill_s / ANSWER_TOKENS
    for count in shares.counts:
        share = shares.timed(count)
        if share is not None and share.decode_s * WORTH_IT <= alone.decode_s and share.answer_s < least_s:
            best, least_s = shares.placed(count, visits=share.visits), share.answer_s
    return best


def _relieved(setting: Setting, placed: Placements) -> Placements:
    """Let the CPU compute so many blocks in RAM that the GPUs have room; as they were where nothing helps.

    A block that streams leaves its keys and values on the GPU, and a long context may have more of
    them than fit; it needs a slot there, too. One that the CPU computes has all of it in RAM, and that
    is done even where it is slower: what lacks room cannot be loaded.
    """
    for gpu in lacking(setting, placed):
        placed = _relieved_of(setting, placed, gpu)
    return placed


def _relieved_of(setting: Setting, placed: Placements, gpu: str) -> Placements:
    """One GPU's part of it: of the numbers of its blocks that are enough, the one that answers fastest."""
    shares = _shares_of(setting, placed, gpu)
    if shares is None:
        return placed

    def has_room(count: int, *, visits: bool = False) -> bool:
        return gpu not in lacking(setting, shares.placed(count, visits=visits))

    enough = shares.from_where(has_room, shares.counts)
    if not enough:
        return placed
    visited = set(shares.from_where(lambda count: has_room(count, visits=True), enough))
    timed = {n: share for n in enough if (share := shares.timed(n, has_room_to_visit=n in visited))}
    if not timed:
        return shares.placed(enough[0], visits=False)
    count = min(timed, key=lambda count: timed[count].answer_s)
    return shares.placed(count, visits=timed[count].visits)


@dataclass(frozen=True)
class _Share:
    """Seconds of sweeps when the CPU computes some blocks, and whether these stream to a GPU in a prefill."""

    decode_s: float
    prefill_s: float
    visits: bool = False

    @property
    def answer_s(self) -> float:
        """Of one token, with its part of the prompt."""
        return self.decode_s + self.prefill_s / ANSWER_TOKENS


def _shares_of(setting: Setting, placed: Placements, gpu: str = "") -> _Shares | None:
    """What the CPU could compute of the blocks in RAM, if anything: of one GPU's, or of all."""
    candidates = [
        i for i, p in enumerate(placed) if _could_be_computed_by_cpu(p) and (not gpu or p.compute == gpu)
    ]
    if not candidates or not setting.machine.has("cpu") or unified_pool(setting.machine):
        return None
    return _Shares(setting, placed, candidates)


class _Shares:
    """The CPU's possible shares of some blocks in RAM, by their number.

    Attributes
    ----------
    counts
        Numbers of blocks that RAM has room for the keys and values of.
    """

    def __init__(self, setting: Setting, placed: Placements, candidates: list[int]) -> None:
        self._setting, self._placed, self._candidates = setting, placed, candidates
        uses = setting.uses(placed)
        room = next(use for use in uses if use.device == "cpu").spare
        room -= activation_bytes(setting.layout, setting.workload)
        if _can_visit(setting):
            blocks = (placed[i].block for i in candidates)
            room -= CACHE_PIECES * cache_piece_bytes(blocks, setting.workload)
        self._streams = engine_of(setting, placed, uses)
        self._are_alike = len({_kind(placed[i]) for i in candidates}) == 1
        self.counts = self._counts_within(room)

    def placed(self, count: int, *, visits: bool) -> Placements:
        """The blocks with ``count`` of them computed by the CPU."""
        return _on_cpu(self._placed, evenly(self._candidates, count), visits=visits)

    def from_where(self, is_enough: Callable[[int], bool], counts: list[int]) -> list[int]:
        """The counts that are enough. Of blocks that are alike a few need a look: more free more."""
        if self._are_alike:
            return counts[bisect_left(counts, True, key=is_enough) :]
        return [count for count in counts if is_enough(count)]

    @cached_property
    def streamed(self) -> _Share | None:
        """All of them on the GPUs; ``None`` without a choice, or when nobody knows how long that takes."""
        decode_s = self._times.decode_s([], self._streams) if self.counts else None
        return None if decode_s is None else _Share(decode_s, self._streamed_prefill_s)

    def timed(self, count: int, *, has_room_to_visit: bool = True) -> _Share | None:
        """``count`` of them by the CPU; ``None`` when nobody knows how long that takes."""
        chosen = evenly(self._candidates, count)
        decode_s = self._times.decode_s(chosen, self._mixed)
        if decode_s is None:
            return None
        here_s, there_s = (self._times.prefill_s(chosen, self._mixed, visits=v) for v in (False, True))
        visits = has_room_to_visit and _can_visit(self._setting) and (not here_s or there_s <= here_s)
        return _Share(decode_s, there_s if visits else here_s, visits)

    @cached_property
    def _times(self) -> _Times:
        return _Times(self._setting, self._placed, self._candidates)

    @cached_property
    def _mixed(self) -> Engine:
        records = can_record_layers(self._setting.layout, self._placed)
        return replace(self._streams, is_captured=False, records_layers=records)

    @cached_property
    def _streamed_prefill_s(self) -> float:
        return self._times.prefill_s([], self._mixed)

    def _counts_within(self, room: int) -> list[int]:
        """Numbers of blocks whose keys, values and buffers, which stay where they are computed, have room."""
        blocks = [self._placed[i].block for i in self._candidates]
        sizes = [self._setting.workload.cache_bytes(b) + b.buffer_bytes for b in blocks]
        if self._are_alike:
            return list(range(1, min(len(sizes), max(0, room) // max(sizes[0], 1)) + 1))
        return [n for n in range(1, len(sizes) + 1) if sum(evenly(sizes, n)) <= room]


def _can_visit(setting: Setting) -> bool:
    """Whether blocks of the CPU may compute in a prefill where they would compute without it.

    Their keys and values must be able to go along and come back. There is room for the KV cache of one block at a
    time: all of these gave theirs away.
    """
    return can_prefill_in_parts(setting.layout)


def _could_be_computed_by_cpu(place: Placement) -> bool:
    is_in_ram = place.home == "cpu" or place.kept
    return is_in_ram and place.is_offloaded and place.compute != "cpu" and _is_plain_layer(place.block)


def _is_plain_layer(block: Block) -> bool:
    return block.kind == "decoder" and bool(block.bytes) and not block.tied_to


def _on_cpu(placed: Placements, chosen: Sequence[int], *, visits: bool) -> Placements:
    them = set(chosen)
    return tuple(
        replace(place, compute="cpu", prefill=place.compute if visits else "") if i in them else place
        for i, place in enumerate(placed)
    )


# --- Experts of the CPU in layers of a GPU


def _split(setting: Setting, placed: Placements) -> Placements | None:
    """Split as many blocks in RAM, spread evenly, as the GPUs have room for the rest of; the CPU computes the others.

    ``None`` where there are none to split, or where that has no room.
    """
    in_ram = [i for i, place in enumerate(placed) if _could_be_computed_by_cpu(place)]
    candidates = [i for i in in_ram if _has_experts(placed[i].block)]
    can_be = setting.machine.has("cpu") and setting.layout.details.get("routed_experts")
    if not candidates or not can_be or unified_pool(setting.machine):
        return None
    on_cpu = _on_cpu(placed, in_ram, visits=_can_visit(setting))

    def with_split(count: int) -> Placements:
        chosen = set(evenly(candidates, count))
        return tuple(
            replace(base, is_split=True, prefill=base.compute) if i in chosen else other
            for i, (base, other) in enumerate(zip(placed, on_cpu, strict=True))
        )

    everything = with_split(len(candidates))
    if not lacking(setting, everything):  # which needs no slots for whole blocks
        return everything if _fits(setting, everything) else None
    counts = range(1, len(candidates))
    count = bisect_left(counts, True, key=lambda count: bool(lacking(setting, with_split(count))))
    some = with_split(count) if count else None
    return some if some is not None and _fits(setting, some) else None


def _has_experts(block: Block) -> bool:
    return 0 < block.active_experts < block.experts and 0 < block.expert_bytes < block.bytes


def _answers_sooner(setting: Setting, one: Placements, other: Placements) -> bool:
    """Whether an answer comes sooner with these placements than with the others, which fit, or nobody knows."""
    if not _fits(setting, one):
        return False
    one_s, other_s = _answer_s(setting, one), _answer_s(setting, other)
    return one_s is None or other_s is None or one_s <= other_s


def _answer_s(setting: Setting, placed: Placements) -> float | None:
    """Seconds of a token with its part of the prompt; ``None`` when nobody knows how long a token takes."""
    layout, workload = setting.layout, setting.workload
    engine = engine_of(setting, placed, setting.uses(placed))
    tokens = min(workload.prefill_tokens, workload.context_length)
    decode_s = seconds(sweep_of(layout, workload, placed, tokens=1), engine)
    cached = tokens_before(workload, layout)
    prompt = sweep_of(layout, workload, in_long_sweep(placed), tokens=tokens, cached=cached)
    prefill_s = seconds(prompt, engine, is_prefill=True) or 0.0
    return None if decode_s is None else decode_s + prefill_s / ANSWER_TOKENS


class _Times:
    """Seconds of sweeps in which the CPU computes some of the candidates.

    Amounts add up over blocks and equal layers change them equally, so each choice costs a few sums.
    """

    def __init__(self, setting: Setting, placed: Placements, candidates: Sequence[int]) -> None:
        layout, workload = setting.layout, setting.workload
        self._tokens = min(workload.prefill_tokens, workload.context_length)
        self._cached = tokens_before(workload, layout)
        self._decode = sweep_of(layout, workload, placed, tokens=1)
        self._prefill = sweep_of(layout, workload, placed, tokens=self._tokens, cached=self._cached)
        self._kinds = {i: _kind(placed[i]) for i in candidates}
        examples = {kind: placed[i] for i, kind in self._kinds.items()}
        self._swaps = {kind: self._swap(setting, place) for kind, place in examples.items()}

    def decode_s(self, chosen: Sequence[int], engine: Engine) -> float | None:
        return seconds(self._sweep(self._decode, chosen, lambda swap: swap.decode), engine)

    def prefill_s(self, chosen: Sequence[int], engine: Engine, *, visits: bool = False) -> float:
        """0 when it is unknown: then decoding alone decides."""
        sweep = self._sweep(self._prefill, chosen, lambda swap: swap.visit if visits else swap.prefill)
        return seconds(sweep, engine, is_prefill=True) or 0.0

    def _sweep(self, whole: Sweep, chosen: Sequence[int], of: Callable[[_Swap], Sweep]) -> Sweep:
        sweep = Sweep()
        sweep.add(whole)
        for kind, times in Counter(self._kinds[i] for i in chosen).items():
            sweep.add(of(self._swaps[kind]), times)
        return sweep

    def _swap(self, setting: Setting, place: Placement) -> _Swap:
        by_cpu, visiting = replace(place, compute="cpu"), replace(place, prefill=place.compute)

        def change(there: Placement, tokens: int, cached: int) -> Sweep:
            swap = block_sweep(setting.layout, setting.workload, there, tokens=tokens, cached=cached)
            before = block_sweep(setting.layout, setting.workload, place, tokens=tokens, cached=cached)
            swap.add(before, -1)
            return swap

        prefill = (change(there, self._tokens, self._cached) for there in (by_cpu, visiting))
        return _Swap(change(by_cpu, 1, 0), *prefill)


def _kind(place: Placement) -> tuple[object, ...]:
    """Blocks of which all figures are equal."""
    block = place.block
    experts = (block.experts, block.expert_bytes, block.active_experts)
    sizes = (block.bytes, block.parameters, block.cache, block.buffer_bytes)
    return (place.home, place.compute, place.kept, *sizes, *experts)
