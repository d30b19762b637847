"""A block of a loaded model, or its experts: where it is, and what holds its bytes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_magic.backends.accelerate.placement.blocks import BlockTensors, FileStore, RamStore
from llm_magic.plan import Placement


@dataclass
class PlacedBlock:
    """A block or its experts, where they are, and what holds their bytes there.

    Attributes
    ----------
    place
        Where it is now: of a block that is split, where this part is.
    module, tensors
        Its module, and the module's parameters.
    shared
        Parameters that are another block's: name -> (that block's module, name there).
    store
        What holds the bytes of a block that travels, or the copy in RAM of one on disk; ``None``
        when its module holds them.
    file
        Where the bytes are in files, as far as that is known.
    ordered_for
        Kind of the device whose kernels read packed weights as they lie.
    within
        Of experts, their modules in the block.
    is_lent_by_files
        Whether its tensors may be pages of the model's own files, as they were loaded.
    planned
        Where the plan has the block; `place` but for one that is split.
    """

    place: Placement
    module: Any
    tensors: BlockTensors
    shared: Mapping[str, tuple[Any, str]]
    store: RamStore | FileStore | None = None
    file: FileStore | None = None
    ordered_for: str = ""
    within: tuple[str, ...] = ("",)
    is_lent_by_files: bool = False
    planned: Placement = field(init=False)

    def __post_init__(self) -> None:
        self.ordered_for = self.ordered_for or kind_of(self.place)
        self.planned = self.place

    @property
    def name(self) -> str:
        """Module path, a key of the device map."""
        return self.place.block.name

    @property
    def is_borrowed(self) -> bool:
        """Whether all of its parameters are another block's (a tied head)."""
        return bool(self.shared) and all(piece.name in self.shared for piece in self.tensors.pieces)

    @property
    def travels(self) -> bool:
        """Whether its modules hold no weights between two uses."""
        stays = self.place.compute == "cpu" and (self.place.kept or self.place.prefill)
        return self.store is not None and not stays

    @property
    def visits(self) -> bool:
        """Whether it computes in RAM, and elsewhere in long sweeps."""
        return bool(self.place.prefill) and self.store is not None

    @property
    def is_empty(self) -> bool:
        """Whether its module has no numbers."""
        return any(tensor.is_meta for tensor in self.tensors.current())

    def held(self) -> list[Any]:
        """Its tensors, wherever they are now."""
        if self.store is not None:
            return self.store.tensors()
        if self.file is not None and self.is_empty:
            return self.file.tensors()
        return self.tensors.current()

    def borrow(self) -> None:
        """Show another block's parameters, which are in their module by now."""
        for name, (lender, leaf) in self.shared.items():
            path, _, key = name.rpartition(".")
            self.module.get_submodule(path)._parameters[key] = lender._parameters[leaf]

    def move_rest(self, place: Placement) -> None:
        """What is no weight goes along; with the experts only what is theirs."""
        import torch

        for name in self.within:
            self.tensors.move_rest(torch.device(place.modules_on), name)


@dataclass(frozen=True)
class PlacedBlocks:
    """The blocks of a model.

    Attributes
    ----------
    blocks
        By name, in model order; without the experts that are routed to one by one.
    experts
        Those experts, by the name of their block.
    """

    blocks: dict[str, PlacedBlock] = field(default_factory=dict)
    experts: dict[str, PlacedBlock] = field(default_factory=dict)

    def parts_of(self, name: str) -> list[PlacedBlock]:
        """A block, and its experts where they are routed to."""
        return [parts[name] for parts in (self.blocks, self.experts) if name in parts]

    def parts(self) -> list[PlacedBlock]:
        """All blocks, and all experts after them."""
        return [*self.blocks.values(), *self.experts.values()]

    def block_after_block(self) -> list[PlacedBlock]:
        """All of them, experts behind their block."""
        return [part for name in self.blocks for part in self.parts_of(name)]


def kind_of(place: Placement) -> str:
    """The kind of the device where a block's modules are."""
    return place.modules_on.partition(":")[0]
