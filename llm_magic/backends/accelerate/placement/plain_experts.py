"""Experts in 16 bits that the CPU computes by kernels of ours, wherever in RAM they are.

transformers' implementations take whole stacks there, with products that are slow for a few tokens. Modules whose
experts come one by one, from the disk, compute in the same way: a token does not depend on where its experts stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.expert_products import (
    are_few_for_a_cpu,
    one_by_one,
    side_by_side,
    stack_names,
    weighted,
)
from llm_magic.backends.accelerate.placement.served_class import is_served, serve, served_by


def is_module_of_experts(module: Any) -> bool:
    """Whether it is one that transformers' interface serves, which says how stacks are laid out."""
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")


def is_served_experts(module: Any) -> bool:
    """Whether a module of experts computes by our kernels, where these can."""
    return served_by(module) is _by_kernels


def serve_plain_experts(module: Any) -> None:
    """Let a module of experts compute by our kernels on the CPU, where it is one that they are for."""
    if module.is_transposed or is_served(module):
        return
    stack = module._parameters.get("down_proj")  # a module, where it is packed
    if stack is not None and cpu_products.few_plain_tokens(stack.dtype):
        serve(module, _by_kernels)


class PlainStack:
    """The matrices of a layer's experts in 16 bits.

    Parameters
    ----------
    matrices
        ``[experts, out, in]``, or what answers for a number with one of these matrices in RAM.
    """

    def __init__(self, matrices: Any) -> None:
        self._matrices = matrices

    @property
    def outputs(self) -> int:
        """Rows of each matrix."""
        return int(self._matrices.shape[1])

    def __getitem__(self, expert: int) -> Any:
        return self._matrices[expert]

    def multiplied(self, tokens: Any, experts: Any) -> Any:
        """Each token ``[n, in]`` times the matrices of its experts, whose numbers are ``[n * k]``: ``[n * k, out]``."""
        import torch

        outputs = cpu_products.multiplied_each_plain(tokens, self._matrices, experts)
        if outputs is not None:
            return outputs
        repeated = tokens.repeat_interleave(len(experts) // len(tokens), dim=0)
        rows = zip(repeated.split(1), experts.tolist(), strict=True)
        return torch.cat([product(self._matrices[expert], row) for row, expert in rows])


def product(matrix: Any, tokens: Any) -> Any:
    """Tokens ``[n, in]`` times a matrix ``[out, in]``."""
    import torch

    outputs = cpu_products.multiplied_plain(tokens, matrix)
    return torch.nn.functional.linear(tokens, matrix) if outputs is None else outputs


def _by_kernels(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """What the module makes of its arguments; ``None`` where it is to do that itself."""
    stacks = _stacks(module, hidden_states)
    if stacks is None:
        return None
    tokens, of_each = top_k_index.shape
    is_here = all(isinstance(stack._matrices, _tensor()) for stack in stacks.values())
    if is_here and are_few_for_a_cpu(module, tokens, of_each):
        compute = side_by_side(stacks)
    else:
        compute = one_by_one(stacks, product)
    return weighted(module, compute, hidden_states, top_k_index, top_k_weights)


def _stacks(module: Any, hidden_states: Any) -> Mapping[str, PlainStack] | None:
    """The module's stacks by name, where they and the tokens are in RAM, and nobody looks on."""
    import torch

    if not hidden_states.is_cpu or module.training:
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    found, learns = {}, torch.is_grad_enabled()
    if learns and hidden_states.requires_grad:
        return None
    for name in stack_names(module):
        matrices = vars(module).get(name, module._parameters.get(name))
        if matrices is None or matrices.device.type != "cpu" or matrices.dtype != hidden_states.dtype:
            return None
        if learns and getattr(matrices, "requires_grad", False):
            return None
        found[name] = PlainStack(matrices)
    return found


def _tensor() -> Any:
    import torch

    return torch.Tensor
