"""What the NVIDIA driver says about its GPUs, without a CUDA context (which would take VRAM itself).

Needs the optional package ``nvidia-ml-py``; without it, or without a driver, there is nothing to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU, in bytes: all, free, and held by other processes than this one."""

    uuid: str
    name: str
    total: int
    free: int
    other: int


def gpus() -> tuple[GpuMemory, ...]:
    """Every GPU that the driver sees, in bus order; those that CUDA may not use included."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        handles = (nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount()))
        return tuple(gpu for gpu in (_read(nvml, handle) for handle in handles) if gpu is not None)


def _read(nvml: Any, handle: Any) -> GpuMemory | None:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError:
        return None  # a GPU in an error state, or with unified memory, has no memory information
    total, free = int(memory.total), int(memory.free)
    return GpuMemory(uuid, name, total, free, _held_by_others(nvml, handle, total - free))


def _held_by_others(nvml: Any, handle: Any, used: int) -> int:
    """Bytes that other processes hold; all that is used where the driver does not know this process.

    Inside a container process ids differ from the driver's, and on Windows sizes are missing.
    """
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return used
    own = sum(p.usedGpuMemory or 0 for p in processes if p.pid == os.getpid())
    return max(0, used - own)


@contextmanager
def _nvml() -> Iterator[Any]:
    """The driver's library, or ``None``."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
