"""A noun → its state on the wire: the map of a plan, the machine, a job, an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from llm_magic.harmless.paths import without_paths
from llm_magic.harmless.terminal import sanitize
from llm_magic.machine import Device, Machine
from llm_magic.plan import DeviceUse, Placement, Plan
from llm_magic.planning.costs import placeable
from llm_magic.result import Footprint
from llm_magic.views.commands import command_of
from llm_magic.views.llama_cpp import llama_cpp_options
from llm_magic.views.map import is_drawn_whole
from llm_magic.views.python import python_of
from llm_magic.wire import (
    BlockState,
    DeviceState,
    ExportState,
    LinkState,
    MachineState,
    MapState,
    MoveState,
    PlanState,
    Status,
    TierState,
)

Memory = Mapping[str, Mapping[str, int]]


def map_state(
    plan: Plan,
    *,
    model: str = "",
    status: Status = "planned",
    memory: Memory | None = None,
    before: Plan | None = None,
    last: Footprint | None = None,
    policies: list[str],
    backend: str = "",
) -> MapState:
    """The memory map of a plan.

    Parameters
    ----------
    model
        The name under which it is loaded.
    memory
        Device -> purpose -> bytes as a loaded model holds them.
    before
        The plan that is in force, where ``plan`` is a proposal: the commands say what changes.
    last
        How the model's last answer was made.
    backend
        What the backend calls this placement, where it cannot place every block by itself.
    """
    return MapState(
        model=model,
        status=status,
        plan=plan_state(plan, memory=memory, before=before, model=model, backend=backend),
        policies=policies,
        measured_tps=last.generation_tps if last else 0.0,
        tokens_per_sweep=last.tokens_per_sweep if last else 0.0,
        limit_share=last.limit_share if last else 0.0,
    )


def plan_state(
    plan: Plan,
    *,
    memory: Memory | None = None,
    before: Plan | None = None,
    model: str = "",
    backend: str = "",
) -> PlanState:
    """A plan with everything that its picture needs; see ``map_state``."""
    layout, forecast = plan.layout, plan.forecast
    return PlanState(
        name=_clean(layout.name),
        dtype=layout.dtype,
        quantization=layout.packing,
        bytes=layout.bytes,
        parameters=layout.parameters,
        context_length=plan.workload.context_length,
        policy=_clean(plan.policy),
        fits=plan.fits,
        mapped=plan.mapped,
        blocks=[_block(plan, place) for place in plan.placements],
        tiers=[_tier(plan, use, (memory or {}).get(use.device, {})) for use in plan.uses],
        moves=moves(plan),
        decode_tps=forecast.decode_tps,
        prefill_tps=forecast.prefill_tps,
        limit_tps=forecast.limit_tps,
        bound_by=_clean(forecast.bound_by),
        warnings=[_clean(text) for text in plan.warnings],
        problems=[_clean(text) for text in plan.problems],
        remedies=[_clean(text) for text in plan.remedies],
        long_sweep=plan.long_sweep,
        exports=ExportState(
            python=_clean(python_of(plan)),
            command=_clean(command_of(plan, before, model)),
            json=_clean(json.dumps(plan.device_map, indent=1)),
            llama_cpp=llama_cpp_options(plan),
            backend=_clean(backend),
        ),
    )


def machine_state(machine: Machine, plan: Plan | None = None, model: str = "") -> MachineState:
    """The machine, with the path of one token's bytes of a plan."""
    return MachineState(
        name=_clean(machine.name),
        described=machine.described,
        devices=[_device(device) for device in machine.devices],
        links=[
            LinkState(
                source=link.source,
                target=link.target,
                bytes_per_s=link.bytes_per_s,
                name=_clean(link.name),
                measured_on=link.measured_on,
                assumed=link.assumed,
            )
            for link in machine.links
        ],
        model=_clean(model),
        moves=moves(plan) if plan else [],
    )


def moves(plan: Plan) -> list[MoveState]:
    """What one decoded token moves, and what devices read of their own memory (source is target)."""
    return [
        MoveState(
            source=source,
            target=target,
            bytes=size,
            bytes_per_s=_speed(plan.machine, source, target),
        )
        for (source, target), size in plan.forecast.bytes_per_token.items()
        if size
    ]


def _speed(machine: Machine, source: str, target: str) -> float:
    speed = machine.bytes_per_s(source, target)
    if not speed and source == "disk" and machine.has("disk"):
        return machine.bytes_per_s("disk", "cpu") or machine.device("disk").read_bytes_per_s
    return speed


def _block(plan: Plan, place: Placement) -> BlockState:
    block = place.block
    dtypes = sorted({tensor.dtype for tensor in block.tensors}) or [plan.layout.dtype]
    return BlockState(
        label=sanitize(block.label),
        kind=block.kind,
        bytes=block.bytes,
        dtype=", ".join(dtypes),
        home=place.home,
        compute=place.compute,
        way=place.way,
        cache_bytes=plan.workload.cache_bytes(block),
        tied_to=[sanitize(plan.layout.block(name).label) for name in block.tied_to],
        experts=block.experts,
        active_experts=block.active_experts,
        prefill=place.prefill,
        looks_up=block.looks_up,
        rest_bytes=place.rest_bytes,
    )


def _tier(plan: Plan, use: DeviceUse, now: Mapping[str, int]) -> TierState:
    device = plan.machine.device(use.device)
    holding = {found.id for found in placeable(plan.machine)}
    return TierState(
        device=use.device,
        kind=device.kind,
        name=_clean(device.name),
        total=use.total,
        free=device.free_bytes,
        unified=device.unified,
        limit=use.limit,
        is_limited=use.device in plan.budget.explicit,
        is_whole=is_drawn_whole(plan, use),
        can_hold=use.device in holding,
        weights=use.weights,
        split=use.split,
        kept=use.kept,
        draft=use.draft,
        slots=use.slots,
        kv_cache=use.kv_cache,
        activations=use.activations,
        buffers=use.buffers,
        reserve=use.reserve,
        other=use.other,
        planned=use.planned,
        spare=use.spare,
        now=dict(now),
    )


def _device(device: Device) -> DeviceState:
    return DeviceState(
        id=device.id,
        kind=device.kind,
        name=_clean(device.name),
        total=device.total_bytes,
        free=device.free_bytes,
        other=device.other_bytes,
        read_bytes_per_s=device.read_bytes_per_s,
        flops=device.flops,
        unified=device.unified,
        measured_on=device.measured_on,
        method=_clean(device.method),
        assumed=list(device.assumed),
    )


def _clean(text: str) -> str:
    """Fit for a saved notebook and a screen: no paths of this computer, no control characters."""
    return sanitize(without_paths(text))
