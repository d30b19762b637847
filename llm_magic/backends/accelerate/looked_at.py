"""Whether somebody looks on while torch computes: what kernels of ours make is not seen by them."""

from __future__ import annotations

ONLY_LOOKS = "only_looks"
"""What a hook before a layer has that changes nothing, and may come when the layer has been computed."""


def is_looked_at() -> bool:
    """Whether operations of this thread are compiled, cast, traced, counted, or transformed to something else."""
    import torch
    from torch.autograd import forward_ad

    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )
