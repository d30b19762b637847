"""A loaded model with every block where its plan says, and the moving of blocks while it stays loaded.

transformers and Accelerate load the model; then this takes over what they offloaded. Accelerate's
hooks inside of blocks go, and each block that must travel gets one hook that lets a `Lane` bring it.
``hf_device_map`` stays what it was: the truth that other libraries can read.
"""

from __future__ import annotations

import weakref
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.placement import adapters, hooks, saving
from llm_magic.backends.accelerate.placement.blocks import (
    BlockTensors,
    FileStore,
    Piece,
    RamStore,
    StoredWeights,
    flat_buffer,
    is_equal,
    write_block,
)
from llm_magic.backends.accelerate.placement.cache_lane import CacheLane
from llm_magic.backends.accelerate.placement.checkpoint import Checkpoint
from llm_magic.backends.accelerate.placement.cpu_experts import CpuExperts, Rows
from llm_magic.backends.accelerate.placement.expert_lanes import DeviceExperts, ExpertTraveller
from llm_magic.backends.accelerate.placement.experts import advise_routed, find_stacks
from llm_magic.backends.accelerate.placement.extents import Extent
from llm_magic.backends.accelerate.placement.lanes import DeviceLane, Traveller, make_streams
from llm_magic.backends.accelerate.placement.layer_cache import layer_indices
from llm_magic.backends.accelerate.placement.lookups import Tables
from llm_magic.backends.accelerate.placement.mapped import MappedFiles
from llm_magic.backends.accelerate.placement.model_device import models_in, show_device
from llm_magic.backends.accelerate.placement.offload_folder import OffloadFolder, disk_error
from llm_magic.backends.accelerate.placement.open_file import OpenFile
from llm_magic.backends.accelerate.placement.read_rows import ShownRow, read_rows
from llm_magic.backends.accelerate.placement.reader import FileReader, choose_direct
from llm_magic.backends.accelerate.placement.stream import Watch
from llm_magic.backends.accelerate.placement.uninterrupted import uninterrupted
from llm_magic.backends.accelerate.placement.visits import Route, SweepHook, VisitingHook, Visits
from llm_magic.errors import EngineError, PlanError
from llm_magic.plan import Placement, Plan
from llm_magic.planning.costs import cache_piece_bytes, slots_for
from llm_magic.units import MIB

Moved = Mapping[tuple[str, str], int]
"""(source, target) -> bytes."""

Report = Callable[[int, int, str], None]
"""Blocks done, blocks in all, label of the next one."""

Owners = dict[int, tuple[Callable[[], Any], Any, str]]
"""``id`` of a parameter -> a weak reference to it, its module, and its name there."""

Fill = Callable[[Placement, Any], None]
"""Gives a block's module its weights."""

_AHEAD = 2  # mapped blocks that the system is asked for while one computes

_SPARE_PINNED_BYTES = 64 * MIB  # that CUDA's own calls find where there is a quota


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
        self.ordered_for = self.ordered_for or _kind(self.place)
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


class PlacedModel:
    """The blocks of a loaded model, and what brings those that travel.

    Parameters
    ----------
    model
        A model that was loaded and dispatched as ``plan`` says.
    plan
        Where everything is.
    files
        The weight files that it was loaded from; none when the model holds other bytes than they do.
    extents
        Parameters that hold bytes of files all the same, by name.
    folder
        What loading has written to, if it has.
    fill
        Gives the modules of a block their weights, block after block: for weights that are made while
        they are placed (packed ones). Without it they are where Accelerate has put them.
    streams
        Device -> its order of copies and computation; what suits the device by default.
    slots
        Device -> how many blocks that travel have room there at a time.

    Attributes
    ----------
    plan
        Where everything is now.
    blocks
        By name, in model order; without the experts that are routed to one by one.
    experts
        Those experts, by the name of their block.
    visits
        Tells whether the sweep that runs takes the CPU's blocks to a GPU.
    tables
        What makes tables work that are not where they compute.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        files: Sequence[Path] = (),
        folder: OffloadFolder | None = None,
        *,
        extents: Mapping[str, Extent] | None = None,
        fill: Fill | None = None,
        streams: Callable[[str], Any] = lambda _device: None,
        slots: Callable[[str], int] = slots_for,
    ) -> None:
        self.model = model
        self.plan = plan
        lent, self._are_some_lent = (extent.path for extent in (extents or {}).values()), bool(extents)
        self._files = tuple(dict.fromkeys((*files, *lent)))
        self._opened = [OpenFile(path, direct=False) for path in self._files]
        self._folder = folder
        self._streams, self._slots = streams, slots
        self._checkpoint = Checkpoint(model, files, extents)
        self._mapped = MappedFiles()
        self._lanes: dict[str, DeviceLane] = {}
        self._cache_lanes: dict[str, CacheLane] = {}
        self._expert_lanes: dict[str, DeviceExperts] = {}
        self._cpu_experts: dict[str, list[CpuExperts]] = {}
        self._stream_hooks: list[hooks.StreamHook] = []
        self._visiting_hooks: dict[str, VisitingHook] = {}
        self.tables = Tables()
        self._advice: list[Any] = []
        self._shown_rows: list[ShownRow] = []
        self._usual_experts: dict[str, str | None] | None = None
        self._skip_keys = getattr(model, "_skip_keys_device_placement", None)
        self._pins_no_more = False
        self.blocks: dict[str, PlacedBlock] = {}
        self.experts: dict[str, PlacedBlock] = {}
        self._take_over(fill)
        self._attach()
        adapters.let_in(model, weakref.WeakMethod(self.weights_shown))
        if plan.layout.quantization:
            layout = plan.layout
            methods = layout.quantization, layout.expert_quantization, layout.head_quantization
            saving.let_save(model, methods, weakref.WeakMethod(self.weights_shown))

    @property
    def lanes(self) -> list[Any]:
        """What brings the blocks that travel, one for each device."""
        return [lane.lane for lane in self._lanes.values()]

    @property
    def travels(self) -> bool:
        """Whether blocks move in every sweep."""
        return any(block.travels for block in self.blocks.values())

    def memory(self) -> dict[str, Counter[str]]:
        """Device -> ``"weights"``, ``"kept"`` or ``"slots"`` -> bytes."""
        held: dict[str, Counter[str]] = defaultdict(Counter)
        for block in self.blocks.values():
            place = block.planned
            held[place.home]["weights"] += place.home_bytes
            held[place.compute]["weights"] += place.rest_bytes
            if place.kept:
                held["cpu"]["kept"] += place.home_bytes
        for device, lane in self._lanes.items():
            held[device]["slots"] += lane.slot_bytes
            held["cpu"]["slots"] += lane.staging_bytes
        for caches in self._cache_lanes.values():
            held["cpu"]["slots"] += caches.staging_bytes
        for device, experts in self._expert_lanes.items():
            held[device]["slots"] += experts.device_bytes
            held["cpu"]["slots"] += experts.staging_bytes
        return held

    def beyond_plan(self) -> dict[str, int]:
        """Device -> bytes that experts, and keys and values ahead of their blocks, have there of what the plan leaves spare."""
        planned = {use.device: use.slots for use in self.plan.uses}
        held = {device: experts.device_bytes for device, experts in self._expert_lanes.items()}
        for device in held:
            held[device] += self._lanes[device].slot_bytes if device in self._lanes else 0
        beyond = {device: max(0, size - planned.get(device, 0)) for device, size in held.items()}
        ahead = {device: caches.bytes_ahead for device, caches in self._cache_lanes.items()}
        return {device: beyond.get(device, 0) + ahead.get(device, 0) for device in beyond | ahead}

    def apply(self, plan: Plan, report: Report = lambda *_: None) -> Moved:
        """Move the blocks that ``plan`` places elsewhere.

        Parameters
        ----------
        report
            Called before each block and after the last one; what it raises undoes the moves.

        Raises
        ------
        PlanError
            When the disk is full or cannot be written, or a block has other shapes than it was loaded with.
        BaseException
            What went wrong, or was raised by ``report``; every block is back in its place then.
        """
        changed = [place for place in plan.placements if self._is_elsewhere(place, plan)]
        self._refuse_other_shapes({place.block.name for place in changed})
        before = {place.block.name: self.blocks[place.block.name].planned for place in changed}
        # To the slowest first: that makes room.
        changed.sort(key=lambda place: _turn(before[place.block.name], place))
        done: list[str] = []
        before_plan = self.plan
        try:
            self._detach()
            for number, place in enumerate(changed):
                report(number, len(changed), place.block.label)
                done.append(place.block.name)
                self._put_parts(place.block.name, place, plan)
            report(len(changed), len(changed), "")
            with uninterrupted():
                self._attach(plan)
                self.plan = plan
        except BaseException as error:
            with uninterrupted():
                self._put_back([before[name] for name in reversed(done)], before_plan)
            full = disk_error(error, self._offload_parent) if isinstance(error, OSError) else None
            if full is not None:
                raise full from None
            raise
        return _moved(before, changed)

    def _refuse_other_shapes(self, moving: Collection[str]) -> None:
        """Refuse to bring back, from a file or a buffer, what somebody gave another shape meanwhile.

        As ``resize_token_embeddings`` does; what stays in its module keeps it.
        """
        modules = {id(module) for module in self.model.modules()}
        for name, block in self.blocks.items():
            is_concerned = name in moving or block.store is not None or block.place.home == "disk"
            is_as_loaded = id(block.module) in modules and block.tensors.has_first_shapes
            if is_concerned and not is_as_loaded:
                raise PlanError(
                    f"{block.place.block.label} has another shape than it was loaded with, and cannot be moved.",
                    "Save the model and its tokenizer (llm.model.save_pretrained(FOLDER)), and load that.",
                )

    def check_files(self) -> None:
        """Refuse to go on with blocks in files that changed: what is mapped would be gone, or another's.

        A block in RAM may be mapped, too: safetensors does not copy what it loads there.

        Raises
        ------
        EngineError
            With the file.
        """
        are_lent = any(block.is_lent_by_files for block in self.blocks.values())
        if are_lent or any(place.home == "disk" for place in self.plan.placements):
            used = self._used_files() if self._are_some_lent else set(self._files)
            for file in self._opened:
                if file.path in used:
                    file.check_unchanged()

    def _used_files(self) -> set[Path]:
        """Those that any block is in."""
        parts = (*self.blocks.values(), *self.experts.values())
        return {extent.path for part in parts if part.file is not None for extent in part.file.extents}

    def watch(self, watch: Watch | None) -> None:
        """Tell ``watch`` of every wait for weights from now on; ``None``: nobody."""
        for lane in self.lanes:
            lane.watch = watch
        for caches in self._cache_lanes.values():
            caches.watch = watch
        for experts in self._expert_lanes.values():
            experts.watch(watch)

    @contextmanager
    def weights_shown(self) -> Iterator[None]:
        """Between sweeps, have all weights in their modules without a copy, in RAM or in mapped files.

        What is added to the model meanwhile is for where its block computes; so says the device map.
        """
        parts = [part for part in (*self.blocks.values(), *self.experts.values()) if part.travels]
        tables = [b for b in self.blocks.values() if b.place.is_looked_up]
        looked_up = [(table.tensors, table.tensors.current()) for table in tables]
        homes = self.model.hf_device_map
        self.tables.detach()  # no adapter takes a copy of what looks up rows
        try:
            computing = {place.block.name: place.modules_on for place in self.plan.placements}
            self.model.hf_device_map = accelerate_device_map(computing)
            for part in parts:
                part.tensors.bind(self._without_a_copy(part))
            yield
        finally:
            with uninterrupted():
                self.model.hf_device_map = homes
                for part in parts:
                    part.tensors.clear()
                # To load an adapter, transformers takes the tables where the map says.
                for tensors, held in looked_up:
                    tensors.bind(held)
                self.place_added()

    def place_added(self) -> None:
        """Take what was added to blocks, as adapters are, to where they compute.

        Raises
        ------
        EngineError
            When it has no bytes.
        """
        try:
            for block in self.blocks.values():
                adapters.check_not_lost(block.tensors.added())
            for name in self.blocks:
                for part in self._parts(name):
                    self._move_rest(part, part.place)
        finally:
            self._attach_tables()

    def settle(self) -> None:
        """Make the next forward pass right after one that did not end."""
        with uninterrupted():
            self._settle_hooks()
            for lane in self.lanes:
                lane.settle()
            for caches in self._cache_lanes.values():
                caches.settle()
            self.visits.end()
            for experts in self._expert_lanes.values():
                experts.settle()

    def close(self) -> None:
        """Give everything back; the model is of no use any more."""
        self._detach()
        hooks.strip(self.model)
        for block in (*self.blocks.values(), *self.experts.values()):
            block.tensors.clear()
            if block.store is not None:
                block.store.close()
        self.blocks.clear()
        self.experts.clear()
        if "_reader" in self.__dict__:
            self._reader.close()
        self._mapped.close()
        for file in self._opened:
            file.close()
        if self._folder is not None:
            self._folder.remove()
        del self.model, self._checkpoint

    # Taking over what was loaded

    def _take_over(self, fill: Fill | None) -> None:
        modules = dict(self.model.named_modules())
        loader = hooks.weights_loader(self.model)
        extents = self._checkpoint.extents(getattr(loader, "index", None) or {})
        owners: Owners = {}
        # A bare parameter is no module, and stays behind Accelerate's own hook.
        found = [(p, modules[p.block.name]) for p in self.plan.placements if p.block.name in modules]
        found = [(place, module) for place, module in found if place.block.name]
        for _, module in found:
            hooks.strip(module)
        hooks.tie_again(self.model)
        for place, module in found:
            if fill is not None:
                fill(place, module)
            found_stacks = find_stacks(module)
            stacks = {stack.name for stack in found_stacks}
            tensors = BlockTensors(module, without=stacks)
            shared = _shared(module, owners)
            for name, (lender, leaf) in shared.items():
                for other in self.blocks.values():
                    tensors.share_empty(name, other.tensors, lender, leaf)
            self.blocks[place.block.name] = PlacedBlock(place, module, tensors, shared)
            if stacks:
                rest = {name for name, _ in module.named_parameters()} - stacks
                experts = PlacedBlock(place, module, BlockTensors(module, rest), {})
                experts.within = tuple(dict.fromkeys(stack.module_name for stack in found_stacks))
                self.experts[place.block.name] = experts
            for part in self._parts(place.block.name):
                if place.home == "disk" and part.tensors.pieces and _is_empty(part):
                    self._take_from_disk(part, extents, loader)
            self._put_parts(place.block.name, place, self.plan)
            block = self.blocks[place.block.name]
            block.is_lent_by_files = fill is None and self._may_be_mapped(block)
            hooks.drop_loaded(loader, place.block.name)

    def _may_be_mapped(self, block: PlacedBlock) -> bool:
        """Whether a block that was just loaded is in RAM in the dtype of the files: it is not copied then."""
        tensors = block.tensors.current() if block.store is None else []
        return any(t.device.type == "cpu" and t.dtype in self._checkpoint.dtypes for t in tensors)

    def _take_from_disk(self, block: PlacedBlock, extents: Mapping[str, Extent], loader: Any) -> None:
        """Find the block's bytes in the files; write them when no file has them as they are needed."""
        names = [f"{block.name}.{piece.name}" for piece in block.tensors.pieces]
        if all(name in extents for name in names):
            block.file = FileStore(block.tensors, [extents[name] for name in names], self._reader)
        else:
            block.file = self._written(block, [loader[name] for name in names])

    # Putting one block somewhere

    @property
    def _offload_parent(self) -> str:
        return self.plan.options.get("offload_folder", "")

    def _put_back(self, places: Sequence[Placement], plan: Plan) -> None:
        """Undo moves away from ``plan``."""
        self.plan = plan
        self._detach()
        for place in sorted(places, key=lambda place: self.blocks[place.block.name].is_borrowed):
            self._put_parts(place.block.name, place, plan)  # lenders first
        self._attach()

    def _is_elsewhere(self, place: Placement, plan: Plan) -> bool:
        block = self.blocks.get(place.block.name)
        if block is None:
            return False
        now = block.planned
        same = replace(now, block=place.block) == place
        return not same or (place.way == "read" and plan.mapped != self.plan.mapped)

    def _parts(self, name: str) -> list[PlacedBlock]:
        """A block, and its experts where they are routed to."""
        return [parts[name] for parts in (self.blocks, self.experts) if name in parts]

    def _put_parts(self, name: str, place: Placement, plan: Plan) -> None:
        parts = self._parts(name)
        # Experts that leave a GPU make room for what stays there.
        for part in reversed(parts) if place.is_split else parts:
            self._put(part, self._place_of(part, place), plan)
        for part in parts:
            part.planned = place
        if place.is_split:
            self._move_rest(parts[-1], parts[-1].place)  # the first one has taken all of the block along

    def _place_of(self, part: PlacedBlock, place: Placement) -> Placement:
        """Where a part of a block is: those of a split one are like blocks of their own."""
        if not place.is_split:
            return place
        if part is self.experts.get(place.block.name):
            return replace(place, compute="cpu", is_split=False)
        return replace(place, home=place.compute, kept=False, prefill="", is_split=False)

    def _put(self, block: PlacedBlock, place: Placement, plan: Plan) -> None:
        """Bring a block's bytes to where ``place`` wants them, from wherever they are."""
        self._move_rest(block, place)
        if block.tensors.pieces:
            self._rearrange(block, place)
            old = block.store
            self._hold(block, place, plan)
            if place.home != block.place.home:
                block.is_lent_by_files = False
            if old is not None and old is not block.store:
                old.close()
        block.place = place

    def _move_rest(self, block: PlacedBlock, place: Placement) -> None:
        """What is no weight goes along; with the experts only what is theirs."""
        import torch

        for name in block.within:
            block.tensors.move_rest(torch.device(place.modules_on), name)

    def _hold(self, block: PlacedBlock, place: Placement, plan: Plan) -> None:
        if block.file is not None and block.place.is_looked_up:  # it may go as a whole now
            self._mapped.at_random(block.file.extents, is_so=False)
        if place.home == "disk" and block.file is None:
            block.file = self._file_of(block)
        is_bound = place.way in ("resident", "cpu", "looked-up", "idle") or (
            place.compute == "cpu" and (place.kept or plan.mapped)
        )
        if is_bound and block.is_borrowed:
            block.store = None  # `_attach` shows it the other block's, once that one has them
        elif place.way == "streamed" or place.kept or place.prefill:
            self._hold_in_ram(block, place)
        elif _is_held(place):
            self._hold_in_module(block, place)
        elif is_bound:
            block.tensors.bind(self._map(block))
            block.store = None
            if place.is_looked_up and block.file is not None:
                self._mapped.at_random(block.file.extents, is_so=True)
        else:
            block.store = block.file
            block.tensors.clear()

    def _rearrange(self, block: PlacedBlock, place: Placement) -> None:
        """Packed weights lie in the order that the kernels of their device read."""
        import torch

        kind = _kind(place)
        if block.ordered_for == kind or not block.tensors.has_order:
            return
        held = self._held(block)
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
                self._reader.forget(path)
                self._mapped.forget(path)
                with suppress(OSError):  # Windows keeps what somebody has open; it goes with the folder
                    path.unlink()

    def _borrow(self, block: PlacedBlock) -> None:
        """Show another block's parameters, which are in their module by now."""
        for name, (lender, leaf) in block.shared.items():
            path, _, key = name.rpartition(".")
            block.module.get_submodule(path)._parameters[key] = lender._parameters[leaf]

    def _hold_in_module(self, block: PlacedBlock, place: Placement) -> None:
        """Put the tensors into the module, for good."""
        import torch

        device = torch.device(place.home)
        tensors = self._held(block)
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
            self._pin(block.store)
        if place.compute == "cpu":
            block.tensors.bind(block.store.tensors())
        else:
            block.tensors.clear()

    def _copied_to_ram(self, block: PlacedBlock, *, pinned: bool) -> RamStore:
        store = RamStore(block.tensors, flat_buffer(block.tensors))
        try:
            if pinned:
                self._pin(store)  # before the copy: a GPU writes several times faster to pinned memory
            _copied(block.tensors, self._held(block), store.memory)
        except BaseException:
            store.close()
            raise
        return store

    def _pin(self, store: RamStore) -> None:
        """Pin a block, unless the system has refused one already: to be refused takes a while."""
        if not store.is_lent and not self._pins_no_more:
            self._pins_no_more = not store.pin()

    def _lent(self, block: PlacedBlock) -> RamStore | None:
        """A tied tensor is in RAM once: as a part of its owner's buffer."""
        if not block.is_borrowed or len(block.tensors.pieces) > 1:
            return None
        ((lender, leaf),) = block.shared.values()
        for owner in self.blocks.values():
            for piece in owner.tensors.pieces:
                path, _, name = piece.name.rpartition(".")
                is_it = name == leaf and owner.module.get_submodule(path) is lender
                if is_it and isinstance(owner.store, RamStore):
                    memory = owner.store.memory[piece.at : piece.at + piece.bytes]
                    return RamStore(block.tensors, memory, owner.store)
        return None

    def _held(self, block: PlacedBlock) -> list[Any]:
        """The block's tensors, wherever they are now."""
        if block.store is not None:
            return block.store.tensors()
        if block.file is not None and _is_empty(block):
            return block.file.tensors()
        return block.tensors.current()

    def _without_a_copy(self, block: PlacedBlock) -> list[Any]:
        """The tensors of a block that travels: in RAM, or in a mapped file."""
        return block.store.tensors() if isinstance(block.store, RamStore) else self._map(block)

    def _map(self, block: PlacedBlock) -> list[Any]:
        assert block.file is not None
        return self._views(block.file, block.tensors.pieces)

    def _views(self, file: FileStore, pieces: Sequence[Piece]) -> list[Any]:
        """A block's tensors in the page cache."""
        places = zip(pieces, file.extents, strict=True)
        return [self._mapped.tensor(extent, piece.dtype, piece.shape) for piece, extent in places]

    def _file_of(self, block: PlacedBlock) -> FileStore:
        """Where the block's bytes are on disk: in the model's own files, or in one that is written now."""
        extents = self._checkpoint.extents()
        names = [f"{block.name}.{piece.name}" for piece in block.tensors.pieces]
        held = self._held(block)
        if block.tensors.is_plain and all(name in extents for name in names):
            file = FileStore(block.tensors, [extents[name] for name in names], self._reader)
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
            self._folder = OffloadFolder(self._offload_parent)
        path = self._folder.new_file(block.name)
        return FileStore(block.tensors, write_block(block.tensors, values, path), self._reader)

    @cached_property
    def _reader(self) -> FileReader:
        here = [path for path in self._files if path.is_file()]  # of a packed model they may be gone
        largest = max(here, key=lambda path: path.stat().st_size, default=None)
        return FileReader(direct=largest is not None and choose_direct(largest))

    # Lanes and hooks

    def _detach(self) -> None:
        for handles in self._advice:
            while handles:
                handles.pop().remove()
        self._advice.clear()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        for caches in self._cache_lanes.values():
            caches.close()
        self._cache_lanes.clear()
        for experts in self._expert_lanes.values():
            experts.close()
        self._expert_lanes.clear()
        for each in self._cpu_experts.values():
            while each:
                each.pop().detach()
        self._cpu_experts.clear()
        self._settle_hooks()
        self._stream_hooks.clear()
        self._visiting_hooks.clear()
        for block in self.blocks.values():
            hooks.detach(block.module)
        self.tables.detach()
        while self._shown_rows:
            self._shown_rows.pop().detach()

    def _settle_hooks(self) -> None:
        for stream_hook in self._stream_hooks:
            stream_hook.settle()
        for visiting_hook in self._visiting_hooks.values():
            visiting_hook.settle()

    def _attach(self, plan: Plan | None = None) -> None:
        """Let blocks travel, from pinned memory as far as the system gives it: staging has its share first."""
        for part in (part for name in self.blocks for part in self._parts(name)):
            fetched = bool(part.place.prefill) or part.place.compute != "cpu"
            if fetched and isinstance(part.store, RamStore):
                self._pin(part.store)  # others may have made room for it
        self._attach_all(plan)
        while stores := self._in_the_way():
            self._detach()
            for store in stores:
                store.unpin()
            self._attach_all(plan)

    def _in_the_way(self) -> list[RamStore]:
        """The last blocks that are pinned, as many as have taken the room of staging, and of what CUDA itself pins.

        Whatever is not pinned goes through staging, which is several times slower when it is not either.
        """
        lanes: list[DeviceLane | CacheLane | DeviceExperts] = [*self._lanes.values()]
        lanes += [*self._cache_lanes.values(), *self._expert_lanes.values()]
        staging, was_refused = sum(lane.refused_bytes for lane in lanes), self._pins_no_more
        self._pins_no_more = False
        wanted = staging + _SPARE_PINNED_BYTES if staging or was_refused else 0
        found: list[RamStore] = []
        for part in (part for name in reversed(self.blocks) for part in self._parts(name)):
            store = part.store
            if wanted > 0 and isinstance(store, RamStore) and store.is_pinned and not store.is_lent:
                found.append(store)
                wanted -= store.memory.numel()
        return found

    def _attach_all(self, plan: Plan | None) -> None:
        """One hook for each block that needs one, and a lane for each device to which blocks travel."""
        travellers: dict[str, list[PlacedBlock]] = defaultdict(list)
        running = [block.place for block in self.blocks.values() if not block.place.block.is_idle]
        devices = {name for place in running for name in (place.compute, place.prefill) if name}
        for block in self.blocks.values():
            if block.is_borrowed and block.store is None:
                self._borrow(block)
            if block.travels:
                travellers[block.place.compute].append(block)
            elif block.visits:
                travellers[block.place.prefill].append(block)
            elif block.place.is_looked_up:
                continue
            elif block.place.block.is_idle and devices != {block.place.modules_on}:
                # For whoever calls it by hand.
                hooks.align_both_ways(block.module, block.place.modules_on, self._skip_keys)
            elif len(devices) > 1:
                hooks.align_inputs(block.module, block.place.compute, self._skip_keys)
        self.visits = Visits((plan or self.plan).long_sweep)
        for device, blocks in travellers.items():
            self._attach_lane(device, blocks, plan or self.plan, align=len(devices) > 1)
        self._attach_experts(plan or self.plan)
        self._let_caches_go_ahead(plan or self.plan)
        self._place_bare(plan or self.plan)
        self._attach_tables()
        self._show_rows()
        self._attach_model(devices)
        self._advise()
        self.model.hf_device_map = _running_first((plan or self.plan).device_map, str(self.model.device))

    def _attach_tables(self) -> None:
        tables = [(block.place, block.module) for block in self.blocks.values()]
        self.tables.attach(self.model, tables, self._skip_keys)

    def _show_rows(self) -> None:
        """Let the model find rows that it reads beside calling an embedding, wherever the weight is then."""
        for name, reader, index in self._read_rows:
            block = self.blocks.get(name)
            if block is None or not (block.travels or block.visits or block.place.is_looked_up):
                continue
            held = self._without_a_copy(block) if block.travels else block.tensors.current()
            row = block.tensors.parameter("weight", held)[index : index + 1].detach().clone()
            self._shown_rows.append(ShownRow(reader, block.module, row, block.place.compute))

    @cached_property
    def _read_rows(self) -> list[tuple[str, Any, int]]:
        return list(read_rows(self.model))

    def _place_bare(self, plan: Plan) -> None:
        """Parameters and buffers between the modules go where the plan computes with them; no hook brings them."""
        import torch

        for place in plan.placements:
            if place.block.name in self.blocks:
                continue
            path, _, leaf = place.block.name.rpartition(".")
            owner, device = self.model.get_submodule(path), torch.device(place.modules_on)
            for held in (owner._buffers, owner._parameters):
                tensor = held.get(leaf)
                if tensor is not None and not tensor.is_meta and tensor.device != device:
                    tensor.data = tensor.data.to(device)

    def _attach_model(self, devices: Collection[str]) -> None:
        running = {name: b.place.compute for name, b in self.blocks.items() if not b.place.block.is_idle}
        first = next(iter(running.values()), next(iter(self.blocks.values())).place.compute)
        show_device(self.model, first)
        for path, inner in models_in(self.model):
            device = next((device for name, device in running.items() if name.startswith(f"{path}.")), "")
            if device:
                show_device(inner, device)
        hooks.detach(self.model)
        if any(part.visits for part in (*self.blocks.values(), *self.experts.values())):
            hooks.attach(self.model, SweepHook(first, self.visits, self._skip_keys))
        elif devices != {"cpu"}:
            hooks.align_both_ways(self.model, first, self._skip_keys)

    def _attach_lane(self, device: str, blocks: list[PlacedBlock], plan: Plan, *, align: bool) -> None:
        travellers: list[Traveller] = [(b.tensors, b.store) for b in blocks if b.store is not None]
        lane = DeviceLane(device, travellers, self._slots(device), self._streams(device))
        self._lanes[device] = lane
        visitors = [block for block in blocks if block.visits]
        if visitors:
            caches = self._cache_lanes[device] = self._cache_lane(device, visitors, plan)
            usual = [number for number, block in enumerate(blocks) if block.travels]
            self.visits.add(lane.lane, usual, caches)
        order = {block.name: number for number, block in enumerate(visitors)}
        for number, (block, (tensors, _)) in enumerate(zip(blocks, travellers, strict=True)):
            if block.visits:
                self._attach_visitor(device, block, lane, number, order[block.name])
                continue
            hook = hooks.StreamHook(
                tensors,
                self._stored(block.name),
                lane.lane,
                number,
                lane.bindings(number),
                execution_device=device,
                align=align,
                skip_keys=self._skip_keys,
            )
            self._stream_hooks.append(hook)
            hooks.attach(block.module, hook)
        lane.lane.prime()

    def _cache_lane(self, device: str, visitors: Sequence[PlacedBlock], plan: Plan) -> CacheLane:
        """What brings the keys and values of these blocks to a device."""
        import torch

        workload = plan.workload
        return CacheLane(
            torch.device(device),
            [layer_indices(block.module) for block in visitors],
            cache_piece_bytes((block.place.block for block in visitors), workload),
            lambda: self._streams(device) or make_streams(device),
            workload.context_length,
        )

    def _let_caches_go_ahead(self, plan: Plan) -> None:
        """Keys and values may come before their block does where the plan leaves the room spare for a second layer's."""
        taken = self.beyond_plan()
        for use in plan.uses:
            caches = self._cache_lanes.get(use.device)
            visitors = [place.block for place in plan.placements if place.prefill == use.device]
            size = max(map(plan.workload.cache_bytes, visitors), default=0) if len(visitors) > 1 else 0
            if caches is not None and size <= use.spare - taken.get(use.device, 0):
                caches.let_go_ahead(size)

    def _attach_visitor(
        self, device: str, block: PlacedBlock, lane: DeviceLane, number: int, visitor: int
    ) -> None:
        import torch

        assert block.store is not None
        there = torch.device(device)
        hook = VisitingHook(
            block.tensors,
            block.tensors.binding(block.store.tensors()),
            self.visits,
            Route(lane.lane, number, lane.bindings(number), there, self._cache_lanes[device], visitor),
            skip_keys=self._skip_keys,
        )
        self._visiting_hooks[block.name] = hook
        hooks.attach(block.module, hook)

    def _stored(self, name: str) -> Mapping[str, Any]:
        """A travelling block's parameters by name, those of its experts too."""
        parts = [part for part in self._parts(name) if part.store is not None]
        return ChainMap(*(StoredWeights(part.tensors, part.store) for part in parts))  # type: ignore[arg-type]

    def _attach_experts(self, plan: Plan) -> None:
        """Routed experts come one by one, to the room that the plan has for slots or leaves spare.

        Those that come for prompts alone leave that to the prompts: a longer pass fetches them less often.
        """
        travellers: dict[str, list[ExpertTraveller]] = defaultdict(list)
        self._attach_cpu_experts()
        for part in self.experts.values():
            if part.travels and part.store is not None:
                travellers[part.place.compute].append((part.tensors, part.store, None))
            elif part.visits and part.store is not None:
                visitor = self._visiting_hooks.get(part.name) or self._cpu_experts[part.name][0]
                travellers[part.place.prefill].append((part.tensors, part.store, visitor))
            elif part.place.way == "read" and part.file is not None:
                self._advise_experts(part, part.file)
        for device, experts in travellers.items():
            is_hot = any(visitor is None for _, _, visitor in experts)
            room = self._room_for_experts(device, plan, with_spare=is_hot)
            streams = self._streams(device)
            self._expert_lanes[device] = DeviceExperts(device, experts, room, self._reader, streams)
        self._choose_implementation(travellers)

    def _attach_cpu_experts(self) -> None:
        """Tokens come to the experts of blocks that are split."""
        rows: dict[str, Rows] = defaultdict(Rows)
        for part in self.experts.values():
            if part.planned.is_split:
                for name in part.within:
                    adapters.check_not_apart(part.tensors.added(name))
                self._cpu_experts[part.name] = [
                    CpuExperts(part.module.get_submodule(name), self.visits, rows[part.planned.compute])
                    for name in part.within
                ]

    def _choose_implementation(self, travellers: Collection[str]) -> None:
        """As the routed ones compute: then a token does not depend on where its experts are.

        Once none of them travels, as before: the implementation that takes one after the other waits for the host.
        """
        if travellers and self._usual_experts is None:
            self._usual_experts = self.model.get_experts_implementation()
            self.model.set_experts_implementation("eager")
        elif not travellers and self._usual_experts is not None:
            self.model.set_experts_implementation(self._usual_experts)
            self._usual_experts = None

    def _room_for_experts(self, device: str, plan: Plan, *, with_spare: bool) -> int:
        """Bytes that the plan has for slots, or leaves spare, and the lane does not take."""
        lane = self._lanes.get(device)
        use = next((use for use in plan.uses if use.device == device), None)
        room = (use.slots + max(0, use.spare) * with_spare) if use else 0
        return max(0, room - (lane.slot_bytes if lane else 0))

    def _advise_experts(self, part: PlacedBlock, file: FileStore) -> None:
        """Ask the system for the experts that tokens are routed to; it never reads the others."""
        extents = dict(zip((piece.name for piece in part.tensors.pieces), file.extents, strict=True))
        stacks = find_stacks(part.module)
        for name in dict.fromkeys(stack.module_name for stack in stacks):
            own = [stack for stack in stacks if stack.module_name == name]
            places = [extents[stack.name] for stack in own]
            experts = part.module.get_submodule(name)
            self._advice.append([advise_routed(experts, own, places, self._mapped.will_need)])

    def _advise(self) -> None:
        """Ask the system for mapped blocks before they are used, in the first sweep; then it has them."""
        mapped = [block for block in self.blocks.values() if block.place.way == "read" and not block.travels]
        for number, block in enumerate(mapped):
            following = mapped[number + 1 : number + 1 + _AHEAD]
            extents = [extent for b in following if b.file is not None for extent in b.file.extents]
            handles: list[Any] = []

            def advise(_module: Any, _inputs: Any, handles: Any = handles, extents: Any = extents) -> None:
                while handles:
                    handles.pop().remove()
                self._mapped.will_need(extents)

            handles.append(block.module.register_forward_pre_hook(advise))
            self._advice.append(handles)


_TIERS = {"disk": 0, "cpu": 1}


def _kind(place: Placement) -> str:
    """The kind of the device where the block's modules are."""
    return place.modules_on.partition(":")[0]


def _is_held(place: Placement) -> bool:
    """Whether a block's modules have its tensors for good, in a memory of its home."""
    return place.way in ("resident", "cpu") or (place.way in ("looked-up", "idle") and place.home != "disk")


def _running_first(device_map: Mapping[str, str], device: str) -> dict[str, int | str]:
    """The map with a block of the device where input goes as its first one: pipelines take that for the model's."""
    by_device = sorted(device_map.items(), key=lambda entry: entry[1] != device)
    return accelerate_device_map(dict(by_device))


def accelerate_device_map(device_map: Mapping[str, str]) -> dict[str, int | str]:
    """Accelerate's form of a device map: ``"cuda:1"`` becomes ``1``, other names stay."""
    return {
        name: int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device
        for name, device in device_map.items()
    }


def _shared(module: Any, owners: Owners) -> dict[str, tuple[Any, str]]:
    """The module's parameters that an earlier block has too; the others become its own."""
    found = {}
    for name, parameter in module.named_parameters():
        path, _, leaf = name.rpartition(".")
        known, owner, key = owners.get(id(parameter), (None, None, ""))
        if known is not None and known() is parameter:  # numbers of what is gone are given again
            found[name] = (owner, key)
        else:
            owners[id(parameter)] = (weakref.ref(parameter), module.get_submodule(path), leaf)
    return found


def _is_empty(block: PlacedBlock) -> bool:
    return any(tensor.is_meta for tensor in block.tensors.current())


def _copied(tensors: BlockTensors, values: Sequence[Any], buffer: Any) -> list[Any]:
    """The values in another buffer."""
    views = tensors.views(buffer)
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    return views


def _moved(before: Mapping[str, Placement], after: Sequence[Placement]) -> Moved:
    moved: Counter[tuple[str, str]] = Counter()
    for place in after:
        was = before[place.block.name]
        rest = max(place.rest_bytes, was.rest_bytes)
        moved[was.home, place.home] += place.block.bytes - rest
        moved[_rest_on(was), _rest_on(place)] += rest
    return Counter({way: size for way, size in moved.items() if size and way[0] != way[1]})


def _turn(before: Placement, after: Placement) -> int:
    """When a block moves among others: what comes to a GPU, if only the rest of a split block, is the last."""
    comes = after.is_split and _rest_on(before) != _rest_on(after)
    return 2 if comes else _TIERS.get(after.home, 2)


def _rest_on(place: Placement) -> str:
    """Where everything of a block is but its experts."""
    return place.compute if place.is_split else place.home
