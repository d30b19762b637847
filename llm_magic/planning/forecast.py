"""How fast a placement will answer, from bytes per token and measured bandwidths.

`sweep.py` has the cost model; here are its answers for decode and prefill, and the hardware's limit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llm_magic.plan import DeviceUse, Forecast, Placement
from llm_magic.planning.costs import reads_mapped
from llm_magic.planning.packed import kernel_of
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
)

_USUALLY_LONG = 32
"""Tokens of a sweep from which on streaming pays where nobody knows how fast the devices multiply.

llama.cpp has its GPU compute from as many on what lies in RAM.
"""


def make_forecast(setting: Setting, placed: Sequence[Placement], uses: Sequence[DeviceUse]) -> Forecast:
    """Decode and prefill speed; 0 and ``"unknown"`` when a needed bandwidth is not known.

    Decode is the rate right after a prompt of ``prefill_tokens``, one token a sweep. Each sweep
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
    prefill_tps = _prefill_tps(setting, in_long_sweep(placed), engine)
    return Forecast(decode_tps, prefill_tps, bound.words, moved, limit_tps)


def long_sweep_of(setting: Setting, placed: Sequence[Placement], uses: Sequence[DeviceUse]) -> int:
    """Tokens, of all sequences, from which on a sweep is faster with ``prefill`` devices; 0 without any."""
    if not any(place.prefill for place in placed):
        return 0
    workload, engine = setting.workload, engine_of(setting, placed, uses)
    streamed = in_long_sweep(placed)

    def is_long(tokens: int) -> bool:
        pair = (sweep_of(setting.layout, workload, each, tokens=tokens) for each in (streamed, placed))
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
    )


def _prefill_tps(setting: Setting, placed: Sequence[Placement], engine: Engine) -> float:
    workload = setting.workload
    tokens = min(workload.prefill_tokens, workload.context_length)
    sweep = sweep_of(setting.layout, workload, placed, tokens=tokens)
    spent = seconds(sweep, engine, is_prefill=True)
    return tokens * workload.batch / max(spent, 1e-9) if spent is not None else 0.0


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
