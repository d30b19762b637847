"""How many bytes a plan may use on each device: what is free, less a documented reserve, or what the user says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from llm_magic.errors import PlanError
from llm_magic.machine import Device, Machine
from llm_magic.plan import MemoryBudget
from llm_magic.planning.costs import placeable
from llm_magic.units import GIB, MIB


def make_budget(machine: Machine, max_memory: Mapping[str, int]) -> MemoryBudget:
    """Limits of every device that can hold blocks.

    Parameters
    ----------
    max_memory
        Device name (or Accelerate's integer key, as text) -> bytes, for everything that the plan
        puts there: weights, KV cache, activations and slots. A limit above what can be used is
        lowered to it.

    Raises
    ------
    PlanError
        When a key names no device, or two keys name the same one.
    """
    asked = _by_device(max_memory, machine)
    reserve = {device.id: reserve_bytes(device) for device in placeable(machine)}
    usable = {device.id: usable_bytes(device) for device in placeable(machine)}
    limits = {name: min(asked.get(name, room), room) for name, room in usable.items()}
    return MemoryBudget(limits, reserve, frozenset(asked))


def reserve_bytes(device: Device) -> int:
    """Bytes that stay out of every plan.

    GPU: 512 MiB for what the driver takes once a model computes, and 2 % for fragmentation of the
    caching allocator. Its context is there already when free bytes are asked for. What comes are kernels
    as they are loaded, cuBLAS's workspaces (8 MiB for each of two or three streams; 32 from an H100 on), and
    graphs: 10 KB for each of a thousand kernels, 64 before CUDA 12.4, for a handful of shapes. RAM: 512 MiB for the interpreter with torch and transformers, and 3 % so that the
    system does not swap; twice that where GPU and CPU share it. Disk: 1 GiB. Never more than an
    eighth of the device.
    """
    share = {"gpu": 512 * MIB + device.total_bytes // 50, "cpu": 512 * MIB + device.total_bytes * 3 // 100}
    wanted = share.get(device.kind, GIB) * (2 if device.unified else 1)
    return min(wanted, device.total_bytes // 8)


def usable_bytes(device: Device) -> int:
    """Free bytes less the reserve.

    A disk counts as a whole: its blocks are read from the model's own files, which take no new
    space; an engine that has to write checks the free space when it does.
    """
    room = device.total_bytes if device.kind == "disk" else device.free_bytes
    return max(0, room - reserve_bytes(device))


def device_name(key: object, machine: Machine) -> str:
    """The device that a key of ``max_memory`` or a value of a device map means; ``0`` is the first GPU.

    Raises
    ------
    PlanError
        When the machine has no such device, or it can hold no blocks.
    """
    text = str(key).strip()
    names = [device.id for device in placeable(machine)]
    if text.isdecimal() and int(text) < len(machine.gpus):
        return machine.gpus[int(text)].id
    if text.lower() in names:
        return text.lower()
    if not machine.gpus and text.lower().startswith(("gpu", "cuda")):
        raise PlanError("There is no GPU to put blocks on.", f"Devices: {', '.join(names)}.")
    aliases = {"ram": "cpu", "gpu": names[0], "cuda": names[0]}
    close = difflib.get_close_matches(text.lower(), names, 1, 0.6)
    guess = aliases.get(text.lower()) or (close[0] if close else "")
    hint = f"Did you mean {guess}? " if guess else ""
    raise PlanError(f"There is no device {text!r} to put blocks on.", f"{hint}Devices: {', '.join(names)}.")


def _by_device(max_memory: Mapping[str, int], machine: Machine) -> dict[str, int]:
    asked: dict[str, int] = {}
    for key, limit in max_memory.items():
        name = device_name(key, machine)
        if name in asked:
            raise PlanError(f"--max-memory names {name} twice.", f"Keep one limit for {name}.")
        asked[name] = limit
    return asked
