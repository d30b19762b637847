"""The weights of a block, packed as they arrive: of its layers, and of the experts in its stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_magic.backends.accelerate.packed.packing import arrange, arrange_one, has_order, parts, template
from llm_magic.backends.accelerate.packed.prepacked import Prepacked
from llm_magic.backends.accelerate.packed.prepacked_stacks import PackedStacks
from llm_magic.backends.accelerate.packed.templates import Parts, bind
from llm_magic.backends.accelerate.quantizing.library_layers import (
    check_shape,
    is_packed,
    shape_of,
    was_transposed,
)
from llm_magic.backends.accelerate.quantizing.pack_layer import packed_weight
from llm_magic.backends.accelerate.quantizing.taken import taken


def pack_block(
    block: Any, weights: Mapping[str, Any], device: Any, compute: Any = None, experts: Any = None
) -> None:
    """Give a block of a prepared model its weights, packed where its layers are.

    Parameters
    ----------
    block
        A module of a prepared model.
    weights
        Tensors by name within the block, of the checkpoint's orientation, on any device; cast to
        the layers' dtype here where they are packed. Others are taken as they are. Or what was packed before.
    device
        Where to do the work; a GPU is quick. The parameters lie there afterwards, or on ``compute``.
    compute
        The device that will compute the block, if another one: it decides the order of the bytes.
    experts
        Where stacks of experts lie afterwards, if elsewhere; those that have an order stay with the others.

    Raises
    ------
    AttributeError, KeyError
        When a name is not a parameter of the block.
    """
    import torch

    device = torch.device(device)
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        module = block.get_submodule(path)
        if leaf in module._modules:
            pack_stack(module._modules[leaf], value, device, device if compute is None else compute, experts)
            continue
        meta = module._parameters[leaf]
        if leaf == "weight" and is_packed(module):
            _pack(module, value if isinstance(value, Prepacked) else value.to(device, meta.dtype), device)
            arrange_one(module, leaf, device if compute is None else compute, fresh=True)
        else:
            numbers = value
            if isinstance(value, Prepacked):
                is_transposed = getattr(module, "is_transposed", False)
                numbers = _unpacked(value, meta, device, is_transposed=is_transposed)
            check_shape(tuple(meta.shape), tuple(numbers.shape), f"The weight {name}")
            # A copy: what comes from a file may be pages of it.
            held = numbers.to(device, copy=True)
            module._parameters[leaf] = torch.nn.Parameter(held, requires_grad=False)
    arrange(block, device if compute is None else compute, fresh=True)


def _unpacked(value: Prepacked, meta: Any, device: Any, *, is_transposed: bool) -> Any:
    """The numbers of what is no packed layer: of an embedding, or of experts, whose matrices may be stacked as ``(in, out)``."""
    import torch

    matrices = [value.numbers(device, index) for index in range(len(value.matrices))]
    numbers = torch.stack(matrices) if len(meta.shape) > 2 else matrices[0]
    if len(meta.shape) > 2 and is_transposed:
        numbers = numbers.transpose(1, 2).contiguous()
    check_shape(tuple(meta.shape), tuple(numbers.shape), f"The packed weight {value.matrices[0][0]}")
    return numbers


def _pack(module: Any, value: Any, device: Any, index: int = 0) -> None:
    """Give a layer its weight, packed: a tensor, or one of the matrices that were packed before."""
    if isinstance(value, Prepacked) and not value.method:
        value = value.numbers(device, index)
        value = value.T if was_transposed(module) else value
    if isinstance(value, Prepacked):
        weight = taken(module, value, index=index, device=device)
    else:
        shape = value.T.shape if was_transposed(module) else value.shape
        check_shape(shape_of(module), tuple(shape), "A weight")
        weight = packed_weight(module, value)
    module._parameters["weight"] = weight
    # Once through the template: what it binds now is what every later buffer gets.
    bind(template(module, "weight").bindings(parts(module, "weight")))


def pack_stack(stack: Any, values: Any, device: Any, compute: Any, experts: Any = None) -> None:
    """Give a `PackedStack` its experts, one after the other; the arguments are as for `pack_block`."""
    linear = stack.linear
    dtype = linear.weight.dtype

    def packed() -> Iterator[Parts]:
        for index in range(stack.experts):
            if isinstance(values, Prepacked):
                _pack(linear, values, device, index)
            else:
                _pack(linear, stack.matrix(values, index).to(device, dtype), device)
            arrange(linear, compute, fresh=True)
            found = parts(linear, "weight")
            stays = experts is None or has_order(linear, "weight")
            yield found if stays else {part: tensor.to(experts) for part, tensor in found.items()}

    stack.fill(packed())


def leave_stack(stack: Any, values: PackedStacks) -> None:
    """Let a `PackedStack` have experts that stay in their files: all of them but the bytes.

    Raises
    ------
    SourceError
        When the files have others.
    """
    from llm_magic.backends.accelerate.packed.scaled_floats import ScaledFloats

    linear = stack.linear
    check_shape(shape_of(linear), values.shape(), f"The packed weight {values.matrices[0][0]}")
    entries, scales = linear.form.empty()
    linear._parameters["weight"] = ScaledFloats(entries, scales, linear.form)
    stack.fill(parts(linear, "weight") for _ in range(stack.experts))
