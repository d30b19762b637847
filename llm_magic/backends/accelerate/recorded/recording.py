"""A recording: what a decoder layer does with the tokens of a sweep, as a list of torch's operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class View:
    """A tensor, by where it lies in what was made as a whole.

    Attributes
    ----------
    base
        Number of that: of an argument, a weight, or a result.
    shape, stride, offset
        In elements.
    dtype
        torch's.
    """

    base: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: Any


VARYING = (-1,)
"""The shape of what has another one in each sweep: keys and values, masks. Only large parts take it, as a whole."""


@dataclass(frozen=True)
class Argument:
    """An argument that is no tensor and no plain value, by its number; a large part gets it as it is."""

    number: int


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes
    ----------
    number
        Its place among all.
    kind
        ``"op"``: of torch. ``"linear"`` and ``"module"``: a module of the layer. ``"attention"``, ``"cache"``,
        ``"router"``: products with the weight of a module that is no linear layer, and ``"experts"``: with a stack.
        ``"state"``: a kernel that changes a state. ``"take"`` and ``"hand on"``: keys and values that layers share, in a
        dictionary among the arguments.
    name
        The operation, the module's path in the layer, or that of the module that attends; the kernel of a state.
    args, kwargs
        As in the call, with a `View` for each tensor.
    outputs
        What it makes.
    changes
        The base that is another one from then on, of the same memory.
    """

    number: int
    kind: str
    name: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[View, ...]
    changes: int | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor that the layer's code makes of nothing but numbers of its own, the same ones in every sweep.

    Attributes
    ----------
    view
        Of all of it.
    numbers
        One after the other.
    """

    view: View
    numbers: tuple[float, ...]

    def tensor(self) -> Any:
        """It."""
        import torch

        return torch.tensor(self.numbers, dtype=self.view.dtype, device="cpu").view(self.view.shape)


@dataclass(frozen=True)
class State:
    """A recurrent state that the cache keeps, of the same shape in every sweep, and that a kernel changes where it is.

    Attributes
    ----------
    cache
        Number of the cache among all arguments.
    module
        Path of the module whose state it is.
    kind, number
        Which one: ``"conv_states"`` or ``"recurrent_states"``.
    shape, view
        Of it.
    """

    cache: int
    module: str
    kind: str
    number: int
    shape: tuple[int, ...]
    view: View


@dataclass(frozen=True)
class Recording:
    """All that a layer does.

    Attributes
    ----------
    arguments
        The tensors of its call, by their number among all arguments.
    weights
        Parameters and buffers: path of the module, name.
    constants, states
        As in `Constant` and `State`.
    nodes
        In order.
    result
        What the layer returns, with a `View` for each tensor.
    """

    arguments: tuple[tuple[int, View], ...]
    weights: tuple[tuple[str, str, View], ...]
    constants: tuple[Constant, ...]
    states: tuple[State, ...]
    nodes: tuple[Node, ...]
    result: Any

    @property
    def given(self) -> Iterator[View]:
        """What is there before the first operation."""
        yield from (view for _, view in self.arguments)
        yield from (view for *_, view in self.weights)
        yield from (constant.view for constant in self.constants)
        yield from (state.view for state in self.states)


@dataclass
class Rehearsal:
    """What the stand-ins gave while a layer was recorded, and what came of it.

    Attributes
    ----------
    leaves
        Of the nodes in turn that are no operations of torch: the tensors that each got, and those that it gave.
    result
        Of the layer.
    """

    arguments: list[Any]
    leaves: list[tuple[list[Any], tuple[Any, ...]]]
    result: Any


def views_in(value: Any) -> Iterator[View]:
    """All views among nested tuples."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from views_in(each)


def needed(nodes: Sequence[Node], result: Any) -> Iterator[Node]:
    """Those of which something comes: large parts, and operations on whose outputs others depend, or the result."""
    wanted = {view.base for view in views_in(result)}
    found: list[Node] = []
    for node in reversed(nodes):
        if node.kind == "op" and not any(view.base in wanted for view in node.outputs):
            continue
        found.append(node)
        wanted |= {view.base for view in views_in((node.args, node.kwargs))}
    return reversed(found)
