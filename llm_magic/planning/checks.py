"""What is wrong with a plan (problems), what a person should know about it (warnings), in sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from llm_magic.machine import Device
from llm_magic.model import ModelLayout
from llm_magic.plan import DeviceUse, Plan, Workload
from llm_magic.planning.budget import reserve_bytes, usable_bytes
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import (
    activation_bytes,
    can_prefill_in_parts,
    dtype_bytes,
    streamed_bytes,
    unified_pool,
)
from llm_magic.planning.packed import kernel_of, slow_on_cpu, slow_on_gpu
from llm_magic.planning.policies import POLICIES
from llm_magic.planning.setting import Setting
from llm_magic.planning.ways import computing_places, lacking
from llm_magic.units import format_bandwidth, format_bytes

_PURPOSES = (
    ("weights", "weights"),
    ("split", "layers without their experts"),
    ("kv_cache", "KV cache"),
    ("activations", "activations"),
    ("slots", "room for blocks that arrive"),
    ("kept", "blocks kept from the disk"),
    ("draft", "draft model"),
    ("buffers", "buffers"),
)
_LITTLE_SPARE = 0.05  # of a RAM: below it other programs start to swap
_MOST_OF_ROOM = 0.9
_MUCH_BESIDE = 0.2
_MUCH_UNPACKED = 0.5  # of a packed model: what stays plain decides its size then
_LARGE_HEAD = 0.25  # of what a token reads of a packed model: worth a word
_FOREIGN_SHARE = 0.1  # of a GPU's memory: held by others, worth a word


def problems(plan: Plan) -> tuple[str, ...]:
    """Why the plan does not fit; empty when it does."""
    return (*(_shortage(use, plan) for use in plan.uses if use.spare < 0), *_pool_shortage(plan))


def shortage_bytes(plan: Plan) -> int:
    """Bytes that lack over all devices; 0 when the plan fits."""
    return sum(max(0, -use.spare) for use in plan.uses) + max(0, _pool_excess(plan))


def too_large_block(plan: Plan) -> str:
    """A sentence about the largest offloaded block when it cannot arrive where it is used."""
    use = next((use for use in plan.uses if use.slots > use.limit), None)
    if use is None:
        return ""
    block = max((p.block for p in plan.offloaded), key=lambda b: streamed_bytes(b, plan.layout))
    size = streamed_bytes(block, plan.layout)
    count = max(1, use.slots // max(size, 1))
    what = f"One block of {format_bytes(size)} ({block.label}) does" if count == 1 else ""
    what = what or f"{count} blocks at a time of {format_bytes(size)} ({block.label}) do"
    return f"{what} not fit the {format_bytes(use.limit)} of {use.device}."


def warnings(plan: Plan, max_memory: dict[str, int]) -> tuple[str, ...]:
    """What to know before loading, most important first."""
    return (
        *_unused_gpu(plan),
        *_cache_beside(plan),
        *_disk(plan),
        *_unpacked(plan),
        *_context(plan),
        *_long_prompt(plan),
        *_memory_in_use(plan),
        *_capped(plan, max_memory),
    )


def _shortage(use: DeviceUse, plan: Plan) -> str:
    device = plan.machine.device(use.device)
    others = f" Other programs hold {format_bytes(device.other_bytes)} of it." if _is_foreign(device) else ""
    parts = [f"{format_bytes(getattr(use, key))} {words}" for key, words in _PURPOSES if getattr(use, key)]
    return (
        f"{_device(use)} lacks {format_bytes(-use.spare)}: {' + '.join(parts)}, "
        f"of {format_bytes(use.limit)} that can be used.{others}"
    )


def _is_foreign(device: Device) -> bool:
    """Whether other processes hold enough of a GPU to be worth a word."""
    return (
        device.kind == "gpu"
        and not device.unified
        and device.other_bytes > device.total_bytes * _FOREIGN_SHARE
    )


def _pool_excess(plan: Plan) -> int:
    """What devices that share one memory take together beyond it; it is counted once."""
    pool = unified_pool(plan.machine)
    names = {device.id for device in pool}
    users = [use for use in plan.uses if use.device in names and use.planned]
    if len(users) < 2 or any(use.spare < 0 for use in users):
        return 0
    return sum(use.planned for use in users) - max(usable_bytes(device) for device in pool)


def _pool_shortage(plan: Plan) -> Iterator[str]:
    excess = _pool_excess(plan)
    if excess > 0:
        names = " and ".join(device.id for device in unified_pool(plan.machine))
        yield f"{names} share one memory, which lacks {format_bytes(excess)} for both together."


def _unused_gpu(plan: Plan) -> Iterator[str]:
    gpus, used = plan.machine.gpus, {place.compute for place in plan.placements}
    if not gpus:
        yield "No GPU was found: the CPU computes."
    elif not used & {gpu.id for gpu in gpus}:
        room = max(plan.budget.limits.get(gpu.id, 0) for gpu in gpus)
        why = (
            "as the placement asks"
            if plan.policy not in ("auto", "balanced", "balanced_low_0", "sequential")
            else f"its {format_bytes(room)} cannot take the KV cache, the activations and blocks that arrive"
        )
        yield f"{gpus[0].id} is not used, {why}: the CPU computes."
    if unified_pool(plan.machine):
        names = " and ".join(device.id for device in unified_pool(plan.machine))
        yield f"{names} share one memory: moving blocks between them frees nothing; what does not fit goes to disk."


def _cache_beside(plan: Plan) -> Iterator[str]:
    """The CPU computes what GPUs have no room for, most often for its keys and values."""
    taken = [p for p in plan.placements if p.compute == "cpu" and p.block.kind == "decoder"]
    if any(use.spare < 0 for use in plan.uses) or all(p.compute == "cpu" for p in plan.placements):
        return
    setting = Setting.of(plan, Constants())
    plain = computing_places(setting, plan.device_map)
    full = lacking(setting, plain)
    if not taken or not full or _is_by_choice(plan):
        return
    layers = "1 layer" if len(taken) == 1 else f"{len(taken)} layers"
    size = format_bytes(sum(plan.workload.cache_bytes(place.block) for place in taken))
    short = [use for use in setting.uses(plain) if use.device in full]
    if any(-use.spare > use.kv_cache for use in short):  # whatever the context is
        yield (
            f"There is no room on {' and '.join(full)} for all layers to compute there: "
            f"the CPU decodes {layers} of those in RAM."
        )
    else:
        yield (
            f"The KV cache of all layers does not fit {' and '.join(full)}: that of {layers}, {size}, is in RAM, "
            "and the CPU decodes them. A smaller -c N takes less."
        )


def _is_by_choice(plan: Plan) -> bool:
    """Whether a policy could have left the keys and values of all layers on the GPUs, with less of the rest there."""
    uses = [use for use in plan.uses if use.device.startswith("cuda")]
    rest = sum(use.planned - use.weights - use.kv_cache for use in uses)
    cache = sum(plan.workload.cache_bytes(block) for block in plan.layout.layers)
    is_ours = plan.policy in {policy.name for policy in POLICIES}
    return is_ours and cache + rest <= sum(use.limit for use in uses)


def _disk(plan: Plan) -> Iterator[str]:
    on_disk = [place for place in plan.placements if place.home == "disk" and not place.block.is_idle]
    if not on_disk:
        return
    blocks = [place for place in on_disk if place.is_offloaded or place.is_split]
    read = [place for place in blocks if not place.kept]
    disk = plan.machine.device("disk")
    speed = f" at {format_bandwidth(disk.read_bytes_per_s)}" if disk.read_bytes_per_s else ""
    what, size = _blocks(len(read)), sum(place.block.bytes for place in read)
    if read and plan.mapped:
        yield (
            f"{what} of {format_bytes(size)} on disk, read once{speed}: the system's page cache has room "
            "for them, as long as other programs leave it."
        )
    elif read:
        yield f"{what} of {format_bytes(size)} on disk, read again for every token{speed}: slow."
    if len(read) < len(blocks):
        kept = sum(place.home_bytes for place in blocks if place.kept)
        yield f"{_blocks(len(blocks) - len(read))} of {format_bytes(kept)} on disk, of which RAM keeps a copy."
    whole = sum(place.block.bytes for place in on_disk)
    if whole > max(0, disk.free_bytes - reserve_bytes(disk)):
        yield (
            f"The disk has {format_bytes(disk.free_bytes)} free. That is enough while blocks are read from "
            "the model's own files, not if they must be converted."
        )


def _context(plan: Plan) -> Iterator[str]:
    trained = plan.layout.context_length
    if trained and plan.workload.context_length > trained:
        yield (
            f"The context of {plan.workload.context_length:,} tokens is longer than the {trained:,} "
            "that the model was made for: answers may turn to nonsense."
        )


def _unpacked(plan: Plan) -> Iterator[str]:
    """What is larger than its files or its method promise, or slower."""
    layout = plan.layout
    method = layout.details.get("quantization")
    if method and not layout.quantization:
        yield (
            f"Its {method} weights are loaded as {layout.dtype}, larger than in the files. "
            "--quantize nf4 packs them again."
        )
    plain = layout.details.get("unpacked_bytes", 0)
    if layout.quantization and plain > layout.bytes * _MUCH_UNPACKED:
        yield (
            f"{format_bytes(plain)} of it stay {layout.dtype}: {layout.quantization} packs linear layers, "
            "and experts that are computed one by one."
        )
    yield from _beside_experts(plan)
    yield from _large_head(layout)
    yield from _slow_kernels(plan)


def _beside_experts(plan: Plan) -> Iterator[str]:
    """Experts that came packed beside layers that did not."""
    layout = plan.layout
    layers = [block for block in layout.blocks if block.kind == "decoder"]
    read = sum(block.bytes_per_token for block in layers)
    beside = sum(block.bytes - block.expert_bytes for block in layers)
    if layout.quantization == "mxfp4" and beside > _MUCH_BESIDE * read:
        on_gpu = any(
            place.compute != "cpu" for place in plan.placements
        )  # whose steps int8 keeps from being captured
        yield (
            f"Beside the experts, {100 * beside / read:.0f} % of what a token reads of the layers stay {layout.dtype}. "
            f"--quantize {'nf4' if on_gpu else 'int8'} packs that, too, and leaves the experts as they are."
        )


def _large_head(layout: ModelLayout) -> Iterator[str]:
    """Packed layers beside a head that is not: with a large vocabulary a token waits for the head then."""
    layers = sum(block.bytes_per_token for block in layout.blocks if block.kind == "decoder")
    head = sum(streamed_bytes(block, layout) for block in layout.blocks if block.kind == "head")
    stays = not layout.quantization or layout.head_quantization or layout.details.get("keeps_head")
    if not stays and head > _LARGE_HEAD * (head + layers):
        yield (
            f"The head, {100 * head / (head + layers):.0f} % of what a token reads, stays {layout.dtype}. "
            "--quantize-head int8 packs it, too."
        )


def _slow_kernels(plan: Plan) -> Iterator[str]:
    """Packed weights that what computes them has no good kernel for."""
    layout = plan.layout
    gpus = {place.compute for place in plan.placements if place.block.kind != "norm"} - {"cpu"}
    slow = [
        gpu for gpu in sorted(gpus) if layout.quantization and slow_on_gpu(layout, plan.machine.device(gpu))
    ]
    if slow:
        floats = kernel_of(replace(layout, dtype="bfloat16")) != kernel_of(layout)
        quick = floats and not slow_on_gpu(replace(layout, dtype="bfloat16"), plan.machine.device(slow[0]))
        remedy = f"{'--dtype bfloat16' if quick else '--quantize nf4'} is several times as fast there."
        if layout.details.get("no_gpu_kernel"):
            remedy = "pip install bitsandbytes brings one that is several times as fast."
        yield (
            f"{', '.join(slow)} unpacks {layout.quantization} in {layout.dtype} for every token, by several kernels. "
            f"{remedy}"
        )
    yield from _better_as_numbers(plan, gpus)
    by_cpu = any("cpu" in place.computing for place in plan.placements)
    if layout.quantization and by_cpu and slow_on_cpu(layout, plan.machine.device("cpu")):
        yield f"{layout.quantization} is slow on the CPU without the kernels that llvmlite compiles for AVX2, AVX-512 and NEON."


def _better_as_numbers(plan: Plan, gpus: Collection[str]) -> Iterator[str]:
    """Floats of 8 bits on a GPU that has room for all of them in 16: these it need not make for every token."""
    layout = plan.layout
    is_whole = all(place.way == "resident" for place in plan.placements if place.block.kind == "decoder")
    if layout.quantization != "fp8" or not gpus or not is_whole:
        return
    numbers = dtype_bytes(layout.dtype) * sum(block.parameters for block in layout.blocks)
    room = sum(plan.machine.device(gpu).free_bytes for gpu in gpus)
    if numbers < _MOST_OF_ROOM * room:
        yield (
            f"{', '.join(sorted(gpus))} makes numbers of fp8 for every token, and has room for all of them. "
            "--quantize none is several times as fast there."
        )


def _long_prompt(plan: Plan) -> Iterator[str]:
    """Activations grow with the prompt, where one pass must read it: a long one may not fit."""
    if can_prefill_in_parts(plan.layout):
        return
    whole = Workload(plan.workload.context_length, plan.workload.batch, plan.workload.context_length)
    if whole.prefill_tokens <= plan.workload.prefill_tokens:
        return
    more = activation_bytes(plan.layout, whole) - activation_bytes(plan.layout, plan.workload)
    tight = [use for use in plan.uses if use.activations and 0 <= use.spare < more]
    if tight:
        use = min(tight, key=lambda use: use.spare)
        tokens = plan.workload.prefill_tokens
        longest = tokens + (whole.prefill_tokens - tokens) * use.spare // more
        yield (
            f"A prompt of more than about {longest:,} tokens may not fit: activations on {use.device} "
            f"grow by {format_bytes(more)} up to the whole context, and {format_bytes(use.spare)} are spare."
        )


def _memory_in_use(plan: Plan) -> Iterator[str]:
    for use in plan.uses:
        device = plan.machine.device(use.device)
        if _is_foreign(device) and (plan.offloaded or any(place.is_split for place in plan.placements)):
            held = format_bytes(device.other_bytes)
            yield f"Other programs hold {held} of {use.device}; without them more blocks fit."
        nearly = 0 <= use.spare < use.total * _LITTLE_SPARE and use.planned
        overflows = any(p.home == "disk" and not p.block.is_idle for p in plan.placements)  # full by intent
        if device.kind == "cpu" and nearly and not overflows and use.device not in plan.budget.explicit:
            yield f"Only {format_bytes(use.spare)} of RAM stay spare: close other programs."


def _capped(plan: Plan, max_memory: dict[str, int]) -> Iterator[str]:
    for device, asked in max_memory.items():
        limit = plan.budget.limits[device]
        if limit < asked:
            yield f"{device}: {format_bytes(asked)} were asked for, {format_bytes(limit)} can be used."


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def _device(use: DeviceUse) -> str:
    """The name that ``--max-memory`` takes, and what it is where that is not plain."""
    return "cpu (RAM)" if use.device == "cpu" else use.device
