"""The recorder of a GPU: work that is captured as CUDA graphs, and launched again as a whole.

The first run is an ordinary one, whose result counts; the second is captured. Work of the host between its kernels
parts it into several graphs. Threads, garbage and torch's workspaces must not end a capture or become part of it, and
one that fails must not leave torch's allocator and random generators so that the whole process suffers from it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from llm_magic.backends.accelerate.memory_errors import is_out_of_memory
from llm_magic.backends.accelerate.placement.cpu_experts import HostWork, before_recording, host_work_taken_by
from llm_magic.backends.accelerate.preparation import preparing

_AFTERMATH = "due to a previous error during capture"  # CUDA says it when a capture ends that failed before
_idle_streams: dict[int, list[Any]] = {}
"""Of recorders that are no more: GPU -> streams for the next ones."""


class Graphs:
    """What one sweep was recorded to: a graph, or several with work of the host between them.

    To `torch.cuda.graph` it is like one graph. Called, it runs all of it once more.

    Parameters
    ----------
    device
        The GPU.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._is_open = False
        self._ended = 0
        self._graphs: list[Any] = []
        self._works: list[HostWork] = []
        self._options: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def capture_begin(self, *pool: Any, **options: Any) -> None:
        """Begin the first graph, or the next one."""
        import torch

        self._options = pool, options
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(*pool, **options)
        self._is_open = True

    def capture_end(self) -> None:
        """End the graph that was begun last, unless it has ended: an error may come between two."""
        if self._is_open:
            self._is_open = False
            self._graphs[-1].capture_end()
            self._ended += 1

    def give_up(self) -> list[Any]:
        """After a capture that failed: let all graphs go but those that have not ended, which are returned."""
        left = [graph for graph in self._graphs[self._ended :] if not _has_ended(graph)]
        self._graphs.clear()
        self._works.clear()
        return left

    def interrupt(self, work: HostWork) -> None:
        """While a graph is captured: have the host do this between what came before and what comes next."""
        self.capture_end()
        self._works.append(work)
        pool, options = self._options
        self.capture_begin(*pool, **options)

    @property
    def has_host_work(self) -> bool:
        """Whether a replay may fail between two of its graphs."""
        return bool(self._works)

    def __call__(self) -> None:
        import torch

        with torch.cuda.device(self._device):
            for graph, work in zip(self._graphs, self._works, strict=False):
                graph.replay()
                torch.cuda.current_stream().synchronize()
                work()
            self._graphs[-1].replay()


class CudaGraphs:
    """Captures on one GPU; all graphs share one pool of memory, since only one runs at a time.

    Parameters
    ----------
    device
        ``torch.device("cuda", 0)``.
    frees_memory
        Whether to collect what is free before each capture: that takes longer than a small one.
    """

    def __init__(self, device: Any, *, frees_memory: bool = True) -> None:
        import torch

        self._device, self._frees_memory = device, frees_memory
        cuda: Any = torch.cuda
        with cuda.device(device):
            # torch keeps a workspace for matrix products on each stream that had one, 32 MiB on an H100.
            idle = _idle_streams.setdefault(self._index, [])
            self._stream = idle.pop() if idle else cuda.Stream()
        weakref.finalize(self, idle.append, self._stream).atexit = False
        self._pool: Any = None
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._failed: list[Any] = []

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        """Run once on a stream of its own, then capture; the work of the host comes between the graphs.

        Raises
        ------
        RuntimeError
            When something in the sweep cannot be captured: a kernel that waits for the host, for one.
        """
        import torch

        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream), before_recording():
                    sweep()
            finally:  # what a sweep that failed has started still writes to the cache, and reads slots
                current.wait_stream(self._stream)
            with preparing():
                graph = self._captured(sweep, current)
        self._alive.add(graph)
        return graph

    def _captured(self, sweep: Callable[[], object], current: Any) -> Graphs:
        """The graph; while one is captured torch gives no free memory to it, so without any it is tried twice."""
        import torch

        for frees_memory in dict.fromkeys((self._frees_memory, True)):
            graph = Graphs(self._device)
            if not self._alive or self._pool is None:  # the pool went with the last graph
                self._pool = torch.cuda.graph_pool_handle()
            try:
                with host_work_taken_by(graph.interrupt):
                    self._capture(graph, sweep, current, frees_memory=frees_memory)
            except BaseException as error:
                self._clean_up(graph, current)
                if "CUDA error: out of memory" in str(error) and frees_memory:  # the driver names no GPU
                    raise torch.OutOfMemoryError(f"{error} on GPU {self._index}") from error
                if frees_memory or not is_out_of_memory(error):
                    raise
            else:
                break
        return graph

    @property
    def _index(self) -> int:
        import torch

        return self._device.index if self._device.index is not None else torch.cuda.current_device()

    def _capture(
        self, graph: Any, sweep: Callable[[], object], current: Any, *, frees_memory: bool = True
    ) -> None:
        import torch

        # What other threads allocate meanwhile (a compilation, a widget) must not end the capture.
        mode: Any = "thread_local"
        capture = torch.cuda.graph if frees_memory else _capturing
        # A capture that fails leaves its own stream behind as the current one: the outer context ends that.
        with (
            torch.cuda.stream(current),
            _without_garbage(),
            _own_workspaces(),
            capture(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode),
        ):
            sweep()

    def _clean_up(self, graph: Graphs, current: Any) -> None:
        """After a capture that failed.

        torch up to 2.11 leaves it open in its allocator, which then gives no memory back to anybody, and
        in its random generators, which refuse to draw until another capture has ended well.
        """
        import torch

        self._failed += graph.give_up()  # the allocator knows it by its address
        library: Any = torch._C
        with suppress(RuntimeError):
            library._cuda_endAllocateToPool(self._index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):
            self._capture(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=self._device), current)
        self._pool = None


def what_ended(error: BaseException) -> BaseException:
    """What a capture was ended by, where torch says no more than that it could not go on after that."""
    first = error.__context__
    return first if first is not None and _AFTERMATH in str(error) else error


def _has_ended(graph: Any) -> bool:
    """Whether its capture has, although there was no memory to make it executable."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@contextmanager
def _without_garbage() -> Iterator[None]:
    """While it lasts, nothing is collected: to unpin memory or to let a graph go would end a capture.

    torch collects nothing before a capture from 2.9 on.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Around a capture: workspaces for its matrix products come from the graphs' own pool, and go back there.

    torch has one for each stream, made before the capture, whose address would become part of the graph. 2.13 and
    2.14 give that back with any graph that was captured on the stream, though others go on using it
    (pytorch/pytorch#193402). What belongs to the pool stays as long as they do, and only one of them runs at a time.
    """
    import torch

    library: Any = torch._C
    clear = getattr(library, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextmanager
def _capturing(graph: Any, *, pool: Any, stream: Any, capture_error_mode: Any) -> Iterator[None]:
    """``torch.cuda.graph`` without what it does first: it waits for the device, and gives free memory back."""
    import torch

    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode=capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()
