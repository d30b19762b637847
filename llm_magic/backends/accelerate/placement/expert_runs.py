"""The experts of long prompts: all of a layer come, in runs of neighbours, and become numbers together.

A long prompt needs nearly all experts. One by one, small ones would cost the host several times what the bus
takes for them. In a stack neighbours lie in one piece, so a run of them is one copy for each part of their
matrices. A lane brings the runs in the order of their use, those of the next layer while attention computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.experts.stacks import Stack
from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.placement.expert_stores import Copied
from llm_magic.backends.accelerate.placement.lanes import slot_memory
from llm_magic.backends.accelerate.placement.stream import Lane, Streams
from llm_magic.planning.packed import EXPERTS_IN_RUNS_BYTES

_SLOTS = 3
"""Runs at a time: one becomes numbers, the others come."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class InRam:
    """The experts of one module, and the tensors in pinned RAM that are its stacks."""

    module: Any
    stacks: Sequence[Stack]
    tensors: Sequence[Any]

    @property
    def are_small(self) -> bool:
        """Whether they are packed, and better come in runs."""
        are_packed = any(isinstance(child, PackedStack) for child in self.module.children())
        return are_packed and sum(stack.bytes_per_expert for stack in self.stacks) <= EXPERTS_IN_RUNS_BYTES

    def packed(self) -> dict[str, list[Any]]:
        """For each stack of packed matrices the tensors of their parts."""
        found: dict[str, list[Any]] = {}
        for stack, tensor in zip(self.stacks, self.tensors, strict=True):
            name, _, part = stack.parameter_name.partition(".")
            if part:
                found.setdefault(name, []).append(tensor)
        return found

    def plain(self) -> dict[str, Any]:
        """The other stacks: biases."""
        both = zip(self.stacks, self.tensors, strict=True)
        return {stack.parameter_name: tensor for stack, tensor in both if "." not in stack.parameter_name}


class ExpertRuns:
    """What brings the experts of long prompts to one device.

    Parameters
    ----------
    device
        Where they compute.
    modules
        Their modules, in the order of a sweep.
    room
        Bytes that they may take there; for two experts at least.
    streams
        The device's order of copies and computation.

    Attributes
    ----------
    lane
        What brings the runs.
    bytes
        What they take.
    """

    def __init__(self, device: str, modules: Sequence[InRam], room: int, streams: Streams) -> None:
        runs: list[_Runs] = []
        self._twins: dict[int, Any] = {}
        for held in modules:
            twin = self._twins[id(held.module)] = copy.copy(held.module)
            for name, tensors in held.packed().items():
                first = runs[-1].end if runs else 0
                runs.append(_Runs(held.module.get_submodule(name), tensors, room // 2, first))
                # An instance's attribute is found before the module of that name.
                twin.__dict__[name] = runs[-1]
            twin.__dict__.update({name: _Rows(rows, device) for name, rows in held.plain().items()})
        slot_bytes = max(each.bytes for each in runs)
        self.bytes = slot_bytes * min(_SLOTS, room // slot_bytes)
        slots = list(slot_memory(device, self.bytes).split(slot_bytes))
        sources = [Copied(streams, pairs) for each in runs for pairs in each.pairs()]
        self.lane = Lane(sources, slots, streams)
        for each in runs:
            each.come_by(self.lane, slots, device)

    @staticmethod
    def least_room(modules: Sequence[InRam]) -> int:
        """Bytes for two experts of any stack."""
        return 2 * max(_room(tensors, 1) for held in modules for tensors in held.packed().values())

    def twin(self, module: Any) -> Any:
        """What computes in place of a module, with experts that come in runs; ``None`` for others."""
        return self._twins.get(id(module))

    def settle(self) -> None:
        """After passes that did not end."""
        self.lane.settle()

    def close(self) -> None:
        """Wait for what is on its way, and let the memory go."""
        self.lane.close()
        self._twins.clear()


class _Runs:
    """Stands for a `PackedStack` in sweeps of many tokens.

    Parameters
    ----------
    stack
        What it stands for.
    tensors
        The stacks of the parts of its matrices, in pinned RAM.
    room
        Bytes for a run.
    first
        Number of its first run among all of the lane.
    """

    def __init__(self, stack: PackedStack, tensors: Sequence[Any], room: int, first: int) -> None:
        self.linear, self.shape, self.is_transposed = stack.linear, stack.shape, stack.is_transposed
        self._stack, self._tensors, self._first = stack, tensors, first
        step = min(stack.at_a_time(stack.dtype), stack.experts)
        while step > 1 and _room(tensors, step) > room:
            step -= 1
        self.bytes = _room(tensors, step)
        self._places = [_room(tensors[:number], step) for number in range(len(tensors))]
        self._runs = [(at, min(at + step, stack.experts)) for at in range(0, stack.experts, step)]
        self._lane: Any = None

    @property
    def end(self) -> int:
        """Number of the run after its last one."""
        return self._first + len(self._runs)

    def pairs(self) -> Iterator[Any]:
        """For each run, what says what is copied to where in a slot."""
        for start, stop in self._runs:
            sources = [tensor[start:stop] for tensor in self._tensors]
            yield lambda slot, sources=sources: [*zip(sources, self._views(sources, slot), strict=True)]

    def come_by(self, lane: Lane, slots: Sequence[Any], device: Any) -> None:
        """What brings the runs, and where to."""
        self._lane, self._unpack = lane, self._stack.unpacking_on(device)
        # Now: some libraries refuse what is made in inference mode.
        self._in_slots = [
            [self._views([tensor[start:stop] for tensor in self._tensors], slot) for slot in slots]
            for start, stop in self._runs
        ]

    def unpacked(self, uses: Sequence[int], dtype: Any) -> Iterator[Any]:
        """As that of `PackedStack`."""
        for number, (start, stop) in enumerate(self._runs):
            if not any(uses[start:stop]):
                yield from [None] * (stop - start)
                continue
            slot = self._lane.take(self._first + number)
            try:
                numbers = self._unpack(self._in_slots[number][slot], dtype)
            finally:
                self._lane.release(self._first + number)  # the next ones come while these are multiplied
            yield from numbers

    def _views(self, parts: Sequence[Any], slot: Any) -> list[Any]:
        """Tensors like these in a slot."""
        return [
            slot[at : at + part.nbytes].view(part.dtype).view(part.shape)
            for at, part in zip(self._places, parts, strict=True)
        ]


class _Rows:
    """Stands for biases: those of all experts come at once, which is little."""

    def __init__(self, tensor: Any, device: str) -> None:
        self._tensor, self._device = tensor, device

    def __getitem__(self, expert: int) -> Any:
        return self._tensor.to(self._device, non_blocking=True)[expert]

    def index_select(self, dim: int, experts: Any) -> Any:
        """As of a tensor."""
        return self._tensor.to(self._device, non_blocking=True).index_select(dim, experts)


def _room(tensors: Sequence[Any], experts: int) -> int:
    """Bytes of so many experts' entries in all of these stacks, each beginning where kernels load it fast."""
    return sum(-(-experts * tensor[0].nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
