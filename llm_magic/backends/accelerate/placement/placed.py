"""A loaded model with every block where its plan says, and the moving of blocks while it stays loaded.

transformers and Accelerate load the model; then this takes over what they offloaded. Accelerate's
hooks inside of blocks go, and each block that must travel gets one hook that lets a `Lane` bring it.
``hf_device_map`` stays what it was: the truth that other libraries can read.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.experts.stacks import find_stacks
from llm_magic.backends.accelerate.files.extents import Extent
from llm_magic.backends.accelerate.files.offload_folder import OffloadFolder, disk_error
from llm_magic.backends.accelerate.placement import adapters, hooks
from llm_magic.backends.accelerate.placement.attachments import Attachments
from llm_magic.backends.accelerate.placement.blocks import BlockTensors
from llm_magic.backends.accelerate.placement.checkpoint import Checkpoint
from llm_magic.backends.accelerate.placement.device_map import accelerate_device_map
from llm_magic.backends.accelerate.placement.homes import Homes
from llm_magic.backends.accelerate.placement.lookups import Tables
from llm_magic.backends.accelerate.placement.placed_block import PlacedBlock, PlacedBlocks
from llm_magic.backends.accelerate.placement.stream import Watch
from llm_magic.backends.accelerate.placement.uninterrupted import uninterrupted
from llm_magic.backends.accelerate.placement.visits import Visits
from llm_magic.backends.accelerate.quantizing import saving
from llm_magic.errors import PlanError
from llm_magic.plan import Placement, Plan
from llm_magic.planning.costs import slots_for

Moved = Mapping[tuple[str, str], int]
"""(source, target) -> bytes."""

Report = Callable[[int, int, str], None]
"""Blocks done, blocks in all, label of the next one."""

Owners = dict[int, tuple[Callable[[], Any], Any, str]]
"""``id`` of a parameter -> a weak reference to it, its module, and its name there."""

Fill = Callable[[Placement, Any], None]
"""Gives a block's module its weights."""


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
        lent = (extent.path for extent in (extents or {}).values())
        checkpoint = Checkpoint(model, files, extents)
        self._placed = PlacedBlocks()
        self.blocks, self.experts = self._placed.blocks, self._placed.experts
        self._homes = Homes(
            self._placed,
            checkpoint,
            tuple(dict.fromkeys((*files, *lent))),
            are_some_lent=bool(extents),
            folder=folder,
            offload_parent=plan.options.get("offload_folder", ""),
        )
        self._attachments = Attachments(model, self._placed, self._homes, streams=streams, slots=slots)
        self._take_over(fill, checkpoint)
        self._attachments.attach(plan)
        adapters.let_in(model, weakref.WeakMethod(self.weights_shown))
        if plan.layout.quantization:
            layout = plan.layout
            methods = layout.quantization, layout.expert_quantization, layout.head_quantization
            saving.let_save(model, methods, weakref.WeakMethod(self.weights_shown))

    @property
    def travels(self) -> bool:
        """Whether blocks move in every sweep."""
        return any(block.travels for block in self.blocks.values())

    @property
    def lanes(self) -> list[Any]:
        """What brings the blocks that travel, one for each device."""
        return self._attachments.lanes

    @property
    def visits(self) -> Visits:
        """Tells whether the sweep that runs takes the CPU's blocks to a GPU."""
        return self._attachments.visits

    @property
    def tables(self) -> Tables:
        """What makes tables work that are not where they compute."""
        return self._attachments.tables

    def memory(self) -> dict[str, Counter[str]]:
        """Device -> ``"weights"``, ``"kept"`` or ``"slots"`` -> bytes."""
        held: dict[str, Counter[str]] = defaultdict(Counter)
        for block in self.blocks.values():
            place = block.planned
            held[place.home]["weights"] += place.home_bytes
            held[place.compute]["weights"] += place.rest_bytes
            if place.kept:
                held["cpu"]["kept"] += place.home_bytes
        self._attachments.add_memory(held)
        return held

    def beyond_plan(self) -> dict[str, int]:
        """Device -> bytes that experts, and keys and values ahead of their blocks, have there of what the plan leaves spare."""
        return self._attachments.beyond_plan(self.plan)

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
            self._attachments.detach()
            for number, place in enumerate(changed):
                report(number, len(changed), place.block.label)
                done.append(place.block.name)
                self._put_parts(place.block.name, place, plan)
            report(len(changed), len(changed), "")
            with uninterrupted():
                self._attachments.attach(plan)
                self.plan = plan
        except BaseException as error:
            with uninterrupted():
                self._put_back([before[name] for name in reversed(done)], before_plan)
            full = disk_error(error, self._homes.offload_parent) if isinstance(error, OSError) else None
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
        self._homes.check_files(self.plan)

    def watch(self, watch: Watch | None) -> None:
        """Tell ``watch`` of every wait for weights from now on; ``None``: nobody."""
        self._attachments.watch(watch)

    @contextmanager
    def weights_shown(self) -> Iterator[None]:
        """Between sweeps, have all weights in their modules without a copy, in RAM or in mapped files.

        What is added to the model meanwhile is for where its block computes; so says the device map.
        """
        parts = [part for part in self._placed.parts() if part.travels]
        tables = [b for b in self.blocks.values() if b.place.is_looked_up]
        looked_up = [(table.tensors, table.tensors.current()) for table in tables]
        homes = self.model.hf_device_map
        self.tables.detach()  # no adapter takes a copy of what looks up rows
        try:
            computing = {place.block.name: place.modules_on for place in self.plan.placements}
            self.model.hf_device_map = accelerate_device_map(computing)
            for part in parts:
                part.tensors.bind(self._homes.without_a_copy(part))
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
            for part in self._placed.block_after_block():
                part.move_rest(part.place)
        finally:
            self._attachments.attach_tables()

    def settle(self) -> None:
        """Make the next forward pass right after one that did not end."""
        with uninterrupted():
            self._attachments.settle()

    def close(self) -> None:
        """Give everything back; the model is of no use any more."""
        self._attachments.close()
        hooks.strip(self.model)
        for block in self._placed.parts():
            block.tensors.clear()
            if block.store is not None:
                block.store.close()
        self.blocks.clear()
        self.experts.clear()
        self._homes.close()
        del self.model

    # Taking over what was loaded

    def _take_over(self, fill: Fill | None, checkpoint: Checkpoint) -> None:
        modules = dict(self.model.named_modules())
        loader = hooks.weights_loader(self.model)
        extents = checkpoint.extents(getattr(loader, "index", None) or {})
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
            for part in self._placed.parts_of(place.block.name):
                if place.home == "disk" and part.tensors.pieces and part.is_empty:
                    self._homes.take_from_disk(part, extents, loader)
            self._put_parts(place.block.name, place, self.plan)
            block = self.blocks[place.block.name]
            block.is_lent_by_files = fill is None and self._homes.may_be_mapped(block)
            hooks.drop_loaded(loader, place.block.name)

    # Putting one block somewhere

    def _put_back(self, places: Sequence[Placement], plan: Plan) -> None:
        """Undo moves away from ``plan``."""
        self.plan = plan
        self._attachments.detach()
        for place in sorted(places, key=lambda place: self.blocks[place.block.name].is_borrowed):
            self._put_parts(place.block.name, place, plan)  # lenders first
        self._attachments.attach(plan)

    def _is_elsewhere(self, place: Placement, plan: Plan) -> bool:
        block = self.blocks.get(place.block.name)
        if block is None:
            return False
        now = block.planned
        same = replace(now, block=place.block) == place
        return not same or (place.way == "read" and plan.mapped != self.plan.mapped)

    def _put_parts(self, name: str, place: Placement, plan: Plan) -> None:
        parts = self._placed.parts_of(name)
        # Experts that leave a GPU make room for what stays there.
        for part in reversed(parts) if place.is_split else parts:
            self._homes.put(part, self._place_of(part, place), mapped=plan.mapped)
        for part in parts:
            part.planned = place
        if place.is_split:
            parts[-1].move_rest(parts[-1].place)  # the first one has taken all of the block along

    def _place_of(self, part: PlacedBlock, place: Placement) -> Placement:
        """Where a part of a block is: those of a split one are like blocks of their own."""
        if not place.is_split:
            return place
        if part is self.experts.get(place.block.name):
            return replace(place, compute="cpu", is_split=False)
        return replace(place, home=place.compute, kept=False, prefill="", is_split=False)


_TIERS = {"disk": 0, "cpu": 1}


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
