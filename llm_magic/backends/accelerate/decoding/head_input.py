"""The head's input, laid out so that the CPU's matrix products are the fast ones.

Of a prompt only the last place is wanted, and transformers gives the head a view of it: one row, whose
strides are those of all rows. torch calls that contiguous, but with weights that ask for no gradient it
does not take oneDNN's kernels for 16 bits then. Measured on two cores with AMX, torch 2.13, 49,152 x 576
in bfloat16: 91 ms instead of 2.
"""

from __future__ import annotations

from typing import Any


def lay_out_head_input(model: Any) -> None:
    """Copy what comes to a model's head on the CPU where its strides are not those of its shape."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_with_plain_strides)


def _with_plain_strides(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    import torch

    states = inputs[0] if inputs else None
    if not isinstance(states, torch.Tensor) or states.device.type != "cpu" or _is_plain(states):
        return None
    return (states.clone(memory_format=torch.contiguous_format), *inputs[1:])


def _is_plain(tensor: Any) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return False
        step *= size
    return True
