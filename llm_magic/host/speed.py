"""Speed of the CPU where no framework measured it: how fast it reads RAM and multiplies matrices.

What a framework reaches is what counts for a forecast, so a backend's own figures come first.
These stand in for it, and come from numpy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llm_magic.host.processors import cpu_cores
from llm_magic.units import MIB


@dataclass(frozen=True)
class CpuSpeed:
    """Bytes read from RAM and floating-point operations, both per second; how they were measured."""

    read_bytes_per_s: float
    flops: float
    method: str


def measure_cpu(free_bytes: int, budget_s: float = 0.4) -> CpuSpeed | None:
    """Read bandwidth (every core sums its part of an array) and float32 matrix product of this CPU.

    ``None`` without numpy, or with too little memory free.
    """
    try:
        import numpy as np
    except ImportError:
        return None
    size = min(256 * MIB, free_bytes // 4)
    if size < 32 * MIB:
        return None
    threads = cpu_cores()
    parts = np.array_split(np.ones(size // 4, dtype=np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        read_s = best_of(lambda: list(pool.map(np.max, parts)), budget_s / 2)
    left, right = np.ones((256, 2048), dtype=np.float32), np.ones((2048, 2048), dtype=np.float32)
    product_s = best_of(lambda: left @ right, budget_s / 2)
    return CpuSpeed(size / read_s, 2 * 256 * 2048 * 2048 / product_s, f"numpy, {thread_words(threads)}")


def thread_words(count: int) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return "1 thread" if count == 1 else f"{count} threads"


def best_of(work: Callable[[], object], budget_s: float) -> float:
    """Seconds of the fastest run of ``work``, after one to warm up; at least two runs are timed."""
    return max(min(_runs(work, budget_s)), 1e-9)


def median_of(work: Callable[[], object], budget_s: float) -> float:
    """Seconds of the run in the middle: of ``work`` that waits for its own threads, the fastest is luck."""
    return max(statistics.median(_runs(work, budget_s)), 1e-9)


def _runs(work: Callable[[], object], budget_s: float) -> list[float]:
    work()
    seconds, end = list[float](), time.perf_counter() + budget_s
    while len(seconds) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds
