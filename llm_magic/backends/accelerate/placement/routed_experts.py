"""Mixture of experts: of an offloaded layer, only the experts that its router chose move.

A layer's experts are stacked in a few parameters, and transformers' "eager" implementation takes them
one at a time: ``self.down_proj[expert]``. `RoutedExperts` lets a twin of the module compute, which has
an object in the place of each stack that answers with the expert's tensor in a slot of an `ExpertCache`.
The module itself keeps its parameters where other libraries look for them, without bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llm_magic.backends.accelerate.experts.stacks import (
    Stack,
    Turn,
    argument_names,
    one_by_one,
    packed_stacks,
    stacks_of,
)
from llm_magic.backends.accelerate.packed.packed_stack import FEW_TOKENS
from llm_magic.backends.accelerate.placement.expert_cache import NEARLY_ALL, ExpertCache, ExpertLayer
from llm_magic.backends.accelerate.placement.expert_stores import ExpertStore, expert_extents

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.files.extents import Extent


class Visitor(Protocol):
    """What computes in RAM, or elsewhere in long sweeps."""

    @property
    def is_away(self) -> bool:
        """Whether it is elsewhere now."""


class RoutedExperts:
    """The experts of one module, fetched when a token is routed to them.

    From here to ``detach`` the module computes with transformers' eager implementation, whatever the
    rest of the model uses; packed experts with their own.

    Parameters
    ----------
    module
        The experts; `can_route` is true for them.
    store
        Where they stay.
    cache
        Where they compute.
    visitor
        Their block, or what computes them, when they compute in RAM unless that is away; ``None``: they always
        come to the cache.

    Raises
    ------
    ValueError
        When an expert does not fit into a slot of the cache.
    """

    def __init__(
        self, module: Any, store: ExpertStore, cache: ExpertCache, visitor: Visitor | None = None
    ) -> None:
        if store.slot_bytes > cache.slot_bytes:
            raise ValueError(f"an expert takes {store.slot_bytes} bytes, a slot has {cache.slot_bytes}")
        self._module, self._cache, self._visitor = module, cache, visitor
        self._layer = ExpertLayer(store)
        self._following: RoutedExperts | None = None
        self._in_runs: Any = None
        self._turn = Turn()
        self._twin = copy.copy(module)
        self._twin.__dict__.update(one_by_one(module))
        # An instance's attribute is found before the parameter of that name.
        stacks = stacks_of("", module)
        for number, stack in enumerate(stacks):
            self._twin.__dict__[stack.parameter_name] = _RoutedStack(self, number, stack, cache.device)
        for name, packed in packed_stacks(module):
            numbers = [n for n, stack in enumerate(stacks) if stack.parameter_name.startswith(f"{name}.")]
            self._twin.__dict__[name] = _RoutedPackedStack(self, numbers, packed.made_on(cache.device))
        self._usual = module.__dict__.get("forward")
        module.__dict__["forward"] = self.forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the module does, with the experts that its input is routed to."""
        if self._visitor is not None and not self._visitor.is_away:
            if self._usual is not None:
                return self._usual(*inputs, **named)
            return type(self._module).forward(self._module, *inputs, **named)
        chosen = _chosen(self._module, inputs, named)
        uses = _uses(chosen, self._layer.store.experts)
        if self._in_runs is not None and len(chosen) > FEW_TOKENS and self._are_nearly_all(uses):
            self._cache.count(self._layer, uses, len(chosen))
            return type(self._in_runs).forward(self._in_runs, *inputs, **named)
        self._cache.begin(self._layer, uses, len(chosen), self._expected())
        self._turn.begin(uses)
        try:
            output = type(self._twin).forward(self._twin, *inputs, **named)
            self._turn.end()
            return output
        finally:
            self._cache.end()

    def is_followed_by(self, other: RoutedExperts) -> None:
        """Whose turn it is after these, in every sweep."""
        self._following = other

    def _expected(self) -> ExpertLayer | None:
        """The layer that is next, if its experts come one by one."""
        following = self._following
        return None if following is None or following._in_runs is not None else following._layer

    def come_in_runs(self, twin: Any) -> None:
        """Let this compute in long passes that need nearly all of them."""
        self._in_runs = twin

    def _are_nearly_all(self, uses: Mapping[int, int]) -> bool:
        return len(uses) >= NEARLY_ALL * self._layer.store.experts

    def piece(self, index: Any, number: int) -> Any:
        """The tensor of one expert (an int or a tensor with one) in stack ``number``."""
        return self._cache.take(self._turn.number(index))[number]

    def detach(self) -> None:
        """Leave the module as it was, with parameters without bytes. Safe to call twice."""
        if self._module.__dict__.get("forward") == self.forward:
            del self._module.__dict__["forward"]
            if self._usual is not None:
                self._module.__dict__["forward"] = self._usual
        self._cache.forget(self._layer)


class _RoutedStack:
    """Stands for a stack: ``stack[index]`` is the tensor of one expert."""

    def __init__(self, experts: RoutedExperts, number: int, stack: Stack, device: Any) -> None:
        self._experts, self._number = experts, number
        self.shape, self.dtype, self.device = stack.shape, stack.dtype, device

    def __getitem__(self, index: Any) -> Any:
        return self._experts.piece(index, self._number)


class _RoutedPackedStack:
    """Stands for a stack of packed matrices: ``stack[index]`` is that of one expert."""

    def __init__(
        self, experts: RoutedExperts, numbers: Sequence[int], matrix: Callable[[list[Any]], Any]
    ) -> None:
        self._experts, self._numbers, self._matrix = experts, numbers, matrix

    def __getitem__(self, index: Any) -> Any:
        return self._matrix([self._experts.piece(index, number) for number in self._numbers])


def advise_routed(
    experts: Any,
    stacks: Sequence[Stack],
    extents: Sequence[Extent],
    will_need: Callable[[list[Extent]], object],
) -> Any:
    """For experts in mapped files: ask the system for the routed ones before the first is computed.

    Nothing else is to be done for them: pages that no token is routed to are never read.

    Parameters
    ----------
    experts
        Their module.
    stacks, extents
        What they are made of, and where that is.
    will_need
        Called with the places that will be read.

    Returns
    -------
    handle
        Its ``remove()`` ends it.
    """
    count = min(stack.experts for stack in stacks)

    def advise(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        uses = _uses(_chosen(module, inputs, named), count)
        will_need([place for index in uses for place in expert_extents(stacks, extents, index)])

    return experts.register_forward_pre_hook(advise, with_kwargs=True)


def _chosen(module: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The experts of each token [tokens, k] among the arguments of a call."""
    return inputs[1] if len(inputs) > 1 else named[argument_names(module)[1]]


def _uses(chosen: Any, experts: int) -> dict[int, int]:
    """Expert -> how many tokens were routed to it; ids beyond the last one mean none."""
    import torch

    ids = chosen.detach().flatten().cpu()
    counts = torch.bincount(ids[(ids >= 0) & (ids < experts)]).tolist()
    return {index: count for index, count in enumerate(counts) if count}
