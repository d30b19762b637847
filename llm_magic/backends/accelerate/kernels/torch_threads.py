"""How many threads torch computes with in a sweep of few tokens: one, where threads of ours have the large products.

What is left to torch then is small, but it shares out even a product of four numbers: each of them waits until a second
thread has a core, and where another program has it that is 10 ms (measured on two cores, three processes beside it, a
product of 1 x 4 and 16 x 4 in bfloat16: 11.7 ms by two threads, 3 us by one).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

_MANY = 1 << 17
"""Numbers for which more than one thread of torch is worth waiting for."""

_of_thread = threading.local()


def threads_of_torch() -> int:
    """As many as torch computes with, or would."""
    import torch

    return _held() or torch.get_num_threads()


@contextmanager
def held_to_one() -> Iterator[None]:
    """What torch computes in this thread it computes alone; where threads of ours do not serve, nothing changes."""
    threads, tell = threads_of_torch(), _teller()
    if tell is None or threads <= 1 or _held():
        yield
        return
    _of_thread.held = threads
    tell(1)
    try:
        yield
    finally:
        tell(threads)
        _of_thread.held = 0


def with_all(numbers: int = 0) -> AbstractContextManager[None]:
    """Around what is large: torch has its threads again.

    Parameters
    ----------
    numbers
        That are read, if somebody knows: for a few nothing changes.
    """
    threads = _held() if not numbers or numbers > _MANY else 0
    return _again(threads) if threads else nullcontext()


@contextmanager
def _again(threads: int) -> Iterator[None]:
    tell = _teller()
    assert tell is not None
    tell(threads)
    try:
        yield
    finally:
        if _held():
            tell(1)


def _held() -> int:
    """The number of threads that are held to one; 0 where none are."""
    return int(getattr(_of_thread, "held", 0))


@cache
def _teller() -> Callable[[int], object] | None:
    """What tells OpenMP how many threads regions of the calling thread have; ``None``: they are to stay as they are.

    torch's own function would tell every thread that begins to compute later, too.
    """
    from llm_magic.backends.accelerate.kernels.openmp import libraries
    from llm_magic.backends.accelerate.kernels.shares import serving

    if serving() is None:
        return None
    for library in libraries():
        if hasattr(library, "omp_set_num_threads"):
            tell: Callable[[int], object] = ctypes.PyDLL(None, handle=library._handle).omp_set_num_threads
            return tell
    return None
