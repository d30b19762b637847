"""Mixture of experts: of an offloaded layer, only the experts that its router chose move.

A layer's experts are stacked in a few parameters, and transformers' "eager" implementation takes them
one at a time: ``self.down_proj[expert]``. `RoutedExperts` lets a twin of the module compute, which has
an object in the place of each stack that answers with the expert's tensor in a slot of an `ExpertCache`.
The module itself keeps its parameters where other libraries look for them, without bytes.

Whether a module can be treated so is not decided by its name: `can_route` lets it run once on tensors
without bytes and looks at what it asks for. Architectures that compute with whole stacks (Llama 4,
JetMoE, DBRX) cannot: their layers move whole. Where the matrices are packed, an expert is an entry of
every part of them (see `packed_experts`).
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llm_magic.backends.accelerate.placement.expert_cache import NEARLY_ALL, ExpertCache, ExpertLayer
from llm_magic.backends.accelerate.placement.expert_stores import ExpertStore, Stack, expert_extents
from llm_magic.backends.accelerate.placement.packed_stack import FEW_TOKENS, PackedStack

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.placement.extents import Extent

__all__ = ["RoutedExperts", "Stack", "advise_routed", "are_packed", "can_route", "find_stacks"]

_ARGUMENTS = 3  # hidden states [tokens, width], experts of each token [tokens, k], their weights


def find_stacks(block: Any) -> tuple[Stack, ...]:
    """The parameters of a block that hold its routed experts; empty when it has to move whole.

    Stacks of one module follow each other, in the order of its parameters.
    """
    return tuple(
        stack
        for name, module in block.named_modules()
        if can_route(module)
        for stack in _stacks(name, module)
    )


def can_route(experts: Any) -> bool:
    """Whether a module takes its experts one at a time, each of them once, and only those that are asked for."""
    if any(_packed_stacks(experts)):
        return True  # it was, as long as the matrices were not packed
    if not _is_routed(experts):
        return False
    stacks = _stacks("", experts)
    widths = sorted({size for stack in stacks for size in stack.shape[1:]})
    return any(_takes_one_at_a_time(experts, stacks, width) for width in widths)


def are_packed(model: Any) -> bool:
    """Whether all experts that could be routed to are packed matrices."""
    modules = list(model.modules())
    are_some = any(isinstance(module, PackedStack) for module in modules)
    return are_some and not any(
        _is_routed(module) for module in modules if not isinstance(module, PackedStack)
    )


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
        self._turn = _Turn()
        self._twin = copy.copy(module)
        self._twin.__dict__.update(_eager(module))
        # An instance's attribute is found before the parameter of that name.
        stacks = _stacks("", module)
        for number, stack in enumerate(stacks):
            self._twin.__dict__[stack.parameter_name] = _RoutedStack(self, number, stack, cache.device)
        for name, packed in _packed_stacks(module):
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


class _Turn(threading.local):
    """The expert that a thread's pass has come to.

    Experts are asked for in ascending order, in every stack with the same tensor: that is what `can_route` has seen.
    So it need not be read here once more: for that, a GPU would come to a halt.
    """

    def __init__(self) -> None:
        self.begin(())

    def begin(self, experts: Iterable[int]) -> None:
        """A pass needs these."""
        self._coming = iter(sorted(experts))
        self._asked: Any = None
        self._number = -1

    def number(self, index: Any) -> int:
        """Which one is asked for with ``index``, an int or a tensor with one."""
        import torch

        if not isinstance(index, torch.Tensor):
            return int(index)
        if index is not self._asked:
            self._asked, self._number = index, next(self._coming, -1)
        if self._number < 0:
            raise RuntimeError("more experts were asked for than tokens are routed to")
        return self._number

    def end(self) -> None:
        """The pass has asked for what it needs."""
        if self._asked is not None and next(self._coming, None) is not None:
            raise RuntimeError("fewer experts were asked for than tokens are routed to")


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
    return inputs[1] if len(inputs) > 1 else named[_argument_names(module)[1]]


def _uses(chosen: Any, experts: int) -> dict[int, int]:
    """Expert -> how many tokens were routed to it; ids beyond the last one mean none."""
    import torch

    ids = chosen.detach().flatten().cpu()
    counts = torch.bincount(ids[(ids >= 0) & (ids < experts)]).tolist()
    return {index: count for index, count in enumerate(counts) if count}


# --- Which modules can be routed


def _is_routed(module: Any) -> bool:
    parameters = list(module.parameters(recurse=False))
    if not any(parameter.dim() == 3 for parameter in parameters):
        return False
    return len(_argument_names(module)) == _ARGUMENTS and all(parameter.dim() > 1 for parameter in parameters)


def _argument_names(module: Any) -> list[str]:
    """Of the class: a hook may have put another ``forward`` on the instance."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _stacks(module_name: str, module: Any) -> tuple[Stack, ...]:
    return tuple(
        Stack(
            module_name,
            name,
            parameter.shape[0],
            parameter[0].nbytes,
            parameter.dtype,
            tuple(parameter.shape),
        )
        for name, parameter in _held(module)
    )


def _held(module: Any) -> Iterator[tuple[str, Any]]:
    """A module's own parameters, and those of its packed stacks."""
    yield from module.named_parameters(recurse=False)
    for name, stack in _packed_stacks(module):
        yield from ((f"{name}.{part}", parameter) for part, parameter in stack.named_parameters())


def _packed_stacks(module: Any) -> list[tuple[str, PackedStack]]:
    return [(name, child) for name, child in module.named_children() if isinstance(child, PackedStack)]


def _takes_one_at_a_time(experts: Any, stacks: Sequence[Stack], width: int) -> bool:
    """Run the module for two tokens and two experts, the first and the last, with recorders for stacks."""
    import torch

    last = min(stack.experts for stack in stacks) - 1
    asked: list[tuple[str, int]] = []
    turn = _Turn()
    turn.begin({0, last})
    trial = copy.copy(experts)
    trial.__dict__.update(_eager(experts))
    trial.__dict__.update({stack.parameter_name: _Recorder(stack, asked, turn) for stack in stacks})
    hidden = torch.empty(2, width, dtype=stacks[0].dtype, device="meta")
    weights = torch.empty(2, 2, dtype=stacks[0].dtype, device="meta")
    try:
        with torch.no_grad(), _on_meta():
            type(experts).forward(trial, hidden, torch.tensor([[0, last], [last, 0]]), weights)
    except Exception:  # whatever it did, it was not to take experts one at a time
        return False
    return _is_in_turn(asked, [stack.parameter_name for stack in stacks], sorted({0, last}))


def _is_in_turn(asked: Sequence[tuple[str, int]], names: Sequence[str], experts: Sequence[int]) -> bool:
    """Whether everything of one expert was asked for, then everything of the next, and nothing else."""
    order = [index for _, index in asked]
    return order == sorted(order) and set(asked) == {(name, index) for name in names for index in experts}


class _Recorder:
    """Stands for a stack in a trial, and writes down which experts are asked for."""

    def __init__(self, stack: Stack, asked: list[tuple[str, int]], turn: _Turn) -> None:
        self._stack, self._asked, self._turn = stack, asked, turn
        self.shape, self.dtype = stack.shape, stack.dtype

    def __getitem__(self, index: Any) -> Any:
        import torch

        number = int(index)
        if self._turn.number(index) != number:
            raise LookupError("which expert comes next cannot be known")
        self._asked.append((self._stack.parameter_name, number))
        return torch.empty(self._stack.shape[1:], dtype=self._stack.dtype, device="meta")


def _on_meta() -> Any:
    """Lets tensors with and without bytes meet: what comes of them has none."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as trees

    class OnMeta(TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, inputs: Any = (), named: Any = None) -> Any:
            arguments = (inputs, named or {})
            found = {tensor.is_meta for tensor in _tensors(arguments)}
            if len(found) > 1:
                arguments = trees.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), arguments)
            return function(*arguments[0], **arguments[1])

    def _tensors(arguments: Any) -> Iterator[Any]:
        return (leaf for leaf in trees.tree_leaves(arguments) if isinstance(leaf, torch.Tensor))

    return OnMeta()


def _eager(module: Any) -> dict[str, Any]:
    """What makes an implementation run that takes experts one by one: a config of its own that asks for it."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "_experts_implementation") or any(_packed_stacks(module)):
        return {}
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    return {"config": config}
