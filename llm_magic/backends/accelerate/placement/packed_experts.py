"""How the module of a layer's experts computes with packed matrices.

Of transformers' implementations some take whole stacks, and others wait for the host at every expert.
`packed_experts` takes experts one by one, each as the library's own linear layer would compute, and asks
the host once; on a GPU not even that for a few tokens, so that their sweeps can be captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llm_magic.backends.accelerate.placement.packed_stack import FEW_TOKENS, PackedMatrix, PackedStack

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
    if not tokens:
        return torch.empty_like(hidden_states)
    on_cpu, is_here = hidden_states.device.type == "cpu", hasattr(module.down_proj, "unpacked")
    # A CPU reads an expert once for each of its tokens then: no more of them than there hardly ever are several.
    is_few = tokens == 1 or (2 * tokens * of_each <= module.num_experts if on_cpu else tokens <= FEW_TOKENS)
    if is_here and is_few:
        compute = _side_by_side
    elif is_here and not on_cpu:
        compute = _unpacked
    else:
        product = _packed_product if on_cpu else _product_of_each if is_few else _unpacked_product
        compute = partial(_one_by_one, product=product)
    outputs = compute(module, hidden_states, top_k_index.flatten())
    shares = top_k_weights.masked_fill(top_k_index >= module.num_experts, 0)
    weighted = outputs.view(tokens, of_each, -1) * shares.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _side_by_side(module: Any, tokens: Any, experts: Any) -> Any:
    """Each token with each of its experts ``[tokens * k]``: few kernels, and a GPU's host does not ask which."""
    of_each, experts = len(experts) // len(tokens), experts.long().clamp(0, module.num_experts - 1)

    def linear(name: str, inputs: Any) -> Any:
        return _biased(module, name, getattr(module, name).multiplied(inputs, experts), experts)

    return _expert(module, linear, tokens.repeat_interleave(of_each, dim=0))


def _unpacked(module: Any, tokens: Any, experts: Any) -> Any:
    """Many tokens, in the order of the experts, some of which are unpacked at a time."""
    order, uses = _in_order(module, experts)

    def linear(name: str, inputs: Any) -> Any:
        stack = getattr(module, name)
        pairs = zip(inputs.split(uses), stack.unpacked(uses, inputs.dtype), strict=True)
        outputs = _products(pairs, (len(inputs), stack.linear.out_features), inputs)
        return _biased(module, name, outputs, experts[order])

    found = _expert(module, linear, tokens[order // (len(experts) // len(tokens))])
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


def _one_by_one(module: Any, tokens: Any, experts: Any, product: Callable[[PackedMatrix, Any], Any]) -> Any:
    """Every expert that there are tokens for, in ascending order, with all of these."""
    order, uses = _in_order(module, experts)
    outputs = tokens.new_zeros(len(experts), tokens.shape[-1])
    for expert, places in enumerate(order.split(uses)):
        if len(places):
            linear = _linear(module, expert, product)
            found = _expert(module, linear, tokens[places // (len(experts) // len(tokens))])
            outputs[places] = found.to(outputs.dtype)
    return outputs


def _in_order(module: Any, experts: Any) -> tuple[Any, list[int]]:
    """Places of ``experts`` in ascending order, without those beyond the last one, and how often each is used."""
    uses = torch.bincount(experts, minlength=module.num_experts)[: module.num_experts].tolist()
    return experts.argsort(stable=True)[: sum(uses)], uses


def _linear(
    module: Any, expert: int, product: Callable[[PackedMatrix, Any], Any]
) -> Callable[[str, Any], Any]:
    def linear(name: str, inputs: Any) -> Any:
        return _biased(module, name, product(getattr(module, name)[expert], inputs), expert)

    return linear


def _packed_product(matrix: PackedMatrix, tokens: Any) -> Any:
    return matrix(tokens)


def _product_of_each(matrix: PackedMatrix, tokens: Any) -> Any:
    """As `_side_by_side`: the bits must not depend on where an expert stays."""
    return torch.cat([matrix(token) for token in tokens.split(1)])


def _unpacked_product(matrix: PackedMatrix, tokens: Any) -> Any:
    """As `_unpacked`."""
    return torch.mm(tokens, matrix.unpacked(tokens.dtype).T)


def _biased(module: Any, name: str, outputs: Any, experts: Any) -> Any:
    return outputs + getattr(module, f"{name}_bias")[experts] if module.has_bias else outputs


def _expert(module: Any, linear: Callable[[str, Any], Any], tokens: Any) -> Any:
    """What transformers' implementations do between the projections."""
    if module.has_gate:
        hidden = module._apply_gate(linear("gate_up_proj", tokens))
    else:
        hidden = module.act_fn(linear("up_proj", tokens))
    outputs = linear("down_proj", hidden)
    has_norm = getattr(module, "has_post_expert_norm", False)  # not yet in transformers 5.17
    return module.post_expert_norm(outputs) if has_norm else outputs


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
