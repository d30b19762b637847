"""One pass through the model: what is read, moved and computed where, and how long each part takes.

A sweep over M tokens takes as long as its slowest part, because copies run ahead while blocks
compute::

    T = max(bytes on a bus / its bandwidth,               one for each GPU
            bytes from the disk / its bandwidth,
            sum over the blocks of reading and launching,  one after the other, on CPU and GPUs
            bytes to the buses and the CPU / what RAM gives)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.plan import Placement, Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import can_prefill_in_parts, dtype_bytes, streamed_bytes
from llm_magic.planning.packed import (
    EXPERTS_IN_RUNS_BYTES,
    GUEST_PASSES,
    Kernel,
    kernel_of,
    numbers_per_s,
    share_of,
)
from llm_magic.units import format_bandwidth

RECORDED_SHARE = 0.15
"""Of an eager layer's launches and Python, what is left where the layer is one graph: its hooks, and one launch.

Not measured on a GPU: 0.08 ms of Python on a Xeon, where the eager layer took 0.34 ms besides its launches.
"""

SPLIT_SHARE = 0.4
"""Of a CPU layer's Python, what its experts alone have (0.1 ms on two EPYC cores), with a token's way to them.

That way, two small copies and a wait, is not measured on a GPU.
"""

EXPERT_SHARE = 0.05
"""Of a layer's launches and Python on a GPU, what one expert more has in a sweep of many tokens.

Two products, and its part of what becomes numbers together. Measured without a GPU: 0.06 ms for nf4 and 0.1 for
quanto-int8 on an EPYC core, with the arithmetic of matrices of 64 by 64.
"""
_ALONE = 5
"""How many times that is for one that comes alone, of several tensors: 0.23 ms, and 0.05 for its way."""

Way = tuple[str, str]


@dataclass(frozen=True)
class Engine:
    """How the loaded model will run, beside where its blocks are.

    ``is_mapped``: the CPU uses the disk's blocks in the page cache; ``is_captured``: a decode step is
    one CUDA graph; ``records_layers``: each layer of a GPU is one; ``kernel``: what computes with packed weights, see
    `packed.kernel_of`.
    """

    machine: Machine
    constants: Constants
    is_mapped: bool = False
    is_captured: bool = False
    records_layers: bool = False
    kernel: Kernel = field(default_factory=Kernel)
    head_kernel: Kernel = field(default_factory=Kernel)

    def packed_share(self, device: str, kernel: Kernel) -> tuple[str, float]:
        """The constant, and what a device reaches of its read speed on weights that this kernel takes."""
        name = "packed_cpu_share" if device == "cpu" else "packed_gpu_share"
        factor: float = getattr(self.constants, name)
        return name, share_of(kernel, self.machine.device(device)) * factor


@dataclass(frozen=True)
class Sweep:
    """Amounts of one pass, which add up over the blocks.

    ``reads``: device -> bytes of weights and caches that it computes with, of which ``mapped`` lie in
    the page cache, ``packed`` must be unpacked, and ``head`` too, where that is packed; ``copied``: device -> bytes that it reads and writes before
    that; ``moves``: (where from, computing device) -> bytes,
    of which ``routed`` are known to be needed only when the block runs; ``staged``: GPU -> bytes of them that are
    copied to or from pinned buffers in RAM on the way; ``layers``: device -> layers;
    ``splits``: device -> layers of which it computes the experts alone; ``experts``: device -> those that a GPU's host
    launches one after the other, of which one that comes alone counts several times; ``flops``: device -> operations;
    ``states``: device -> numbers of the tokens' states that go through layers.
    """

    reads: Counter[str] = field(default_factory=Counter)
    mapped: Counter[str] = field(default_factory=Counter)
    packed: Counter[str] = field(default_factory=Counter)
    head: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    moves: Counter[Way] = field(default_factory=Counter)
    routed: Counter[Way] = field(default_factory=Counter)
    staged: Counter[str] = field(default_factory=Counter)
    layers: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    experts: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)

    def add(self, other: Sweep, times: int = 1) -> None:
        """Count another one in, some times; negative: take it out."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            for key, count in theirs.items():
                mine[key] += times * count


@dataclass(frozen=True)
class Leg:
    """One part of the time of a sweep; ``words`` name it in "bound by ...", ``cause`` for the constants."""

    words: str
    seconds: float
    cause: str = ""


def in_long_sweep(placed: Iterable[Placement]) -> tuple[Placement, ...]:
    """The placements as a sweep of many tokens finds them: blocks of the CPU stream to where they prefill.

    Those that have their keys and values in RAM still name that device as their ``prefill``: they visit it.
    """
    return tuple(
        replace(place, compute=place.prefill, prefill="" if place.is_split else place.prefill, is_split=False)
        if place.prefill
        else place
        for place in placed
    )


def tokens_before(workload: Workload, layout: ModelLayout) -> int:
    """Tokens that the KV cache holds before a pass through a prompt, half-way through the context."""
    if not can_prefill_in_parts(layout):
        return 0
    return max(0, workload.context_length - workload.prefill_tokens) // 2


def sweep_of(
    layout: ModelLayout, workload: Workload, placed: Iterable[Placement], *, tokens: int, cached: int = 0
) -> Sweep:
    """What a pass over ``tokens`` tokens of each sequence does, every block where it computes.

    ``cached`` tokens are in the KV cache before a prefill.
    """
    alike: dict[object, tuple[Placement, int]] = {}
    for place in placed:
        key = (place.block.likeness, place.home, place.compute, place.kept, place.is_split, place.prefill)
        alike[key] = place, alike.get(key, (place, 0))[1] + 1
    whole = Sweep()
    for place, times in alike.values():
        whole.add(block_sweep(layout, workload, place, tokens=tokens, cached=cached), times)
    return whole


def block_sweep(
    layout: ModelLayout, workload: Workload, place: Placement, *, tokens: int, cached: int = 0
) -> Sweep:
    """The part of one block; an encoder runs once, in the prefill, and an idle block never."""
    block, device, part = place.block, place.compute, Sweep()
    source = "cpu" if place.kept else place.home
    if block.is_idle or (tokens == 1 and block.kind == "encoder"):
        return part
    if place.is_looked_up:  # a few rows, wherever they are
        return part
    if place.is_split:
        return _split_sweep(layout, workload, place, tokens=tokens, cached=cached)
    read = _read_bytes(block, layout, tokens)
    part.reads[device] = read + _cache_read(block, workload, tokens, cached)
    is_layer = block.kind in ("encoder", "decoder")
    if (packed := _packed_part(part, layout, block)) is not None:
        packed[device] = read
    elif source == "disk" and device == "cpu":
        part.mapped[device] = read
    if source == device != "cpu":
        part.copied[device] = _gathered_bytes(block, workload, tokens)
    part.layers[device] = int(is_layer)
    if device != "cpu" and tokens > 1:
        part.experts[device] = _launched_experts(layout, workload, place, tokens=tokens)
    part.flops[device] = _flops(block, layout, tokens, cached) * workload.batch
    part.states[device] = is_layer * tokens * workload.batch * layout.hidden_size
    if source != device:
        part.moves[source, device] = _moved_bytes(block, layout, workload, tokens)
        part.routed[source, device] = _routed_bytes(block, workload, tokens)
    if place.prefill == device:
        part.add(_visiting_cache(block, workload, device, tokens=tokens, cached=cached))
        part.copied[device] += _reordered_bytes(layout, read)
    return part


def _packed_part(part: Sweep, layout: ModelLayout, block: Block) -> Counter[str] | None:
    """Where the bytes of a block are counted that is packed."""
    if layout.quantization and block.kind in ("encoder", "decoder"):
        return part.packed
    return part.head if layout.head_quantization and block.kind == "head" else None


def _reordered_bytes(layout: ModelLayout, read: int) -> int:
    """What a GPU reads and writes for weights in the order of a CPU's kernel, until they are numbers."""
    return GUEST_PASSES * read if kernel_of(layout).name == "int4" else 0


def _visiting_cache(block: Block, workload: Workload, device: str, *, tokens: int, cached: int) -> Sweep:
    """The way of keys and values that are in RAM: all that there are to the GPU, and the new ones back."""
    part = Sweep()
    there, back = (workload.batch * block.cache.bytes_for(count) for count in (cached, tokens))
    part.moves["cpu", device], part.moves[device, "cpu"] = there, back
    part.staged[device] = there + back
    return part


def _split_sweep(
    layout: ModelLayout, workload: Workload, place: Placement, *, tokens: int, cached: int
) -> Sweep:
    """The part of a block whose experts the CPU computes; what goes to them and comes back is a few rows."""
    rest, part = place.rest_bytes, Sweep()
    experts = place.block.expert_bytes - _idle_expert_bytes(place.block, workload, tokens)
    part.reads["cpu"] = experts
    part.reads[place.compute] = rest + _cache_read(place.block, workload, tokens, cached)
    if layout.quantization:
        part.packed.update({place.compute: rest, "cpu": experts})
    part.layers[place.compute], part.splits["cpu"] = 1, 1
    flops = _flops(place.block, layout, tokens) * workload.batch
    part.flops["cpu"] = flops * experts // max(rest + experts, 1)
    attention = _attention_flops(place.block, layout, tokens, cached) * workload.batch
    part.flops[place.compute] = flops - part.flops["cpu"] + attention
    return part


def can_capture(layout: ModelLayout, machine: Machine, placed: Sequence[Placement]) -> bool:
    """Whether a decode step can be CUDA graphs with at most experts of the CPU between them.

    One GPU computes all else then, and only copies bring blocks.
    """
    computing = {place.compute for place in placed}
    if len(computing) > 1 or layout.details.get("eager"):
        return False
    device = machine.device(computing.pop())
    is_split = any(place.is_split for place in placed)  # a graph that ends would leave copies on their way
    brings_late = any(p.way == "read" or (p.is_offloaded and (p.block.experts or is_split)) for p in placed)
    asks = any(place.is_split and _asks_the_host(place, layout) for place in placed)
    return device.id.startswith("cuda") and not device.unified and not (brings_late or asks)


def can_record_layers(layout: ModelLayout, placed: Iterable[Placement]) -> bool:
    """Whether each layer of a GPU can be a CUDA graph, where other devices compute some of them."""
    is_known = not (layout.details.get("eager") or layout.details.get("keeps_states"))
    return is_known and not any(_asks_the_host(p, layout) for p in placed if p.block.experts)


def _asks_the_host(place: Placement, layout: ModelLayout) -> bool:
    """Whether the experts of a GPU are taken one after the other: where some of them come to it, all that are plain."""
    width = dtype_bytes(layout.dtype)
    are_plain = any(len(t.shape) == 3 and t.bytes >= prod(t.shape) * width for t in place.block.tensors)
    comes = place.is_offloaded and (place.compute != "cpu" or (are_plain and not place.kept))
    return comes or bool(place.prefill and are_plain)


def seconds(sweep: Sweep, engine: Engine, *, is_prefill: bool = False) -> float | None:
    """How long the sweep takes; ``None`` when a bandwidth that it needs is unknown."""
    legs = parts(sweep, engine, is_prefill=is_prefill)
    return None if legs is None else max(leg.seconds for leg in legs)


def parts(sweep: Sweep, engine: Engine, *, is_prefill: bool = False) -> tuple[Leg, ...] | None:
    """What runs at the same time: the chain of the blocks, every bus, the disk, RAM."""
    chain = chain_of(sweep, engine, is_prefill=is_prefill)
    buses, disk = _buses(sweep, engine), _disk(sweep, engine)
    if chain is None or buses is None or disk is None:
        return None
    longest = max(chain, key=lambda leg: leg.seconds, default=Leg("nothing", 0.0))
    whole = Leg(longest.words, sum(leg.seconds for leg in chain), longest.cause)
    return (whole, *buses, *disk, *_ram(sweep, engine))


def chain_of(sweep: Sweep, engine: Engine, *, is_prefill: bool = False) -> tuple[Leg, ...] | None:
    """What comes one after the other: layers need what the layers before them made."""
    legs: list[Leg] = []
    for device, count in sweep.reads.items():
        speed = engine.machine.device(device).read_bytes_per_s
        if not count and not sweep.layers[device] and not sweep.splits[device]:
            continue
        if not speed:
            return None
        if is_prefill and not engine.machine.device(device).flops and sweep.flops[device]:
            return None
        legs += _computing(device, sweep, engine, is_prefill=is_prefill)
    return (*legs, *_waits(sweep, engine))


def _computing(device: str, sweep: Sweep, engine: Engine, *, is_prefill: bool) -> list[Leg]:
    """The legs of one device: work and launches, in turn on a CPU, whose cores do both, and in a graph.

    An eager GPU has its kernels queued ahead, so that one hides behind the other. It runs the kernels that
    a graph has between its matrix products, so a graph of the same blocks never takes longer.
    """
    work = _reading(device, sweep, engine)
    if is_prefill and sweep.flops[device]:
        work = max(work, _multiplying(device, sweep, engine), key=lambda leg: leg.seconds)
    launch = _launching(device, sweep, engine, is_prefill=is_prefill)
    if launch.cause != "gpu_layer_s":
        return [work, launch]
    between_s = 0.0 if is_prefill else sweep.layers[device] * engine.constants.captured_layer_s
    work = replace(work, seconds=work.seconds + between_s)
    if sweep.splits["cpu"] and not is_prefill:  # it waits for the CPU in every layer, with nothing queued
        return [work, launch]
    return [max(work, launch, key=lambda leg: leg.seconds)]


def _reading(device: str, sweep: Sweep, engine: Engine) -> Leg:
    """Weights and caches from the device's memory; what is packed or in the page cache comes slower."""
    machine, constants = engine.machine, engine.constants
    speed = machine.device(device).read_bytes_per_s
    words = f"{_memory(device)}, {format_bandwidth(speed)}"
    mapped = sweep.mapped[device] if engine.is_mapped else 0
    packed, head = sweep.packed[device], sweep.head[device]
    plain = sweep.reads[device] - mapped - packed - head
    family = "cpu" if device == "cpu" else "gpu"
    share = "cpu_beside_bus" if device == "cpu" and _copies(sweep) else f"{family}_share"
    packed_name, packed_share = engine.packed_share(device, engine.kernel)
    _, head_share = engine.packed_share(device, engine.head_kernel)
    spent = {
        share: float(plain + sweep.copied[device]),
        "page_cache_share": mapped / constants.page_cache_share,
        packed_name: packed / packed_share + head / head_share,
    }
    cause = max(spent, key=lambda name: spent[name])
    return Leg(words, sum(spent.values()) / (speed * getattr(constants, share)), cause)


def _multiplying(device: str, sweep: Sweep, engine: Engine) -> Leg:
    """The matrix products of a prefill; on a CPU also numbers of packed weights, and what layers make of states beside them."""
    name, its = "cpu_prefill" if device == "cpu" else "gpu_prefill", engine.machine.device(device)
    spent = sweep.flops[device] / its.flops + sweep.states[device] * its.state_s
    if numbers := numbers_per_s(engine.kernel, its):
        spent += sweep.packed[device] / numbers
    return Leg(f"matrix products on {device}", spent / getattr(engine.constants, name), name)


def _launching(device: str, sweep: Sweep, engine: Engine, *, is_prefill: bool) -> Leg:
    """Python and launches of a device's layers, or what a graph has between its matrix products."""
    is_captured = engine.is_captured and not is_prefill
    name = "cpu_layer_s" if device == "cpu" else "captured_layer_s" if is_captured else "gpu_layer_s"
    can_be = device.startswith("cuda") and not engine.machine.device(device).unified
    is_recorded = name == "gpu_layer_s" and engine.records_layers and can_be and not is_prefill
    share = RECORDED_SHARE if is_recorded else 1.0
    words = f"launching kernels on {device}"
    layers = share * sweep.layers[device] + SPLIT_SHARE * sweep.splits[device]
    layers += EXPERT_SHARE * sweep.experts[device]
    return Leg(words, layers * getattr(engine.constants, name), name)


def _copies(sweep: Sweep) -> int:
    """Bytes on their way to GPUs, which take a core for their driver."""
    return sum(count for (_, target), count in sweep.moves.items() if target != "cpu")


def _waits(sweep: Sweep, engine: Engine) -> tuple[Leg, ...]:
    """Experts move when the router has chosen them: nothing hides their copies."""
    waits: dict[str, float] = {}
    for (_, target), count in sweep.routed.items():
        if speed := _bus_speed(target, engine):
            waits[target] = waits.get(target, 0.0) + count / speed
    return tuple(
        Leg(_bus_words(target, engine), spent, "bus_share") for target, spent in waits.items() if spent
    )


def _buses(sweep: Sweep, engine: Engine) -> tuple[Leg, ...] | None:
    """The way to each GPU, which what comes from the disk takes too, and the way back: a bus carries both at once."""
    counts = Counter[Way]()
    for (source, target), count in sweep.moves.items():
        if target != "cpu":
            counts["to", target] += count
        elif source != "disk":
            counts["from", source] += count
    legs = []
    for (direction, device), count in (+counts).items():
        speed = _bus_speed(device, engine)
        if not speed:
            return None
        legs.append(Leg(_bus_words(device, engine, direction), count / speed, "bus_share"))
    return tuple(legs)


def link_bytes_per_s(machine: Machine, device: str) -> float:
    """What the way from RAM to a GPU carries as measured; a shared memory is its own way."""
    return machine.bytes_per_s("cpu", device) or (
        machine.device(device).read_bytes_per_s if machine.device(device).unified else 0.0
    )


def _bus_speed(device: str, engine: Engine) -> float:
    return link_bytes_per_s(engine.machine, device) * engine.constants.bus_share


def _bus_words(device: str, engine: Engine, direction: str = "to") -> str:
    return f"bus {direction} {device}, {format_bandwidth(link_bytes_per_s(engine.machine, device))}"


def _disk(sweep: Sweep, engine: Engine) -> tuple[Leg, ...] | None:
    count = sum(size for (source, target), size in sweep.moves.items() if source == "disk")
    if not count or engine.is_mapped:
        return ()
    raw = disk_bytes_per_s(engine.machine)
    if not raw:
        return None
    seconds = count / (raw * engine.constants.disk_share)
    return (Leg(f"disk, {format_bandwidth(raw)}", seconds, "disk_share"),)


def disk_bytes_per_s(machine: Machine) -> float:
    """Sequential reads of the disk; 0 when unknown."""
    return machine.bytes_per_s("disk", "cpu") or machine.device("disk").read_bytes_per_s


def _ram(sweep: Sweep, engine: Engine) -> tuple[Leg, ...]:
    """Buses and CPU share what RAM gives; it matters when more than one of them takes from it.

    What is staged is read and written once more, by the CPU.
    """
    machine = engine.machine
    alone = machine.device("cpu").read_bytes_per_s if machine.has("cpu") else 0.0
    targets = {target for (_, target), count in sweep.moves.items() if count and target != "cpu"}
    links = [0.0, *(machine.bytes_per_s("cpu", target) for target in targets)]
    speed = engine.constants.dram_factor * max(alone, *links)
    staged = sum(sweep.staged.values())
    takers = len(targets) + bool(sweep.reads["cpu"] or staged)
    if takers < 2 or not speed:
        return ()
    returned = sum(count for (_, target), count in sweep.moves.items() if target == "cpu") if staged else 0
    count = _copies(sweep) + returned + 2 * staged + sweep.reads["cpu"]
    return (Leg(f"RAM for CPU and buses, {format_bandwidth(speed)}", count / speed, "dram_factor"),)


def _read_bytes(block: Block, layout: ModelLayout, tokens: int) -> int:
    """Weights that the block's computation reads: an embedding reads rows, a head its (tied) matrix."""
    if block.kind == "embedding":
        return tokens * layout.hidden_size * dtype_bytes(layout.dtype)
    if block.kind == "head":
        return streamed_bytes(block, layout)
    return block.bytes_per_token if tokens == 1 else block.bytes


def _moved_bytes(block: Block, layout: ModelLayout, workload: Workload, tokens: int) -> int:
    """Bytes that travel: of experts only those that are routed to."""
    return streamed_bytes(block, layout) - _idle_expert_bytes(block, workload, tokens)


def _routed_bytes(block: Block, workload: Workload, tokens: int) -> int:
    """Bytes of the experts that a decoding sweep needs, when not all of them; 0 in a prefill."""
    if tokens > 1 or not block.experts or not block.active_experts:
        return 0
    return block.expert_bytes - _idle_expert_bytes(block, workload, tokens)


def _idle_expert_bytes(block: Block, workload: Workload, tokens: int) -> int:
    """Bytes of the experts that no token of any sequence is routed to, where each takes some at random."""
    if not block.experts or not block.active_experts:
        return 0
    share: float = (1 - block.active_experts / block.experts) ** (tokens * workload.batch)
    return round(block.expert_bytes * share)


def _launched_experts(layout: ModelLayout, workload: Workload, place: Placement, *, tokens: int) -> int:
    """The experts that a GPU's host launches one after the other: not plain ones that are there, which are one kernel."""
    block, source = place.block, "cpu" if place.kept else place.home
    travels = source != place.compute
    if not block.expert_bytes or not (travels or layout.quantization):
        return 0
    idle = _idle_expert_bytes(block, workload, tokens) * block.experts // block.expert_bytes
    is_small = block.expert_bytes // block.experts <= EXPERTS_IN_RUNS_BYTES
    in_runs = bool(layout.quantization) and is_small and source == "cpu"
    return (block.experts - idle) * (1 if in_runs or not travels else _ALONE)


def _gathered_bytes(block: Block, workload: Workload, tokens: int) -> int:
    """What is read and written so that the experts of each token lie where a GPU's host need not know them."""
    if tokens > 1 or not block.experts:
        return 0
    return 2 * workload.batch * block.expert_bytes * block.active_experts // block.experts


def _cache_read(block: Block, workload: Workload, tokens: int, cached: int) -> int:
    whole = cached + tokens if cached else workload.prefill_tokens
    return workload.batch * block.cache.bytes_for(min(whole, workload.context_length))


def _flops(block: Block, layout: ModelLayout, tokens: int, cached: int = 0) -> int:
    """Two operations for each weight that works on a token; the head works on the last one only."""
    if block.kind not in ("encoder", "decoder") or not block.bytes:
        return 0
    weights = 2 * tokens * block.parameters * block.bytes_per_token // block.bytes
    return weights + _attention_flops(block, layout, tokens, cached)


def _attention_flops(block: Block, layout: ModelLayout, tokens: int, cached: int) -> int:
    """Of each token with those before the pass: two operations for each value of its query, and two for its output."""
    cache = block.cache
    reach = min(cached, cache.window or cached) if cache.bytes_per_token else 0
    return 4 * tokens * reach * layout.hidden_size


def _memory(device: str) -> str:
    return "RAM" if device == "cpu" else f"memory of {device}"


def slowest(legs: Sequence[Leg]) -> Leg:
    """What a sweep is bound by."""
    return max(legs, key=lambda leg: leg.seconds)
