"""Experts in 16 bits that the CPU computes by kernels of ours, wherever in RAM they are.

transformers' implementations take whole stacks there, with products that are slow for a few tokens. Modules whose
experts come one by one, from the disk, compute in the same way: a token does not depend on where its experts stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_magic.backends.accelerate.current import current
from llm_magic.backends.accelerate.experts.expert_products import (
    are_few_for_a_cpu,
    one_by_one,
    side_by_side,
    stack_names,
    weighted,
)
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.served.served_class import serve, served_by


def is_module_of_experts(module: Any) -> bool:
    """Whether it is one that transformers' interface serves, which says how stacks are laid out."""
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")


def is_served_experts(module: Any) -> bool:
    """Whether a module of experts computes by our kernels, where these can."""
    return served_by(module) is _experts_by_kernels


def serve_plain_experts(module: Any) -> None:
    """Let a module of experts compute by our kernels on the CPU, where it is one that they are for."""
    if module.is_transposed or served_by(module):
        return
    stack = module._parameters.get("down_proj")  # a module, where it is packed
    if stack is not None and cpu_products.few_plain_tokens(stack.dtype):
        serve(module, _experts_by_kernels)


_OF_TRANSFORMERS = (None, "eager", "batched_mm", "grouped_mm")
"""Implementations that are ways to the same; somebody who wants another one gets that."""


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

    @property
    def is_fetched(self) -> bool:
        """Whether a matrix is there only while it is asked for."""
        return not cpu_products.are_numbers(self._matrices)

    @property
    def in_ram(self) -> PackedWeights | None:
        """The first matrix as kernels take it, which the others follow; ``None`` where they do not."""
        return cpu_products.plain_stack(self._matrices)

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


def _experts_by_kernels(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """What the module makes of its arguments; ``None`` where it is to do that itself."""
    stacks = _stacks(module, hidden_states)
    if stacks is None:
        return None
    tokens, of_each = top_k_index.shape
    most = cpu_products.few_plain_tokens(hidden_states.dtype)
    is_here = not any(stack.is_fetched for stack in stacks.values())
    if is_here and are_few_for_a_cpu(module, tokens, of_each, most):
        compute = side_by_side(stacks)
    else:
        compute = one_by_one(stacks, product)
    return weighted(module, compute, hidden_states, top_k_index, top_k_weights)


def _stacks(module: Any, hidden_states: Any) -> Mapping[str, PlainStack] | None:
    """The module's stacks by name, where kernels may multiply with them."""
    if not _may_compute(module, hidden_states):
        return None
    names = stack_names(module)
    held = [vars(module).get(name, module._parameters.get(name)) for name in names]
    if not all(_is_in_ram(matrices, hidden_states.dtype) for matrices in held):
        return None
    return {name: PlainStack(matrices) for name, matrices in zip(names, held, strict=True)}


def _may_compute(module: Any, hidden_states: Any) -> bool:
    """Whether tokens are in RAM, nobody looks on but who records layers, and nobody wants another implementation."""
    import torch

    if not hidden_states.is_cpu or not cpu_products.are_numbers(hidden_states) or module.training:
        return False
    if current() is None and is_looked_at():
        return False
    learns = torch.is_grad_enabled() and hidden_states.requires_grad
    return not learns and module.config._experts_implementation in _OF_TRANSFORMERS


def _is_in_ram(matrices: Any, dtype: Any) -> bool:
    import torch

    if matrices is None or matrices.device.type != "cpu" or matrices.dtype != dtype:
        return False
    return not (torch.is_grad_enabled() and getattr(matrices, "requires_grad", False))
