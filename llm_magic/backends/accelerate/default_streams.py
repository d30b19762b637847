"""Loading is done on the default streams of GPUs, whatever stream its caller is on.

transformers copies weights to a GPU on threads of its own, and these begin on its default stream. The memory of what
the calling thread has merged goes to the next of these copies, which wait for nothing that another stream still reads.
A thread may well be on another one: torch 2.13 leaves that of a capture that fails behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def on_default_streams(devices: Iterable[str]) -> Iterator[None]:
    """On each of these GPUs, work on the default stream: after what the current one has begun, and before what it does next.

    Parameters
    ----------
    devices
        By name; those that are no CUDA devices are left out.
    """
    gpus = sorted({device for device in devices if device.startswith("cuda:")})
    if not gpus:
        yield
        return
    import torch

    cuda: Any = torch.cuda
    with ExitStack() as stack:
        before = cuda.current_device()
        for gpu in gpus:
            stack.enter_context(_on_default_stream(gpu))
        stack.enter_context(cuda.device(before))  # a stream of another GPU makes that the current one
        yield


@contextmanager
def _on_default_stream(gpu: str) -> Iterator[None]:
    import torch

    cuda: Any = torch.cuda
    here, default = cuda.current_stream(gpu), cuda.default_stream(gpu)
    if here == default:
        yield
        return
    default.wait_stream(here)
    try:
        with cuda.stream(default):
            yield
    finally:
        here.wait_stream(default)
