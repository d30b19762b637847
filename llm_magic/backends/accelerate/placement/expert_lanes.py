"""The way of all experts that travel to one device: the stores they stay in, the cache they come to.

| the experts are | they compute on | way of a routed one                              |
|-----------------|-----------------|--------------------------------------------------|
| in pinned RAM   | a GPU           | one copy over the bus for each of its tensors    |
| in other RAM    | a GPU           | a thread copies to a pinned buffer; then the bus |
| on disk         | a GPU           | threads read to a pinned buffer; then the bus    |
| on disk         | the CPU         | threads read into the slot                       |

Experts that are in RAM or mapped and compute on the CPU do not travel: nothing is needed for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

from llm_magic.backends.accelerate.experts.stacks import Stack, find_stacks
from llm_magic.backends.accelerate.files.extents import FileImage
from llm_magic.backends.accelerate.files.reader import FileReader, page_buffer
from llm_magic.backends.accelerate.placement.blocks import BlockTensors, FileStore, RamStore, pin, unpin
from llm_magic.backends.accelerate.placement.expert_cache import ExpertCache
from llm_magic.backends.accelerate.placement.expert_runs import ExpertRuns, InRam
from llm_magic.backends.accelerate.placement.expert_stores import (
    ExpertStore,
    FileExperts,
    RamExperts,
    expert_images,
    flat_bytes,
)
from llm_magic.backends.accelerate.placement.lanes import make_streams, slot_memory
from llm_magic.backends.accelerate.placement.routed_experts import RoutedExperts, Visitor
from llm_magic.backends.accelerate.placement.stream import Staging, Streams, Watch

LEAST_SLOTS = 2
"""One expert computes while the next one comes."""

_BUFFERS = 8  # experts on their way through pinned memory at a time: they are small, and a disk wants several

ExpertTraveller = tuple[BlockTensors, RamStore | FileStore, Visitor | None]
"""The stacks of one block's experts, and nothing else of it; where they are; their block, if it visits only."""


@dataclass(frozen=True)
class _Module:
    """The experts of one module, and where their stacks are."""

    module: Any
    stacks: tuple[Stack, ...]
    pieces: tuple[int, ...]
    store: RamStore | FileStore
    images: Sequence[FileImage]
    visitor: Visitor | None

    @property
    def bytes_on_the_way(self) -> int:
        """Size of a buffer that takes any of the experts."""
        return max((image.bytes for image in self.images), default=flat_bytes(self.stacks))


class DeviceExperts:
    """The experts of the blocks that travel to one device, and the memory that they take there.

    Parameters
    ----------
    device
        Where they compute.
    travellers
        The experts of each block and their stores, in the order of a sweep.
    budget_bytes
        Room for the cache; at least `LEAST_SLOTS` experts are held, and no more than there are.
    reader
        What reads those on disk.
    streams
        The device's order of copies and computation; by default what suits the device, with a
        stream of its own: an expert is needed at once and must not queue behind the next blocks.

    Attributes
    ----------
    cache
        What holds them, and counts what was fetched.
    runs
        What brings all of them for long prompts; ``None`` where that is no quicker.
    staging_bytes
        Memory it takes in RAM, pinned.
    refused_bytes
        What of the latter could not be pinned.
    """

    def __init__(
        self,
        device: str,
        travellers: Sequence[ExpertTraveller],
        budget_bytes: int,
        reader: FileReader,
        streams: Streams | None = None,
    ) -> None:
        self._device, self._reader = device, reader
        self._streams = streams or make_streams(device)
        self._pinned: list[Any] = []
        self._copier: ThreadPoolExecutor | None = None
        self.staging_bytes = self.refused_bytes = 0
        self._modules = [module for traveller in travellers for module in _modules(*traveller)]
        stores = [self._store(module) for module in self._modules]
        slot_bytes = max(store.slot_bytes for store in stores)
        try:
            self.runs = self._make_runs(budget_bytes - LEAST_SLOTS * slot_bytes)
            left = budget_bytes - (self.runs.bytes if self.runs else 0)
            count = min(left // slot_bytes, sum(store.experts for store in stores))
            self._cache_bytes = max(count, LEAST_SLOTS) * slot_bytes
            room = slot_memory(device, self._cache_bytes)[: self._cache_bytes]
        except BaseException:
            self._unpin()
            raise
        self.cache = ExpertCache(room, slot_bytes, self._streams)
        self._routed = [
            RoutedExperts(module.module, store, self.cache, module.visitor)
            for module, store in zip(self._modules, stores, strict=True)
        ]
        for routed, module in zip(self._routed, self._modules, strict=True):
            if self.runs is not None and (twin := self.runs.twin(module.module)) is not None:
                routed.come_in_runs(twin)
        for routed, following in pairwise(self._routed):
            routed.is_followed_by(following)

    @property
    def device_bytes(self) -> int:
        """Memory it takes on its device."""
        return self._cache_bytes + (self.runs.bytes if self.runs else 0)

    def watch(self, watch: Watch | None) -> None:
        """Tell ``watch`` of every wait for experts from now on; ``None``: nobody."""
        self.cache.watch = watch
        if self.runs is not None:
            self.runs.lane.watch = watch

    def settle(self) -> None:
        """After forward passes that did not end."""
        self.cache.settle()
        if self.runs is not None:
            self.runs.settle()

    def close(self) -> None:
        """Leave the modules as they were, wait for what is on its way, and give the memory back."""
        for routed in self._routed:
            routed.detach()
        self.cache.close()
        if self.runs is not None:
            self.runs.close()
            self.runs = None
        if self._copier is not None:
            self._copier.shutdown()
        self._unpin()
        self._routed.clear()
        self._modules.clear()

    def _make_runs(self, room: int) -> ExpertRuns | None:
        """What brings small packed experts in runs, of half the room at most: the other half is for hot ones."""
        found = [
            InRam(module.module, module.stacks, [module.store.tensors()[piece] for piece in module.pieces])
            for module in self._modules
            if isinstance(module.store, RamStore) and module.store.is_pinned and self._device != "cpu"
        ]
        found = [held for held in found if held.are_small]
        are_for_prompts = all(module.visitor is not None for module in self._modules)
        room = room if are_for_prompts else room // 2
        if not found or room < ExpertRuns.least_room(found):
            return None
        return ExpertRuns(self._device, found, room, self._streams)

    def _unpin(self) -> None:
        while self._pinned:
            unpin(self._pinned.pop())
        self.__dict__.pop("_staging", None)

    def _store(self, module: _Module) -> ExpertStore:
        if isinstance(module.store, FileStore):
            through = () if self._device == "cpu" else (self._staging, self._streams)
            return FileExperts(module.stacks, module.images, self._reader, *through)
        held = module.store.tensors()
        tensors = [held[number] for number in module.pieces]
        if module.store.is_pinned or self._device == "cpu":
            return RamExperts(module.stacks, tensors, self._streams)
        self._copier = self._copier or ThreadPoolExecutor(1, "llm-magic-experts")
        return RamExperts(module.stacks, tensors, self._streams, self._staging, self._copier)

    @cached_property
    def _staging(self) -> Staging:
        """Pinned buffers for all that cannot go straight to the device."""
        size = max(module.bytes_on_the_way for module in self._modules)
        buffers = [page_buffer(size) for _ in range(_BUFFERS)]
        self._pinned += takewhile(pin, buffers)
        self.staging_bytes = size * len(buffers)
        self.refused_bytes = size * (len(buffers) - len(self._pinned))
        return Staging(buffers)


def _modules(
    tensors: BlockTensors, store: RamStore | FileStore, visitor: Visitor | None
) -> Iterator[_Module]:
    places = {piece.name: number for number, piece in enumerate(tensors.pieces)}
    found = find_stacks(tensors.module)
    for name in dict.fromkeys(stack.module_name for stack in found):
        stacks = tuple(stack for stack in found if stack.module_name == name)
        pieces = tuple(places[stack.name] for stack in stacks)
        images: Sequence[FileImage] = ()
        if isinstance(store, FileStore):
            images = expert_images(stacks, [store.extents[number] for number in pieces])
        yield _Module(tensors.module.get_submodule(name), stacks, pieces, store, images, visitor)
