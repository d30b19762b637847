"""Experts of a layer as transformers has them: stacked in a few parameters, and taken one at a time by its "eager" code.

Whether a module does so is not decided by its name: `can_route` lets it run once on tensors without bytes and looks at
what it asks for. Architectures that compute with whole stacks (Llama 4, JetMoE, DBRX) do not. Where the matrices are
packed, an expert is an entry of every part of them (see `packed_experts`).
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.packed.packed_stack import PackedStack

_ARGUMENTS = 3  # hidden states [tokens, width], experts of each token [tokens, k], their weights


@dataclass(frozen=True)
class Stack:
    """One parameter that holds an entry for each expert of a layer.

    Attributes
    ----------
    module_name
        The module of the experts, relative to the block (``"mlp.experts"``).
    parameter_name
        Its parameter (``"gate_up_proj"``).
    experts
        Number of entries.
    bytes_per_expert
        Size of one of them.
    dtype, shape
        torch dtype and shape of the whole stack.
    """

    module_name: str
    parameter_name: str
    experts: int
    bytes_per_expert: int
    dtype: Any
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The parameter, relative to the block (``"mlp.experts.gate_up_proj"``)."""
        return f"{self.module_name}.{self.parameter_name}" if self.module_name else self.parameter_name

    def view(self, memory: Any, at: int) -> Any:
        """The entry of one expert whose bytes begin at ``at`` in ``memory`` (uint8)."""
        return memory[at : at + self.bytes_per_expert].view(self.dtype).view(self.shape[1:])


def find_stacks(block: Any) -> tuple[Stack, ...]:
    """The parameters of a block that hold its routed experts; empty when it has to move whole.

    Stacks of one module follow each other, in the order of its parameters.
    """
    return tuple(
        stack
        for name, module in block.named_modules()
        if can_route(module)
        for stack in stacks_of(name, module)
    )


def can_route(experts: Any) -> bool:
    """Whether a module takes its experts one at a time, each of them once, and only those that are asked for."""
    if any(packed_stacks(experts)):
        return True  # it was, as long as the matrices were not packed
    if not _is_routed(experts):
        return False
    stacks = stacks_of("", experts)
    widths = sorted({size for stack in stacks for size in stack.shape[1:]})
    return any(_takes_one_at_a_time(experts, stacks, width) for width in widths)


def are_packed(model: Any) -> bool:
    """Whether all experts that could be routed to are packed matrices."""
    modules = list(model.modules())
    are_some = any(isinstance(module, PackedStack) for module in modules)
    return are_some and not any(
        _is_routed(module) for module in modules if not isinstance(module, PackedStack)
    )


class Turn(threading.local):
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


def _is_routed(module: Any) -> bool:
    parameters = list(module.parameters(recurse=False))
    if not any(parameter.dim() == 3 for parameter in parameters):
        return False
    return len(argument_names(module)) == _ARGUMENTS and all(parameter.dim() > 1 for parameter in parameters)


def argument_names(module: Any) -> list[str]:
    """Of the class: a hook may have put another ``forward`` on the instance."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def stacks_of(module_name: str, module: Any) -> tuple[Stack, ...]:
    """Of one module, in the order of its parameters."""
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
    for name, stack in packed_stacks(module):
        yield from ((f"{name}.{part}", parameter) for part, parameter in stack.named_parameters())


def packed_stacks(module: Any) -> list[tuple[str, PackedStack]]:
    """Those that a module has, by their names there."""
    return [(name, child) for name, child in module.named_children() if isinstance(child, PackedStack)]


def _takes_one_at_a_time(experts: Any, stacks: Sequence[Stack], width: int) -> bool:
    """Run the module for two tokens and two experts, the first and the last, with recorders for stacks."""
    import torch

    last = min(stack.experts for stack in stacks) - 1
    asked: list[tuple[str, int]] = []
    turn = Turn()
    turn.begin({0, last})
    trial = copy.copy(experts)
    trial.__dict__.update(one_by_one(experts))
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

    def __init__(self, stack: Stack, asked: list[tuple[str, int]], turn: Turn) -> None:
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


def one_by_one(module: Any) -> dict[str, Any]:
    """What makes an implementation run that takes experts one by one: a config of its own that asks for it."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "_experts_implementation") or any(packed_stacks(module)):
        return {}
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    return {"config": config}
