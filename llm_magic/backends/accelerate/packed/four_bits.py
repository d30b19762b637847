"""bitsandbytes' 4-bit formats on the CPU: the bits that the library makes, several times as fast.

Packing means to find, for every weight, the nearest of 16 values. The library searches between the
15 bounds. A compiled kernel compares with all of them, many weights at a time. Where there is none, a table
says it, by the leading bits of the weight, which leaves one bound at most.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.team import team

_BINS = 1 << 12  # of the table between -1 and 1; the bounds are further apart
_OF_A_SHARE = 1 << 14  # weights, at least
_AT_A_TIME = 1 << 18  # weights, whose temporary tensors stay in the caches


def packed(values: Any, kind: str, block: int) -> tuple[Any, Any]:
    """Pack weights as ``bitsandbytes.functional.quantize_4bit`` does on the CPU.

    Parameters
    ----------
    values
        A float tensor on the CPU, of a multiple of ``block`` elements.
    kind
        ``"nf4"`` or ``"fp4"``.
    block
        Weights that share a scale; even.

    Returns
    -------
    data, scales
        uint8 ``[n / 2, 1]``, two weights in a byte, the first in the high bits, and float32 ``[n / block]``.
    """
    import torch

    groups = values.reshape(-1, block).contiguous()
    data: Any = torch.empty(groups.shape[0], block // 2, dtype=torch.uint8)
    scales: Any = torch.empty(groups.shape[0], dtype=torch.float32)
    kernel = _kernel(kind, block, str(values.dtype).removeprefix("torch."))
    if kernel is not None:
        addresses = (tensor.data_ptr() for tensor in (groups, data, scales))
        shares = groups.numel() // _OF_A_SHARE
        kernel((ctypes.c_int64 * 6)(*addresses, len(groups), team(), shares))
        return data.view(-1, 1), scales
    step = max(1, _AT_A_TIME // block)
    for some, codes, largest in zip(groups.split(step), data.split(step), scales.split(step), strict=True):
        numbers = some.float()
        torch.amax(numbers.abs(), dim=-1, out=largest)
        numbers = numbers * (1.0 / largest.clamp(min=1e-38)).unsqueeze(-1)
        nearest = _nearest(numbers.clamp_(-1, 1).flatten(), kind).view(-1, block)
        torch.bitwise_or(nearest[:, ::2] << 4, nearest[:, 1::2], out=codes)
    return data.view(-1, 1), scales


@cache
def _kernel(kind: str, block: int, dtype: str) -> Callable[[Any], None] | None:
    """The compiled kernel; ``None`` where there is none for this processor."""
    if block % 16 or not cpu_products.are_read(dtype):
        return None
    from bitsandbytes.functional import get_4bit_type

    from llm_magic.backends.accelerate.kernels.four_bits import packing

    values, order = get_4bit_type(kind, device="cpu").sort()
    return packing(_middles(values).tolist(), order.tolist(), block, dtype)


def _nearest(scaled: Any, kind: str) -> Any:
    """The code of each number between -1 and 1."""
    import torch

    below, bounds, order = _tables(kind)
    # Between 2 and 4 floats are evenly spaced: their leading bits count bins.
    bins = ((scaled + 3).view(torch.int32) >> 11).bitwise_and_(2 * _BINS - 1)
    ranks = below.index_select(0, bins)
    ranks += scaled > bounds.index_select(0, bins)
    return ranks if order is None else order.index_select(0, ranks.int())


@cache
def _tables(kind: str) -> tuple[Any, Any, Any]:
    """For each bin the bounds that are below it, and the one inside, if any; then the codes in ascending order."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    values, order = get_4bit_type(kind, device="cpu").sort()
    middles = _middles(values)
    edges = torch.arange(2 * _BINS) * (2 / _BINS) - 1  # the bin of 1 itself follows the last one
    below = torch.bucketize(edges, middles).to(torch.uint8)
    bounds = torch.full((2 * _BINS,), torch.inf)
    bounds[((middles.double() + 1) * (_BINS / 2)).long()] = middles
    in_order = torch.equal(order, torch.arange(16))
    return below, bounds, None if in_order else order.to(torch.uint8)


def _middles(values: Any) -> Any:
    """What is between two neighbours belongs to the nearer one, and their middle to the first."""
    return (values[:-1] + values[1:]) / 2
