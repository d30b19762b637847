"""Where blocks have their bytes: in their modules, in RAM, in the model's own files, or in files that are written.

A block comes from wherever it is. What files hold is not written again, and not copied where it can be mapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.files.extents import Extent
from llm_magic.backends.accelerate.files.mapped import MappedFiles
from llm_magic.backends.accelerate.files.offload_folder import OffloadFolder
from llm_magic.backends.accelerate.files.open_file import OpenFile
from llm_magic.backends.accelerate.files.reader import FileReader, choose_direct
from llm_magic.backends.accelerate.placement.blocks import (
    BlockTensors,
    FileStore,
    Piece,
    RamStore,
    flat_buffer,
    is_equal,
    write_block,
)
from llm_magic.backends.accelerate.placement.checkpoint import Checkpoint
from llm_magic.backends.accelerate.placement.placed_block import PlacedBlock, PlacedBlocks, kind_of
from llm_magic.errors import EngineError
from llm_magic.plan import Placement, Plan


class Homes:
    """What brings blocks to their places.

    Parameters
    ----------
    placed
        The blocks, as far as they were taken over.
    checkpoint
        Where the parameters of the model are in its files.
    files
        The weight files that it was loaded from, and those of ``extents``.
    are_some_lent
        Whether it is packed, but for parameters whose bytes these files hold.
    folder
        What loading has written to, if it has.
    offload_parent
        Where such a folder is to be made; ``""`` for the usual place.

    Attributes
    ----------
    offload_parent
        That.
    mapped
        Files as memory.
    pins_no_more
        Whether the system has refused to pin a block.
    """

    def __init__(
        self,
        placed: PlacedBlocks,
        checkpoint: Checkpoint,
        files: Sequence[Path],
        *,
        are_some_lent: bool,
        folder: OffloadFolder | None,
        offload_parent: str,
    ) -> None:
        self._placed, self._checkpoint, self._files = placed, checkpoint, files
        self._are_some_lent = are_some_lent
        self._opened = [OpenFile(path, direct=False) for path in files]
        self._folder, self.offload_parent = folder, offload_parent
        self.mapped = MappedFiles()
        self.pins_no_more = False

    def check_files(self, plan: Plan) -> None:
        """Refuse to go on with blocks in files that changed: what is mapped would be gone, or another's.

        A block in RAM may be mapped, too: safetensors does not copy what it loads there.

        Raises
        ------
        EngineError
            With the file.
        """
        are_lent = any(block.is_lent_by_files for block in self._placed.blocks.values())
        if are_lent or any(place.home == "disk" for place in plan.placements):
            used = self._used_files() if self._are_some_lent else set(self._files)
            for file in self._opened:
                if file.path in used:
                    file.check_unchanged()

    def _used_files(self) -> set[Path]:
        """Those that any block is in."""
        return {
            extent.path
            for part in self._placed.parts()
            if part.file is not None
            for extent in part.file.extents
        }

    def take_from_disk(self, block: PlacedBlock, extents: Mapping[str, Extent], loader: Any) -> None:
        """Find the block's bytes in the files; write them when no file has them as they are needed."""
        names = [f"{block.name}.{piece.name}" for piece in block.tensors.pieces]
        if all(name in extents for name in names):
            block.file = FileStore(block.tensors, [extents[name] for name in names], self.reader)
        else:
            block.file = self._written(block, [loader[name] for name in names])

    def may_be_mapped(self, block: PlacedBlock) -> bool:
        """Whether a block that was just loaded is in RAM in the dtype of the files: it is not copied then."""
        tensors = block.tensors.current() if block.store is None else []
        return any(t.device.type == "cpu" and t.dtype in self._checkpoint.dtypes for t in tensors)

    def put(self, block: PlacedBlock, place: Placement, *, mapped: bool) -> None:
        """Bring a block's bytes to where ``place`` wants them, from wherever they are.

        ``mapped``: what the CPU computes from the disk is in mapped files.
        """
        block.move_rest(place)
        if block.tensors.pieces:
            self._rearrange(block, place)
            old = block.store
            self._hold(block, place, mapped=mapped)
            if place.home != block.place.home:
                block.is_lent_by_files = False
            if old is not None and old is not block.store:
                old.close()
        block.place = place

    def _hold(self, block: PlacedBlock, place: Placement, *, mapped: bool) -> None:
        if block.file is not None and block.place.is_looked_up:  # it may go as a whole now
            self.mapped.at_random(block.file.extents, is_so=False)
        if place.home == "disk" and block.file is None:
            block.file = self._file_of(block)
        is_bound = place.way in ("resident", "cpu", "looked-up", "idle") or (
            place.compute == "cpu" and (place.kept or mapped)
        )
        if is_bound and block.is_borrowed:
            block.store = None  # `PlacedBlock.borrow` shows it the other block's, once that one has them
        elif place.way == "streamed" or place.kept or place.prefill:
            self._hold_in_ram(block, place)
        elif _is_held(place):
            self._hold_in_module(block, place)
        elif is_bound:
            block.tensors.bind(self._map(block))
            block.store = None
            if place.is_looked_up and block.file is not None:
                self.mapped.at_random(block.file.extents, is_so=True)
        else:
            block.store = block.file
            block.tensors.clear()

    def _rearrange(self, block: PlacedBlock, place: Placement) -> None:
        """Packed weights lie in the order that the kernels of their device read."""
        import torch

        kind = kind_of(place)
        if block.ordered_for == kind or not block.tensors.has_order:
            return
        held = block.held()
        if block.store is not None or any(tensor.device.type == "cpu" for tensor in held):
            held = [
                tensor.clone() for tensor in held
            ]  # what it is in closes; a GPU, which may be full, stays
        block.tensors.bind(held)
        if block.store is not None:
            block.store.close()
        self._drop_written(block)
        block.store = block.file = None
        try:
            block.tensors.arrange(torch.device(place.modules_on))
        except BaseException:
            block.tensors.bind(held)  # no half of it in the other order
            raise
        block.tensors, block.ordered_for = block.tensors.packed_anew(), kind

    def _drop_written(self, block: PlacedBlock) -> None:
        """Delete a file that was written for the block: it holds another order."""
        for path in {extent.path for extent in block.file.extents} if block.file is not None else ():
            if self._folder is not None and path.parent == self._folder.path:
                self.reader.forget(path)
                self.mapped.forget(path)
                with suppress(OSError):  # Windows keeps what somebody has open; it goes with the folder
                    path.unlink()

    def _hold_in_module(self, block: PlacedBlock, place: Placement) -> None:
        """Put the tensors into the module, for good."""
        import torch

        device = torch.device(place.home)
        tensors = block.held()
        is_there = block.store is None and _is_held(block.place)
        if is_there and all(tensor.device == device for tensor in tensors):
            return
        if not (isinstance(block.store, RamStore) and device.type == "cpu"):
            tensors = _copied(block.tensors, tensors, flat_buffer(block.tensors, device))
        block.tensors.bind(tensors)
        block.store = None

    def _hold_in_ram(self, block: PlacedBlock, place: Placement) -> None:
        """Keep the bytes in one buffer in RAM: to be fetched from there, or to compute with."""
        fetched = place.prefill or place.compute != "cpu"
        if not isinstance(block.store, RamStore):
            block.store = self._lent(block) or self._copied_to_ram(block, pinned=bool(fetched))
        elif fetched:
            self.pin(block.store)
        if place.compute == "cpu":
            block.tensors.bind(block.store.tensors())
        else:
            block.tensors.clear()

    def _copied_to_ram(self, block: PlacedBlock, *, pinned: bool) -> RamStore:
        store = RamStore(block.tensors, flat_buffer(block.tensors))
        try:
            if pinned:
                self.pin(store)  # before the copy: a GPU writes several times faster to pinned memory
            _copied(block.tensors, block.held(), store.memory)
        except BaseException:
            store.close()
            raise
        return store

    def pin(self, store: RamStore) -> None:
        """Pin a block, unless the system has refused one already: to be refused takes a while."""
        if not store.is_lent and not self.pins_no_more:
            self.pins_no_more = not store.pin()

    def _lent(self, block: PlacedBlock) -> RamStore | None:
        """A tied tensor is in RAM once: as a part of its owner's buffer."""
        if not block.is_borrowed or len(block.tensors.pieces) > 1:
            return None
        ((lender, leaf),) = block.shared.values()
        for owner in self._placed.blocks.values():
            for piece in owner.tensors.pieces:
                path, _, name = piece.name.rpartition(".")
                is_it = name == leaf and owner.module.get_submodule(path) is lender
                if is_it and isinstance(owner.store, RamStore):
                    memory = owner.store.memory[piece.at : piece.at + piece.bytes]
                    return RamStore(block.tensors, memory, owner.store)
        return None

    def without_a_copy(self, block: PlacedBlock) -> list[Any]:
        """The tensors of a block that travels: in RAM, or in a mapped file."""
        return block.store.tensors() if isinstance(block.store, RamStore) else self._map(block)

    def _map(self, block: PlacedBlock) -> list[Any]:
        assert block.file is not None
        return self._views(block.file, block.tensors.pieces)

    def _views(self, file: FileStore, pieces: Sequence[Piece]) -> list[Any]:
        """A block's tensors in the page cache."""
        places = zip(pieces, file.extents, strict=True)
        return [self.mapped.tensor(extent, piece.dtype, piece.shape) for piece, extent in places]

    def _file_of(self, block: PlacedBlock) -> FileStore:
        """Where the block's bytes are on disk: in the model's own files, or in one that is written now."""
        extents = self._checkpoint.extents()
        names = [f"{block.name}.{piece.name}" for piece in block.tensors.pieces]
        held = block.held()
        if block.tensors.is_plain and all(name in extents for name in names):
            file = FileStore(block.tensors, [extents[name] for name in names], self.reader)
            if self._may_lend() and is_equal(self._views(file, block.tensors.pieces), held):
                return file
        return self._written(block, held)

    def _may_lend(self) -> bool:
        """Whether the files are those that a packed model was loaded from: it may have done without them until now."""
        if not self._are_some_lent:
            return True
        try:
            for file in self._opened:
                file.check_unchanged()
        except EngineError:
            return False
        return all(path.is_file() for path in self._files)

    def _written(self, block: PlacedBlock, values: list[Any]) -> FileStore:
        if self._folder is None:
            self._folder = OffloadFolder(self.offload_parent)
        path = self._folder.new_file(block.name)
        return FileStore(block.tensors, write_block(block.tensors, values, path), self.reader)

    @cached_property
    def reader(self) -> FileReader:
        """What reads blocks from files."""
        here = [path for path in self._files if path.is_file()]  # of a packed model they may be gone
        largest = max(here, key=lambda path: path.stat().st_size, default=None)
        return FileReader(direct=largest is not None and choose_direct(largest))

    def close(self) -> None:
        """Close all files, and remove what was written."""
        if "reader" in self.__dict__:
            self.reader.close()
        self.mapped.close()
        for file in self._opened:
            file.close()
        if self._folder is not None:
            self._folder.remove()
        del self._checkpoint  # it has the model


def _is_held(place: Placement) -> bool:
    """Whether a block's modules have its tensors for good, in a memory of its home."""
    return place.way in ("resident", "cpu") or (place.way in ("looked-up", "idle") and place.home != "disk")


def _copied(tensors: BlockTensors, values: Sequence[Any], buffer: Any) -> list[Any]:
    """The values in another buffer."""
    views = tensors.views(buffer)
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    return views
