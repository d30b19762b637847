"""The way of every block that travels: from its store, through pinned memory where it must, into slots.

| the block is  | it computes on | way                                              |
|---------------|----------------|--------------------------------------------------|
| in pinned RAM | a GPU          | one copy over the bus                            |
| in other RAM  | a GPU          | a thread copies to a pinned buffer; then the bus |
| on disk       | a GPU          | threads read to a pinned buffer; then the bus    |
| on disk       | the CPU        | threads read into the slot                       |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any

from llm_magic.backends.accelerate.files.extents import FileImage
from llm_magic.backends.accelerate.files.reader import page_buffer
from llm_magic.backends.accelerate.placement.blocks import (
    Binding,
    BlockTensors,
    FileStore,
    RamStore,
    pin,
    unpin,
)
from llm_magic.backends.accelerate.placement.stream import (
    AcceleratorStreams,
    HostStreams,
    Lane,
    RamSource,
    ReadSource,
    Source,
    StagedSource,
    Staging,
    Streams,
)
from llm_magic.planning.costs import slots_for

Traveller = tuple[BlockTensors, RamStore | FileStore]


class DeviceLane:
    """The lane of one device, and the memory that it takes.

    Parameters
    ----------
    device
        Where its blocks compute.
    travellers
        The blocks and their stores, in the order of a sweep.
    slots
        How many blocks may be there at a time.
    streams
        The device's order of copies and computation; by default what suits the device.

    Attributes
    ----------
    lane
        What hooks ask for their blocks.
    slot_bytes, staging_bytes
        Memory it holds on its device and, pinned, in RAM.
    refused_bytes
        What of the latter could not be pinned.
    """

    def __init__(
        self, device: str, travellers: Sequence[Traveller], slots: int, streams: Streams | None = None
    ) -> None:
        self._device = device
        self._streams = streams or make_streams(device)
        self._travellers = list(travellers)
        self._count = min(slots, len(travellers))
        self._pinned: list[Any] = []
        self._copier: ThreadPoolExecutor | None = None
        self.staging_bytes = self.refused_bytes = 0
        size = max(self._bytes_in_slot(*traveller) for traveller in travellers)
        self._slots = [slot_memory(device, size) for _ in range(self._count)]
        self.slot_bytes = size * self._count
        self.lane = Lane(list(self._sources()), self._slots, self._streams)

    def bindings(self, number: int) -> list[Binding]:
        """What puts each slot's views into block ``number``."""
        tensors, store = self._travellers[number]
        image = self._image(store)
        offsets = image.offsets if image else None
        return [tensors.binding(tensors.views(slot, offsets)) for slot in self._slots]

    def close(self) -> None:
        """Wait for what is on its way and give the memory back."""
        self.lane.close()
        if self._copier is not None:
            self._copier.shutdown()
        for buffer in self._pinned:
            unpin(buffer)
        self._pinned.clear()
        self._slots.clear()
        self._travellers.clear()

    def _image(self, store: RamStore | FileStore) -> FileImage | None:
        """What the slot takes of the files as it is; ``None`` where it takes the block flat."""
        return store.image if isinstance(store, FileStore) and self._device == "cpu" else None

    def _bytes_in_slot(self, tensors: BlockTensors, store: RamStore | FileStore) -> int:
        image = self._image(store)
        return image.bytes if image else tensors.bytes

    def _sources(self) -> Iterator[Source]:
        staging: Staging | None = None
        for _, store in self._travellers:
            if isinstance(store, FileStore) and self._image(store):
                yield ReadSource(store.read)
            elif isinstance(store, RamStore) and (store.is_pinned or not self._streams.needs_pinned):
                yield RamSource(store.memory, self._streams)
            else:
                staging = staging or self._staging()
                yield self._staged(store, staging)

    def _staged(self, store: RamStore | FileStore, staging: Staging) -> StagedSource:
        if isinstance(store, FileStore):
            return StagedSource(store.read, store.pairs, staging, self._streams)
        self._copier = self._copier or ThreadPoolExecutor(1, "llm-magic-staging")
        return StagedSource(partial(store.read, self._copier), store.pairs, staging, self._streams)

    def _staging(self) -> Staging:
        """Pinned buffers: one is filled while another is copied from."""
        sizes = [
            store.image.bytes if isinstance(store, FileStore) else tensors.bytes
            for tensors, store in self._travellers
        ]
        buffers = [page_buffer(max(sizes)) for _ in range(min(slots_for("cpu"), self._count))]
        self._pinned += takewhile(pin, buffers)
        self.staging_bytes = max(sizes) * len(buffers)
        self.refused_bytes = max(sizes) * (len(buffers) - len(self._pinned))
        return Staging(buffers)


def make_streams(device: str) -> Streams:
    """The order of copies and computation on a device."""
    return AcceleratorStreams(device) if device.startswith(("cuda", "xpu")) else HostStreams()


def slot_memory(device: str, size: int) -> Any:
    """Room for a block (uint8)."""
    import torch

    if device == "cpu":
        return page_buffer(size).zero_()  # the system hands out pages when they are first written to
    return torch.empty(size, dtype=torch.uint8, device=device)
