"""A packed weight by itself, of whatever library: what multiplies with it, and the numbers it stands for."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.packed import int4_orders, tinygemm

_KINDS_OF_FLOATS = {"mxfp4": "mxfp4", "fp8": "float8"}
_QUANTO_KINDS = {"qint8": "int8", "qfloat8_e4m3fn": "float8", "qint4": "int4", "qint2": "int2"}


def multiplied(tokens: Any, packed: Any) -> Any:
    """``tokens`` ``[..., in]`` times a packed weight ``(out, in)``, by the kernels of its library.

    As its linear layer computes; but 8-bit integers of bitsandbytes become floats first, where that layer
    multiplies large activations apart, for which it asks the host.
    """
    import torch

    state = getattr(packed, "quant_state", None)
    if state is not None:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(tokens, packed, quant_state=state)
    if hasattr(packed, "form"):
        from llm_magic.backends.accelerate.packed.scaled_floats import product

        return product(tokens, packed)
    if type(packed).__name__ == "Int8Params":
        packed = floats_of_rows(packed.data, packed.SCB, tokens.dtype)
    return torch.nn.functional.linear(tokens, packed)


def packed_weights(packed: Any) -> PackedWeights | None:
    """A packed weight as our kernels for the CPU take it; ``None`` where they do not know its kind."""
    if (state := getattr(packed, "quant_state", None)) is not None:
        rows, columns = state.shape
        if state.nested:
            return None
        return PackedWeights(state.quant_type, packed, state.absmax, None, rows, columns, state.blocksize)
    if type(packed).__name__ == "Int8Params":
        rows, columns = packed.shape
        return PackedWeights("int8", packed, packed.SCB, None, rows, columns, factor=1 / 127)
    if (form := getattr(packed, "form", None)) is not None:
        kind, group = _KINDS_OF_FLOATS[form.method], form.group if form.group < form.columns else 0
        return PackedWeights(kind, packed, packed.scales, None, form.rows, form.columns, group)
    return _packed_by_quanto(packed) if hasattr(packed, "qtype") else None


def _packed_by_quanto(packed: Any) -> PackedWeights | None:
    kind, (rows, columns) = _QUANTO_KINDS.get(packed.qtype.name), packed.shape
    if kind is None or packed.axis != 0:
        return None
    if hasattr(packed, "_scale_shift"):
        data, group, block = packed._data._data, packed._group_size, int4_orders.block_in_halves()
        is_read = block and not int4_orders.is_for_cuda(data)
        of_rows = packed._scale_shift
        return (
            PackedWeights(kind, data, of_rows, None, rows, columns, group, block=block) if is_read else None
        )
    if kind in ("int8", "float8"):
        return PackedWeights(kind, packed._data, packed._scale, None, rows, columns)
    if rows % (8 // packed.qtype.bits):  # then the parts that share bytes begin within a row
        return None
    data, group = getattr(packed._data, "_data", packed._data), packed._group_size or columns
    return PackedWeights(kind, data, packed._scale, packed._shift, rows, columns, group)


def numbers(packed: Any) -> Any:
    """What a packed weight of 4 bits, or of quanto, stands for."""
    state = getattr(packed, "quant_state", None)
    if state is None:
        return tinygemm.numbers_of(packed) if hasattr(packed, "_scale_shift") else packed.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, state)


def floats_of_rows(integers: Any, scales: Any, dtype: Any) -> Any:
    """What 8-bit rows stand for, whose largest numbers are the ``scales``."""
    return integers.to(dtype) * (scales / 127).to(dtype).unsqueeze(-1)
