"""How fast a placement will answer, from bytes per token and measured bandwidths.

``_stock_accelerate`` is the whole cost model of the engine: everything else only counts bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.plan import DeviceUse, Forecast, Placement, Workload
from llm_magic.planning.costs import dtype_bytes, streamed_bytes
from llm_magic.units import format_bandwidth

UNPINNED_BYTES_PER_S = 7.0e9
"""Copies from pageable memory (RAM or page cache), measured on PCIe 5 where pinned ones reach 54 GB/s."""

UNPINNED_SHARE = 0.5
"""On slower links, what pageable copies reach of the link: each byte is staged once more by the driver."""

OFFLOADED_TENSOR_S = 0.4e-3
"""Hook, allocation and ``empty_cache`` for every offloaded tensor of every sweep, beside its copy."""

LAUNCH_S_PER_LAYER = {"gpu": 1.0e-3, "cpu": 0.3e-3}
"""Python and kernel launches of one eager transformers layer (an 8B model of 32 layers: 34 ms on an H100)."""

PREFILL_EFFICIENCY = 0.5
"""Share of the dense peak that the matrix products of a prefill reach."""


@dataclass(frozen=True)
class Leg:
    """One part of the time of a sweep; ``words`` name it in "bound by ..."."""

    words: str
    seconds: float
    is_travel: bool = False


@dataclass(frozen=True)
class Sweep:
    """What one pass through the model does.

    ``reads``: device -> weight and cache bytes that it computes with; ``moves``: (home, computing
    device) -> bytes; ``tensors``: the same -> how many tensors; ``layers``: device -> layers that
    compute there; ``flops``: device -> operations of the matrix products.
    """

    reads: Mapping[str, int]
    moves: Mapping[tuple[str, str], int]
    tensors: Mapping[tuple[str, str], int]
    layers: Mapping[str, int]
    flops: Mapping[str, int]


def make_forecast(
    layout: ModelLayout,
    machine: Machine,
    workload: Workload,
    placed: Sequence[Placement],
    uses: Sequence[DeviceUse],
) -> Forecast:
    """Decode and prefill speed; 0 and ``"unknown"`` when a needed bandwidth is not known.

    Decode is the rate right after a prompt of ``prefill_tokens``. Each sweep serves ``batch``
    sequences.
    """
    decode = _sweep(layout, workload, placed, tokens=1)
    moved = {**decode.moves} | {(device, device): count for device, count in decode.reads.items()}
    legs = _stock_accelerate(decode, machine, uses)
    if legs is None:
        return Forecast(0.0, 0.0, "unknown", moved)
    decode_tps = workload.batch / max(sum(leg.seconds for leg in legs), 1e-9)
    slowest = max(legs, key=lambda leg: leg.seconds).words
    return Forecast(decode_tps, _prefill_tps(layout, machine, workload, placed, uses), slowest, moved)


def _prefill_tps(
    layout: ModelLayout,
    machine: Machine,
    workload: Workload,
    placed: Sequence[Placement],
    uses: Sequence[DeviceUse],
) -> float:
    tokens = min(workload.prefill_tokens, workload.context_length)
    sweep = _sweep(layout, workload, placed, tokens=tokens)
    legs = _stock_accelerate(sweep, machine, uses)
    if legs is None or any(not machine.device(device).flops for device in sweep.layers):
        return 0.0
    products = sum(
        count / (machine.device(device).flops * PREFILL_EFFICIENCY) for device, count in sweep.flops.items()
    )
    travel = sum(leg.seconds for leg in legs if leg.is_travel)
    rest = sum(leg.seconds for leg in legs) - travel
    return tokens * workload.batch / max(travel + max(rest, products), 1e-9)


def _sweep(layout: ModelLayout, workload: Workload, placed: Sequence[Placement], *, tokens: int) -> Sweep:
    reads, layers, flops = Counter[str](), Counter[str](), Counter[str]()
    moves, tensors = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for place in placed:
        block, device = place.block, place.compute
        if tokens == 1 and block.kind == "encoder":
            continue  # an encoder runs once, in the prefill
        reads[device] += _read_bytes(block, layout, tokens) + _cache_read(block, workload)
        layers[device] += block.kind in ("encoder", "decoder")
        flops[device] += _flops(block, tokens) * workload.batch
        if place.is_offloaded:
            moves[place.home, device] += streamed_bytes(block, layout)
            tensors[place.home, device] += max(1, len(block.tensors))
    return Sweep(+reads, +moves, +tensors, +layers, +flops)


def _stock_accelerate(sweep: Sweep, machine: Machine, uses: Sequence[DeviceUse]) -> tuple[Leg, ...] | None:
    """Legs of a sweep by stock Accelerate; ``None`` when a bandwidth is unknown.

    Copies and computation take turns (each tensor is brought when its module runs), so the time is
    the sum of the legs. On a GPU kernels are queued ahead, so launches hide behind reads or the
    other way round; on a CPU both take the same cores.
    """
    legs: list[Leg] = []
    for device, count in sweep.reads.items():
        speed = machine.device(device).read_bytes_per_s
        if not speed:
            return None
        read = Leg(f"{_memory(device)}, {format_bandwidth(speed)}", count / speed)
        kind = "cpu" if device == "cpu" else "gpu"
        launch = Leg(f"launching kernels on {device}", sweep.layers.get(device, 0) * LAUNCH_S_PER_LAYER[kind])
        legs += [read, launch] if kind == "cpu" else [max(read, launch, key=lambda leg: leg.seconds)]
    for (home, device), count in sweep.moves.items():
        words, speed = _travel(home, device, machine, uses)
        if not speed:
            return None
        seconds = count / speed + sweep.tensors[home, device] * OFFLOADED_TENSOR_S
        legs.append(Leg(f"{words}, {format_bandwidth(count / seconds)}", seconds, is_travel=True))
    return tuple(legs)


def _travel(home: str, device: str, machine: Machine, uses: Sequence[DeviceUse]) -> tuple[str, float]:
    """Name and unpinned bandwidth of the way from a store to the computing device; 0: unknown."""
    ram = machine.device("cpu").read_bytes_per_s if machine.has("cpu") else 0.0
    bus = machine.bytes_per_s("cpu", device) if device != "cpu" else ram or 2 * UNPINNED_BYTES_PER_S
    if machine.has(device) and machine.device(device).unified:
        bus = bus or machine.device(device).read_bytes_per_s
    copies = min(bus * UNPINNED_SHARE, UNPINNED_BYTES_PER_S)
    if home == "cpu":
        return f"RAM → {device} unpinned", copies
    if _in_page_cache(machine, uses):
        return "disk (page cache)", copies
    disk = machine.bytes_per_s("disk", "cpu") or machine.device("disk").read_bytes_per_s
    return "disk", 1 / (1 / disk + 1 / copies) if disk and copies else 0.0


def _in_page_cache(machine: Machine, uses: Sequence[DeviceUse]) -> bool:
    """Whether the RAM that the plan leaves free holds all disk blocks after the first sweep."""
    by_device = {use.device: use for use in uses}
    if not machine.has("cpu") or "disk" not in by_device:
        return False
    shared = [use for use in uses if use.device == "cpu" or machine.device(use.device).unified]
    free = machine.device("cpu").free_bytes - sum(use.planned for use in shared)
    reserve = max((use.reserve for use in shared), default=0)
    return by_device["disk"].weights <= free - reserve


def _read_bytes(block: Block, layout: ModelLayout, tokens: int) -> int:
    """Weights that the block's computation reads: an embedding reads rows, a head its (tied) matrix."""
    if block.kind == "embedding":
        return tokens * layout.hidden_size * dtype_bytes(layout.dtype)
    if block.kind == "head":
        return streamed_bytes(block, layout)
    return block.bytes_per_token if tokens == 1 else block.bytes


def _cache_read(block: Block, workload: Workload) -> int:
    tokens = min(workload.prefill_tokens, workload.context_length)
    return workload.batch * block.cache.bytes_for(tokens)


def _flops(block: Block, tokens: int) -> int:
    """Two operations for each weight that works on a token; the head works on the last one only."""
    if block.kind not in ("encoder", "decoder") or not block.bytes:
        return 0
    return 2 * tokens * block.parameters * block.bytes_per_token // block.bytes


def _memory(device: str) -> str:
    return "RAM" if device == "cpu" else f"memory of {device}"
