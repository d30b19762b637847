"""How fast weights come from a disk: `python -m benchmarks.disk_reader [--folder DIR]`.

Protocol. A file of random bytes is written to the folder and synced. Each way sweeps it once in
blocks, as a model that is offloaded does: blocks are read into two buffers in turn, two reads under
way at a time; the mapped way touches every page once the system was asked for it. "Cold": the file's
pages are dropped from the page cache first (where the system lets us). "Warm": they were all read
before. The ways take turns, ``--repeats`` times; the median is shown, and its share of the best cold
way's. A disk with a cache of its own, or a virtual one, may be quicker than its flash the second
time; that holds for all ways. On a virtual machine, pages that the guest touches for the first time
may cost it more than the disk does: it shows in the cold mapped and buffered ways. Buffers are used once before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import sweep
from benchmarks.clock import drop_pages
from llm_magic.backends.accelerate.files.extents import Extent, FileImage, file_image
from llm_magic.backends.accelerate.files.mapped import MappedFiles
from llm_magic.backends.accelerate.files.reader import THREADS, FileReader, choose_direct, page_buffer
from llm_magic.units import MIB, format_bandwidth, format_bytes, parse_bytes

CAN_DROP = hasattr(os, "posix_fadvise")


@dataclass(frozen=True)
class Way:
    """One way to read: ``sweep`` reads all blocks once."""

    name: str
    cold: bool
    sweep: Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """One way's rate: the median of its repeats, the lowest and the highest, in bytes per second."""

    way: str
    cold: bool
    bytes_per_s: float
    low_bytes_per_s: float
    high_bytes_per_s: float


def main() -> int:
    """Measure every way, print a table, write the numbers."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="llm-magic-disk-", dir=arguments.folder) as folder:
        path = write_file(Path(folder) / "weights.bin", arguments.size)
        measured = measure(path, arguments)
        direct = choose_direct(path)
    print_table(measured, arguments)
    print(f"choose_direct: {'direct' if direct else 'buffered'}")
    write_json(measured, direct, arguments)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast weights come from a disk.")
    parser.add_argument("--folder", type=Path, default=None, help="on which disk (the temporary folder)")
    parser.add_argument("--size", type=parse_bytes, default="1GiB", help="of the file (1GiB)")
    parser.add_argument("--block", type=parse_bytes, default="64MiB", help="of one block (64MiB)")
    parser.add_argument("--repeats", type=int, default=5, help="sweeps of each way (5)")
    parser.add_argument("--json", type=Path, default=Path("build/disk_reader.json"), help="where numbers go")
    return parser.parse_args()


def write_file(path: Path, size: int) -> Path:
    """Random bytes, for disks that compress."""
    with path.open("wb") as file:
        for start in range(0, size, 16 * MIB):
            file.write(os.urandom(min(16 * MIB, size - start)))
        file.flush()
        os.fsync(file.fileno())
    return path


def measure(path: Path, arguments: argparse.Namespace) -> list[Measured]:
    starts = range(0, arguments.size, arguments.block)
    blocks = [Extent(path, start, min(arguments.block, arguments.size - start)) for start in starts]
    images = [file_image([block]) for block in blocks]
    buffers = [page_buffer(max(image.bytes for image in images)).fill_(0) for _ in range(2)]
    readers: dict[tuple[bool, int], FileReader] = {
        (direct, threads): FileReader(direct=direct, threads=threads)
        for direct, threads in ((False, 1), (False, THREADS), (True, 1), (True, THREADS), (True, 4 * THREADS))
    }
    ways = [
        Way(
            f"{'direct' if direct else 'buffered'}, {threads} thread{'s' if threads > 1 else ''}",
            cold,
            partial(sweep, reader, images, buffers),
        )
        for (direct, threads), reader in readers.items()
        for cold in ((True,) if direct else (True, False))
    ]
    ways += [Way("mapped, asked for ahead", cold, partial(sweep_mapped, blocks)) for cold in (True, False)]
    rates: dict[tuple[str, bool], list[float]] = {(way.name, way.cold): [] for way in ways}
    for _ in range(arguments.repeats):
        for way in ways:
            seconds = time_one(way, path, images, buffers, readers[False, THREADS])
            rates[way.name, way.cold].append(arguments.size / seconds)
    for reader in readers.values():
        reader.close()
    return [
        Measured(name, cold, statistics.median(found), min(found), max(found))
        for (name, cold), found in rates.items()
    ]


def time_one(
    way: Way, path: Path, images: Sequence[FileImage], buffers: Sequence[torch.Tensor], buffered: FileReader
) -> float:
    if not way.cold:
        sweep(buffered, images, buffers)
    elif CAN_DROP:
        drop_pages(path)
    start = time.perf_counter()
    way.sweep()
    return time.perf_counter() - start


def sweep_mapped(blocks: Sequence[Extent]) -> None:
    """Every block once: two are asked for ahead, then each page is touched."""
    files = MappedFiles()
    try:
        ahead = [files.will_need([block]) for block in blocks[:2]]
        for number, block in enumerate(blocks):
            for future in ahead[number]:
                future.result()
            if number + 2 < len(blocks):
                ahead.append(files.will_need([blocks[number + 2]]))
            files.tensor(block, torch.uint8, (block.bytes,))[:: mmap.PAGESIZE].sum()
    finally:
        files.close()


def print_table(measured: list[Measured], arguments: argparse.Namespace) -> None:
    best = max(row.bytes_per_s for row in measured if row.cold)
    title = f"{format_bytes(arguments.size)} in blocks of {format_bytes(arguments.block)}"
    print(f"{title:34}{'':8}{'median':>12}{'lowest':>12}{'highest':>12}{'of best cold':>14}")
    for row in measured:
        rates = (row.bytes_per_s, row.low_bytes_per_s, row.high_bytes_per_s)
        shown = "".join(f"{format_bandwidth(rate):>12}" for rate in rates)
        print(f"{row.way:34}{'cold' if row.cold else 'warm':8}{shown}{row.bytes_per_s / best:14.2f}")
    if not CAN_DROP:
        print("This system cannot drop pages: what is called cold may be warm.")


def write_json(measured: list[Measured], direct: bool, arguments: argparse.Namespace) -> None:
    record: dict[str, Any] = {
        "benchmark": "disk_reader",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in ("torch", "llm-magic")},
        "file_bytes": arguments.size,
        "block_bytes": arguments.block,
        "repeats": arguments.repeats,
        "cold_is_cold": CAN_DROP,
        "choose_direct": direct,
        "ways": [asdict(row) for row in measured],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {arguments.json}")


if __name__ == "__main__":
    sys.exit(main())
