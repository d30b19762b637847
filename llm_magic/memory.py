"""How much memory there is to take, so that an unload can say what it gave back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from llm_magic.machine import Device, Link

Accelerators = Callable[[bool], tuple[tuple[Device, ...], tuple[Link, ...]]]


@dataclass(frozen=True)
class FreeMemory:
    """A moment's memory: what this process holds in RAM, and what is free on each GPU, in bytes."""

    resident: int
    gpus: Mapping[str, int]

    @classmethod
    def now(cls, accelerators: Accelerators) -> FreeMemory:
        """Measure it."""
        devices, _ = accelerators(False)
        return cls(psutil.Process().memory_info().rss, {d.id: d.free_bytes for d in devices})

    def gained_since(self, before: FreeMemory) -> dict[str, int]:
        """Bytes that came back on each device since ``before``; never negative."""
        gained = {"cpu": before.resident - self.resident}
        gained |= {gpu: free - before.gpus.get(gpu, free) for gpu, free in self.gpus.items()}
        return {device: max(0, count) for device, count in gained.items()}
