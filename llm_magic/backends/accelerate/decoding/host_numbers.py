"""Numbers that a model's own code has on the host and brings to a GPU in each sweep: a smallest divisor, for one.

A copy from memory that is not pinned ends a capture. A number needs none: a kernel writes it. It is part of what is
recorded then, as any other number that Python computes.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any


def written_by_kernels() -> Any:
    """While it lasts, this thread copies no number to a GPU: kernels write them there.

    Not around compiled functions: torch would compile them anew.
    """
    return _of_moves()()


@cache
def _of_moves() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class Moves(TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            is_number = function is torch.Tensor.to and args[0].is_cpu and args[0].dim() == 0
            # Around these alone: where operations are looked at, torch has other ways for some.
            with _of_copies()() if is_number else nullcontext():
                return function(*args, **(kwargs or {}))

    return Moves


@cache
def _of_copies() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def dispatch(_self: Any, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        device = options.get("device")
        if operation is not torch.ops.aten._to_copy.default or device is None or device.type == "cpu":
            return operation(*args, **options)
        dtype = options.get("dtype") or args[0].dtype
        return torch.full((), args[0].item(), dtype=dtype, device=device)

    return type("Copies", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})
