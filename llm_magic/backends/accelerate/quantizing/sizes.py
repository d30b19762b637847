"""Bytes of packed weights, before they are packed."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.quantizing.library_layers import kind_of
from llm_magic.backends.accelerate.quantizing.methods import BLOCK


def packed_bytes(module: Any, dtype: Any) -> int:
    """Bytes that the weight of a prepared module takes once packed, its statistics included.

    Parameters
    ----------
    module
        A module whose weight ``prepare`` named, or the one in the place of stacked experts that it named.
    dtype
        torch dtype in which it computes.
    """
    if (linear := module.__dict__.get("linear")) is not None:
        return int(module.experts) * packed_bytes(linear, dtype)
    rows, columns = int(module.out_features), int(module.in_features)
    itemsize, kind = int(dtype.itemsize), kind_of(module)
    if kind == "scaled floats":
        return int(module.form.bytes)
    if kind == "bitsandbytes, 4 bits":
        count = rows * columns
        return -(-count // 2) + 4 * -(-count // BLOCK)  # nibbles, and a float32 scale for each group
    if kind == "bitsandbytes, 8 bits":
        return rows * columns + 4 * rows
    bits = int(module.weight_qtype.bits)
    if bits == 8:
        return rows * columns + itemsize * rows
    if groups := module.weight_group_size:
        rows, columns = rows * columns // int(groups), int(groups)
    # Rows are packed on top of each other; each has a scale and a shift, and of a single one each number.
    return -(-rows * bits // 8) * columns + 2 * itemsize * (columns if rows == 1 else rows)
