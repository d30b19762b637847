"""A program with the modules of one layer: what runs in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

from llm_magic.backends.accelerate.kernels.torch_threads import FEW_NUMBERS, one_thread
from llm_magic.backends.accelerate.layer_cache import GrowingTensors
from llm_magic.backends.accelerate.recorded.attending import attention, attention_step
from llm_magic.backends.accelerate.recorded.chain import Chain, Room, chained
from llm_magic.backends.accelerate.recorded.kept_tokens import cache_step
from llm_magic.backends.accelerate.recorded.linears import Experts, Linears, Router
from llm_magic.backends.accelerate.recorded.picks import limits_of, pick
from llm_magic.backends.accelerate.recorded.program import (
    CompiledRegion,
    Program,
    Values,
    call,
    shown,
)
from llm_magic.backends.accelerate.recorded.recording import VARYING, Node, View, views_in
from llm_magic.backends.accelerate.recorded.states import StateStep, is_kept, kept

_PRODUCTS = ("aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default")


class Bound:
    """A program with the modules of one layer.

    Parameters
    ----------
    leaves
        The arguments of the first sweep that it is for.
    """

    def __init__(
        self,
        program: Program,
        layer: Any,
        growing: GrowingTensors | None = None,
        room: Room | None = None,
        leaves: Sequence[Any] = (),
    ) -> None:
        self._program = program
        self._size = program.size
        recording = program.recording
        self._arguments = [
            (number, view.base) for number, view in recording.arguments if view.base in program.used
        ]
        self._checked = [
            (number, view.shape) for number, view in recording.arguments if view.shape != VARYING
        ]
        self._weights = []
        for path, name, view in recording.weights:
            module = layer.get_submodule(path)
            held = module._parameters if name in module._parameters else module._buffers
            self._weights.append((held, name, view))
        self._states = [(state, layer.get_submodule(state.module)) for state in recording.states]
        self._constants = [(each.view.base, each.tensor()) for each in recording.constants]
        self._matrices = list(_matrices(program, layer))
        groups, growing, limits = (
            _together(program.parts),
            growing or GrowingTensors(0),
            limits_of(recording.nodes),
        )
        given = {view.base for _, view in recording.arguments}
        steps, wanted = list[Any](), list[set[int]]()
        while groups:
            attends = attention(groups, layer, growing, leaves, given)
            count = 1 if attends is None else attends.parts
            step = attends or pick(groups[0][0], limits) or _step(groups[0], layer, growing)
            steps.append(step)
            wanted.append(set[int]().union(*map(_reads, groups[:count])))
            groups = groups[count:]
        wanted.append({view.base for view in views_in(program.result)})
        self._steps = chained(steps, wanted, room or Room())
        self._result = program.result

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Whether arguments are of the shapes that it is for."""
        return (
            all(leaves[number].shape == shape for number, shape in self._checked)
            and all(_is_such(held.get(name), view) for held, name, view in self._weights)
            and all(_shape_and_dtype(held.get(name)) == known for held, name, known in self._matrices)
            and all(is_kept(state, leaves[state.cache], module.layer_idx) for state, module in self._states)
        )

    @property
    def shapes(self) -> list[tuple[int, Any]]:
        """Those of arguments that it is for, by their numbers."""
        return self._checked

    @property
    def chain(self) -> Chain | None:
        """All that it does, where that is one chain that changes nothing but the KV cache's keys and values."""
        chain = getattr(self._steps[0], "__self__", None) if len(self._steps) == 1 else None
        return chain if isinstance(chain, Chain) and not (chain.has_states or self._states) else None

    @property
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where its parameters are."""
        found = [(held, name) for held, name, _ in self._weights]
        chain = self.chain
        for linears in chain.linears if chain else ():
            found += linears.places
        return found

    def run(self, leaves: Sequence[Any]) -> Any:
        """What the layer returns."""
        values = self.values(leaves)
        for step in self._steps:
            step(values)
        return self.result(values)

    def take_states(self, values: Values, leaves: Sequence[Any]) -> None:
        """Have other states than those that `values` were made with, the first of the arguments."""
        values[-1] = leaves
        for number, base in self._arguments:
            if not number:
                values[base] = leaves[0].contiguous()

    def result(self, values: Values) -> Any:
        """What it returns of them."""
        return shown(self._result, values)

    def values(self, leaves: Sequence[Any]) -> Values:
        """What is there before the first step."""
        values: Values = [None] * self._size
        for number, base in self._arguments:
            values[base] = leaves[number].contiguous()
        for held, name, view in self._weights:
            values[view.base] = held[name]
        for base, tensor in self._constants:
            values[base] = tensor
        for state, module in self._states:
            values[state.view.base] = kept(state, leaves[state.cache], module.layer_idx)
        values.append(leaves)
        return values


def _matrices(program: Program, layer: Any) -> Iterator[tuple[Any, str, Any]]:
    """Where parameters are that are numbers one by one, of linear layers and experts, and what they were when recorded."""
    import torch

    for part in program.parts:
        if isinstance(part, Node) and part.kind in ("linear", "experts"):
            name = "weight" if part.kind == "linear" else part.args[0]
            held = layer.get_submodule(part.name)._parameters
            if type(held.get(name)) is torch.nn.Parameter:
                yield held, name, _shape_and_dtype(held[name])


def _shape_and_dtype(parameter: Any) -> Any:
    return None if parameter is None else (parameter.shape, parameter.dtype)


def _together(parts: Sequence[CompiledRegion | Node]) -> list[list[Any]]:
    """Parts one by one, but for linear layers of the same tokens."""
    found: list[list[Any]] = []
    for part in parts:
        tokens = _tokens_of(part)
        if tokens is not None and found and tokens == _tokens_of(found[-1][0]):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _tokens_of(part: CompiledRegion | Node) -> Any:
    """What a linear layer sees; ``None``: it is something else."""
    return part.args[0] if isinstance(part, Node) and part.kind == "linear" else None


def _reads(parts: Sequence[CompiledRegion | Node]) -> set[int]:
    """Bases that some parts read, or change."""
    found: set[int] = set()
    for part in parts:
        if isinstance(part, CompiledRegion):
            found.update(part.outer)
        else:
            found.update(view.base for view in views_in((part.args, part.kwargs)))
    return found


def _step(parts: Sequence[Any], layer: Any, growing: GrowingTensors) -> Any:
    """What has values compute: a member of a chain, or a function."""
    part = parts[0]
    if isinstance(part, CompiledRegion):
        return part
    if part.kind in _OF_NO_MODULE:
        return _OF_NO_MODULE[part.kind](part)
    modules = [layer.get_submodule(each.name) for each in parts]
    if part.kind == "linear":
        return Linears(part.args[0], [each.outputs[0] for each in parts], modules)
    if part.kind == "cache":
        return cache_step(part, modules[0], growing)
    if part.kind in _STEPS:
        return _STEPS[part.kind](part, modules[0])
    return lambda values: call(part, modules[0], values)


def _by_torch(node: Node) -> Callable[[Values], None]:
    """What torch computes."""
    numbers = max((prod(view.shape) for view in views_in((node.args, node.outputs))), default=0)
    if str(node.name) not in _PRODUCTS or numbers > FEW_NUMBERS:
        return lambda values: call(node, None, values)

    def step(values: Values) -> None:
        with one_thread():
            call(node, None, values)

    return step


def _taking_step(node: Node, _layer: Any) -> Callable[[Values], None]:
    shared, name = node.args

    def step(values: Values) -> None:
        for view, tensor in zip(node.outputs, values[-1][shared.number][name], strict=True):
            values[view.base] = tensor

    return step


def _handing_step(node: Node, _layer: Any) -> Callable[[Values], None]:
    shared, name, kept = node.args

    def step(values: Values) -> None:
        values[-1][shared.number][name] = shown(kept, values)

    return step


_OF_NO_MODULE: dict[str, Callable[[Node], Any]] = {"op": _by_torch, "state": StateStep}
_STEPS = {
    "attention": attention_step,
    "experts": Experts,
    "router": Router,
    "take": _taking_step,
    "hand on": _handing_step,
}


def _is_such(weight: Any, view: View) -> bool:
    """Whether a weight is still what was recorded."""
    return (
        weight is not None
        and weight.dtype is view.dtype
        and weight.shape == view.shape
        and weight.is_cpu
        and weight.stride() == view.stride
    )
