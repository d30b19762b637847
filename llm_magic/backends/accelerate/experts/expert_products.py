"""How the module of a layer's experts computes when its matrices are multiplied one by one.

Of transformers' implementations some take whole stacks, and others wait for the host at every expert. What a module does
between and around the products is the same for all kinds of matrices: those of a `PackedStack` and of a `PlainStack`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llm_magic.backends.accelerate.current import current

Product = Callable[[Any, Any], Any]
"""What a matrix, as a stack gives it, makes of tokens ``[n, in]``."""

Compute = Callable[[Any, Any, Any], Any]
"""What a module makes of tokens ``[n, width]`` with experts ``[n * k]``, the same number for each token: ``[n * k, width]``."""


class Stack(Protocol):
    """The matrices of all experts of a layer.

    Attributes
    ----------
    outputs
        Rows of each.
    """

    @property
    def outputs(self) -> int: ...

    def __getitem__(self, expert: int) -> Any:
        """One of them."""

    def multiplied(self, tokens: Any, experts: Any) -> Any:
        """Each token ``[n, in]`` times the matrices of its experts, whose numbers are ``[n * k]``: ``[n * k, out]``."""


def stack_names(module: Any) -> tuple[str, str]:
    """What the stacks of a module that transformers' interface serves are called, in the order of their products."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def weighted(module: Any, compute: Compute, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """What experts make of tokens, each with its share; arguments as those of a module of experts."""
    tokens, of_each = top_k_index.shape
    if not tokens:
        return hidden_states.new_empty(hidden_states.shape)
    outputs = compute(module, hidden_states, top_k_index.flatten())
    if not _are_all_there(module, top_k_index):
        top_k_weights = top_k_weights.masked_fill(top_k_index >= module.num_experts, 0)
    shared = outputs.view(tokens, of_each, -1) * top_k_weights.unsqueeze(-1)
    return shared.sum(dim=1).to(hidden_states.dtype)


def _are_all_there(module: Any, experts: Any) -> bool:
    """Whether who records a layer knows that there is an expert for each number."""
    recorder = current()
    return recorder is not None and recorder.are_below(experts, module.num_experts)


def are_few_for_a_cpu(module: Any, tokens: int, of_each: int, most: int) -> bool:
    """Whether to read an expert once for each of its tokens: no more of them than there hardly ever are several.

    With more than ``most`` tokens an expert may have as many that it is not multiplied by its bytes.
    """
    return tokens == 1 or (2 * tokens * of_each <= module.num_experts and tokens <= most)


def side_by_side(stacks: Mapping[str, Stack]) -> Compute:
    """Each token with each of its experts: few kernels, and a GPU's host does not ask which."""

    def compute(module: Any, tokens: Any, experts: Any) -> Any:
        experts = experts.long()
        if not _are_all_there(module, experts):
            experts = experts.clamp(0, module.num_experts - 1)

        def linear(name: str, inputs: Any) -> Any:
            stack, recorder = stacks[name], current()
            if recorder is None:
                products = stack.multiplied(inputs, experts)
            else:
                products = recorder.products_of_experts(module, name, inputs, experts, stack.outputs)
            return biased(module, name, products, experts)

        return of_an_expert(module, linear, tokens)

    return compute


def one_by_one(stacks: Mapping[str, Stack], product: Product) -> Compute:
    """Every expert that there are tokens for, in ascending order, with all of these."""

    def compute(module: Any, tokens: Any, experts: Any) -> Any:
        order, uses = in_order(module, experts)
        outputs = tokens.new_zeros(len(experts), tokens.shape[-1])
        for expert, places in enumerate(order.split(uses)):
            if len(places):

                def linear(name: str, inputs: Any, expert: int = expert) -> Any:
                    return biased(module, name, product(stacks[name][expert], inputs), expert)

                found = of_an_expert(module, linear, tokens[places // (len(experts) // len(tokens))])
                outputs[places] = found.to(outputs.dtype)
        return outputs

    return compute


def in_order(module: Any, experts: Any) -> tuple[Any, list[int]]:
    """Places of ``experts`` in ascending order, without those beyond the last one, and how often each is used."""
    uses = experts.bincount(minlength=module.num_experts)[: module.num_experts].tolist()
    return experts.argsort(stable=True)[: sum(uses)], uses


def biased(module: Any, name: str, outputs: Any, experts: Any) -> Any:
    """Products of these experts, or of one, with the stack of a name, and what they have beside it."""
    if not module.has_bias:
        return outputs
    biases = getattr(module, f"{name}_bias")
    # Not by indexing, which takes many times as long on a CPU for a few rows.
    return outputs + (biases[experts] if isinstance(experts, int) else biases.index_select(0, experts))


def of_an_expert(module: Any, linear: Callable[[str, Any], Any], tokens: Any) -> Any:
    """What transformers' implementations do between the projections."""
    first, second = stack_names(module)
    hidden = linear(first, tokens)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    outputs = linear(second, hidden)
    has_norm = getattr(module, "has_post_expert_norm", False)  # not yet in transformers 5.17
    return module.post_expert_norm(outputs) if has_norm else outputs
