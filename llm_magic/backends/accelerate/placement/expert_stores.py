"""Where the experts of one layer stay, and the way of a single one of them into a slot.

transformers keeps the experts of a layer in stacks: parameters whose first dimension counts experts.
An expert is the same entry of every stack. It lies in one piece in each of them, so it can be copied,
or read from a file that has the stacks in the model's own order, without touching the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from llm_magic.backends.accelerate.experts.stacks import Stack
from llm_magic.backends.accelerate.files.extents import Extent, FileImage, file_image
from llm_magic.backends.accelerate.placement.stream import Arrival, Mark, ReadSource, Source, StagedSource

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.files.reader import FileReader
    from llm_magic.backends.accelerate.placement.stream import Staging, Streams

_ALIGNMENT = 256  # what device kernels load fastest


class ExpertStore(Protocol):
    """The experts of one layer, in the place where they stay.

    Attributes
    ----------
    experts
        How many there are.
    expert_bytes
        What moves when one of them is fetched.
    slot_bytes
        Room that one of them takes in a slot.
    """

    experts: int
    expert_bytes: int
    slot_bytes: int

    def source(self, index: int) -> Source:
        """What brings an expert into a slot."""

    def views(self, index: int, slot: Any) -> tuple[Any, ...]:
        """The expert's tensors in the slot that it was brought to, in the order of the stacks."""


class RamExperts:
    """Experts in RAM, on their way to an accelerator.

    Parameters
    ----------
    stacks
        What they are made of.
    tensors
        The stacks in RAM, contiguous; pinned, unless ``staging`` is given.
    streams
        The device's order of copies and computation.
    staging, executor
        For memory that is not pinned: a ring of pinned buffers of `flat_bytes` each, and a thread
        that copies into them.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        tensors: Sequence[Any],
        streams: Streams,
        staging: Staging | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._stacks, self._tensors, self._streams = tuple(stacks), tuple(tensors), streams
        self._staging, self._executor = staging, executor
        self._offsets = _offsets(stacks)
        self.experts = _count(stacks)
        self.expert_bytes = _bytes(stacks)
        self.slot_bytes = flat_bytes(stacks)

    def source(self, index: int) -> Source:
        if self._staging is None:
            return Copied(self._streams, partial(self._pairs, index))
        return StagedSource(partial(self._read, index), self._flat_pair, self._staging, self._streams)

    def views(self, _index: int, slot: Any) -> tuple[Any, ...]:
        return _views(self._stacks, slot, self._offsets)

    def _pairs(self, index: int, slot: Any) -> list[tuple[Any, Any]]:
        views = _views(self._stacks, slot, self._offsets)
        return [(tensor[index], view) for tensor, view in zip(self._tensors, views, strict=True)]

    def _flat_pair(self, buffer: Any, slot: Any) -> list[tuple[Any, Any]]:
        return [(buffer[: self.slot_bytes], slot[: self.slot_bytes])]

    def _read(self, index: int, buffer: Any, before: Callable[[], object] | None) -> Future[None]:
        def copy() -> None:
            if before is not None:
                before()
            for entry, view in self._pairs(index, buffer):
                view.copy_(entry)

        assert self._executor is not None
        return self._executor.submit(copy)


class FileExperts:
    """Experts in files that hold the stacks as the model does.

    Parameters
    ----------
    stacks
        What they are made of.
    images
        Where each expert is; see `expert_images`.
    reader
        What reads them.
    staging, streams
        For an accelerator: a ring of pinned buffers that take any of the images, and its order of
        copies and computation. Without them threads read straight into the slots, which are in RAM then.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        images: Sequence[FileImage],
        reader: FileReader,
        staging: Staging | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._stacks, self._reader = tuple(stacks), reader
        self._staging, self._streams = staging, streams
        self._offsets = _offsets(stacks)
        self._images = images
        self.experts = _count(stacks)
        self.expert_bytes = _bytes(stacks)
        in_place = max(image.bytes for image in images)
        self.slot_bytes = in_place if staging is None else flat_bytes(stacks)

    def source(self, index: int) -> Source:
        read = partial(self._reader.read, self._images[index])
        if self._staging is None:
            return ReadSource(read)
        assert self._streams is not None
        return StagedSource(read, partial(self._pairs, index), self._staging, self._streams)

    def views(self, index: int, slot: Any) -> tuple[Any, ...]:
        in_place = self._staging is None
        return _views(self._stacks, slot, self._images[index].offsets if in_place else self._offsets)

    def _pairs(self, index: int, buffer: Any, slot: Any) -> list[tuple[Any, Any]]:
        size = [stack.bytes_per_expert for stack in self._stacks]
        places = zip(self._images[index].offsets, self._offsets, size, strict=True)
        return [(buffer[read : read + count], slot[at : at + count]) for read, at, count in places]


@dataclass(frozen=True)
class Copied:
    """Copies that need nothing before them."""

    streams: Streams
    pairs: Callable[[Any], Sequence[tuple[Any, Any]]]

    def start(self, slot: Any, after: Mark | None) -> Arrival:
        return self.streams.copy(self.pairs(slot), after)


def expert_extents(stacks: Sequence[Stack], extents: Sequence[Extent], index: int) -> list[Extent]:
    """Where one expert is in the files that hold the stacks."""
    return [
        Extent(extent.path, extent.offset + index * stack.bytes_per_expert, stack.bytes_per_expert)
        for stack, extent in zip(stacks, extents, strict=True)
    ]


def expert_images(stacks: Sequence[Stack], extents: Sequence[Extent]) -> list[FileImage]:
    """How each expert will lie in the buffer that it is read into."""
    return [file_image(expert_extents(stacks, extents, index)) for index in range(_count(stacks))]


def _views(stacks: Sequence[Stack], memory: Any, offsets: Sequence[int]) -> tuple[Any, ...]:
    return tuple(stack.view(memory, at) for stack, at in zip(stacks, offsets, strict=True))


def _offsets(stacks: Sequence[Stack]) -> tuple[int, ...]:
    """Where each entry begins in a slot that holds them one after the other."""
    places = [0]
    for stack in stacks:
        places.append(places[-1] + _aligned(stack.bytes_per_expert))
    return tuple(places[:-1])


def flat_bytes(stacks: Sequence[Stack]) -> int:
    """Room for one expert whose tensors lie one after the other."""
    return sum(_aligned(stack.bytes_per_expert) for stack in stacks)


def _bytes(stacks: Sequence[Stack]) -> int:
    return sum(stack.bytes_per_expert for stack in stacks)


def _count(stacks: Sequence[Stack]) -> int:
    """Experts that have an entry in every stack."""
    return min(stack.experts for stack in stacks)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
