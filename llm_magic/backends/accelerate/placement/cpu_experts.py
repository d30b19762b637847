"""Experts that the CPU computes where they are, in a layer of which a GPU computes everything else.

Nearly all bytes of a mixture's layer are experts, of which a token needs a few. They may stay in RAM, where
the CPU reads those few, while attention with its keys and values, the router and shared experts stay on the
GPU. What crosses the bus is a row for each token, there and back.

In a sweep that is recorded, the work of the host comes between two graphs: whoever records says so by
`host_work_taken_by`. Memory cannot be pinned meanwhile, so the run before makes room for rows: `before_recording`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llm_magic.backends.accelerate.files.reader import page_buffer
from llm_magic.backends.accelerate.placement.blocks import pin
from llm_magic.backends.accelerate.placement.visits import Visits

HostWork = Callable[[], None]

_recording = threading.local()


@contextmanager
def host_work_taken_by(take: Callable[[HostWork], None]) -> Iterator[None]:
    """While this thread records the kernels of a GPU: hand ``take`` what the host has to do before the next ones."""
    _recording.take = take
    try:
        yield
    finally:
        del _recording.take


@contextmanager
def before_recording() -> Iterator[None]:
    """While this thread runs a sweep as it is that will be recorded next."""
    _recording.is_near = True
    try:
        yield
    finally:
        del _recording.is_near


class Rows:
    """Pinned tensors in RAM, at fixed addresses, for what comes from one GPU and goes back to it.

    All layers share them: each has done with them when the next one begins.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, tuple[int, ...], Any], tuple[Any, Any]] = {}

    def make(self, tensor: Any, number: int) -> None:
        """Have room for tensors like this one, argument ``number`` of a layer; its result is argument -1."""
        key = _key(tensor, number)
        memory = None if key in self._held else page_buffer(tensor.nbytes)
        if memory is not None and pin(memory):
            row = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._held[key] = memory, row  # it is pinned as long as somebody has the memory as a whole

    def like(self, tensor: Any, number: int) -> Any:
        """The room for this tensor.

        Raises
        ------
        RuntimeError
            When there is none: the system has refused to pin it.
        """
        held = self._held.get(_key(tensor, number))
        if held is None:
            raise RuntimeError("no pinned memory for what experts in RAM compute")
        return held[1]


def _key(tensor: Any, number: int) -> tuple[int, tuple[int, ...], Any]:
    return number, tuple(tensor.shape), tensor.dtype


class CpuExperts:
    """Lets a module of experts compute in RAM, whatever device its arguments are on.

    Parameters
    ----------
    module
        The experts, with their parameters in RAM.
    visits
        Says whether the sweep is long: then they compute on the GPU, expert by expert.
    rows
        Where tokens stay while they are here, in sweeps that are recorded.
    """

    def __init__(self, module: Any, visits: Visits, rows: Rows) -> None:
        self._module, self._visits, self._rows = module, visits, rows
        self._usual = module.__dict__.get("forward")
        module.__dict__["forward"] = self.forward

    @property
    def is_away(self) -> bool:
        """Whether they compute elsewhere in this sweep."""
        return self._visits.is_on

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the module makes of its arguments, where these are."""
        values = [*inputs, *named.values()]
        there = values[0].device
        if there.type == "cpu":
            return self._compute(values, named)
        take = getattr(_recording, "take", None)
        if take is None:
            if getattr(_recording, "is_near", False):
                for number, value in enumerate(values):
                    self._rows.make(value, number)
                self._rows.make(values[0], -1)
            return self._compute([value.to("cpu") for value in values], named).to(there)
        here = [self._rows.like(value, number) for number, value in enumerate(values)]
        for row, value in zip(here, values, strict=True):
            row.copy_(value.contiguous(), non_blocking=True)
        result = self._rows.like(values[0], -1)
        take(lambda: result.copy_(self._compute(here, named)))
        return result.to(there, non_blocking=True)

    def detach(self) -> None:
        """Leave the module as it was. Safe to call twice."""
        if self._module.__dict__.get("forward") == self.forward:
            del self._module.__dict__["forward"]
            if self._usual is not None:
                self._module.__dict__["forward"] = self._usual

    def _compute(self, values: Sequence[Any], named: Any) -> Any:
        count = len(values) - len(named)
        inputs, rest = values[:count], dict(zip(named, values[count:], strict=True))
        if self._usual is not None:
            return self._usual(*inputs, **rest)
        return type(self._module).forward(self._module, *inputs, **rest)
