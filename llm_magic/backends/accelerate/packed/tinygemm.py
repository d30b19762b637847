"""Weights of quanto in the order of torch's 4-bit kernel, "tinygemm".

Which weights it takes, and on which devices; how one gets its order, another or none; and what one stands for.
"""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.packed import int4_orders
from llm_magic.backends.accelerate.packed.quanto_integers import is_in_bytes, unpacked
from llm_magic.planning.packed import INT4_GROUPS

_AT_A_TIME = 1 << 22
"""Weights that are put into another order at a time."""


def fits(weight: Any) -> bool:
    """Whether torch's 4-bit kernel takes it, whose rows come in 16s on CPUs.

    What quanto has packed goes by its rule, groups of 128; other groups are of a checkpoint, with an exact shift.
    """
    import torch
    from optimum.quanto import WeightQBitsTensor, qint4

    if not isinstance(weight, WeightQBitsTensor) or weight.qtype != qint4 or weight.ndim != 2:
        return False
    rows, columns = weight.shape
    groups = INT4_GROUPS if is_in_bytes(weight) else (128,)
    grouped = weight._group_size in groups and weight.axis == 0 and not rows % 16 and not columns % 32
    return bool(grouped and weight.dtype == torch.bfloat16)


def has_kernel(device: Any) -> bool:
    """Whether torch has that kernel for a device."""
    import torch

    if device.type != "cuda":
        return bool(device.type == "cpu")
    return bool(torch.version.cuda) and bool(torch.cuda.get_device_capability(device) >= (8, 0))


def _rows_at_a_time(columns: int) -> int:
    return 64 * max(1, _AT_A_TIME // (64 * columns))  # every order has its blocks of rows end there


def ordered(weight: Any, device: Any) -> Any:
    """The weight as torch's kernel takes it; some rows at a time, because on a GPU they are put in order as int32."""
    import torch

    rows, columns = weight.shape
    groups, step = columns // weight._group_size, _rows_at_a_time(columns)
    plain = unpacked(weight._data).view(rows, columns)
    data, statistics = [], []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data.append(_in_order(plain[start:stop].to(device)))
        of_rows = slice(start * groups, stop * groups)
        scale, shift = (
            each[of_rows].to(device).float().view(-1, groups) for each in (weight._scale, weight._shift)
        )
        # In place of what stands for zero the kernel wants the number in the middle, which is rounded here.
        statistics.append(torch.stack((scale, 8 * scale - shift), -1).to(weight.dtype))
    held = torch.cat(statistics).transpose(0, 1).contiguous()  # [groups, rows, 2]
    return _weight(weight, _packed(weight, torch.cat(data)), held)


def _in_order(plain: Any) -> Any:
    """Integers in the order of the kernel of their device."""
    if plain.device.type == "cpu":
        return int4_orders.to_cpu(plain)
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor

    return TinyGemmPackedTensor.pack(plain)._data


def in_other_order(weight: Any) -> Any:
    """A weight of torch's kernel for CUDA as that for CPUs reads it, or the other way round."""
    data = int4_orders.reordered(weight._data._data, weight.shape[1])
    # Quanto's own .to() would round the statistics again; they have one format everywhere.
    return _weight(weight, _packed(weight, data), weight._scale_shift.to(data.device))


def as_integers(weight: Any) -> Any:
    """A weight of torch's kernel as quanto packs integers, for devices that have no such kernel."""
    packed = _packed(weight, weight._data._data)
    plain = int4_orders.integers(packed._data, weight.shape[1])
    packed.unpack = lambda: plain
    return _weight(weight, packed, weight._scale_shift).weight_qbits_tensor()


def numbers_of(weight: Any) -> Any:
    """What a weight of torch's kernel stands for; quanto would compile an extension to tell."""
    rows, columns = weight.shape
    integers = int4_orders.integers(weight._data._data, columns).view(rows, -1, weight._group_size)
    scales, middles = weight._scale_shift.transpose(0, 1).unsqueeze(-2).unbind(-1)  # [rows, groups, 1]
    numbers = integers.to(scales.dtype)
    return numbers.sub_(8).mul_(scales).add_(middles).view(rows, columns)  # a large one is there once


def _weight(weight: Any, data: Any, statistics: Any) -> Any:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    shape = (weight.size(), weight.stride())
    return TinyGemmWeightQBitsTensor(weight.qtype, weight.axis, weight._group_size, *shape, data, statistics)


def _packed(weight: Any, data: Any) -> Any:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor

    return TinyGemmPackedTensor(data, weight.size(), weight.stride())
