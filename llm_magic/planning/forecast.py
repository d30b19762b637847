"""How fast a placement will answer, from bytes per token and measured bandwidths.

`sweep.py` has the cost model; here are its answers for decode and prefill, and the hardware's limit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llm_magic.plan import DeviceUse, Forecast, Placement, Plan
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import reads_mapped
from llm_magic.planning.packed import head_kernel_of, kernel_of
from llm_magic.planning.setting import Setting
from llm_magic.planning.sweep import (
    Engine,
    Sweep,
    can_capture,
    can_record_layers,
    disk_bytes_per_s,
    in_long_sweep,
    link_bytes_per_s,
    parts,
    seconds,
    slowest,
    sweep_of,
    tokens_before,
)

_USUALLY_LONG = 32
"""Tokens of a sweep from which on streaming pays where nobody knows how fast the devices multiply.

llama.cpp has its GPU compute from as many on what lies in RAM.
"""


def make_forecast(setting: Setting, placed: Sequence[Placement], uses: Sequence[DeviceUse]) -> Forecast:
    """Decode and prefill speed; 0 and ``"unknown"`` when a needed bandwidth is not known.

    Prefill is the rate of a prompt of ``prefill_tokens``, decode that right after it, one token a sweep. Each sweep
    serves ``batch`` sequences.
    """
    workload, engine = setting.workload, engine_of(setting, placed, uses)
    decode = sweep_of(setting.layout, workload, placed, tokens=1)
    moved, legs = _moved(decode, engine), parts(decode, engine)
    if legs is None:
        return Forecast(0.0, 0.0, "unknown", moved)
    bound = slowest(legs)
    decode_tps = workload.batch / max(bound.seconds, 1e-9)
    limit_tps = workload.batch / max(_least_seconds(decode, engine), 1e-9)
    tokens = min(workload.prefill_tokens, workload.context_length)
    prompt_s = _prompt_s(setting, placed, engine, tokens)
    prefill_tps = tokens * workload.batch / max(prompt_s, 1e-9) if prompt_s is not None else 0.0
    return Forecast(decode_tps, prefill_tps, bound.words, moved, limit_tps)


def long_sweep_of(setting: Setting, placed: Sequence[Placement], uses: Sequence[DeviceUse]) -> int:
    """Tokens, of all sequences, from which on a sweep is faster with ``prefill`` devices; 0 without any."""
    if not any(place.prefill for place in placed):
        return 0
    workload, engine = setting.workload, engine_of(setting, placed, uses)
    streamed, cached = in_long_sweep(placed), tokens_before(workload, setting.layout)

    def is_long(tokens: int) -> bool:
        pair = (
            sweep_of(setting.layout, workload, each, tokens=tokens, cached=cached)
            for each in (streamed, placed)
        )
        there, here = (seconds(sweep, engine, is_prefill=True) for sweep in pair)
        return tokens >= _USUALLY_LONG if there is None or here is None else there < here

    most = min(workload.prefill_tokens, workload.context_length)
    shortest = 2  # one token is what the CPU's share was chosen for
    return workload.batch * (shortest + bisect_left(range(shortest, most), True, key=is_long))


def engine_of(setting: Setting, placed: Sequence[Placement], uses: Sequence[DeviceUse]) -> Engine:
    """How blocks placed like this will run."""
    machine = setting.machine
    return Engine(
        machine,
        setting.constants,
        is_mapped=reads_mapped(machine, uses, placed),
        is_captured=can_capture(setting.layout, machine, placed),
        records_layers=len({device for place in placed for device in place.computing}) > 1
        and can_record_layers(setting.layout, placed),
        kernel=kernel_of(setting.layout),
        head_kernel=head_kernel_of(setting.layout),
    )


def prompt_seconds(plan: Plan, tokens: int) -> float | None:
    """How long it takes to read a prompt of so many tokens, pass by pass; ``None`` when a bandwidth is unknown."""
    setting = Setting.of(plan, Constants.from_json(plan.constants))
    return _prompt_s(setting, plan.placements, engine_of(setting, plan.placements, plan.uses), tokens)


def _prompt_s(setting: Setting, placed: Sequence[Placement], engine: Engine, tokens: int) -> float | None:
    """Each pass finds what the ones before it have left in the KV cache."""
    layout, workload, streamed = setting.layout, setting.workload, in_long_sweep(placed)
    spent = 0.0
    for cached in range(0, tokens, workload.prefill_tokens):
        new = min(workload.prefill_tokens, tokens - cached)
        sweep = sweep_of(layout, workload, streamed, tokens=new, cached=cached)
        each = seconds(sweep, engine, is_prefill=True)
        if each is None:
            return None
        spent += each
    return spent


def _moved(sweep: Sweep, engine: Engine) -> dict[tuple[str, str], int]:
    """(source, target) -> bytes of a sweep; what is used in the page cache does not move."""
    moves = {way: size for way, size in sweep.moves.items() if size and not engine.is_mapped}
    return moves | {(device, device): size for device, size in sweep.reads.items() if size}


def _least_seconds(sweep: Sweep, engine: Engine) -> float:
    """The hardware's limit: every byte at its measured bandwidth, copies hidden, nothing launched.

    Layers still come one after the other, on whatever device.
    """
    machine = engine.machine
    reads = sum(
        size / machine.device(device).read_bytes_per_s for device, size in sweep.reads.items() if size
    )
    links = {target for _, target in sweep.moves if target != "cpu"}
    buses = [
        sum(size for (_, to), size in sweep.moves.items() if to == target) / link_bytes_per_s(machine, target)
        for target in links
    ]
    from_disk = sum(size for (source, _), size in sweep.moves.items() if source == "disk")
    disk = from_disk / disk_bytes_per_s(machine) if from_disk and not engine.is_mapped else 0.0
    return max(reads, disk, *buses)
