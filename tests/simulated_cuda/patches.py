"""``torch.cuda`` for the simulated device."""

from __future__ import annotations

import enum
import importlib.util
import types
from functools import cache
from typing import Any

import torch

from tests.simulated_cuda import int4
from tests.simulated_cuda.build import build


@cache
def core() -> Any:
    """The compiled device."""
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  before there is a GPU: its operators then have kernels of the CPU alone
    return build()


@cache
def install() -> None:
    """Make this process see the simulated GPUs."""
    core()
    torch.set_num_threads(1)  # what is computed is tiny
    torch.version.cuda = "12.8"
    _patch_library()
    _patch_module()
    int4.install()
    torch.cuda.default_generators = tuple(core().default_generator(i) for i in range(core().device_count()))


def races() -> list[str]:
    """What was not ordered since the last call."""
    return list(core().take_races())


def driver_bytes(index: int = 0) -> int:
    """What executable graphs take of a GPU, which torch counts nowhere."""
    return int(core().memory_stats(index)["driver"])


def set_total_memory(size: int, index: int = 0) -> int:
    """Bytes that a GPU has from now on; returns what it had."""
    before = int(core().memory_stats(index)["total"])
    core().set_total(index, size)
    return before


def fail_allocation_in(count: int) -> int:
    """Let one allocation fail, after ``count`` others; returns how many were left before, less than 0 if none."""
    return int(core().fail_allocation_in(count))


class Stream(torch.Stream):
    """``torch.cuda.Stream``."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: int) -> Stream:
        if known:
            return super().__new__(cls, **known)
        index = torch.cuda._utils._get_device_index(device, optional=True)
        return super().__new__(cls, device=torch.device("cuda", index), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event


class Event(torch.Event):
    """``torch.cuda.Event``."""

    def __new__(
        cls,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> Event:
        made = super().__new__(
            cls, device=torch.device("cuda"), enable_timing=enable_timing, blocking=blocking
        )
        made.is_timed = enable_timing
        return made

    def elapsed_time(self, end_event: Any) -> float:
        if not (self.is_timed and end_event.is_timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.query() and end_event.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return float(core().elapsed_ms(self.event_id, end_event.event_id))

    def record(self, stream: Any = None) -> None:
        super().record(stream or torch.cuda.current_stream())

    def wait(self, stream: Any = None) -> None:
        super().wait(stream or torch.cuda.current_stream())


class Error(enum.IntEnum):
    """``cudaError``, as far as torch's Python asks for it."""

    success = 0


def _runtime() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        cudaError=Error,
        cudaHostRegister=lambda address, size, flags: core().register_pinned(address, size),
        cudaHostUnregister=core().unregister_pinned,
        cudaMemGetInfo=_memory_info,
        cudaGetErrorString=lambda error: f"error {int(error)}",
    )


def _memory_info(index: int) -> tuple[int, int]:
    stats = core().memory_stats(index)
    return stats["total"] - stats["reserved"] - stats["driver"], stats["total"]


def _properties(index: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="Simulated GPU",
        major=9,
        minor=0,
        total_memory=core().memory_stats(index)["total"],
        multi_processor_count=4,
        L2_cache_size=1 << 20,
        is_integrated=0,
        uuid=f"00000000-0000-0000-0000-00000000000{index}",
        gcnArchName="",
    )


def _stats(index: int) -> dict[str, Any]:
    stats = core().memory_stats(index)

    def kind(current: int, peak: int) -> dict[str, Any]:
        return {"all": {"current": current, "peak": peak, "allocated": 0, "freed": 0}}

    return {
        "allocated_bytes": kind(stats["allocated"], stats["peak"]),
        "reserved_bytes": kind(stats["reserved"], stats["peak_reserved"]),
        "allocation": {"all": {"allocated": stats["allocations"]}},
    }


def _stream_of(index: int, stream_id: int) -> tuple[int, int, int]:
    return stream_id, index, 1


def _patch_library() -> None:
    """What a build with CUDA has in ``torch._C``."""

    def index_of(index: int) -> int:
        return core().current_device() if index < 0 else index

    functions = {
        "_cuda_init": lambda: None,
        "_cuda_isInBadFork": False,
        "_cuda_getDeviceCount": core().device_count,
        "_cuda_getDevice": core().current_device,
        "_cuda_setDevice": core().exchange_device,
        "_cuda_exchangeDevice": core().exchange_device,
        "_cuda_maybeExchangeDevice": core().exchange_device,
        "_cuda_getCurrentStream": lambda i: _stream_of(index_of(i), core().current_stream(index_of(i))),
        "_cuda_getDefaultStream": lambda i: _stream_of(index_of(i), 0),
        "_cuda_setStream": lambda stream_id, device_index, device_type: core().set_stream(
            device_index, stream_id
        ),
        "_cuda_synchronize": lambda: core().synchronize(core().current_device()),
        "_cuda_sleep": core().sleep,
        "_cuda_emptyCache": core().empty_cache,
        "_cuda_clearCublasWorkspaces": core().clear_workspaces,
        "_cuda_memoryStats": _stats,
        "_cuda_resetPeakMemoryStats": core().reset_peak,
        "_cuda_endAllocateToPool": lambda device, pool: None,
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_canDeviceAccessPeer": lambda first, second: True,
        "_cuda_ipc_collect": lambda: None,
        "_host_emptyCache": lambda: None,
    }
    for name, function in functions.items():
        setattr(torch._C, name, function)


def _patch_module() -> None:
    """What ``torch.cuda`` has taken from ``torch._C`` when it was imported."""
    cuda: Any = torch.cuda
    cuda._cudart = _runtime()
    cuda._get_device_properties = _properties
    cuda._exchange_device = cuda._maybe_exchange_device = core().exchange_device
    cuda.Stream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.CUDAGraph = cuda.graphs.CUDAGraph = core().Graph
    cuda.graphs._cuda_isCurrentStreamCapturing = core().is_capturing
    cuda.graphs._graph_pool_handle = core().new_pool
    cuda._is_in_bad_fork = lambda: False
    torch.backends.cuda.is_built = lambda: True
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache = lambda: None
