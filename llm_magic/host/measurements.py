"""What was measured on a computer, kept in the cache folder so that it is measured once.

One file for all: a home folder that several computers share holds an entry for each, under a
fingerprint of the hardware and of what uses it. A file that cannot be read counts as empty.

Beside a computer's speeds lies what was fitted to models that ran on it, by model: constants of the
cost model, which this module stores and does not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from llm_magic.errors import LLMMagicError
from llm_magic.folders import cache_folder, make_private
from llm_magic.host import nvml
from llm_magic.host.machine_file import machine_from_json, machine_to_json
from llm_magic.host.processors import cpu_cores, cpu_name
from llm_magic.host.system_files import text_of
from llm_magic.machine import Machine

ROOT = Path("/")
VERSION = 5
_MACHINES_KEPT = 16
_FITS_KEPT = 64
_VISIBILITY = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR",
)  # fmt: skip


@dataclass(frozen=True)
class DiskSpeed:
    """Kind and read speed of one disk; ``measured_on`` is an ISO date, empty when it was not measured."""

    name: str
    read_bytes_per_s: float = 0.0
    measured_on: str = ""
    method: str = ""


@dataclass(frozen=True)
class Measurements:
    """One computer: everything but its disks as a `Machine`, and its disks by `disk_key`."""

    machine: Machine
    disks: Mapping[str, DiskSpeed] = field(default_factory=dict)


def here() -> tuple[Path, str]:
    """The file, and the key of the computer at hand."""
    return cache_folder() / "machine.json", fingerprint(tuple(gpu.uuid for gpu in nvml.gpus()))


def fingerprint(gpu_uuids: tuple[str, ...] = (), root: Path = ROOT) -> str:
    """Changes with the CPU, the RAM, the GPUs, which of them are visible, and the versions of torch, transformers and llvmlite."""
    parts = [platform.system(), platform.machine(), cpu_name(root), str(cpu_cores())]
    parts += [str(round(psutil.virtual_memory().total / 2**30)), _version("torch"), _version("transformers")]
    parts += [_version("llvmlite"), *sorted(gpu_uuids), *_linux_gpus(root)]
    parts += [f"{name}={os.environ.get(name, '')}" for name in _VISIBILITY]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def load_measurements(path: Path, key: str) -> Measurements | None:
    """What is kept under ``key``; ``None`` when there is nothing, or nothing readable."""
    entry = _read(path).get(key)
    if not isinstance(entry, dict):
        return None
    try:
        machine = _with_uuids(machine_from_json(entry["machine"]), entry["uuids"])
        disks = {str(disk): _disk_speed(facts) for disk, facts in entry["disks"].items()}
    except (LLMMagicError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return Measurements(_without_disks(machine), disks)


def save_measurements(path: Path, key: str, measurements: Measurements) -> None:
    """Keep ``measurements`` under ``key``, beside what is there of other computers.

    The file is replaced as a whole, so that a reader never sees half of it. A cache folder that
    cannot be written is no error: then the next session measures again.
    """
    _keep(
        path,
        key,
        {
            "machine": machine_to_json(measurements.machine),
            "uuids": {device.id: device.uuid for device in measurements.machine.devices if device.uuid},
            "disks": {disk: vars(speed) for disk, speed in measurements.disks.items()},
        },
    )


def load_fit(path: Path, key: str, model: str, is_alike: Callable[[str], bool]) -> Mapping[str, Any] | None:
    """What was fitted to ``model`` on the computer ``key``, else to the model like it that was fitted last."""
    fits = _fits(_read(path).get(key))
    found = fits.get(model) or next((fits[other] for other in reversed(fits) if is_alike(other)), None)
    return found if isinstance(found, dict) else None


def save_fit(path: Path, key: str, model: str, facts: Mapping[str, Any]) -> None:
    """Keep what was fitted to ``model`` on the computer ``key``, as the newest; see `save_measurements`."""
    fits = {other: fit for other, fit in _fits(_read(path).get(key)).items() if other != model}
    kept = dict(list(fits.items())[-(_FITS_KEPT - 1) :])
    _keep(path, key, {"fits": kept | {model: dict(facts)}})


def _fits(entry: object) -> dict[str, Any]:
    fits = entry.get("fits") if isinstance(entry, dict) else None
    return fits if isinstance(fits, dict) else {}


def _keep(path: Path, key: str, facts: dict[str, Any]) -> None:
    """Write ``facts`` into the entry of a computer, which becomes the newest; the rest of it stays."""
    machines = _read(path)
    entry = machines.pop(key, None)
    for oldest in list(machines)[: max(0, len(machines) + 1 - _MACHINES_KEPT)]:
        del machines[oldest]
    machines[key] = (entry if isinstance(entry, dict) else {}) | facts
    with contextlib.suppress(OSError):
        _write(path, json.dumps({"version": VERSION, "machines": machines}, indent=1))


def _disk_speed(facts: Mapping[str, Any]) -> DiskSpeed:
    speed = DiskSpeed(**facts)
    texts = (speed.name, speed.measured_on, speed.method)
    if not all(isinstance(text, str) for text in texts) or not 0 <= speed.read_bytes_per_s < 1e15:
        raise ValueError("no speed of a disk")
    return speed


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict) or data.get("version") != VERSION:
        return {}
    machines = data.get("machines")
    return machines if isinstance(machines, dict) else {}


def _write(path: Path, text: str) -> None:
    make_private(path.parent)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _with_uuids(machine: Machine, uuids: Mapping[str, str]) -> Machine:
    devices = tuple(replace(device, uuid=str(uuids.get(device.id, ""))) for device in machine.devices)
    return replace(machine, devices=devices)


def _without_disks(machine: Machine) -> Machine:
    """A machine file always has a disk; here disks are kept beside the machine."""
    devices = tuple(device for device in machine.devices if device.kind != "disk")
    return replace(machine, devices=devices, links=tuple(k for k in machine.links if k.source != "disk"))


def _linux_gpus(root: Path) -> list[str]:
    """Display and compute cards as the kernel and the NVIDIA driver list them."""
    cards = sorted((root / "sys/class/drm").glob("card[0-9]*/device"))
    found = [f"{text_of(card / 'vendor')}:{text_of(card / 'device')}" for card in cards]
    nvidia = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in nvidia for line in text_of(path).splitlines()]
    return found + [line for line in lines if line.startswith(("Model", "GPU UUID"))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
