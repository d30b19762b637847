"""Small matrix products of torch, by one thread.

torch shares out even a product of four numbers, and waits until a second thread has a core. Where another program has
that, it is 10 ms (measured on two cores, three processes beside it, 1 x 4 times 4 x 16 in bfloat16: 11.7 ms by two
threads, 3 us by one).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

FEW_NUMBERS = 1 << 17
"""Up to so many one thread is enough."""


@contextmanager
def one_thread() -> Iterator[None]:
    """What torch computes in this thread meanwhile it computes alone. Kernels of ours are not for in here."""
    import torch

    threads, tell = torch.get_num_threads(), _teller()
    if tell is None or threads <= 1:
        yield
        return
    try:
        tell(1)
        yield
    finally:
        tell(threads)


@cache
def _teller() -> Callable[[int], object] | None:
    """What tells OpenMP how many threads regions of the calling thread have; ``None``: nobody knows it.

    torch's own function would tell every thread that begins to compute later, too.
    """
    from llm_magic.backends.accelerate.kernels.openmp import libraries

    for library in libraries():
        if hasattr(library, "omp_set_num_threads"):
            tell: Callable[[int], object] = ctypes.PyDLL(None, handle=library._handle).omp_set_num_threads
            return tell
    return None
