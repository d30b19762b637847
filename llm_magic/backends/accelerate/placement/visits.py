"""Blocks that the CPU computes, on a visit to a GPU: for sweeps of many tokens.

A CPU decodes a token as fast as it reads the weights, but it multiplies slowly: a prompt is read many
times faster by a GPU to which its blocks stream like any others. So in a long sweep a lane brings
them, and a `CacheLane` their keys and values, of which the new ones go back to RAM behind each block. In all other
sweeps they are no part of what the lane brings, and compute where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import send_to_device

from llm_magic.backends.accelerate.layer_cache import find_cache, find_layers, layer_indices
from llm_magic.backends.accelerate.packed.templates import bind
from llm_magic.backends.accelerate.placement.blocks import Binding, BlockTensors
from llm_magic.backends.accelerate.placement.cache_lane import CacheLane
from llm_magic.backends.accelerate.placement.hooks import InputHook
from llm_magic.backends.accelerate.placement.stream import Lane
from llm_magic.backends.accelerate.placement.uninterrupted import uninterrupted


class Visits:
    """Whether the sweep that runs now is a long one, and what its lanes bring.

    Parameters
    ----------
    long_sweep
        Tokens, of all sequences, from which on a sweep is a long one; 0: none is.

    Attributes
    ----------
    is_on
        Whether blocks that begin now compute on their visit.
    """

    def __init__(self, long_sweep: int) -> None:
        self.is_on = False
        self._long_sweep = long_sweep
        self._lanes: dict[Lane, tuple[int, ...]] = {}
        self._caches: list[CacheLane] = []

    def add(self, lane: Lane, usual: Sequence[int], caches: CacheLane) -> None:
        """A lane that brings blocks on visits; ``usual`` are the numbers of those that always travel.

        ``caches`` brings their keys and values.
        """
        self._lanes[lane] = tuple(usual)
        self._caches.append(caches)
        lane.follow(usual)

    def begin(self, tokens: int, cache: Any = None) -> None:
        """A sweep over so many tokens begins, behind those in a KV cache."""
        is_long = 0 < self._long_sweep <= tokens
        if is_long:
            self.is_on = True  # first: then an interrupt in the midst of this is mended by `end`
            for lane, usual in self._lanes.items():
                lane.follow(None, then=usual)
                lane.prime()
            for caches in self._caches:
                caches.prepare(cache, 0)
        else:
            self.end()

    def finish(self) -> None:
        """All blocks have computed: wait until the new keys and values are in RAM, and end it."""
        for caches in self._caches:
            caches.finish()
        self.end()

    def end(self) -> None:
        """It is over, or will never be."""
        if self.is_on:
            for caches in self._caches:
                caches.settle()
            for lane, usual in self._lanes.items():
                lane.follow(usual)
                lane.prime()
            self.is_on = False


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
    caches, visitor
        What brings its keys and values, and its number there.
    """

    lane: Lane
    index: int
    bindings: Sequence[Binding]
    device: Any
    caches: CacheLane
    visitor: int


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

    Attributes
    ----------
    is_away
        Whether the block is on a visit.
    """

    def __init__(
        self, tensors: BlockTensors, home: Binding, visits: Visits, route: Route, *, skip_keys: Any = None
    ) -> None:
        import torch

        self._host = torch.device("cpu")
        super().__init__(execution_device=self._host, skip_keys=skip_keys)
        self.is_away = False
        self._tensors, self._home, self._visits, self._route = tensors, home, visits, route
        self._indices = layer_indices(tensors.module)
        self._at_work: set[int] = set()  # threads
        self._lock = threading.Lock()
        self._own = threading.local()  # the pass of each thread: its keys and values

    def init_hook(self, module: Any) -> Any:
        """The weights are where they belong."""
        return module

    def pre_forward(self, _module: Any, *args: Any, **kwargs: Any) -> Any:
        """Be where the sweep computes, with the inputs."""
        cache = find_cache((*args, *kwargs.values()))
        layers, caches = find_layers(cache, self._indices), self._route.caches
        self._own.stays = []
        if self._starts_away(can_go=layers is not None):
            where = self._route.device
            self._own.stays = [caches.visit(layer) for layer in layers or ()]
            caches.prepare(cache, self._route.visitor + 1)
        else:
            where = self._host
            for layer in layers or ():
                caches.come_home(layer)
        return send_to_device(args, where), send_to_device(kwargs, where, skip_keys=self.skip_keys)

    def post_forward(self, _module: Any, output: Any) -> Any:
        """Go home."""
        for stay in self._own.stays:
            stay.end()
        self._own.stays = []
        self._ends()
        return output

    def detach_hook(self, module: Any) -> Any:
        """The block's store keeps the weights."""
        return module

    def settle(self) -> None:
        """After a forward pass that did not end."""
        with self._lock:
            self._at_work.clear()
            self._go_home()

    def _starts_away(self, *, can_go: bool) -> bool:
        with self._lock:
            if not self._at_work:
                self.is_away = self._visits.is_on and can_go
            self._at_work.add(threading.get_ident())
            is_away = self.is_away
        if is_away:
            slot = self._route.lane.take(self._route.index)
            with self._lock:
                bind(self._route.bindings[slot])
                self._tensors.lend_rest(self._route.device)
        return is_away

    def _ends(self) -> None:
        with self._lock:
            was_away = self.is_away
            self._at_work.discard(threading.get_ident())
            if not self._at_work:
                self._go_home()
        if was_away:
            self._route.lane.release(self._route.index)

    def _go_home(self) -> None:
        if self.is_away:
            with uninterrupted():
                bind(self._home)
                self._tensors.take_rest_back()
                self.is_away = False


class SweepHook(InputHook):
    """On the whole model: brings its inputs, and says when a sweep begins and ends, and how long it is."""

    def __init__(self, device: Any, visits: Visits, skip_keys: Any = None) -> None:
        super().__init__(device, io_same_device=True, skip_keys=skip_keys)
        self._visits = visits

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self._visits.begin(_tokens(*args, **kwargs), find_cache((*args, *kwargs.values())))
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: Any, output: Any) -> Any:
        self._visits.finish()
        return super().post_forward(module, output)


def _tokens(input_ids: Any = None, *_: Any, inputs_embeds: Any = None, **__: Any) -> int:
    """Tokens of all sequences in a call of the model: ids [batch, tokens] or embeddings [batch, tokens, width]."""
    inputs = input_ids if input_ids is not None else inputs_embeds
    return 0 if inputs is None else int(inputs.shape[0] * inputs.shape[1])
