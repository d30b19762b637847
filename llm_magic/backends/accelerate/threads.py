"""How many cores torch computes with, where the driver of a GPU needs some too.

While blocks stream over the bus, a thread of the driver keeps the copies going. A matrix product that
takes every core starves it, and itself: measured on 16 cores, 8–10 GB/s with 16 threads beside a busy
bus, 42–46 GB/s with 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llm_magic.plan import Plan

_LEFT = 4  # a quarter of the cores at most


@contextmanager
def cores_left_for_the_driver(plan: Plan) -> Iterator[None]:
    """Compute with fewer threads while the CPU works beside a GPU that blocks stream to."""
    devices = {device for place in plan.placements for device in place.computing}
    streams = any(place.way in ("streamed", "read", "kept") for place in plan.placements)
    if "cpu" not in devices or len(devices) == 1 or not streams:
        yield
        return
    with fewer_threads():
        yield


@contextmanager
def fewer_threads() -> Iterator[None]:
    """Compute with as many threads as leave the driver its cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - min(_LEFT, before // 4)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
