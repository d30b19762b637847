"""How the module of a layer's experts computes with packed matrices.

Each is computed as the library's own linear layer would, and the host is asked once which are needed; on a GPU not even
that for a few tokens, so that their sweeps can be captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llm_magic.backends.accelerate.experts.expert_products import (
    are_few_for_a_cpu,
    biased,
    in_order,
    of_an_expert,
    one_by_one,
    side_by_side,
    stack_names,
    weighted,
)
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.packed.packed_stack import FEW_TOKENS, PackedMatrix, PackedStack

IMPLEMENTATION = "llm_magic_packed"
"""Name of `packed_experts` among transformers' implementations of experts."""


def packed_experts(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """What a layer's experts make of tokens, each token by the experts that it is routed to.

    An implementation of transformers' experts interface, for modules whose matrices are `PackedStack`s.

    Parameters
    ----------
    module
        The experts.
    hidden_states
        ``[tokens, width]``.
    top_k_index, top_k_weights
        Experts of each token ``[tokens, k]``, and the share of each. Numbers beyond the last one mean none.

    Returns
    -------
    Tensor
        ``[tokens, width]``.
    """
    tokens, of_each = top_k_index.shape
    on_cpu, is_here = hidden_states.device.type == "cpu", hasattr(module.down_proj, "unpacked")
    if on_cpu:
        is_few = are_few_for_a_cpu(module, tokens, of_each, cpu_products.few_tokens(hidden_states.dtype))
    else:
        is_few = tokens <= FEW_TOKENS
    stacks = {name: getattr(module, name) for name in stack_names(module)}
    if is_here and is_few:
        compute = side_by_side(stacks)
    elif is_here and not on_cpu:
        compute = _unpacked
    else:
        product = _packed_product if on_cpu else _product_of_each if is_few else _unpacked_product
        compute = one_by_one(stacks, product)
    return weighted(module, compute, hidden_states, top_k_index, top_k_weights)


def computes_packed(module: Any) -> bool:
    """Whether a module computes by `packed_experts`."""
    config = getattr(module, "config", None)
    is_ours = getattr(config, "_experts_implementation", None) == IMPLEMENTATION
    return is_ours and any(isinstance(child, PackedStack) for child in module.children())


def _unpacked(module: Any, tokens: Any, experts: Any) -> Any:
    """Many tokens, in the order of the experts, some of which are unpacked at a time."""
    order, uses = in_order(module, experts)

    def linear(name: str, inputs: Any) -> Any:
        stack = getattr(module, name)
        pairs = zip(inputs.split(uses), stack.unpacked(uses, inputs.dtype), strict=True)
        outputs = _products(pairs, (len(inputs), stack.linear.out_features), inputs)
        return biased(module, name, outputs, experts[order])

    found = of_an_expert(module, linear, tokens[order // (len(experts) // len(tokens))])
    outputs = tokens.new_zeros(len(experts), tokens.shape[-1])
    outputs[order] = found.to(outputs.dtype)
    return outputs


def _products(pairs: Iterable[tuple[Any, Any]], shape: tuple[int, int], like: Any) -> Any:
    """Tokens times matrices ``(out, in)``, one below the other: with gradients each by itself, else where they belong."""
    if torch.is_grad_enabled() and like.requires_grad:
        return torch.cat([some @ matrix.T for some, matrix in pairs if len(some)])
    outputs = like.new_empty(shape)
    start = 0
    for some, matrix in pairs:
        if len(some):
            torch.mm(some, matrix.T, out=outputs[start : start + len(some)])
            start += len(some)
    return outputs


def _packed_product(matrix: PackedMatrix, tokens: Any) -> Any:
    return matrix(tokens)


def _product_of_each(matrix: PackedMatrix, tokens: Any) -> Any:
    """As `side_by_side`: the bits must not depend on where an expert stays."""
    return torch.cat([matrix(token) for token in tokens.split(1)])


def _unpacked_product(matrix: PackedMatrix, tokens: Any) -> Any:
    """As `_unpacked`."""
    return torch.mm(tokens, matrix.unpacked(tokens.dtype).T)


def replace_stacks(module: Any, make_linear: Callable[[int, int], Any]) -> tuple[str, ...]:
    """Let a module of experts hold packed matrices, still without bytes, and compute with them.

    Parameters
    ----------
    module
        Experts on the meta device that transformers' interface serves, one at a time.
    make_linear
        Makes the packed layer of one expert, of ``(in, out)``.

    Returns
    -------
    tuple of str
        Names of the parameters that were replaced.
    """
    stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    for name, parameter in stacks.items():
        rows, columns = parameter.shape[:0:-1] if module.is_transposed else parameter.shape[1:]
        del module._parameters[name]
        module.add_module(
            name,
            PackedStack(
                make_linear(columns, rows), tuple(parameter.shape), is_transposed=module.is_transposed
            ),
        )
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = packed_experts
    module.config = copy.deepcopy(module.config)
    module.config._experts_implementation_internal = IMPLEMENTATION
    return tuple(stacks)
