"""What there is to run on: devices, what is free on them now, and how fast bytes move between them.

The nouns only. ``host/probe.py`` fills them from this machine, ``host/machine_file.py`` from a description.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

DeviceKind = Literal["gpu", "cpu", "disk", "npu"]

PACKED_KINDS = ("mxfp4", "int4", "int8", "float8")
"""Kinds of packed weights whose speed is measured: codes of 4 bits, integers of them, and bytes that become numbers in two ways."""


@dataclass(frozen=True)
class Device:
    """A place for bytes, and maybe for work.

    Attributes
    ----------
    id
        ``"cuda:0"``, ``"mps"``, ``"xpu:0"``, ``"npu:0"``, ``"cpu"`` (the RAM) or ``"disk"``.
    name
        What it is sold as (``"RTX 4090"``), or the mount's kind for a disk (``"NVMe SSD"``).
    total_bytes, free_bytes
        What it has, and what a new allocation may take now.
    read_bytes_per_s
        How fast its own processor reads it; for a disk, sequential reads. 0 when unknown.
    flops
        Dense bf16 operations per second, for the prefill forecast. 0 when unknown.
    layer_s
        Seconds that one decoder layer takes for a token beyond the read of its weights. 0 when unknown.
    ahead_s
        The same of the CPU where layers that follow one another are one call. 0 when they are not, or nobody knows.
    state_s
        Of the CPU: seconds that one decoder layer takes in a prompt for each number of a token's state beyond its
        matrix products: norms, rotations, activations, attention. 0 when unknown.
    beside_bytes_per_s
        Of the CPU: how fast it reads while copies to the GPUs run, whose driver takes cores. 0 when unknown.
    packed
        Of the CPU: (one of `PACKED_KINDS`, bytes of such weights per second that it multiplies with a token).
    unpacked
        Of the CPU: the same of those that it makes numbers of, as it does once in a prompt.
    unified
        Whether GPU and CPU share this memory, so that "offloading to RAM" frees nothing.
    measured_on
        ISO date on which the speed was measured; empty when it is an assumption.
    other_bytes
        Of the bytes in use, what other processes hold, a second kernel on the same GPU for one.
    assumed
        Which of ``"total"``, ``"free"``, ``"read"`` and ``"flops"`` are assumptions.
    method
        How the speed was measured, or where an assumption comes from, in a few words.
    capability
        What kernels ask for before they run: of an NVIDIA GPU the compute capability (``"8.6"``), of a
        CPU the widest of its vector instructions (``"avx512_bf16"``, ``"avx512"``, ``"avx2"``). Empty
        when unknown.
    threads
        With which the CPU computes; 0 when unknown.
    uuid
        The hardware's own identity, by which the driver's tools know it. Never shown or saved
        in a notebook.
    """

    id: str
    kind: DeviceKind
    name: str
    total_bytes: int
    free_bytes: int
    read_bytes_per_s: float = 0.0
    flops: float = 0.0
    layer_s: float = 0.0
    beside_bytes_per_s: float = 0.0
    packed: tuple[tuple[str, float], ...] = ()
    unpacked: tuple[tuple[str, float], ...] = ()
    ahead_s: float = 0.0
    state_s: float = 0.0
    unified: bool = False
    measured_on: str = ""
    other_bytes: int = 0
    assumed: tuple[str, ...] = ()
    method: str = ""
    capability: str = ""
    threads: int = 0
    uuid: str = field(default="", compare=False, repr=False)

    @property
    def used_bytes(self) -> int:
        """Bytes in use, by this and by other processes."""
        return max(0, self.total_bytes - self.free_bytes)


@dataclass(frozen=True)
class Link:
    """How bytes go from one device to another.

    ``beside_bytes_per_s`` is what it carries while the CPU reads, too, 0 when unknown. ``measured_on`` is an ISO date, or empty when nobody measured: then ``assumed`` tells a guess
    from what a machine file says.
    """

    source: str
    target: str
    bytes_per_s: float
    name: str = ""
    measured_on: str = ""
    assumed: bool = False
    beside_bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Devices and links. ``described`` is True when it came from a file, not from this computer."""

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    described: bool = False

    @cached_property
    def gpus(self) -> tuple[Device, ...]:
        """GPUs in the order in which they are filled."""
        return tuple(device for device in self.devices if device.kind == "gpu")

    def device(self, device_id: str) -> Device:
        """The device with this id.

        Raises
        ------
        KeyError
            When the machine has none.
        """
        return next((d for d in self.devices if d.id == device_id), None) or _missing(device_id)

    def has(self, device_id: str) -> bool:
        """Whether there is a device with this id."""
        return any(device.id == device_id for device in self.devices)

    def bytes_per_s(self, source: str, target: str) -> float:
        """Bandwidth from ``source`` to ``target``; 0 when no link says."""
        if source == target:
            return self.device(source).read_bytes_per_s
        return self._speeds.get((source, target), 0.0)

    @cached_property
    def _speeds(self) -> dict[tuple[str, str], float]:
        return {(link.source, link.target): link.bytes_per_s for link in reversed(self.links)}


def _missing(device_id: str) -> Device:
    raise KeyError(device_id)
