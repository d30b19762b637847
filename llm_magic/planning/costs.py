"""What a placement costs on every device, by purpose: weights, buffers, KV cache, activations, slots.

A block in RAM or on disk that a GPU computes arrives in one of a few slots there; from the disk it
passes a ring of pinned buffers in RAM, and so do keys and values of a block that visits a GPU. A block that the
CPU computes has its KV cache in RAM. Of a block
that is split its experts are in RAM, and everything else, with its KV cache, is on the GPU. On a
map without a GPU, blocks on disk are used where the system's page cache holds them when there is
room for all of them, and arrive in a ring of buffers in RAM when there is not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from llm_magic.machine import Device, Machine
from llm_magic.model import Block, ModelLayout, TensorInfo
from llm_magic.plan import DeviceUse, MemoryBudget, Placement, Plan, Workload
from llm_magic.planning.packed import HEADS_IN_ROWS, UNPACKED_EXPERTS_BYTES, UNPACKED_HEAD_BYTES
from llm_magic.units import MIB

SCAN_CHUNK_TOKENS = 64
"""Tokens for which a chunked recurrent scan keeps one state (the chunk size of transformers' kernels)."""

SCORES_BYTES = 128 * MIB
"""Of scores that attention without a kernel of torch makes at a time, where it is computed in parts."""

CACHE_PIECES = 4
"""Pinned buffers that keys and values of visiting blocks pass, a piece at a time: half of them in each direction."""

CACHES_GOING_BACK = 2
"""Layers whose new keys and values are on the GPU still, on their way back to RAM."""

_GROUP = 64  # columns that share a scale: rows of others are not unpacked one by one

_CACHE_PIECE_BYTES = 4 * MIB
"""Of such a piece: more than a bus carries while it is told of the next one, and little in RAM that may be full."""

_EXPERTS_ON_THE_WAY = 4
"""One of so many experts of a layer has room where those of the CPU compute in a long sweep, one after the other."""

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of a torch dtype; 8-bit floats take 1, names that are unknown count as 2."""
    return 1 if dtype.startswith("float8") else _DTYPE_BYTES.get(dtype, 2)


def slots_for(device: str) -> int:
    """How many offloaded blocks have room at a time: one is used, the next ones arrive.

    Three on a device that streams; two in RAM, where blocks come from the disk. Never more than
    there are offloaded blocks.
    """
    return 2 if device == "cpu" else 3


def activation_bytes(layout: ModelLayout, workload: Workload) -> int:
    """Peak of what one prefill pass keeps beside weights and KV cache, on a device that computes.

    With ``T`` tokens (prefill x batch), hidden size ``H``, MLP width ``I``, ``e`` bytes an element
    and ``k`` experts a token, an eager transformers layer peaks at::

        2·T·H·e                                     residual stream and its normed copy
      + max(6·T·H·e,                                q, k, v, rotated q and k, attention output (sdpa)
            8·T·H,                                  the norm's fp32 copy and its square
            3·T·k·I·e + [k > 1]·T·k·(I + H)·e)      act(gate), up, their product; experts: gate, tokens
                                                    (int8: 10·T·k·I, see ``_mlp_bytes``)
      + half of the largest layer's KV cache        ``torch.cat`` holds old and new keys at once
      + what attention over a prefix adds           see ``_attention_bytes``
      + 3 states for every scanned token            recurrent layers, see ``_scan_bytes``
      + the largest packed matrix in ``e`` bytes    a prefill unpacks one weight at a time, see ``_unpacked_bytes``
      + T·W·e                                       rows of ``W`` values for all layers (Gemma 3n, 4)

    Before the first layer, such rows take T·W·(2·e + 8): looked up, projected, and the norm's fp32 copies.

    A pass that is shorter than the context comes after a prefix (an earlier part of the prompt, a
    kept chat) that fills the rest of it.

    Read off ``LlamaMLP``, ``LlamaRMSNorm``, ``DynamicLayer.update`` and ``MambaMixer.slow_forward``
    of transformers 5. sdpa never materialises the T x T scores, eager attention does.
    """
    tokens = _tokens(workload)
    row = tokens * layout.hidden_size * dtype_bytes(layout.dtype)
    experts = layout.active_experts or 1
    width = layout.intermediate_size or 4 * layout.hidden_size
    gathered = experts * (row + tokens * width * dtype_bytes(layout.dtype)) if experts > 1 else 0
    mlp = tokens * experts * width * _mlp_bytes(layout) + gathered
    largest_cache = workload.largest_cache_bytes(layout)
    peak = 2 * row + max(6 * row, 8 * tokens * layout.hidden_size, mlp)
    rest = _attention_bytes(layout, workload) + _scan_bytes(layout, workload) + _unpacked_bytes(layout)
    beside = tokens * _row_beside(layout)
    kept = beside * dtype_bytes(layout.dtype)
    return max(peak + largest_cache // 2 + rest + kept, 2 * kept + 8 * beside)


def _row_beside(layout: ModelLayout) -> int:
    """Values that tables have for a token beside its embedding: for each layer some."""
    tables = [block for block in layout.blocks if block.looks_up and block.label != "embed"]
    return sum(tensor.shape[1] for block in tables for tensor in block.tensors if len(tensor.shape) == 2)


def can_prefill_in_parts(layout: ModelLayout) -> bool:
    """Whether a prompt may be read in several passes: recurrent states and encoders need one."""
    caches = layout.cache_costs
    keeps_all = any(cache.bytes_per_token for cache in caches) and not any(c.fixed_bytes for c in caches)
    return keeps_all and not layout.is_encoder_decoder


def longest_pass(plan: Plan, context: int, cached: int = 0, taken: Mapping[str, int] | None = None) -> int:
    """Tokens of a prompt that one prefill pass may read, by what the plan leaves spare.

    Parameters
    ----------
    context
        Tokens of the whole prompt.
    cached
        How many of them the KV cache holds already.
    taken
        Device -> bytes that the engine has of what the plan leaves spare.

    Returns
    -------
    int
        All that are left when they fit, else at least ``plan.workload.prefill_tokens``, which the
        plan has counted.
    """
    layout, batch, left = plan.layout, plan.workload.batch, context - cached
    computing = {place.compute for place in plan.placements}  # each `prefill` device among them
    computing |= {device for place in plan.placements if not place.prefill for device in place.computing}
    taken = taken or {}
    spares = (use.spare - taken.get(use.device, 0) for use in plan.uses if use.device in computing)
    spare = min(spares, default=0)

    def needed(workload: Workload) -> int:
        return activation_bytes(layout, workload) + max(
            _visit_bytes(plan.placements, workload).values(), default=0
        )

    room = needed(plan.workload) + max(0, spare)

    def is_too_long(tokens: int) -> bool:
        return needed(Workload(context, batch, tokens)) > room

    if not can_prefill_in_parts(layout) or not is_too_long(left):
        return left
    shortest = min(plan.workload.prefill_tokens, left)
    return shortest - 1 + max(1, bisect_left(range(shortest, left), True, key=is_too_long))


def logits_bytes(layout: ModelLayout, workload: Workload) -> int:
    """Logits of the last position and what sampling makes of them, on the head's device.

    ``generate`` keeps one position of a prefill, in the model's dtype and copied to fp32; top-k and
    top-p sort it (fp32 values, int64 indices) and take a softmax: B·V·(e + 4 + 4 + 8 + 4).
    """
    return workload.batch * layout.vocab_size * (dtype_bytes(layout.dtype) + 20)


def main_device(homes: Iterable[str], machine: Machine) -> str:
    """Where a forward pass starts: the first GPU among the homes of its blocks, or the CPU without one."""
    gpus = {gpu.id for gpu in machine.gpus}
    return next((home for home in homes if home in gpus), "cpu")


def streamed_bytes(block: Block, layout: ModelLayout) -> int:
    """Bytes that travel when an offloaded block runs: its tensors, and the tied one it borrows."""
    borrowed = 0 if block.bytes else max((layout.block(name).bytes for name in block.tied_to), default=0)
    return block.bytes + borrowed


def placeable(machine: Machine) -> tuple[Device, ...]:
    """The devices that a map may name, in the order in which they are filled."""
    tiers = {"gpu": 0, "cpu": 1, "disk": 2}
    return tuple(sorted((d for d in machine.devices if d.kind in tiers), key=lambda d: tiers[d.kind]))


def unified_pool(machine: Machine) -> tuple[Device, ...]:
    """The GPUs that take their memory from the RAM, and the CPU; empty when every device has its own."""
    gpus = tuple(device for device in machine.gpus if device.unified)
    return (*gpus, machine.device("cpu")) if gpus and machine.has("cpu") else ()


def device_uses(
    layout: ModelLayout,
    machine: Machine,
    budget: MemoryBudget,
    workload: Workload,
    placed: Sequence[Placement],
) -> tuple[DeviceUse, ...]:
    """Bytes by purpose of every device; the CPU of a unified memory appears only when it is used."""
    purposes = _bytes_by_purpose(layout, machine, workload, placed)
    uses = tuple(
        DeviceUse(
            device=device.id,
            total=device.total_bytes,
            limit=budget.limits.get(device.id, 0),
            reserve=budget.reserve.get(device.id, 0),
            other=device.used_bytes,
            **purposes[device.id],
        )
        for device in placeable(machine)
    )
    slots = _slot_bytes(layout, machine, workload, placed, is_mapped=reads_mapped(machine, uses, placed))
    shared = {device.id for device in unified_pool(machine) if device.kind == "cpu"}
    uses = tuple(replace(use, slots=slots[use.device]) for use in uses)
    return tuple(use for use in uses if use.planned or use.device not in shared)


def reads_mapped(machine: Machine, uses: Sequence[DeviceUse], placed: Sequence[Placement]) -> bool:
    """Whether the CPU uses the disk's blocks right in the page cache, without a copy of its own.

    So it does on a map without a GPU, when the RAM that the plan leaves free holds all of them.
    Buffers to read them into are not counted, because then there are none.
    """
    size = sum(place.block.bytes for place in placed if place.way == "read")
    if not size or {place.compute for place in placed} != {"cpu"}:
        return False
    ram = next(use for use in uses if use.device == "cpu")
    free = machine.device("cpu").free_bytes - ram.reserve
    return size <= free - (ram.planned - ram.slots)


def _bytes_by_purpose(
    layout: ModelLayout, machine: Machine, workload: Workload, placed: Sequence[Placement]
) -> defaultdict[str, Counter[str]]:
    """Everything but slots."""
    purposes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for place in placed:
        purposes[place.home]["weights"] += place.home_bytes
        purposes[place.compute]["split"] += place.rest_bytes
        purposes["cpu"]["kept"] += place.home_bytes if place.kept else 0
        purposes[place.modules_on]["buffers"] += place.block.buffer_bytes
        purposes[place.compute]["kv_cache"] += workload.cache_bytes(place.block)
    for device, size in _visit_bytes(placed, workload).items():
        purposes[device]["activations"] += size
    for device, kinds in _kinds_by_device(placed).items():
        # Looking up rows makes hidden states only.
        looks_up = kinds == {"embedding"}
        row = _tokens(workload) * layout.hidden_size * dtype_bytes(layout.dtype)
        purposes[device]["activations"] += row if looks_up else activation_bytes(layout, workload)
    if placed:
        purposes[logits_place(placed).compute]["activations"] += logits_bytes(layout, workload)
    if layout.draft and placed:
        main = main_device((place.home for place in placed if not place.block.is_idle), machine)
        purposes[main]["draft"] += draft_bytes(layout.draft, workload)
    return purposes


def draft_bytes(draft: ModelLayout, workload: Workload) -> int:
    """Weights, buffers and KV cache of a draft model."""
    return sum(block.bytes + block.buffer_bytes + workload.cache_bytes(block) for block in draft.blocks)


def cache_piece_bytes(visitors: Iterable[Block], workload: Workload) -> int:
    """Of the keys or values of these blocks, what is copied at a time."""
    most = max((workload.cache_bytes(block) // 2 for block in visitors), default=0)
    return min(_CACHE_PIECE_BYTES, max(1, most))


def new_cache_bytes(block: Block, workload: Workload) -> int:
    """KV cache of the tokens of one prefill pass."""
    return workload.batch * block.cache.bytes_for(min(workload.prefill_tokens, workload.context_length))


def _visit_bytes(placed: Sequence[Placement], workload: Workload) -> dict[str, int]:
    """GPU -> bytes of the keys and values of blocks on a visit.

    They come along, a block's at a time; the new ones of the blocks before are on their way back.
    """
    return {
        device: max(workload.cache_bytes(block) for block in visitors)
        + min(CACHES_GOING_BACK, len(visitors)) * max(new_cache_bytes(block, workload) for block in visitors)
        for device, visitors in _visitors(placed).items()
    }


def _visitors(placed: Sequence[Placement]) -> dict[str, list[Block]]:
    """Device -> blocks of the CPU that compute there in long sweeps."""
    visitors: defaultdict[str, list[Block]] = defaultdict(list)
    for place in placed:
        if place.prefill and not place.is_split:
            visitors[place.prefill].append(place.block)
    return visitors


def _kinds_by_device(placed: Sequence[Placement]) -> dict[str, set[str]]:
    """Computing device -> kinds of its blocks."""
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for place in placed:
        for device in place.computing if not place.block.is_idle else ():
            kinds[device].add(place.block.kind)
    return kinds


def _slot_bytes(
    layout: ModelLayout,
    machine: Machine,
    workload: Workload,
    placed: Sequence[Placement],
    *,
    is_mapped: bool,
) -> Counter[str]:
    """Room in which blocks arrive: on the GPUs, and in RAM for those that come from the disk."""
    arriving: defaultdict[str, list[int]] = defaultdict(list)
    staged: defaultdict[str, list[int]] = defaultdict(list)
    for place in placed:
        target = place.fetched_to
        if not target or (target == "cpu" and is_mapped) or place.is_split:
            continue
        size = streamed_bytes(place.block, layout)
        arriving[target].append(size)
        if place.way == "read" and place.compute != "cpu":
            staged[place.compute].append(size)
    slots = Counter[str]()
    for visitors in _visitors(placed).values():
        slots["cpu"] += CACHE_PIECES * cache_piece_bytes(visitors, workload)
    for place in placed:
        if place.is_split and place.prefill:
            slots[place.prefill] = max(slots[place.prefill], _on_the_way(place.block))
    for device, sizes in arriving.items():
        slots[device] += _ring_bytes(device, sizes)
    for device, sizes in staged.items():  # of a shared memory there is one only
        slots[device if machine.device(device).unified else "cpu"] += _ring_bytes("cpu", sizes)
    return slots


def _on_the_way(block: Block) -> int:
    """Room in which experts arrive one after the other: at least one comes while another computes."""
    if not block.experts:
        return 0
    return max(block.expert_bytes // _EXPERTS_ON_THE_WAY, -(-2 * block.expert_bytes // block.experts))


def _ring_bytes(device: str, sizes: Sequence[int]) -> int:
    return min(slots_for(device), len(sizes)) * max(sizes)


def logits_place(placed: Sequence[Placement]) -> Placement:
    """The placement that makes the logits: the head, or the last block of a model without one."""
    used = [place for place in placed if not place.block.is_idle] or placed
    return next((place for place in reversed(used) if place.block.kind == "head"), used[-1])


def _attention_bytes(layout: ModelLayout, workload: Workload) -> int:
    """What attention keeps beside its input and output.

    In a pass that is not the first one of its sequence, sdpa takes a mask (two of booleans, one in
    the model's dtype: tokens x context) and, for grouped queries, keys and values repeated for
    every head. Eager attention always does, and makes the scores of every head: twice in the
    model's dtype, once in fp32; where it is computed in parts, of some tokens at a time, and without copies.
    """
    tokens, context = min(workload.prefill_tokens, workload.context_length), workload.context_length
    is_eager, width = layout.details.get("attention") == "eager", dtype_bytes(layout.dtype)
    if not is_eager and (tokens == context or not can_prefill_in_parts(layout)):
        return 0
    growing = [cache for cache in layout.cache_costs if cache.bytes_per_token]
    reach = max((min(context, (cache.window or context) + tokens) for cache in growing), default=0)
    heads, kv_heads = layout.details.get("attention_heads", 0), layout.details.get("kv_heads", 0)
    groups = heads // kv_heads if kv_heads else 1
    repeated = groups * max((cache.bytes_for(context) for cache in growing), default=0) if groups > 1 else 0
    scores = tokens * reach * heads * (2 * width + 4) if is_eager else 0
    more = workload.batch * (scores + repeated)
    if layout.details.get("attends_in_parts"):
        more = min(more, max(SCORES_BYTES, workload.batch * reach * heads * (8 + width)))
    return workload.batch * tokens * reach * (2 + width) + more


def _scan_bytes(layout: ModelLayout, workload: Workload) -> int:
    """States that the scan of a recurrent layer keeps at once, three tensors of them.

    The Mamba path without its own kernels materialises one state a token; linear attention works
    in chunks.
    """
    state = max((cache.fixed_bytes for cache in layout.cache_costs), default=0)
    tokens = min(workload.prefill_tokens, workload.context_length)
    states = tokens if "Mamba" in layout.architecture else -(-tokens // SCAN_CHUNK_TOKENS)
    return 3 * workload.batch * states * state


def _mlp_bytes(layout: ModelLayout) -> int:
    """What the MLP keeps at once for each of its values: act(gate), up and their product.

    LLM.int8() has up as sums in 32 bits, in fp16 and in the model's dtype, beside act(gate).
    """
    width = dtype_bytes(layout.dtype)
    return 6 + 2 * width if layout.quantization == "int8" else 3 * width


def _unpacked_bytes(layout: ModelLayout) -> int:
    """The largest packed matrix as it is while a prefill multiplies with it, or the experts that are unpacked at once.

    quanto has floats a second time before their scale, and integers of less than a byte as bytes; a CPU has those
    in float32, where it is slow with 16 bits. A head is unpacked some rows at a time.
    """
    width = dtype_bytes(layout.dtype)
    before = {"float8": width, "int4": 2, "int2": 2, "mxfp4": 2}

    def most(block: Block, tensor: TensorInfo) -> int:
        count, experts = prod(tensor.shape[-2:]), prod(tensor.shape)
        method = layout.head_quantization if block.kind == "head" else layout.quantization
        if block.kind == "head" and method in HEADS_IN_ROWS and not tensor.shape[-1] % _GROUP:
            return min(count * width, UNPACKED_HEAD_BYTES)
        return max(count * (width + before.get(method, 0)), min(experts * width, UNPACKED_EXPERTS_BYTES))

    return max((most(*found) for found in _packed_weights(layout)), default=0)


def _packed_weights(layout: ModelLayout) -> Iterator[tuple[Block, TensorInfo]]:
    """The weights that take fewer bytes than in the dtype that computes."""
    if not layout.quantization:
        return
    width = dtype_bytes(layout.dtype)
    for block in layout.blocks:
        for tensor in block.tensors:
            if len(tensor.shape) >= 2 and tensor.bytes < prod(tensor.shape) * width:
                yield block, tensor


def _tokens(workload: Workload) -> int:
    """Tokens of one prefill pass."""
    return min(workload.prefill_tokens, workload.context_length) * workload.batch
