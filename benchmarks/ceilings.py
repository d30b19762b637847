"""What the hardware allows, measured beside what is held against it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.clock import drop_pages, weight_files
from llm_magic.backends.accelerate.files.extents import Extent, FileImage, file_image
from llm_magic.backends.accelerate.files.reader import THREADS, FileReader, page_buffer
from llm_magic.units import GIB, MIB

_BLOCK = 64 * MIB
_SMALL, _LARGE = 8 * 1024, 400_000_000  # what the CPU hands over for a token, and a block of a large model
_LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))


class DiskCeiling:
    """Reads a model's files cold, block by block, two reads under way: the best of three ways to read."""

    WAYS = ((True, 1), (True, THREADS), (False, THREADS))  # direct, threads

    def __init__(self, folder: str, most_bytes: int = 2 * GIB) -> None:
        self._images: list[tuple[Path, FileImage]] = []
        left = most_bytes
        for path in weight_files(folder):
            size = min(left, path.stat().st_size)
            self._images += [
                (path, file_image([Extent(path, start, min(_BLOCK, size - start))]))
                for start in range(0, size, _BLOCK)
            ]
            left -= size
        self._buffers = [
            page_buffer(max(image.bytes for _, image in self._images)).fill_(0) for _ in range(2)
        ]
        self._readers = {way: FileReader(direct=way[0], threads=way[1]) for way in self.WAYS}

    def measure(self) -> dict[str, Any]:
        """Bytes per second of each way."""
        rates = {
            f"{'direct' if direct else 'buffered'}, {threads}": self._rate(reader)
            for (direct, threads), reader in self._readers.items()
        }
        return {"bytes_per_s": max(rates.values()), "rates": rates}

    def close(self) -> None:
        """End the threads."""
        for reader in self._readers.values():
            reader.close()

    def _rate(self, reader: FileReader) -> float:
        for path in {path for path, _ in self._images}:
            drop_pages(path)
        images = [image for _, image in self._images]
        start = time.perf_counter()
        sweep(reader, images, self._buffers)
        return sum(image.bytes for image in images) / (time.perf_counter() - start)


def sweep(reader: FileReader, images: Sequence[FileImage], buffers: Sequence[Any]) -> None:
    """Every block once, two reads under way at a time."""
    under_way: list[Future[None]] = []
    for number, image in enumerate(images):
        if number >= 2:
            under_way[number - 2].result()
        under_way.append(reader.read(image, buffers[number % 2]))
    for future in under_way[-2:]:
        future.result()


class CpuCeiling:
    """Weights that torch's bf16 matrix-vector products read per second, on layers of a Llama 8B."""

    def __init__(self, layers: int = 4) -> None:
        import torch

        self._layers = [[torch.ones(shape, dtype=torch.bfloat16) for shape in _LAYER] for _ in range(layers)]
        self._inputs = {width: torch.ones(1, width, dtype=torch.bfloat16) for width in (4096, 14336)}
        self._bytes = sum(weight.nbytes for layer in self._layers for weight in layer)

    def measure(self) -> dict[str, Any]:
        """One second of it."""
        return {"bytes_per_s": self.rate(1.0)}

    def rate(self, seconds: float) -> float:
        """Bytes per second, after one run to warm up."""
        self._run()
        runs, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            self._run()
            runs += 1
        return self._bytes * runs / (time.perf_counter() - start)

    def _run(self) -> None:
        from torch.nn.functional import linear

        for layer in self._layers:
            for weight in layer:
                linear(self._inputs[weight.shape[1]], weight)


class Cuda:
    """Whether there is a CUDA device."""

    def measure(self) -> dict[str, str]:
        """Its name.

        Raises
        ------
        RuntimeError
            When there is none.
        """
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        return {"name": torch.cuda.get_device_name(0)}


class GpuCeiling:
    """The bus from pinned memory, and reads of the device.

    With the CPU: also its products alone and beside the bus, and small copies alone and beside a large one.
    """

    def __init__(self, *, with_cpu: bool = False) -> None:
        import torch

        size = min(GIB, torch.cuda.mem_get_info()[0] // 8)
        self._torch: Any = torch
        self._host = torch.ones(size, dtype=torch.uint8).pin_memory()
        self._there: Any = None
        self._size = size
        self._cpu = CpuCeiling() if with_cpu else None

    def measure(self) -> dict[str, Any]:
        """Bytes per second of everything."""
        torch = self._torch
        self._there = torch.empty(self._size, dtype=torch.uint8, device="cuda")
        found: dict[str, Any] = {"bus_bytes_per_s": self._size / self._seconds(self._copy)}
        large = torch.ones(self._size, dtype=torch.float32, device="cuda")  # 4 bytes each
        found["read_bytes_per_s"] = large.nbytes / self._seconds(large.max)
        del large
        if self._cpu is not None:
            found["cpu_bytes_per_s"] = self._cpu.rate(1.0)
            found["cpu_beside_bus"], found["bus_beside_cpu"] = self._both(self._cpu)
            found |= self._small_copies()
        self._there = None  # others of the group want the memory
        torch.cuda.empty_cache()
        return found

    def _copy(self) -> None:
        self._there.copy_(self._host, non_blocking=True)

    def _seconds(self, work: Callable[[], object], runs: int = 7) -> float:
        """Median by the device's own clock."""
        cuda = self._torch.cuda
        times: list[float] = []
        for _ in range(1 + runs):
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times[1:])[runs // 2]

    def _small_copies(self, runs: int = 7) -> dict[str, float]:
        """Seconds until a small copy is done, by the clock of the CPU, which waits for it: medians.

        Whether such a copy waits behind a large one of another stream is up to the device's copy engines.
        """
        torch = self._torch
        small, there = (
            torch.ones(_SMALL, dtype=torch.uint8),
            torch.empty(_SMALL, dtype=torch.uint8, device="cuda"),
        )
        sources = {"pageable": small, "pinned": small.clone().pin_memory()}
        own, side = torch.cuda.Stream(), torch.cuda.Stream()
        size = min(_LARGE, self._size)
        torch.cuda.synchronize()

        def seconds(source: Any, beside: bool) -> float:
            if beside:
                with torch.cuda.stream(side):
                    self._there[:size].copy_(self._host[:size], non_blocking=True)
            start = time.perf_counter()
            with torch.cuda.stream(own):
                there.copy_(source, non_blocking=True)
            own.synchronize()
            took = time.perf_counter() - start
            torch.cuda.synchronize()
            return took

        found: dict[str, float] = {}
        for name, source in sources.items():
            for key, beside in (("", False), ("_beside", True)):
                times = sorted([seconds(source, beside) for _ in range(1 + runs)][1:])
                found[f"small_{name}{key}_s"] = times[runs // 2]
        return found

    def _both(self, cpu: CpuCeiling) -> tuple[float, float]:
        """CPU with four cores left to the driver, and the bus beside it."""
        torch = self._torch
        threads, stop, moved = torch.get_num_threads(), threading.Event(), [0]

        def pump() -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    self._copy()
                    self._copy()
                    stream.synchronize()
                    moved[0] += 2 * self._size

        thread = threading.Thread(target=pump)
        torch.set_num_threads(max(1, threads - 4))
        thread.start()
        try:
            start, before = time.perf_counter(), moved[0]
            rate = cpu.rate(1.0)
            bus = (moved[0] - before) / (time.perf_counter() - start)
        finally:
            stop.set()
            thread.join()
            torch.set_num_threads(threads)
        return rate, bus
