"""Blocks that the CPU computes, on a visit to a GPU: for sweeps of many tokens.

A CPU decodes a token as fast as it reads the weights, but it multiplies slowly: a prompt is read many
times faster by a GPU to which its blocks stream like any others. So in a long sweep a lane brings
them, with their keys and values, which go back to RAM behind each block. In all other sweeps they are
no part of what the lane brings, and compute where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import send_to_device

from llm_magic.backends.accelerate.placement.blocks import Binding, BlockTensors
from llm_magic.backends.accelerate.placement.hooks import InputHook
from llm_magic.backends.accelerate.placement.layer_cache import find_layer, layer_index, take_along
from llm_magic.backends.accelerate.placement.packing import bind
from llm_magic.backends.accelerate.placement.stream import Lane


class Visits:
    """Whether the sweep that runs now is a long one, and what its lanes bring.

    Parameters
    ----------
    long_sweep
        Tokens, of all sequences, from which on a sweep is a long one.

    Attributes
    ----------
    is_on
        Whether blocks that begin now compute on their visit.
    """

    def __init__(self, long_sweep: int) -> None:
        self.is_on = False
        self._long_sweep = long_sweep
        self._lanes: dict[Lane, tuple[int, ...]] = {}

    def add(self, lane: Lane, usual: Sequence[int]) -> None:
        """A lane that brings blocks on visits; ``usual`` are the numbers of those that always travel."""
        self._lanes[lane] = tuple(usual)
        lane.follow(usual)

    def begin(self, tokens: int) -> None:
        """A sweep over so many tokens begins."""
        self.is_on = tokens >= self._long_sweep
        if self.is_on:
            for lane in self._lanes:
                lane.follow(None)
                lane.prime()

    def end(self) -> None:
        """It is over, or will never be: what goes back to RAM has arrived there when this returns."""
        if not self.is_on:
            return
        self.is_on = False
        for lane, usual in self._lanes.items():
            lane.streams.mark().synchronize()
            lane.follow(usual)
            lane.prime()


@dataclass(frozen=True)
class Route:
    """How a block gets to the device that it visits.

    Attributes
    ----------
    lane, index
        What brings it, and its number there.
    bindings
        For each slot of the lane, what puts the slot's views into the block.
    device
        The torch device.
    """

    lane: Lane
    index: int
    bindings: Sequence[Binding]
    device: Any


class VisitingHook(AlignDevicesHook):  # type: ignore[misc]  # accelerate has no types
    """Lets a block compute in RAM, or, in long sweeps, on the device to which a lane brings it.

    Passes that overlap, on several threads, compute in one place: where the first of them does.

    Parameters
    ----------
    tensors, home
        The block's parameters, and what binds them where they stay in RAM.
    visits
        Says whether the sweep is long.
    route
        How the block gets to where it computes then.
    skip_keys
        Arguments that stay where they are (the KV cache).
    """

    def __init__(
        self, tensors: BlockTensors, home: Binding, visits: Visits, route: Route, *, skip_keys: Any = None
    ) -> None:
        import torch

        self._host = torch.device("cpu")
        super().__init__(execution_device=self._host, skip_keys=skip_keys)
        self.is_away = False
        self._tensors, self._home, self._visits, self._route = tensors, home, visits, route
        self._back: Binding = []
        self._layer = layer_index(tensors.module)
        self._users = 0
        self._lock = threading.Lock()
        self._own = threading.local()  # the pass of each thread: its keys and values

    def init_hook(self, module: Any) -> Any:
        """The weights are where they belong."""
        return module

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 (Accelerate's signature)
        """Be where the sweep computes, with the inputs."""
        where = self._route.device if self._starts_away() else self._host
        self._own.layer = find_layer((*args, *kwargs.values()), self._layer)
        take_along(self._own.layer, where)
        return send_to_device(args, where), send_to_device(kwargs, where, skip_keys=self.skip_keys)

    def post_forward(self, module: Any, output: Any) -> Any:  # noqa: ARG002
        """Go home."""
        layer, self._own.layer = self._own.layer, None
        if self.is_away:
            take_along(layer, self._host, non_blocking=True)
            self._ends_away()
        else:
            with self._lock:
                self._users -= 1
        return output

    def detach_hook(self, module: Any) -> Any:
        """The block's store keeps the weights."""
        return module

    def settle(self) -> None:
        """After a forward pass that did not end."""
        with self._lock:
            self._users = 0
            self._go_home()

    def _starts_away(self) -> bool:
        with self._lock:
            if not self._users:
                self.is_away = self._visits.is_on
            self._users += 1
            is_away = self.is_away
        if is_away:
            self._go_away()
        return is_away

    def _go_away(self) -> None:
        try:
            slot = self._route.lane.take(self._route.index)
        except BaseException:
            with self._lock:
                self._users -= 1
            raise
        with self._lock:
            bind(self._route.bindings[slot])
            if not self._back:
                there, self._back = self._tensors.lend_added(self._route.device)
                bind(there)
                self._tensors.move_buffers(self._route.device)

    def _ends_away(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._go_home()
        self._route.lane.release(self._route.index)

    def _go_home(self) -> None:
        if self.is_away:
            self.is_away = False
            bind(self._home)
            bind(self._back)
            self._back = []
            self._tensors.move_buffers(self._host)


class SweepHook(InputHook):
    """On the whole model: brings its inputs, and says when a sweep begins and ends, and how long it is."""

    def __init__(self, device: Any, visits: Visits, skip_keys: Any = None) -> None:
        super().__init__(device, io_same_device=True, skip_keys=skip_keys)
        self._visits = visits

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self._visits.begin(_tokens(*args, **kwargs))
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: Any, output: Any) -> Any:
        self._visits.end()
        return super().post_forward(module, output)


def _tokens(input_ids: Any = None, *_: Any, inputs_embeds: Any = None, **__: Any) -> int:
    """Tokens of all sequences in a call of the model: ids [batch, tokens] or embeddings [batch, tokens, width]."""
    inputs = input_ids if input_ids is not None else inputs_embeds
    return 0 if inputs is None else int(inputs.shape[0] * inputs.shape[1])
