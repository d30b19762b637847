"""One block of the model: its tensors as views of one buffer of bytes, and the places that hold them.

A block travels as a whole. Its tensors lie one after the other in a flat buffer, so that it is one
copy, one transfer over the bus, one range of a file. `BlockTensors` knows that order and puts views of
a buffer into the block's modules; a store (`RamStore`, `FileStore`) is a place where the bytes stay
between their uses.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_magic.backends.accelerate.files.extents import Extent, FileImage, file_image
from llm_magic.backends.accelerate.files.reader import FileReader, page_buffer
from llm_magic.backends.accelerate.packed import packing
from llm_magic.backends.accelerate.packed.kinds import Stacked
from llm_magic.backends.accelerate.packed.templates import Assignment, bind
from llm_magic.units import MIB

ALIGNMENT = 256
"""Bytes to which tensors are aligned in a buffer: what device kernels load fastest."""

_PART_BYTES = 64 * MIB  # that are compared at a time

_FOR_ALL_GPUS = 1
"""``cudaHostRegisterPortable``: not for the current device only."""

_registered: dict[int, weakref.finalize[Any, Any]] = {}
"""What is pinned, by its address."""

Binding = list[Assignment]
"""Assignments ``mapping[key] = value`` that put tensors into modules."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a block.

    Attributes
    ----------
    name
        Parameter, relative to the block (``"self_attn.q_proj.weight"``).
    part
        Which tensor of the parameter; empty for the parameter itself (see `packing`).
    dtype, shape
        torch dtype and shape of this tensor.
    bytes, at
        Its size, and where it begins in the block's flat buffer.
    """

    name: str
    part: str
    dtype: Any
    shape: tuple[int, ...]
    bytes: int
    at: int


class BlockTensors:
    """The parameters of a block's module, as pieces of one flat buffer.

    Parameters
    ----------
    module
        The block.
    without
        Parameters that are held elsewhere, by name relative to the block.

    Attributes
    ----------
    pieces
        In the order of the buffer.
    bytes
        Size of the flat buffer.
    """

    def __init__(self, module: Any, without: Collection[str] = ()) -> None:
        self.module = module
        self._lent: list[tuple[dict[str, Any], str, Any, Any]] = []
        owners = {name: _owner(module, name) for name, _ in module.named_parameters()}
        self._known = {(id(owner), leaf) for owner, leaf in owners.values()}
        self._owners = {name: owner for name, owner in owners.items() if name not in without}
        self._templates = {name: packing.template(*owner) for name, owner in self._owners.items()}
        self.pieces = tuple(self._laid_out())
        self.bytes = sum(_aligned(piece.bytes) for piece in self.pieces)
        self._empty = [entry for template in self._templates.values() for entry in template.empty()]

    @property
    def is_plain(self) -> bool:
        """Whether every parameter is its own only tensor, as it is in files."""
        return all(not piece.part for piece in self.pieces)

    @property
    def has_first_shapes(self) -> bool:
        """Whether what is in the module has the shapes that it had at first."""
        found = [(piece, self._owners[piece.name]) for piece in self.pieces if not piece.part]
        return all(tuple(owner._parameters[leaf].shape) == piece.shape for piece, (owner, leaf) in found)

    @property
    def has_order(self) -> bool:
        """Whether some devices want the bytes in an order of their own."""
        return any(packing.has_order(*owner) for owner in self._owners.values())

    def arrange(self, device: Any) -> None:
        """Put what is in the module into the order that ``device`` reads; see `packing.arrange`."""
        for module, leaf in self._owners.values():
            if leaf in module._parameters:  # parts of a stack may have changed with the first of them
                packing.arrange_one(module, leaf, device)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece begins in the flat buffer."""
        return tuple(piece.at for piece in self.pieces)

    def current(self) -> list[Any]:
        """The tensors that are in the module now, in the order of the pieces."""
        found = {name: packing.parts(*owner) for name, owner in self._owners.items()}
        return [found[piece.name][piece.part] for piece in self.pieces]

    def views(self, buffer: Any, offsets: Sequence[int] | None = None) -> list[Any]:
        """The pieces of a buffer (uint8) as tensors; ``offsets`` are those of the flat buffer by default."""
        places = self.offsets if offsets is None else offsets
        return [
            buffer[at : at + piece.bytes].view(piece.dtype).view(piece.shape)
            for piece, at in zip(self.pieces, places, strict=True)
        ]

    def copy_to(self, buffer: Any) -> None:
        """Copy what is in the module now into a flat buffer."""
        for tensor, view in zip(self.current(), self.views(buffer), strict=True):
            view.copy_(tensor)

    def binding(self, tensors: Sequence[Any]) -> Binding:
        """What puts these tensors into the module: made once, assigned in every sweep."""
        by_name: dict[str, dict[str, Any]] = {name: {} for name in self._templates}
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            by_name[piece.name][piece.part] = tensor
        return [
            entry for name, template in self._templates.items() for entry in template.bindings(by_name[name])
        ]

    def bind(self, tensors: Sequence[Any]) -> None:
        """Put these tensors into the module."""
        bind(self.binding(tensors))

    def clear(self) -> None:
        """Leave tensors without bytes in the module."""
        bind(self._empty)

    def share_empty(self, name: str, lender: BlockTensors, module: Any, leaf: str) -> None:
        """Leave, as parameter ``name``, the very one that ``lender`` leaves: so others see what is tied."""
        owner, key = self._owners[name]
        for mapping, lent, value in lender._empty:
            if mapping is module._parameters and lent == leaf:
                self._empty = [
                    (own, k, value if own is owner._parameters and k == key else v)
                    for own, k, v in self._empty
                ]

    def parameter(self, name: str, tensors: Sequence[Any]) -> Any:
        """One parameter, made of the block's tensors, without putting it into the module."""
        parts = {p.part: t for p, t in zip(self.pieces, tensors, strict=True) if p.name == name}
        leaf = name.rpartition(".")[2]
        return next(value for _, key, value in self._templates[name].bindings(parts) if key == leaf)

    def move_rest(self, device: Any, within: str = "") -> None:
        """Put what stays where the block computes there: buffers (rotary tables, counters), adapters.

        Parameters
        ----------
        within
            Only of what is in this module of the block.
        """
        for mapping, leaf, buffer in self._buffers(within):
            if buffer.device != device:
                mapping[leaf] = buffer.to(device)
        for _, _, parameter in self._added(within):
            if parameter.device != device:
                parameter.data = parameter.data.to(device)

    def lend_rest(self, device: Any) -> None:
        """Show the module copies on ``device`` of what stays: buffers and adapters. Twice lends nothing more.

        Others hold adapters by the parameter, to train or to save them: it is not changed.
        """
        import torch

        if self._lent:
            return
        for mapping, leaf, own in (*self._buffers(), *self._added()):
            if own.device != device:
                copy = own.detach().to(device)
                is_parameter = isinstance(own, torch.nn.Parameter)
                lent = torch.nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                self._lent.append((mapping, leaf, own, lent))
                mapping[leaf] = lent

    def take_rest_back(self) -> None:
        """Show the module itself again; a buffer that the module has replaced meanwhile comes along."""
        for mapping, leaf, own, lent in self._lent:
            now = mapping[leaf]
            mapping[leaf] = own if now is lent or now is own else now.to(own.device)
        self._lent.clear()

    def added(self, within: str = "") -> list[Any]:
        """Parameters that came after the block was taken over: those of adapters; or those in one of its modules."""
        return [parameter for _, _, parameter in self._added(within)]

    def packed_anew(self) -> BlockTensors:
        """The same parameters, once their modules hold them in another form."""
        owners = {name: _owner(self.module, name) for name, _ in self.module.named_parameters()}
        mine = {(id(owner), leaf) for owner, leaf in self._owners.values()}
        stacks = {id(owner) for owner, _ in self._owners.values() if isinstance(owner, Stacked)}
        others = {n for n, (o, leaf) in owners.items() if (id(o), leaf) not in mine and id(o) not in stacks}
        fresh = BlockTensors(self.module, without=others)
        fresh._known -= {
            (id(owners[name][0]), owners[name][1]) for name in others if not self._is_known(name)
        }
        return fresh

    def _buffers(self, within: str = "") -> list[tuple[dict[str, Any], str, Any]]:
        found = []
        for name, buffer in _of_module(self.module.named_buffers(), within):
            owner, leaf = _owner(self.module, name)
            found.append((owner._buffers, leaf, buffer))
        return found

    def _added(self, within: str = "") -> list[tuple[dict[str, Any], str, Any]]:
        found = []
        for name, parameter in _of_module(self.module.named_parameters(), within):
            if not self._is_known(name):
                owner, leaf = _owner(self.module, name)
                found.append((owner._parameters, leaf, parameter))
        return found

    def _is_known(self, name: str) -> bool:
        owner, leaf = _owner(self.module, name)
        return (id(owner), leaf) in self._known or isinstance(owner, Stacked)

    def _laid_out(self) -> Iterator[Piece]:
        at = 0
        for name, owner in self._owners.items():
            for part, tensor in packing.parts(*owner).items():
                yield Piece(name, part, tensor.dtype, tuple(tensor.shape), tensor.nbytes, at)
                at += _aligned(tensor.nbytes)


class Store(Protocol):
    """A place where the bytes of a block stay."""

    def tensors(self) -> list[Any]:
        """The block's tensors in RAM, in the order of its pieces."""

    def close(self) -> None:
        """Give the place back."""


class RamStore:
    """A block in RAM, in one flat buffer.

    Parameters
    ----------
    tensors
        The block.
    memory
        Its flat buffer (uint8).
    lender
        The store whose memory it is, when it is another block's: that one pins it and gives it back.
    """

    def __init__(self, tensors: BlockTensors, memory: Any, lender: RamStore | None = None) -> None:
        self._tensors = tensors
        self._lender = lender
        self._is_pinned = False
        self.memory = memory

    @property
    def is_lent(self) -> bool:
        """Whether the memory is another block's."""
        return self._lender is not None

    @property
    def is_pinned(self) -> bool:
        """Whether a device can fetch it by itself."""
        return self._lender.is_pinned if self._lender else self._is_pinned

    def pin(self) -> bool:
        """Lock the buffer in RAM so that a device can fetch it; ``False`` when the system refuses.

        The buffer is registered at its exact size: torch's own pinned allocations are rounded up to
        powers of two.
        """
        if not self.is_pinned and self._lender is None:
            self._is_pinned = pin(self.memory)
        return self.is_pinned

    def unpin(self) -> None:
        """Undo ``pin``: nothing may be on its way from here. Safe to call twice."""
        if self._is_pinned:
            unpin(self.memory)
            self._is_pinned = False

    def tensors(self) -> list[Any]:
        return self._tensors.views(self.memory)

    def read(self, executor: Executor, buffer: Any, before: Callable[[], None] | None) -> Future[None]:
        """Copy the block into a pinned buffer on another thread: for memory that could not be pinned."""

        def copy() -> None:
            if before is not None:
                before()
            buffer[: self.memory.numel()].copy_(self.memory)

        return executor.submit(copy)

    def pairs(self, buffer: Any, slot: Any) -> list[tuple[Any, Any]]:
        """What is copied from such a buffer to a slot."""
        size = self.memory.numel()
        return [(buffer[:size], slot[:size])]

    def close(self) -> None:
        self.unpin()


class FileStore:
    """A block in files: those of the model itself, or one that was written for it.

    Parameters
    ----------
    tensors
        The block.
    extents
        Where each piece is, in the order of the pieces.
    reader
        What reads them.
    """

    def __init__(self, tensors: BlockTensors, extents: Sequence[Extent], reader: FileReader) -> None:
        self._tensors = tensors
        self._reader = reader
        self.extents = tuple(extents)
        self.image: FileImage = file_image(self.extents)

    def read(self, buffer: Any, before: Callable[[], None] | None = None) -> Future[None]:
        """Start to read the files' image into ``buffer``; its views are at ``image.offsets``."""
        return self._reader.read(self.image, buffer, before)

    def pairs(self, buffer: Any, slot: Any) -> list[tuple[Any, Any]]:
        """What is copied from an image to a slot that holds the block flat."""
        return [
            (buffer[at : at + piece.bytes], slot[piece.at : piece.at + piece.bytes])
            for piece, at in zip(self._tensors.pieces, self.image.offsets, strict=True)
        ]

    def tensors(self) -> list[Any]:
        buffer = page_buffer(self.image.bytes)
        self.read(buffer).result()
        return self._tensors.views(buffer, self.image.offsets)

    def close(self) -> None:
        """The files stay: they are the model's own, or go with the offload folder."""


class StoredWeights(Mapping[str, Any]):
    """A block's parameters by name, read from where they are: what other libraries ask a hook for."""

    def __init__(self, tensors: BlockTensors, store: Store) -> None:
        self._tensors = tensors
        self._store = store
        self._names = tuple(dict.fromkeys(piece.name for piece in tensors.pieces))

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors.parameter(name, self._store.tensors())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def flat_buffer(tensors: BlockTensors, device: Any = "cpu") -> Any:
    """A flat buffer (uint8) for a block."""
    import torch

    if str(device) == "cpu":
        return page_buffer(tensors.bytes)[: tensors.bytes]
    return torch.empty(tensors.bytes, dtype=torch.uint8, device=device)


def write_block(tensors: BlockTensors, values: Sequence[Any], path: Path) -> list[Extent]:
    """Write a block's tensors, in the order of its pieces, to a new file with mode 0600.

    Raises
    ------
    OSError
        When it cannot be written; what was written of it is gone then.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, stat.S_IRUSR | stat.S_IWUSR), "wb") as file:
        try:
            for piece, value in zip(tensors.pieces, values, strict=True):
                file.seek(piece.at)
                file.write(raw(value.cpu()).numpy().data)
            file.truncate(tensors.bytes)
        except BaseException:
            path.unlink()
            raise
    return [Extent(path, piece.at, piece.bytes) for piece in tensors.pieces]


def is_equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two lists of tensors hold the same bytes; a part of them comes to RAM at a time."""
    return all(_are_equal(raw(a), raw(b)) for a, b in zip(first, second, strict=True))


def _are_equal(first: Any, second: Any) -> bool:
    import torch

    if first.numel() != second.numel():
        return False
    pairs = zip(first.split(_PART_BYTES), second.split(_PART_BYTES), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def raw(tensor: Any) -> Any:
    """The bytes of a tensor (uint8, flat); copied when it is not contiguous."""
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8)


def pin(memory: Any) -> bool:
    """Register RAM with CUDA, for all GPUs; ``False`` when it refuses, or there is no CUDA.

    Memory that goes without ``unpin`` is unregistered then: the system could not have it back.

    Parameters
    ----------
    memory
        The beginning of a `page_buffer`, whose pages nothing else is on.
    """
    import torch

    if not memory.numel() or not torch.cuda.is_available():
        return False
    cuda: Any = torch.cuda
    address = memory.data_ptr()
    if int(cuda.cudart().cudaHostRegister(address, memory.numel(), _FOR_ALL_GPUS)):
        _forget_refusal()
        return False
    _show_to_children(address, memory.numel(), is_so=False)
    _registered[address] = weakref.finalize(memory, _unregister, address, memory.numel())
    _registered[address].atexit = False
    return True


def unpin(memory: Any) -> None:
    """Undo ``pin``. Safe to call twice."""
    finalizer = _registered.get(memory.data_ptr())
    if finalizer is not None:
        finalizer()


def _unregister(address: int, size: int) -> None:
    import torch

    del _registered[address]
    cuda: Any = torch.cuda
    if int(cuda.cudart().cudaHostUnregister(address)):
        _forget_refusal()
    _show_to_children(address, size, is_so=True)


def _show_to_children(address: int, size: int, *, is_so: bool) -> None:
    """Whether a process that is forked gets these pages. A system that cannot choose gives them.

    Of pinned pages it would get copies, all of them at once, as often as somebody runs ``!command`` in a
    cell; and WSL may leave the GPU the old ones once either process writes. Without them a child that
    reads such a tensor crashes: CUDA would not let it compute anyway.
    """
    advice = getattr(mmap, "MADV_DOFORK" if is_so else "MADV_DONTFORK", None)
    if advice is not None:  # Linux
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def _forget_refusal() -> None:
    """What CUDA refused stays its last error, which would be reported with the next kernel: run one for it."""
    import torch

    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _of_module(named: Iterable[tuple[str, Any]], within: str) -> Iterator[tuple[str, Any]]:
    """Of these tensors by name those of an inner module, or all of them."""
    return ((name, tensor) for name, tensor in named if not within or name.startswith(f"{within}."))


def _owner(module: Any, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
