"""Running out of memory: how it is told, and how freed memory goes back to the system."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from typing import Any

from llm_magic.units import MIB

_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "BLAS_STATUS_ALLOC_FAILED",  # its workspace, or its handle (CUBLAS, HIPBLAS)
    "BLAS_STATUS_NOT_INITIALIZED",  # its handle, too: what a full device mostly says
)

_DRIVER_BYTES = 256 * MIB
"""Of a GPU's free memory, for kernels that are yet to be loaded: about half of what plans keep out."""


class TokensLostError(RuntimeError):
    """Keys and values of an answer are gone, for want of memory to put them into."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def refuse_overflow(devices: Iterable[str]) -> None:
    """Let torch run out of memory when these GPUs have no more, where their driver would not.

    Drivers for Windows, those of WSL too, take RAM instead. It is read over the bus at every use, many
    times slower, and no error tells that blocks should go. What is free changes: call it whenever blocks
    are placed.

    Parameters
    ----------
    devices
        By name; those that are no CUDA devices are left out.
    """
    if not _drivers_overflow():
        return
    import torch

    cuda: Any = torch.cuda
    for device in devices:
        if device.startswith("cuda:"):
            free, total = cuda.mem_get_info(device)
            spare = max(0, free - min(_DRIVER_BYTES, total // 16))
            share = (cuda.memory_reserved(device) + spare) / total
            cuda.set_per_process_memory_fraction(min(1.0, share), device)


def _drivers_overflow() -> bool:
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def free_bytes(device: Any) -> int:
    """What a CUDA device has left for tensors of this process, its allocator's own spare memory included."""
    import torch

    cuda: Any = torch.cuda
    free, _total = cuda.mem_get_info(device)
    return int(free + cuda.memory_reserved(device) - cuda.memory_allocated(device))


def release_memory() -> None:
    """Hand freed memory back to the system: garbage, cached device memory, malloc's spare pages."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing in a process that has not used CUDA
    torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim()


def trim() -> None:
    """Hand malloc's spare pages back: glibc keeps freed tensors of up to 32 MiB for later ones."""
    import ctypes

    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if give_back is not None:
            give_back(0)
