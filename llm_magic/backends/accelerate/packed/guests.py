"""Weights in the order of torch's 4-bit kernel for CPUs, where another device multiplies with them."""

from __future__ import annotations

from functools import cache
from typing import Any

from llm_magic.backends.accelerate.packed import int4_orders, tinygemm


def is_a_guest(weight: Any) -> bool:
    """Whether it is in the order of torch's kernel for CPUs, and on a device: for a prompt, from RAM."""
    return hasattr(weight, "_scale_shift") and not (
        weight.device.type in ("cpu", "meta") or int4_orders.is_for_cuda(weight._data._data)
    )


def as_a_guest(weight: Any) -> Any:
    """The same weight, of the class of guests."""
    shape = (weight.size(), weight.stride())
    return guest_class()(
        weight.qtype, weight.axis, weight._group_size, *shape, weight._data, weight._scale_shift
    )


@cache
def guest_class() -> Any:
    """A weight of torch's kernel for CPUs where another device multiplies with it: it becomes numbers first.

    For the many tokens of a prompt that is quick, and the bytes in RAM stay as they are.
    """
    import torch
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    class Guest(TinyGemmWeightQBitsTensor):  # type: ignore[misc]  # its library has no types
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.nn.functional.linear:
                return super().__torch_function__(func, types, args, kwargs)

            def linear(inputs: Any, weight: Any, bias: Any = None) -> Any:
                return torch.nn.functional.linear(inputs, tinygemm.numbers_of(weight), bias)

            return linear(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(op, types, args, kwargs)
            return as_a_guest(result) if is_a_guest(result) else result

    return Guest
