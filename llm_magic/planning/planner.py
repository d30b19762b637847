"""A layout, a machine and a policy (or a map) -> a checked ``Plan``.

Planners only choose homes. Bytes, forecast and checks come from one code for all of them, so no
planner can promise what does not fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from llm_magic.errors import PlanError
from llm_magic.hookspecs import Planner, hookimpl
from llm_magic.machine import Machine
from llm_magic.model import Block, CacheCost, ModelLayout
from llm_magic.plan import Plan, Workload
from llm_magic.planning import checks
from llm_magic.planning.budget import device_name, make_budget
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import dtype_bytes, placeable, reads_mapped
from llm_magic.planning.device_map import read_device_map, resolve_device_map
from llm_magic.planning.forecast import long_sweep_of, make_forecast, prompt_seconds
from llm_magic.planning.policies import POLICIES
from llm_magic.planning.policies import auto as _auto
from llm_magic.planning.setting import Setting
from llm_magic.planning.ways import place_blocks
from llm_magic.units import MIB, format_bytes, format_rate

__all__ = [
    "make_budget",
    "make_plan",
    "read_device_map",
    "refusal",
    "register_planners",
    "with_room_for_prompts",
]

_SHORTEST_CONTEXT = 256
_CLEARLY_FASTER = 1.2
_PROMPT, _ANSWER = 2048, 256  # tokens
_CPU = next(planner for planner in POLICIES if planner.name == "cpu")


@hookimpl
def register_planners(register: Callable[[Planner], None]) -> None:
    """Register the built-in policies."""
    for planner in POLICIES:
        register(planner)


def make_plan(
    layout: ModelLayout,
    machine: Machine,
    workload: Workload,
    *,
    placement: Planner | Mapping[str, str],
    policy: str,
    max_memory: Mapping[str, int] | None = None,
    source: str = "",
    options: Mapping[str, str] | None = None,
    constants: Constants | None = None,
) -> Plan:
    """Place the blocks and say what that costs.

    A plan that does not fit is returned, with ``problems`` and ``remedies``.

    Parameters
    ----------
    placement
        A policy, or a device map of block names, labels or module names.
    policy
        What to call it: the policy's name, or the file of the map.
    max_memory
        Device -> bytes; see ``make_budget``.
    source, options
        What the user asked to load, for the equivalent Python (``options["dtype"]``,
        ``options["revision"]``, ``options["offload_folder"]``, ``options["gguf_file"]``).
    constants
        What the cost model assumes of this machine; without them, what was measured on others.

    Raises
    ------
    PlanError
        When the map (also a planner's) is not one device for every block, or ``max_memory`` names
        an unknown device.
    """
    if not layout.blocks:
        raise PlanError(f"{layout.name} has no blocks to place.", "Choose a model with weights.")
    limits = {device_name(key, machine): limit for key, limit in (max_memory or {}).items()}
    request = _Request(
        layout,
        machine,
        workload,
        placement,
        policy,
        max_memory or {},
        source,
        options or {},
        constants or Constants(),
    )
    plan = _place(request)
    plan = replace(plan, problems=checks.problems(plan), warnings=checks.warnings(plan, limits))
    if not plan.fits:
        return replace(plan, remedies=tuple(_remedies(plan, request)))
    return replace(plan, warnings=(*_faster_on_the_cpu(plan, request), *plan.warnings))


def refusal(plan: Plan) -> PlanError:
    """The error that says why a plan cannot be loaded, and what could be."""
    remedy = plan.remedies[0] if plan.remedies else "Choose a smaller model."
    return PlanError(f"{plan.layout.name} does not fit: {' '.join(plan.problems)}", remedy)


def with_room_for_prompts(plan: Plan, planned: Callable[[int], Plan]) -> Plan:
    """The plan, or one with room for longer passes through a prompt where that pays.

    What is offloaded goes to a GPU once for each pass, so passes of twice the length take half the time, as long as
    the bus is what they wait for. Their hidden states take room from layers, and answers are slower then. It
    is weighed for a prompt of `_PROMPT` tokens and an answer of `_ANSWER`.

    Parameters
    ----------
    planned
        Makes the same plan for passes of so many tokens.
    """
    gpus = {gpu.id for gpu in plan.machine.gpus}
    if not plan.fits or not any(place.fetched_to in gpus for place in plan.placements):
        return plan
    tokens = plan.workload.prefill_tokens
    while (tokens := 2 * tokens) <= min(_PROMPT, plan.workload.context_length):
        longer = planned(tokens)
        if longer.fits and _answer_s(longer) < _answer_s(plan):
            plan = longer
    return plan


def _answer_s(plan: Plan) -> float:
    decode_tps, prompt_s = plan.forecast.decode_tps, prompt_seconds(plan, _PROMPT)
    return prompt_s + _ANSWER / decode_tps if decode_tps and prompt_s else math.inf


@dataclass(frozen=True)
class _Request:
    layout: ModelLayout
    machine: Machine
    workload: Workload
    placement: Planner | Mapping[str, str]
    policy: str
    max_memory: Mapping[str, int]
    source: str
    options: Mapping[str, str]
    constants: Constants


def _place(request: _Request) -> Plan:
    """The plan without its sentences."""
    layout, machine, workload = request.layout, request.machine, request.workload
    budget = make_budget(machine, request.max_memory)
    if isinstance(request.placement, Planner):
        device_map = _planned(request.placement, request)
    else:
        device_map = resolve_device_map(request.placement, layout, machine)
    setting = Setting(layout, machine, budget, workload, request.constants)
    placed = place_blocks(setting, device_map)
    uses = setting.uses(placed)
    return Plan(
        request.source,
        layout,
        machine,
        workload,
        budget,
        request.policy,
        placed,
        uses,
        make_forecast(setting, placed, uses),
        options=request.options,
        mapped=reads_mapped(machine, uses, placed),
        long_sweep=long_sweep_of(setting, placed, uses),
        constants=request.constants.to_json(),
    )


def _planned(planner: Planner, request: _Request) -> dict[str, str]:
    """A planner's map, checked like a person's: it may come from a plugin."""
    layout, machine = request.layout, request.machine
    budget = make_budget(machine, request.max_memory)
    remedy = "Use --device-map auto, or tell the plugin's author."
    try:
        answer = planner.place(layout, budget, machine, request.workload)
    except Exception as error:  # a plugin's code: anything can come out of it
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise PlanError(f"The policy {planner.name} failed: {what}", remedy) from error
    if not isinstance(answer, Mapping) or not all(isinstance(key, str) for key in answer):
        raise PlanError(f"The policy {planner.name} gave no map of block names to devices.", remedy)
    try:
        return resolve_device_map(answer, layout, machine)
    except PlanError as error:
        message = f"The policy {planner.name} gave an invalid map: {error.message}"
        raise PlanError(message, remedy) from error


def _faster_on_the_cpu(plan: Plan, request: _Request) -> Iterator[str]:
    """Streaming over a bus can be slower than computing where the weights are: worth a word before loading."""
    is_offloaded = plan.offloaded or any(place.is_split for place in plan.placements)
    if not is_offloaded or plan.placements[0].compute == "cpu" or not plan.machine.has("cpu"):
        return
    on_cpu = _place(replace(request, placement=_CPU, policy=_CPU.name))
    if checks.problems(on_cpu):
        return
    if on_cpu.forecast.decode_tps > _CLEARLY_FASTER * plan.forecast.decode_tps > 0:
        speed, other = format_rate(on_cpu.forecast.decode_tps), format_rate(plan.forecast.decode_tps)
        yield f"--device-map cpu is forecast to decode at {speed} instead of {other}; prompts take longer there."


def _remedies(plan: Plan, request: _Request) -> Iterator[str]:
    """What would fit, the smallest change first; each was planned and found to fit."""
    block, least = checks.too_large_block(plan), _least_memory(plan, request)
    if block and least:
        yield f"{block} {least}"
    context = _longest_context(request)
    if context:
        yield f"With --ctx-size {context} it fits."
    if least and not block:
        yield least
    if plan.policy != "auto" and _fits(replace(request, placement=_AUTO)):
        yield "With --device-map auto it fits."
    half = _in_half_precision(request)
    if half and _fits(half):
        yield f"With --dtype {half.layout.dtype} it fits."
    if block and not least:
        yield block
    yield _more_memory(plan)


_AUTO = next(planner for planner in POLICIES if planner.place is _auto)


def _fits(request: _Request) -> bool:
    return not checks.problems(_place(request))


def _longest_context(request: _Request) -> int:
    """The longest context that fits, in steps of 256 tokens; 0 when even the shortest does not."""

    def is_too_long(steps: int) -> bool:
        context = steps * _SHORTEST_CONTEXT
        return not _fits(replace(request, workload=replace(request.workload, context_length=context)))

    most = (request.workload.context_length - 1) // _SHORTEST_CONTEXT
    steps = bisect_left(range(1, most + 1), True, key=is_too_long)
    return steps * _SHORTEST_CONTEXT


def _least_memory(plan: Plan, request: _Request) -> str:
    """The smallest limit that would do, when a limit that the user gave is what is too small."""
    for use in plan.uses:
        given = use.device in plan.budget.explicit and use.spare < 0
        ceiling = make_budget(plan.machine, {}).limits[use.device]
        if not given or ceiling <= use.limit:
            continue
        others = {k: v for k, v in request.max_memory.items() if device_name(k, plan.machine) != use.device}

        def is_enough(mib: int, device: str = use.device, others: Mapping[str, int] = others) -> bool:
            return _fits(replace(request, max_memory={**others, device: mib * MIB}))

        sizes = range(use.limit // MIB, ceiling // MIB + 1)
        index = bisect_left(sizes, True, key=is_enough)
        if index < len(sizes):
            return f"With --max-memory {use.device}={sizes[index]}MiB it fits."
    return ""


def _in_half_precision(request: _Request) -> _Request | None:
    """The same request with 16-bit weights and cache; ``None`` when they are already."""
    layout = request.layout
    if dtype_bytes(layout.dtype) <= 2:
        return None
    blocks = tuple(_halved(block) for block in layout.blocks)
    return replace(request, layout=replace(layout, blocks=blocks, dtype="bfloat16"))


def _halved(block: Block) -> Block:
    tensors = tuple(
        replace(t, dtype="bfloat16", bytes=t.bytes // 2) if t.dtype == "float32" else t for t in block.tensors
    )
    cache = CacheCost(block.cache.bytes_per_token // 2, block.cache.fixed_bytes, block.cache.window)
    return replace(block, tensors=tensors, cache=cache, expert_bytes=block.expert_bytes // 2)


def _more_memory(plan: Plan) -> str:
    lacking = format_bytes(checks.shortage_bytes(plan))
    kinds = {device.kind for device in placeable(plan.machine)}
    if "disk" not in kinds:
        return f"It needs {lacking} more memory, or a disk to offload to."
    return (
        f"It needs {lacking} more on {', '.join(use.device for use in plan.uses if use.spare < 0) or 'RAM'}."
    )
