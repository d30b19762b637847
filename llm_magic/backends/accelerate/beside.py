"""What the CPU reads and the buses carry when both are at work, as in plans where both compute.

They share the memory, and the driver of the copies takes cores, so neither gets what it gets alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

from llm_magic.backends.accelerate.threads import fewer_threads
from llm_magic.units import MIB

_COPY_BYTES = 16 * MIB
_UNDER_WAY = 2  # copies to a GPU: the next one waits for the bus, not for us
_LEAST_RUNS = 2


def rates_together(
    read: Callable[[], object], read_bytes: int, gpus: Sequence[str], budget_s: float
) -> tuple[float, dict[str, float]]:
    """Bytes per second that the CPU reads, and that each GPU is sent meanwhile.

    Parameters
    ----------
    read
        Has the CPU read ``read_bytes``, with the threads of torch.
    gpus
        Devices of torch with memory of their own.

    Raises
    ------
    RuntimeError
        When a copy fails, for want of memory for one.
    """
    with fewer_threads(), _copies_to(gpus) as copied:
        read()
        before, start, runs = dict(copied), time.perf_counter(), 0
        while runs < _LEAST_RUNS or time.perf_counter() < start + budget_s:
            read()
            runs += 1
        seconds = time.perf_counter() - start
        sent = {gpu: (copied[gpu] - before[gpu]) / seconds for gpu in gpus}
    return runs * read_bytes / seconds, sent


@contextmanager
def _copies_to(gpus: Sequence[str]) -> Iterator[Mapping[str, int]]:
    """Copies from pinned memory to every GPU, all the time: the bytes that have come, by GPU."""
    copied, stop = dict.fromkeys(gpus, 0), threading.Event()
    begun = {gpu: threading.Event() for gpu in gpus}

    def copy(gpu: str) -> None:
        try:
            with closing(_copies(gpu)) as done:
                for count in done:
                    copied[gpu] += count
                    begun[gpu].set()
                    if stop.is_set():
                        return
        finally:
            begun[gpu].set()

    with ThreadPoolExecutor(len(gpus)) as pool:
        copying = [pool.submit(copy, gpu) for gpu in gpus]
        try:
            for event in begun.values():
                event.wait()
            yield copied
        finally:
            stop.set()
        for each in copying:
            each.result()


def _copies(gpu: str) -> Generator[int]:
    """One copy after the other; says the bytes of each that is done."""
    import torch

    module: Any = getattr(torch, gpu.partition(":")[0])
    here = torch.ones(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=gpu)
    stream, done = module.Stream(device=gpu), deque[Any]()
    try:
        while True:
            with module.stream(stream):
                there.copy_(here, non_blocking=True)
            done.append(stream.record_event(_event(module)))
            if len(done) == _UNDER_WAY:
                done.popleft().synchronize()
                yield _COPY_BYTES
    finally:
        stream.synchronize()


def _event(module: Any) -> Any:
    """One whose waiters leave their core to others, as those of the engine do."""
    return module.Event(blocking=True) if module.__name__ == "torch.cuda" else module.Event()
