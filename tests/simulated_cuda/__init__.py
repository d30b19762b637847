"""A simulated CUDA device, for tests where there is no GPU: ``install()`` before anything uses ``torch.cuda``.

Tensors of the device are tensors that torch takes for a GPU's: mixed devices, pinned memory, streams,
events, graph captures, memory that runs out all behave, and kernels give the CPU's numbers. What it adds
is a check of order: every two accesses to the same bytes that no event, stream or wait orders are
reported by `races`, however the delays of a run fall.

It says nothing of speed, and has no compiler: ``torch.compile`` does not know it.
"""

from tests.simulated_cuda.patches import (
    driver_bytes,
    fail_allocation_in,
    install,
    races,
    set_total_memory,
)

__all__ = ["driver_bytes", "fail_allocation_in", "install", "races", "set_total_memory"]
