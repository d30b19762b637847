"""A recorded layer, run: compiled functions between its large parts."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from llm_magic.backends.accelerate.kernels.steps import Fold, Loop, Operand
from llm_magic.backends.accelerate.recorded.lowering import Step, Temporaries, lowered
from llm_magic.backends.accelerate.recorded.recording import (
    VARYING,
    Argument,
    Node,
    Recording,
    Rehearsal,
    View,
    views_in,
)

Values = list[Any]

_ALIGNED = 64


@dataclass(frozen=True)
class Region:
    """Operations that are one compiled function.

    Attributes
    ----------
    steps
        With numbers of bases as buffers.
    made
        What it makes that is used elsewhere.
    between
        Of what it makes for itself: base, bytes.
    """

    steps: tuple[Step, ...]
    made: tuple[View, ...]
    between: tuple[tuple[int, int], ...]


Part = Region | Node

_Entry = tuple[Node, Sequence[Step] | None]


def parts_of(recording: Recording) -> list[Part]:
    """What is to be done, in an order in which small operations come together.

    Linear layers come as soon as they can, what torch has to compute as late as it can. Bases of the same memory have
    one number in what is returned.
    """
    temporaries = Temporaries(1 + max(view.base for view in _views_of(recording)))
    waiting: list[_Entry] = [(node, lowered(node, temporaries)) for node in recording.nodes]
    known = {view.base for view in recording.given}
    found: list[list[_Entry]] = []
    while waiting:
        some = _next_ones(waiting, known)
        found.append(some)
        waiting = [entry for entry in waiting if entry not in some]
        known |= {view.base for node, _ in some for view in node.outputs}
    memory = _memory(recording)
    parts: list[Part] = []
    for some in found:
        if some[0][1] is None:
            parts.append(_in_memory(some[0][0], memory))
            continue
        steps = tuple(step for _, steps in some for step in steps or ())
        parts.append(Region(tuple(renumbered(step, memory) for step in steps), (), ()))
    return _with_results(parts, recording, temporaries)


def _next_ones(waiting: Sequence[_Entry], known: set[int]) -> list[_Entry]:
    """A linear layer, or else all small operations that come to their turn, or else whatever is next."""
    ready = [entry for number, entry in enumerate(waiting) if _is_ready(entry[0], known, waiting[:number])]
    linear = next((entry for entry in ready if entry[0].kind == "linear"), None)
    if linear is not None:
        return [linear]
    small: list[_Entry] = []
    seen, rest = set(known), list[_Entry]()
    for entry in waiting:
        if entry[1] is not None and _is_ready(entry[0], seen, rest):
            small.append(entry)
            seen |= {view.base for view in entry[0].outputs}
        else:
            rest.append(entry)
    return small or ready[:1]


def _is_ready(node: Node, known: set[int], before: Sequence[_Entry]) -> bool:
    """Whether all is there that it needs, and nobody who came before it still needs what it changes."""
    if not all(view.base in known for view in views_in((node.args, node.kwargs))):
        return False
    return node.changes is None or not any(
        view.base == node.changes for other, _ in before for view in views_in((other.args, other.kwargs))
    )


def _memory(recording: Recording) -> dict[int, int]:
    """The first base of the same memory, for each that is not it."""
    found: dict[int, int] = {}
    for node in recording.nodes:
        if node.changes is not None:
            found[node.outputs[0].base] = found.get(node.changes, node.changes)
    return found


def _in_memory(value: Any, memory: dict[int, int]) -> Any:
    if isinstance(value, View):
        return replace(value, base=memory.get(value.base, value.base))
    if isinstance(value, Node):
        args, kwargs, outputs = (
            _in_memory(each, memory) for each in (value.args, value.kwargs, value.outputs)
        )
        return replace(value, args=args, kwargs=kwargs, outputs=outputs)
    return tuple(_in_memory(each, memory) for each in value) if isinstance(value, tuple) else value


def _with_results(parts: list[Part], recording: Recording, temporaries: Temporaries) -> list[Part]:
    """Tell each region which of what it makes somebody else wants."""
    wanted: Counter[int] = Counter()
    for part in parts:
        wanted.update(
            {view.base for view in views_in((part.args, part.kwargs))}
            if isinstance(part, Node)
            else _buffers(part)
        )
    wanted.update({view.base for view in views_in(_in_memory(recording.result, _memory(recording)))})
    outputs = {view.base: view for node in recording.nodes for view in node.outputs}
    there = {view.base for view in recording.given}
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Node):
            found.append(part)
            there |= {view.base for view in part.outputs}
            continue
        made, between = [], []
        for base in dict.fromkeys(step.result.buffer for step in part.steps):
            if base in there:  # changed where it is
                continue
            view = outputs.get(base)
            if view is not None and wanted[base] > 1:
                made.append(view)
                there.add(base)
            else:
                size = (
                    _bytes(temporaries.shapes[base], 4)
                    if view is None
                    else _bytes(view.shape, view.dtype.itemsize)
                )
                between.append((base, size))
        found.append(Region(part.steps, tuple(made), tuple(between)))
    return found


def _buffers(region: Region) -> set[int]:
    found = set()
    for step in region.steps:
        found.add(step.result.buffer)
        found |= {each.buffer for each in (step.inputs if isinstance(step, Loop) else (step.input,))}
    return found


def _bytes(shape: Sequence[int], itemsize: int) -> int:
    count = itemsize
    for size in shape:
        count *= size
    return -(-count // _ALIGNED) * _ALIGNED


class CompiledRegion:
    """A region as it is called.

    Attributes
    ----------
    made
        What it makes that is used elsewhere.
    outer
        Bases whose addresses its kernel is told, in this order.
    scratch_bytes, offsets
        Of what it makes for itself, whose addresses come after them.
    kernel
        Of the address of these addresses.
    """

    def __init__(self, region: Region) -> None:
        import torch

        self.made = region.made
        inner = [base for base, _ in region.between]
        self.outer = [base for base in dict.fromkeys(_in_order(region)) if base not in inner]
        self.scratch_bytes = sum(size for _, size in region.between)
        offsets, at = [], 0
        for _, size in region.between:
            offsets.append(at)
            at += size
        self.offsets = offsets
        numbers = {base: number for number, base in enumerate([*self.outer, *inner])}
        self._words = ctypes.c_int64 * len(numbers)
        self.kernel = _compiled(tuple(renumbered(step, numbers) for step in region.steps))
        cpu = torch.device("cpu")  # not the default device, which somebody may have set
        self._empty, self._strided = (partial(of, device=cpu) for of in (torch.empty, torch.empty_strided))
        self._byte = torch.uint8

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``."""
        for view in self.made:
            values[view.base] = self._strided(view.shape, view.stride, dtype=view.dtype)
        scratch = self._empty(self.scratch_bytes, dtype=self._byte)
        start = scratch.data_ptr()
        self.kernel(
            self._words(
                *[values[base].data_ptr() for base in self.outer], *[start + at for at in self.offsets]
            )
        )


def _in_order(region: Region) -> Iterator[int]:
    for step in region.steps:
        for operand in (*(step.inputs if isinstance(step, Loop) else (step.input,)), step.result):
            yield operand.buffer


def renumbered(step: Step, numbers: dict[int, int]) -> Step:
    """A step on buffers of other numbers, where those are known."""

    def other(operand: Operand) -> Operand:
        return replace(operand, buffer=numbers.get(operand.buffer, operand.buffer))

    if isinstance(step, Fold):
        return replace(step, result=other(step.result), input=other(step.input))
    return replace(step, result=other(step.result), inputs=tuple(map(other, step.inputs)))


@cache
def _compiled(steps: tuple[Step, ...]) -> Callable[[Any], None]:
    from llm_magic.backends.accelerate.kernels.elementwise import elementwise

    return elementwise(steps)


class Program:
    """A recorded layer, for every layer of which the same was recorded."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.result = _in_memory(recording.result, _memory(recording))
        self.parts: list[CompiledRegion | Node] = [
            part if isinstance(part, Node) else CompiledRegion(part) for part in parts_of(recording)
        ]
        self.size = 1 + max(view.base for view in _views_of(recording))
        used = {
            view.base
            for part in self.parts
            if isinstance(part, Node)
            for view in views_in((part.args, part.kwargs))
        }
        self.native = {base for part in self.parts if isinstance(part, CompiledRegion) for base in part.outer}
        self.used = used | self.native | {view.base for view in views_in(self.result)}

    def rehearse(self, layer: Any, rehearsal: Rehearsal) -> bool:
        """Whether it makes of what the stand-ins gave what the layer's own code made of it."""
        values = self.begin(layer, rehearsal.arguments)
        numbers = (node.number for node in self.recording.nodes if node.kind != "op")
        given = dict(zip(numbers, rehearsal.leaves, strict=True))
        for part in self.parts:
            if isinstance(part, CompiledRegion):
                part.run(values)
            elif part.kind == "op":
                call(part, None, values)
            else:
                got, gave = given[part.number]
                views = [v for v in views_in((part.args, part.kwargs)) if v.shape != VARYING]
                if not _are_close([shown(view, values) for view in views], got):
                    return False
                for view, tensor in zip(part.outputs, gave, strict=True):
                    values[view.base] = tensor
        return _are_close(_tensors(shown(self.result, values)), _tensors(rehearsal.result))

    def begin(self, layer: Any, arguments: Sequence[Any]) -> Values:
        values: Values = [None] * self.size
        for number, view in self.recording.arguments:
            values[view.base] = arguments[number]
        for path, name, view in self.recording.weights:
            module = layer.get_submodule(path)
            values[view.base] = module._parameters.get(name, module._buffers.get(name))
        for constant in self.recording.constants:
            values[constant.view.base] = constant.tensor()
        return values


def call(node: Node, module: Any, values: Values) -> None:
    """Have torch compute an operation, or a module its part."""
    args, kwargs = shown(node.args, values), {name: shown(value, values) for name, value in node.kwargs}
    result = (node.name if module is None else module)(*args, **kwargs)
    if node.changes is not None:
        return
    results = result if isinstance(result, (tuple, list)) else (result,)
    for view, each in zip(node.outputs, results, strict=False):  # a module may have nothing beside its own
        values[view.base] = each if module is None else as_noted(each, view)


def as_noted(result: Any, view: View) -> Any:
    """What a large part has made, as compiled functions read it.

    Raises
    ------
    RuntimeError
        When it is something else than what the layer's code was seen with.
    """
    if result.dtype is not view.dtype or result.shape != view.shape:
        raise RuntimeError(
            f"A part of a layer made {result.dtype} {tuple(result.shape)}; it was recorded with"
            f" {view.dtype} {view.shape}."
        )
    return result.contiguous()


def shown(value: Any, values: Values) -> Any:
    """A value of a recording with tensors for its views."""
    if isinstance(value, Argument):
        return values[-1][value.number]
    if isinstance(value, View):
        tensor = values[value.base]
        if value.shape == VARYING or (
            tensor.shape == value.shape and tensor.stride() == value.stride and not value.offset
        ):
            return tensor
        return tensor.as_strided(value.shape, value.stride, value.offset + tensor.storage_offset())
    return tuple(shown(each, values) for each in value) if isinstance(value, tuple) else value


def _views_of(recording: Recording) -> Iterator[View]:
    yield from recording.given
    for node in recording.nodes:
        yield from node.outputs


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    return [found for each in value for found in _tensors(each)] if isinstance(value, (tuple, list)) else []


def _are_close(mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(mine) == len(theirs) and all(map(_is_close, mine, theirs))


def _is_close(mine: Any, theirs: Any) -> bool:
    import torch

    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if not theirs.is_floating_point() or not theirs.numel():
        return torch.equal(mine, theirs)
    far = 8 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    return bool((mine.float() - theirs.float()).abs().max() <= far)
