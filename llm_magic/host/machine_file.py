"""``--machine FILE``: a computer described in JSON, to plan for one that is not here.

Only what a person knows has to be in it; the rest is filled with the assumptions below, each marked
as one. ``examples/machines`` has some. The smallest::

    {"devices": [{"id": "cuda:0", "name": "RTX 4090"}, {"id": "cpu", "total": "64GiB"}]}

A device has ``id`` (``cuda:0``, ``mps``, ``xpu:0``, ``npu:0``, ``cpu``, ``disk``), ``name``, ``total``,
``free``, ``other`` (held by other programs), ``read`` (``"1008 GB/s"``), ``flops`` (``"165 TFLOPS"``), ``layer_s``,
``ahead_s``, ``beside`` (read while copies to GPUs run), ``packed`` (``{"mxfp4": "13 GB/s"}``, also of int4, int8 and float8), ``unpacked`` (the same), ``state_s``,
``unified``, ``measured_on``, ``method``, ``capability``, ``threads`` (of a CPU)
and ``assumed``. A link has ``from``, ``to``, ``bandwidth``, ``beside`` (while the CPU reads), ``name``, ``measured_on`` and ``assumed``;
its ends may be all of a family, ``cuda:*``. Sizes and speeds are texts with a unit, or plain numbers in
bytes, bytes per second and operations per second.

Assumptions
-----------
GPU
    Memory, read speed and operations of its data sheet where its name is known; else 300 GB/s and
    20 TFLOPS. Free: all but 0.5 GiB, which driver and desktop take.
Unified GPU (``mps``)
    Memory: three quarters of the RAM, as Metal recommends.
CPU
    40 GB/s, what two channels of DDR4-3200 give in practice, and 0.5 TFLOPS. Free: all but 10 %,
    and at least all but 2 GiB. No AVX-512, unless ``capability`` says so (``"avx512_bf16"``).
Disk
    1 TiB, half of it free; by its name: NVMe 3 GB/s, SSD 500 MB/s, HDD 150 MB/s, and NVMe where it has none.
Links
    CPU and GPU, and two GPUs: 25 GB/s, what pinned copies get from PCIe 4 x16. Disk to CPU: as the disk reads.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_magic.errors import OptionError
from llm_magic.host.data_sheets import DataSheet, data_sheet
from llm_magic.machine import PACKED_KINDS, Device, DeviceKind, Link, Machine
from llm_magic.units import GIB, MIB, TIB, format_bytes, parse_bytes

PCIE4_X16_BYTES_PER_S = 25e9
GPU_RESERVE_BYTES = GIB // 2
MACHINE_KEYS = ("name", "devices", "links")
DEVICE_KEYS = (
    "id", "name", "total", "free", "other", "read", "flops", "layer_s", "ahead_s", "beside", "packed", "unpacked", "state_s",
    "unified", "measured_on", "method", "capability", "threads", "assumed",
)  # fmt: skip
LINK_KEYS = ("from", "to", "bandwidth", "beside", "name", "measured_on", "assumed")

_FILE_LIMIT_BYTES = 4 * MIB
_MOST = {"devices": 64, "links": 1024}  # every pair of devices gets a link
_MANY = 1 << 16
_LARGEST = 1 << 60  # 1 EiB: more is a typing error, and overflows somebody's integer
_ID = re.compile(r"cpu|disk|mps|(?:cuda|xpu|npu):\d{1,3}")
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)FLOPS?(?:/s)?\s*", re.IGNORECASE)
_PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_DISK_SPEEDS = {"NVMe": 3e9, "SSD": 0.5e9, "HDD": 0.15e9, "Network": 0.1e9, "SD card": 0.08e9, "RAM": 4e9}
_UNKNOWN_GPU = DataSheet(0, 300e9, 20e12)
_CPU_READ_BYTES_PER_S, _CPU_FLOPS = 40e9, 0.5e12


def read_machine(path: Path) -> Machine:
    """The machine that a file describes, for ``--machine FILE``; ``described`` is True.

    Raises
    ------
    OptionError
        When the file cannot be read, is no JSON, or describes no machine.
    """
    try:
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            raise OptionError(f"{path.name} is too large for a machine description.", _SEE_EXAMPLES)
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(
            f"Cannot read {path.name}: {error.strerror}.", "Give the path of a JSON file."
        ) from None
    except json.JSONDecodeError as error:
        raise OptionError(
            f"{path.name} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}.",
            _SEE_EXAMPLES,
        ) from None
    except (ValueError, RecursionError):
        raise OptionError(f"{path.name} is no JSON text.", _SEE_EXAMPLES) from None
    return replace(machine_from_json(data, path.stem), described=True)


def machine_from_json(data: object, name: str = "") -> Machine:
    """The machine in a JSON value; what it leaves out is assumed. ``name`` is its name if it has none.

    Raises
    ------
    OptionError
        When a key is unknown, a value is malformed, a device is missing, unknown or there twice.
    """
    fields = _object(data, MACHINE_KEYS, "The machine")
    entries = [
        _object(entry, DEVICE_KEYS, f"Device {n}") for n, entry in enumerate(_list(fields, "devices"), 1)
    ]
    ids = [_device_id(entry, n) for n, entry in enumerate(entries, 1)]
    for number, device_id in enumerate(ids):
        if device_id in ids[:number]:
            raise OptionError(f"Device {device_id} is there twice.", "Number GPUs cuda:0, cuda:1, …")
    if "cpu" not in ids:
        raise OptionError(
            'The machine has no device "cpu".', 'Add its RAM, for example {"id": "cpu", "total": "32GiB"}.'
        )
    devices = _devices(dict(zip(ids, entries, strict=True)))
    links = _links(_list(fields, "links"), [device.id for device in devices])
    return Machine(_text(fields, "name") or name or "machine", devices, with_assumed_links(devices, links))


def machine_to_json(machine: Machine) -> dict[str, Any]:
    """JSON that `read_machine` reads back to the same devices and links, exactly."""
    return {
        "name": machine.name,
        "devices": [_device_to_json(device) for device in machine.devices],
        "links": [_link_to_json(link) for link in machine.links],
    }


def with_assumed_speeds(device: Device) -> Device:
    """``device`` with speeds where it has none: of its data sheet, or typical of its kind."""
    read, flops, source = _typical_speeds(device)
    missing = [
        key for key, value in (("read", device.read_bytes_per_s), ("flops", device.flops)) if not value
    ]
    guessed = [key for key, value in (("read", read), ("flops", flops)) if value and key in missing]
    if not guessed:
        return device
    return replace(
        device,
        read_bytes_per_s=device.read_bytes_per_s or read,
        flops=device.flops or flops,
        assumed=tuple(dict.fromkeys([*device.assumed, *guessed])),
        method=device.method or source,
    )


def with_assumed_links(devices: tuple[Device, ...], links: tuple[Link, ...]) -> tuple[Link, ...]:
    """``links`` and those that every computer has: disk to CPU, CPU to and from GPUs, between GPUs."""
    there = {(link.source, link.target) for link in links}
    gpus = [device for device in devices if device.kind == "gpu" and not device.unified]
    assumed = [
        Link(disk.id, "cpu", disk.read_bytes_per_s, disk.name, disk.measured_on, "read" in disk.assumed)
        for disk in devices
        if disk.kind == "disk" and disk.read_bytes_per_s
    ]
    pairs = [pair for gpu in gpus for pair in (("cpu", gpu.id), (gpu.id, "cpu"))]
    pairs += [(a.id, b.id) for a in gpus for b in gpus if a.id != b.id]
    assumed += [Link(a, b, PCIE4_X16_BYTES_PER_S, "PCIe 4 x16", assumed=True) for a, b in pairs]
    return (*links, *(link for link in assumed if (link.source, link.target) not in there))


_SEE_EXAMPLES = 'The smallest one: {"devices": [{"id": "cpu", "total": "32GiB"}]}.'


# --- Devices


def _devices(entries: Mapping[str, Mapping[str, Any]]) -> tuple[Device, ...]:
    """Devices in their order in the file, the disk added where it is left out."""
    cpu = _cpu(entries["cpu"])
    made: dict[str, Device] = {}
    for device_id, entry in entries.items():
        kind = device_kind(device_id)
        made[device_id] = cpu if kind == "cpu" else _MAKERS[kind](device_id, entry, cpu)
    if "disk" not in made:
        made["disk"] = _disk("disk", {}, cpu)
    return tuple(with_assumed_speeds(device) for device in made.values())


def _cpu(entry: Mapping[str, Any]) -> Device:
    total = _size(entry, "total", "cpu")
    if not total:
        raise OptionError("Device cpu has no total.", 'Say how much RAM there is: "total": "64GiB".')
    default_free = max(0, total - max(2 * GIB, total // 10))
    return _device("cpu", entry, total, default_free, assumed=())


def _gpu(device_id: str, entry: Mapping[str, Any], cpu: Device) -> Device:
    unified = _flag(entry, "unified", device_id == "mps")
    total = _size(entry, "total", device_id)
    assumed = ("total",) if total is None else ()
    if total is None:
        total = _assumed_gpu_memory(device_id, entry, cpu, unified)
    free = min(total, cpu.free_bytes) if unified else max(0, total - GPU_RESERVE_BYTES)
    return _device(device_id, entry, total, free, assumed=assumed, unified=unified)


def _assumed_gpu_memory(device_id: str, entry: Mapping[str, Any], cpu: Device, unified: bool) -> int:
    if unified:
        return cpu.total_bytes * 3 // 4
    sheet = data_sheet(_text(entry, "name"))
    if sheet is None or not sheet.total_bytes:
        raise OptionError(
            f"Device {device_id} has no total.", 'Say how much memory it has: "total": "24GiB".'
        )
    return sheet.total_bytes


def _disk(device_id: str, entry: Mapping[str, Any], _cpu: Device) -> Device:
    total = _size(entry, "total", device_id)
    entry = {"name": "NVMe SSD", **entry}
    assumed = ("total",) if total is None else ()
    total = TIB if total is None else total
    return _device(device_id, entry, total, total // 2, assumed=assumed)


def _npu(device_id: str, entry: Mapping[str, Any], _cpu: Device) -> Device:
    total = _size(entry, "total", device_id) or 0
    return _device(device_id, entry, total, total, assumed=(), unified=_flag(entry, "unified", True))


_MAKERS: dict[str, Callable[[str, Mapping[str, Any], Device], Device]] = {
    "gpu": _gpu,
    "disk": _disk,
    "npu": _npu,
}


def _device(
    device_id: str,
    entry: Mapping[str, Any],
    total: int,
    free: int,
    *,
    assumed: tuple[str, ...],
    unified: bool = False,
) -> Device:
    """A device with what its entry says; ``total`` and ``free`` as they are otherwise."""
    given_free = _size(entry, "free", device_id)
    if given_free is None and free != total:
        assumed = (*assumed, "free")
    free = free if given_free is None else given_free
    other = _size(entry, "other", device_id) or 0
    if free > total:
        raise OptionError(
            f"Device {device_id} has {format_bytes(free)} free of {format_bytes(total)}.",
            "Correct total or free.",
        )
    return Device(
        id=device_id,
        kind=device_kind(device_id),
        name=_text(entry, "name") or _DEFAULT_NAMES.get(device_id, device_id.partition(":")[0].upper()),
        total_bytes=total,
        free_bytes=free,
        read_bytes_per_s=_bandwidth(entry, "read", device_id),
        flops=_flops(entry, device_id),
        layer_s=_seconds(entry, "layer_s", device_id),
        beside_bytes_per_s=_bandwidth(entry, "beside", device_id),
        packed=_packed(entry, "packed", device_id),
        unpacked=_packed(entry, "unpacked", device_id),
        ahead_s=_seconds(entry, "ahead_s", device_id),
        state_s=_seconds(entry, "state_s", device_id),
        unified=unified,
        measured_on=_date(entry, device_id),
        other_bytes=min(other, total - free),
        assumed=_marks(entry, device_id) if "assumed" in entry else assumed,
        method=_text(entry, "method"),
        capability=_text(entry, "capability").lower(),
        threads=_count(entry, "threads", device_id),
    )


_DEFAULT_NAMES = {"cpu": "CPU", "mps": "Apple GPU", "disk": "Disk"}


def device_kind(device_id: str) -> DeviceKind:
    """``"gpu"``, ``"cpu"``, ``"disk"`` or ``"npu"`` of a device name."""
    family = device_id.partition(":")[0]
    kinds: dict[str, DeviceKind] = {"cpu": "cpu", "disk": "disk", "npu": "npu"}
    return kinds.get(family, "gpu")


def _typical_speeds(device: Device) -> tuple[float, float, str]:
    """Read speed, operations, and where they come from; 0 where nothing is typical."""
    if device.kind == "cpu":
        return _CPU_READ_BYTES_PER_S, _CPU_FLOPS, "typical RAM, two channels"
    if device.kind == "disk":
        kind = next((kind for kind in _DISK_SPEEDS if device.name.startswith(kind)), "SSD")
        return _DISK_SPEEDS[kind], 0.0, f"typical {kind} speed"
    if device.kind == "npu":
        return 0.0, 0.0, ""
    sheet = data_sheet(device.name)
    sheet, source = (sheet, "data sheet") if sheet else (_UNKNOWN_GPU, "typical GPU")
    return sheet.read_bytes_per_s, sheet.flops, source


# --- Links


def _links(entries: list[Any], ids: list[str]) -> tuple[Link, ...]:
    """Links by their ends; of two for the same ends the later one counts, so that one may except from ``cuda:*``."""
    made: dict[tuple[str, str], Link] = {}
    for number, value in enumerate(entries, 1):
        entry = _object(value, LINK_KEYS, f"Link {number}")
        sources, targets = (_link_ends(entry, key, ids) for key in ("from", "to"))
        pairs = [(source, target) for source in sources for target in targets if source != target]
        if not pairs:
            raise OptionError(
                f"Link {number} goes from {sources[0]} to itself.",
                'Give the device\'s own speed as its "read".',
            )
        made |= {pair: _link(entry, *pair) for pair in pairs}
    return tuple(made.values())


def _link_ends(entry: Mapping[str, Any], key: str, ids: list[str]) -> list[str]:
    """The device named, or all of a family: ``cuda:*``."""
    end = _text(entry, key)
    family = end.removesuffix("*")
    ends = [
        device_id
        for device_id in ids
        if device_id == end or (family.endswith(":") and end != family and device_id.startswith(family))
    ]
    if not ends:
        raise OptionError(
            f"A link names the device {end!r}, which the machine does not have.",
            f"Its devices: {', '.join(ids)}.",
        )
    return ends


def _link(entry: Mapping[str, Any], source: str, target: str) -> Link:
    label = f"the link from {source} to {target}"
    speed = _bandwidth(entry, "bandwidth", label)
    if not speed:
        raise OptionError(f"bandwidth of {label} is missing.", 'Write it like "bandwidth": "25 GB/s".')
    return Link(
        source,
        target,
        speed,
        _text(entry, "name"),
        _date(entry, label),
        _flag(entry, "assumed", False),
        _bandwidth(entry, "beside", label),
    )


# --- JSON out


def _device_to_json(device: Device) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": device.id, "name": device.name}
    entry |= {"total": _size_text(device.total_bytes), "free": _size_text(device.free_bytes)}
    optional = {
        "other": device.other_bytes and _size_text(device.other_bytes),
        "read": device.read_bytes_per_s and _speed_text(device.read_bytes_per_s),
        "flops": device.flops,
        "layer_s": device.layer_s,
        "beside": device.beside_bytes_per_s and _speed_text(device.beside_bytes_per_s),
        "ahead_s": device.ahead_s,
        "state_s": device.state_s,
        "packed": {kind: _speed_text(speed) for kind, speed in device.packed},
        "unpacked": {kind: _speed_text(speed) for kind, speed in device.unpacked},
        "measured_on": device.measured_on,
        "method": device.method,
        "capability": device.capability,
        "threads": device.threads,
    }
    entry |= {key: value for key, value in optional.items() if value}
    return entry | {"unified": device.unified, "assumed": list(device.assumed)}


def _link_to_json(link: Link) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "from": link.source,
        "to": link.target,
        "bandwidth": _speed_text(link.bytes_per_s),
    }
    optional = {
        "beside": link.beside_bytes_per_s and _speed_text(link.beside_bytes_per_s),
        "name": link.name,
        "measured_on": link.measured_on,
        "assumed": link.assumed,
    }
    return entry | {key: value for key, value in optional.items() if value}


def _size_text(count: int) -> int | str:
    """``"24GiB"`` where that is exact, else the number of bytes."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB)):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return count


def _speed_text(bytes_per_s: float) -> float | str:
    gigabytes = bytes_per_s / 1e9
    return f"{gigabytes:.0f} GB/s" if gigabytes >= 1 and bytes_per_s == int(gigabytes) * 1e9 else bytes_per_s


# --- Values


def _object(value: object, keys: tuple[str, ...], what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(f"{what} is no JSON object.", _SEE_EXAMPLES)
    for key in value:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"It takes {', '.join(keys)}."
            raise OptionError(f"{what} has an unknown key {_short(key)}.", hint)
    return value


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise OptionError(f"The machine's {key} are no JSON list.", _SEE_EXAMPLES)
    if len(value) > _MOST[key]:
        raise OptionError(
            f"The machine has {len(value)} {key}; at most {_MOST[key]} are planned for.", _SEE_EXAMPLES
        )
    return value


def _device_id(entry: Mapping[str, Any], number: int) -> str:
    device_id = entry.get("id")
    if not isinstance(device_id, str) or not _ID.fullmatch(device_id):
        raise OptionError(
            f"Device {number} has the id {_short(device_id)}.",
            "Ids are cpu, disk, mps, cuda:0, cuda:1, xpu:0, npu:0.",
        )
    return device_id


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str) or len(value) > 200:
        raise OptionError(f"{key} is {_short(value)}.", "Write a short text.")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _flag(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise OptionError(f"{key} is {_short(value)}.", "Write true or false.")
    return value


def _marks(entry: Mapping[str, Any], device_id: str) -> tuple[str, ...]:
    value = entry["assumed"]
    if not isinstance(value, list) or not all(mark in ("total", "free", "read", "flops") for mark in value):
        raise OptionError(
            f"assumed of {device_id} is {_short(value)}.", 'Write a list of "total", "free", "read", "flops".'
        )
    return tuple(value)


def _date(entry: Mapping[str, Any], where: str) -> str:
    text = _text(entry, "measured_on")
    try:
        return datetime.date.fromisoformat(text).isoformat() if text else ""
    except ValueError:
        raise OptionError(f"measured_on of {where} is {text!r}.", "Write a date like 2026-11-22.") from None


def _size(entry: Mapping[str, Any], key: str, where: str) -> int | None:
    """Bytes, or ``None`` when the entry does not say."""
    value = entry.get(key)
    if value is None:
        return None
    try:
        size = parse_bytes(value) if isinstance(value, str) else _number(value)
    except OptionError:
        size = -1
    if not 0 <= size <= _LARGEST:
        raise OptionError(
            f"{key} of {where} is {_short(value)}, which is no size.", "Write it like 24GiB or 512MiB."
        )
    return int(size)


def _bandwidth(entry: Mapping[str, Any], key: str, where: str) -> float:
    """Bytes per second; 0 when the entry does not say."""
    value = entry.get(key, 0)
    try:
        speed = _parse_bandwidth(value) if isinstance(value, str) else _number(value)
    except OptionError:
        speed = -1
    if not 0 <= speed <= _LARGEST:
        raise OptionError(
            f"{key} of {where} is {_short(value)}, which is no speed.", "Write it like 25 GB/s."
        )
    return float(speed)


def _packed(entry: Mapping[str, Any], key: str, device_id: str) -> tuple[tuple[str, float], ...]:
    where = f"{key} of {device_id}"
    speeds = _object(entry.get(key, {}), PACKED_KINDS, where)
    return tuple((kind, _bandwidth(speeds, kind, where)) for kind in speeds)


def _parse_bandwidth(text: str) -> float:
    """``"25 GB/s"``, ``"800MB/s"``; without ``/s`` it is no speed."""
    size, slash, per = text.partition("/")
    if not slash or per.strip() != "s":
        return -1
    return parse_bytes(size)


def _flops(entry: Mapping[str, Any], device_id: str) -> float:
    value = entry.get("flops", 0)
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    flops = float(match[1]) * _PREFIX[match[2].upper()] if match else _number(value)
    if not 0 <= flops <= 1e21:
        raise OptionError(f"flops of {device_id} is {_short(value)}.", "Write it like 165 TFLOPS.")
    return float(flops)


def _seconds(entry: Mapping[str, Any], key: str, device_id: str) -> float:
    value = entry.get(key, 0)
    seconds = _number(value)
    if not 0 <= seconds <= 1:
        raise OptionError(f"{key} of {device_id} is {_short(value)}.", "Write seconds, like 0.0003.")
    return float(seconds)


def _count(entry: Mapping[str, Any], key: str, device_id: str) -> int:
    value = entry.get(key, 0)
    number = _number(value)
    if not isinstance(number, int) or not 0 <= number <= _MANY:
        raise OptionError(f"{key} of {device_id} is {_short(value)}.", "Write a number, like 8.")
    return number


def _number(value: object) -> int | float:
    """A finite number, or -1 for everything else; JSON in Python also reads NaN, Infinity and true."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return -1
    return value if isinstance(value, int) or math.isfinite(value) else -1


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
