"""The computer at hand as a `Machine`: what it has, what is free now, and how fast bytes move in it.

Forecasts need numbers, so the first call on a computer measures for some six seconds (after
torch and transformers are imported); later calls find the speeds in ``machine.json`` of the cache folder and only
look up what is free, without torch where the driver or the system tells it. What could not be
measured, beside a model that leaves no room for one, is as it was measured before; else it is assumed, as
``machine_file.py`` says, and marked.

The CPU's speed is the backend's, when it reports a device ``cpu``: what its kernels reach is what
decoding on the CPU gets, not what the memory could give. Otherwise numpy stands in.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llm_magic.folders import cache_folder
from llm_magic.host import nvml
from llm_magic.host.disk import Disk, disk_key, disk_under, measure_read
from llm_magic.host.machine_file import (
    machine_from_json,
    machine_to_json,
    read_machine,
    with_assumed_links,
    with_assumed_speeds,
)
from llm_magic.host.measurements import (
    DiskSpeed,
    Measurements,
    fingerprint,
    load_measurements,
    save_measurements,
)
from llm_magic.host.memory import Memory, host_memory
from llm_magic.host.processors import cpu_cores, cpu_name, npu_names
from llm_magic.host.speed import measure_cpu
from llm_magic.machine import Device, Link, Machine

__all__ = ["Accelerators", "machine_from_json", "machine_to_json", "probe_machine", "read_machine"]

Accelerators = Callable[[bool], tuple[tuple[Device, ...], tuple[Link, ...]]]
_SPEEDS = {
    "read_bytes_per_s": "read",
    "flops": "flops",
    "layer_s": "",
    "ahead_s": "",
    "state_s": "",
    "beside_bytes_per_s": "",
    "packed": "",
    "unpacked": "",
}
"""What is measured of a device, and its mark where it is assumed."""


@dataclass(frozen=True)
class _Now:
    """What changes from call to call: RAM, and the NVIDIA driver's GPUs by their identity."""

    memory: Memory
    gpus: Mapping[str, nvml.GpuMemory]


def probe_machine(accelerators: Accelerators, *, measure: bool = False, disk_folder: Path) -> Machine:
    """The computer at hand, with what is free on it now.

    Parameters
    ----------
    accelerators
        The backend's devices and their links; its argument says whether to measure speeds. A
        device ``cpu`` among them carries the speed of the CPU; its memory is not looked at.
    measure
        Measure again, instead of using speeds that are kept.
    disk_folder
        Where offloaded weights go: its disk is the machine's. It need not exist.
    """
    now = _Now(host_memory(), {gpu.uuid: gpu for gpu in nvml.gpus()})
    path, key = cache_folder() / "machine.json", fingerprint(tuple(now.gpus))
    kept = load_measurements(path, key)
    machine = None if kept is None or measure else _refreshed(kept.machine, accelerators, now)
    is_new = machine is None
    if machine is None:
        machine = _calibrated(accelerators, now, kept.machine if kept else None)
    disks = dict(kept.disks) if kept else {}
    if measure or disk_key(disk_folder) not in disks:
        disks[disk_key(disk_folder)] = _measured_disk(disk_folder)
        is_new = True
    if is_new:
        save_measurements(path, key, Measurements(machine, disks))
    return _with_disk(machine, disk_folder, disks[disk_key(disk_folder)])


def _calibrated(accelerators: Accelerators, now: _Now, before: Machine | None) -> Machine:
    """Everything but the disk, measured now, or else ``before``."""
    found, links = accelerators(True)
    speed = next((device for device in found if device.id == "cpu"), None)
    cpu = _cpu(now.memory, speed or _numpy_cpu(now.memory.free))
    gpus = tuple(_driver_view(device, now) for device in found if device.id != "cpu")
    npus = tuple(_npu(number, name) for number, name in enumerate(npu_names()))
    if before is not None:
        gpus, cpu = tuple(_completed(gpu, before) for gpu in gpus), _completed(cpu, before)
        links = _completed_links((*gpus, cpu), links, before)
    devices = tuple(with_assumed_speeds(device) for device in (*gpus, cpu, *npus))
    name = f"{platform.system().replace('Darwin', 'macOS')} {platform.machine()}"
    return Machine(name, devices, with_assumed_links(devices, links))


def _completed(device: Device, before: Machine) -> Device:
    """``device`` with what was measured of it before, where that could not be done now."""
    old = _same(device, before)
    if old is None:
        return device
    known = {
        name: getattr(old, name)
        for name, mark in _SPEEDS.items()
        if not getattr(device, name) and getattr(old, name) and mark not in old.assumed
    }
    when, how = device.measured_on or old.measured_on, device.method or old.method
    return replace(device, **known, measured_on=when, method=how) if known else device


def _completed_links(
    devices: tuple[Device, ...], links: tuple[Link, ...], before: Machine
) -> tuple[Link, ...]:
    """``links`` with those that were measured before between the same devices, and what else was."""
    same = {device.id for device in devices if _same(device, before)}
    old = {(k.source, k.target): k for k in before.links if k.measured_on and {k.source, k.target} <= same}
    found = {(k.source, k.target): k for k in links}
    for ends, link in found.items():
        if ends in old and not link.beside_bytes_per_s:
            found[ends] = replace(link, beside_bytes_per_s=old[ends].beside_bytes_per_s)
    return tuple((found | {ends: link for ends, link in old.items() if ends not in found}).values())


def _same(device: Device, machine: Machine) -> Device | None:
    """The device of a machine that is this one."""
    who = (device.id, device.name, device.uuid)
    return next((each for each in machine.devices if (each.id, each.name, each.uuid) == who), None)


def _refreshed(machine: Machine, accelerators: Accelerators, now: _Now) -> Machine | None:
    """``machine`` with what is free now; ``None`` when its GPUs are not the same any more."""
    gpus = {device.id: _seen_without_backend(device, now) for device in machine.gpus}
    if not all(gpus.values()):
        gpus = {
            device.id: _driver_view(device, now) for device in accelerators(False)[0] if device.kind == "gpu"
        }
        if list(gpus) != [device.id for device in machine.gpus]:
            return None
    devices = tuple(_with_room(device, gpus.get(device.id), now.memory) for device in machine.devices)
    return replace(machine, devices=devices)


def _with_room(device: Device, seen: Device | None, memory: Memory) -> Device:
    """``device`` with its speeds, and the memory as it was ``seen`` now."""
    if device.kind == "cpu":
        return replace(device, total_bytes=memory.total, free_bytes=memory.free, other_bytes=memory.other)
    if seen is None:
        return device
    return replace(
        device,
        total_bytes=seen.total_bytes,
        free_bytes=seen.free_bytes,
        other_bytes=seen.other_bytes,
        uuid=seen.uuid,
    )


def _seen_without_backend(device: Device, now: _Now) -> Device | None:
    """A GPU's memory as system or driver tell it; ``None`` when only the backend can."""
    if device.unified or device.uuid in now.gpus:
        return _driver_view(device, now)
    return None


def _driver_view(device: Device, now: _Now) -> Device:
    """``device`` with what the driver knows of its memory; unified memory as the system's RAM."""
    if device.unified:
        return replace(
            device,
            free_bytes=min(device.total_bytes, now.memory.free),
            other_bytes=min(device.total_bytes, now.memory.other),
        )
    gpu = now.gpus.get(device.uuid)
    if gpu is None:
        return device
    free = min(gpu.free, device.total_bytes)
    return replace(device, free_bytes=free, other_bytes=min(gpu.other, device.total_bytes - free))


def _cpu(memory: Memory, speed: Device | None) -> Device:
    cores = cpu_cores()
    name = f"{cpu_name()} · {cores} {'core' if cores == 1 else 'cores'}"
    cpu = Device("cpu", "cpu", name, memory.total, memory.free, other_bytes=memory.other)
    if speed is None:
        return cpu
    return replace(
        cpu,
        read_bytes_per_s=speed.read_bytes_per_s,
        flops=speed.flops,
        layer_s=speed.layer_s,
        beside_bytes_per_s=speed.beside_bytes_per_s,
        packed=speed.packed,
        unpacked=speed.unpacked,
        ahead_s=speed.ahead_s,
        state_s=speed.state_s,
        measured_on=speed.measured_on,
        method=speed.method,
        capability=speed.capability,
        threads=speed.threads,
    )


def _numpy_cpu(free_bytes: int) -> Device | None:
    speed = measure_cpu(free_bytes)
    if speed is None:
        return None
    return Device(
        "cpu", "cpu", "", 0, 0, speed.read_bytes_per_s, speed.flops, measured_on=_today(), method=speed.method
    )


def _npu(number: int, name: str) -> Device:
    """A neural processor: named, with no memory of its own that a plan could use."""
    return Device(f"npu:{number}", "npu", name, 0, 0, unified=True)


def _measured_disk(folder: Path) -> DiskSpeed:
    name = disk_under(folder).name
    speed = measure_read((folder, cache_folder()))
    return DiskSpeed(name, speed.bytes_per_s, _today(), speed.method) if speed else DiskSpeed(name)


def _with_disk(machine: Machine, folder: Path, speed: DiskSpeed) -> Machine:
    room: Disk = disk_under(folder, speed.name)
    disk = with_assumed_speeds(
        Device(
            "disk",
            "disk",
            room.name,
            room.total,
            room.free,
            speed.read_bytes_per_s,
            measured_on=speed.measured_on,
            method=speed.method,
        )
    )
    devices = _before_npus(machine.devices, disk)
    return replace(machine, devices=devices, links=with_assumed_links(devices, machine.links))


def _before_npus(devices: tuple[Device, ...], disk: Device) -> tuple[Device, ...]:
    memories = tuple(device for device in devices if device.kind != "npu")
    return (*memories, disk, *(device for device in devices if device.kind == "npu"))


def _today() -> str:
    return datetime.date.today().isoformat()
