"""Quanto's integers of 2 and 4 bits: several in a byte, or one in each until a weight gets its order.

They are packed and unpacked by torch's operators alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_BYTE = 8
"""Bits that quanto's integers have which came from a checkpoint, until `arrange` packs them."""


def in_bytes(integers: Any) -> Any:
    """Small integers (uint8, groups by columns) for a weight of quanto, which `arrange` puts where they belong."""
    from optimum.quanto.tensor.packed import PackedTensor

    return PackedTensor(integers, _BYTE, integers.size(), integers.stride())


def is_in_bytes(weight: Any) -> bool:
    """Whether a weight of quanto has its integers so."""
    return getattr(getattr(weight, "_data", None), "_bits", 0) == _BYTE


def packed_now(weight: Any) -> Any:
    """The same weight with several integers in a byte, as quanto packs them."""
    from optimum.quanto.tensor.packed import PackedTensor

    weight._data = PackedTensor.pack(unpacked(weight._data), weight.qtype.bits)
    weight._shift = weight._shift.to(weight.dtype)
    return weight


def unpacked(packed: Any) -> Any:
    """Quanto's integers, one in a byte: row blocks that share bytes, the first in the lowest bits."""
    import torch

    bits, mask = packed._bits, (1 << packed._bits) - 1
    if bits == _BYTE:
        return packed._data
    blocks = [packed._data >> shift & mask for shift in range(0, 8, bits)]
    return torch.cat(blocks)[: packed.shape[0]]


@cache
def torch_packed() -> Any:
    """Quanto's packed 2- and 4-bit integers, unpacked by torch's operators.

    Quanto unpacks by an extension that it compiles at the first use: a minute with a compiler, an
    error without one, for the same few shifts.
    """
    from optimum.quanto.tensor.packed import PackedTensor

    class TorchPacked(PackedTensor):  # type: ignore[misc]  # its library has no types
        @staticmethod
        def __new__(cls: Any, *args: Any, **options: Any) -> Any:
            return PackedTensor.__new__(cls, *args, **options)

        def unpack(self) -> Any:
            return unpacked(self)

        @staticmethod
        def __tensor_unflatten__(tensors: Any, meta: Any, size: Any, stride: Any) -> Any:
            return _rewrapped(PackedTensor.__tensor_unflatten__(tensors, meta, size, stride))

        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(op, types, args, kwargs)
            return _rewrapped(result) if isinstance(result, PackedTensor) else result

    def _rewrapped(packed: Any) -> Any:
        return TorchPacked(packed._data, packed._bits, packed.size(), packed.stride())

    return TorchPacked
