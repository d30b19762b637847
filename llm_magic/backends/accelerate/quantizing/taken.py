"""The weight of one layer that was packed before, when its checkpoint was made."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.packed.prepacked import PackedByBitsAndBytes, damaged
from llm_magic.backends.accelerate.packed.prepacked_groups import Groups, PackedInGroups
from llm_magic.backends.accelerate.packed.prepacked_stacks import PackedStacks
from llm_magic.backends.accelerate.packed.quanto_integers import in_bytes
from llm_magic.backends.accelerate.quantizing.library_layers import check_shape, kind_of, shape_of
from llm_magic.backends.accelerate.quantizing.methods import method_of
from llm_magic.backends.accelerate.quantizing.pack_layer import four_bit_weight, without_activations


def taken(module: Any, value: Any, *, index: int, device: Any) -> Any:
    """The weight of a layer that was packed before."""
    if isinstance(value, PackedByBitsAndBytes):
        return _taken_from_bitsandbytes(module, value, index, device)
    if isinstance(value, PackedStacks):
        data, scales = value.parts(index, device)
        return _scaled(module, data, scales, value.matrices[index][0])
    assert isinstance(value, PackedInGroups)
    return _taken_from_groups(module, value, index, device)


def _taken_from_bitsandbytes(module: Any, value: PackedByBitsAndBytes, index: int, device: Any) -> Any:
    from bitsandbytes.nn import Int8Params

    data, scales, shape = value.parts(index, device)
    check_shape(shape_of(module), shape, f"The packed weight {value.matrices[index][0]}")
    if value.method == "int8":
        return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)
    return four_bit_weight(module, data, scales, value.dtype)


def _scaled(module: Any, data: Any, scales: Any, name: str) -> Any:
    """A packed weight in floats with scales."""
    from llm_magic.backends.accelerate.packed.scaled_floats import ScaledFloats

    form, columns = module.form, data.shape[-1] * (8 // method_of(module.form.method).bits)
    check_shape(shape_of(module), (data.shape[0], columns), f"The packed weight {name}")
    groups = form.columns // form.group
    if scales.shape[1] == 1:  # of all of a row
        scales = scales.expand(-1, groups)
    if tuple(scales.shape) != (form.rows, groups):
        raise damaged(name)
    return ScaledFloats(data.contiguous(), scales.contiguous(), form)


def _taken_from_groups(module: Any, value: PackedInGroups, index: int, device: Any) -> Any:
    import torch

    held, name = value.groups(device, index), value.matrices[index][0]
    check_shape(shape_of(module), held.shape, f"The packed weight {name}")
    if kind_of(module) == "scaled floats":
        if held.entries.dtype != torch.float8_e4m3fn or held.zeros is not None:
            raise damaged(name)
        return _scaled(module, held.entries.view(torch.uint8), held.scales, name)
    if kind_of(module) == "bitsandbytes, 8 bits":
        return _rows_of_8_bits(held, name)
    without_activations(module, device)
    if module.weight_qtype.bits == 8:
        return _quanto_rows(module, held, name, value.dtype)
    return _quanto_groups(module, held, name, value.dtype)


def _rows_of_8_bits(held: Groups, name: str) -> Any:
    """A packed weight of bitsandbytes, whose scales are of the largest entry there can be."""
    from bitsandbytes.nn import Int8Params

    entries, scales = _signed(held, name), held.scales.reshape(-1) * 127
    return Int8Params(entries, requires_grad=False, has_fp16_weights=False, CB=entries, SCB=scales)


def _quanto_rows(module: Any, held: Groups, name: str, dtype: Any) -> Any:
    """A packed weight of quanto with a scale for each row; it becomes numbers of ``dtype``."""
    import torch
    from optimum.quanto import WeightQBytesTensor

    kind = module.weight_qtype
    entries = _signed(held, name)
    stride = (held.shape[1], 1)
    packed = WeightQBytesTensor(kind, 0, held.shape, stride, entries, held.scales.to(dtype), None)
    return torch.nn.Parameter(packed, requires_grad=False)


def _quanto_groups(module: Any, held: Groups, name: str, dtype: Any) -> Any:
    """A packed weight of quanto with a scale and a shift for each group of columns."""
    import torch
    from optimum.quanto import WeightQBitsTensor

    columns = held.shape[1]
    group = module.weight_group_size or columns
    if held.entries.dtype != torch.uint8 or held.zeros is None or held.scales.shape[1] * group != columns:
        raise damaged(name)
    # What torch's kernel wants in place of the shift is rounded once, from this, and it has an order of its own:
    # `arrange` makes either of it.
    shift = (held.zeros * held.scales).reshape(-1, 1)
    scale = held.scales.to(dtype).reshape(-1, 1)
    entries, stride = in_bytes(held.entries.view(-1, group)), (columns, 1)
    packed = WeightQBitsTensor(
        module.weight_qtype, 0, module.weight_group_size, held.shape, stride, entries, scale, shift
    )
    return torch.nn.Parameter(packed, requires_grad=False)


def _signed(held: Groups, name: str) -> Any:
    """Entries of 8 bits as integers with a sign, of which 0 stands for zero."""
    import torch

    if held.scales.shape[1] > 1:
        raise damaged(name)
    if held.zeros is None and held.entries.dtype == torch.int8:
        return held.entries
    if held.zeros is None or held.entries.dtype != torch.uint8 or bool((held.zeros != 128).any()):
        raise damaged(name)
    return (held.entries ^ 128).view(torch.int8)
