"""What lets blocks run that are not where they compute: one hook for each, and a lane for each device to which they travel.

Experts that are routed to one by one travel alone, keys and values with a block that computes elsewhere in long sweeps.
"""

from __future__ import annotations

from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

from llm_magic.backends.accelerate.experts.stacks import find_stacks
from llm_magic.backends.accelerate.layer_cache import layer_indices
from llm_magic.backends.accelerate.placement import adapters, hooks
from llm_magic.backends.accelerate.placement.blocks import FileStore, RamStore, StoredWeights
from llm_magic.backends.accelerate.placement.cache_lane import CacheLane
from llm_magic.backends.accelerate.placement.cpu_experts import CpuExperts, Rows
from llm_magic.backends.accelerate.placement.device_map import running_first
from llm_magic.backends.accelerate.placement.expert_lanes import DeviceExperts, ExpertTraveller
from llm_magic.backends.accelerate.placement.homes import Homes
from llm_magic.backends.accelerate.placement.lanes import DeviceLane, Traveller, make_streams
from llm_magic.backends.accelerate.placement.lookups import Tables
from llm_magic.backends.accelerate.placement.model_device import models_in, show_device
from llm_magic.backends.accelerate.placement.placed_block import PlacedBlock, PlacedBlocks
from llm_magic.backends.accelerate.placement.read_rows import ShownRow, read_rows
from llm_magic.backends.accelerate.placement.routed_experts import advise_routed
from llm_magic.backends.accelerate.placement.stream import Watch
from llm_magic.backends.accelerate.placement.visits import Route, SweepHook, VisitingHook, Visits
from llm_magic.plan import Plan
from llm_magic.planning.costs import cache_piece_bytes
from llm_magic.units import MIB

_AHEAD = 2  # mapped blocks that the system is asked for while one computes

_SPARE_PINNED_BYTES = 64 * MIB  # that CUDA's own calls find where there is a quota


class Attachments:
    """The hooks and lanes of a loaded model.

    Parameters
    ----------
    placed
        Its blocks.
    homes
        Where these have their bytes.
    streams, slots
        As of `PlacedModel`.

    Attributes
    ----------
    visits
        Tells whether the sweep that runs takes the CPU's blocks to a GPU.
    tables
        What makes tables work that are not where they compute.
    """

    def __init__(
        self,
        model: Any,
        placed: PlacedBlocks,
        homes: Homes,
        *,
        streams: Callable[[str], Any],
        slots: Callable[[str], int],
    ) -> None:
        self._model, self._placed, self._homes = model, placed, homes
        self._blocks, self._experts = placed.blocks, placed.experts
        self._streams, self._slots = streams, slots
        self._lanes: dict[str, DeviceLane] = {}
        self._cache_lanes: dict[str, CacheLane] = {}
        self._expert_lanes: dict[str, DeviceExperts] = {}
        self._cpu_experts: dict[str, list[CpuExperts]] = {}
        self._stream_hooks: list[hooks.StreamHook] = []
        self._visiting_hooks: dict[str, VisitingHook] = {}
        self._advice: list[Any] = []
        self._shown_rows: list[ShownRow] = []
        self._usual_experts: dict[str, str | None] | None = None
        self._skip_keys = getattr(model, "_skip_keys_device_placement", None)
        self.tables = Tables()
        self.visits = Visits(0)

    @property
    def lanes(self) -> list[Any]:
        """What brings the blocks that travel, one for each device."""
        return [lane.lane for lane in self._lanes.values()]

    def add_memory(self, held: MutableMapping[str, Counter[str]]) -> None:
        """Add what all of this takes to device -> purpose -> bytes."""
        for device, lane in self._lanes.items():
            held[device]["slots"] += lane.slot_bytes
            held["cpu"]["slots"] += lane.staging_bytes
        for caches in self._cache_lanes.values():
            held["cpu"]["slots"] += caches.staging_bytes
        for device, experts in self._expert_lanes.items():
            held[device]["slots"] += experts.device_bytes
            held["cpu"]["slots"] += experts.staging_bytes

    def beyond_plan(self, plan: Plan) -> dict[str, int]:
        """Device -> bytes that experts, and keys and values ahead of their blocks, have there of what a plan leaves spare."""
        planned = {use.device: use.slots for use in plan.uses}
        held = {device: experts.device_bytes for device, experts in self._expert_lanes.items()}
        for device in held:
            held[device] += self._lanes[device].slot_bytes if device in self._lanes else 0
        beyond = {device: max(0, size - planned.get(device, 0)) for device, size in held.items()}
        ahead = {device: caches.bytes_ahead for device, caches in self._cache_lanes.items()}
        return {device: beyond.get(device, 0) + ahead.get(device, 0) for device in beyond | ahead}

    def watch(self, watch: Watch | None) -> None:
        """Tell ``watch`` of every wait for weights from now on; ``None``: nobody."""
        for lane in self.lanes:
            lane.watch = watch
        for caches in self._cache_lanes.values():
            caches.watch = watch
        for experts in self._expert_lanes.values():
            experts.watch(watch)

    def settle(self) -> None:
        """Make the next forward pass right after one that did not end."""
        self._settle_hooks()
        for lane in self.lanes:
            lane.settle()
        for caches in self._cache_lanes.values():
            caches.settle()
        self.visits.end()
        for experts in self._expert_lanes.values():
            experts.settle()

    def detach(self) -> None:
        """Let no block travel any more, and no code of ours run beside the model's."""
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
        for block in self._blocks.values():
            hooks.detach(block.module)
        self.tables.detach()
        while self._shown_rows:
            self._shown_rows.pop().detach()

    def close(self) -> None:
        """Detach for good."""
        self.detach()
        del self._model

    def _settle_hooks(self) -> None:
        for stream_hook in self._stream_hooks:
            stream_hook.settle()
        for visiting_hook in self._visiting_hooks.values():
            visiting_hook.settle()

    def attach(self, plan: Plan) -> None:
        """Let blocks travel, from pinned memory as far as the system gives it: staging has its share first."""
        for part in self._placed.block_after_block():
            fetched = bool(part.place.prefill) or part.place.compute != "cpu"
            if fetched and isinstance(part.store, RamStore):
                self._homes.pin(part.store)  # others may have made room for it
        self._attach_all(plan)
        while stores := self._in_the_way():
            self.detach()
            for store in stores:
                store.unpin()
            self._attach_all(plan)

    def _in_the_way(self) -> list[RamStore]:
        """The last blocks that are pinned, as many as have taken the room of staging, and of what CUDA itself pins.

        Whatever is not pinned goes through staging, which is several times slower when it is not either.
        """
        lanes: list[DeviceLane | CacheLane | DeviceExperts] = [*self._lanes.values()]
        lanes += [*self._cache_lanes.values(), *self._expert_lanes.values()]
        staging, was_refused = sum(lane.refused_bytes for lane in lanes), self._homes.pins_no_more
        self._homes.pins_no_more = False
        wanted = staging + _SPARE_PINNED_BYTES if staging or was_refused else 0
        found: list[RamStore] = []
        for part in (part for name in reversed(self._blocks) for part in self._placed.parts_of(name)):
            store = part.store
            if wanted > 0 and isinstance(store, RamStore) and store.is_pinned and not store.is_lent:
                found.append(store)
                wanted -= store.memory.numel()
        return found

    def _attach_all(self, plan: Plan) -> None:
        """One hook for each block that needs one, and a lane for each device to which blocks travel."""
        travellers: dict[str, list[PlacedBlock]] = defaultdict(list)
        running = [block.place for block in self._blocks.values() if not block.place.block.is_idle]
        devices = {name for place in running for name in (place.compute, place.prefill) if name}
        for block in self._blocks.values():
            if block.is_borrowed and block.store is None:
                block.borrow()
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
        self.visits = Visits(plan.long_sweep)
        for device, blocks in travellers.items():
            self._attach_lane(device, blocks, plan, align=len(devices) > 1)
        self._attach_experts(plan)
        self._let_caches_go_ahead(plan)
        self._place_bare(plan)
        self.attach_tables()
        self._show_rows()
        self._attach_model(devices)
        self._advise()
        self._model.hf_device_map = running_first(plan.device_map, str(self._model.device))

    def attach_tables(self) -> None:
        """Let tables work that are not where they compute."""
        tables = [(block.place, block.module) for block in self._blocks.values()]
        self.tables.attach(self._model, tables, self._skip_keys)

    def _show_rows(self) -> None:
        """Let the model find rows that it reads beside calling an embedding, wherever the weight is then."""
        for name, reader, index in self._read_rows:
            block = self._blocks.get(name)
            if block is None or not (block.travels or block.visits or block.place.is_looked_up):
                continue
            held = self._homes.without_a_copy(block) if block.travels else block.tensors.current()
            row = block.tensors.parameter("weight", held)[index : index + 1].detach().clone()
            self._shown_rows.append(ShownRow(reader, block.module, row, block.place.compute))

    @cached_property
    def _read_rows(self) -> list[tuple[str, Any, int]]:
        return list(read_rows(self._model))

    def _place_bare(self, plan: Plan) -> None:
        """Parameters and buffers between the modules go where the plan computes with them; no hook brings them."""
        import torch

        for place in plan.placements:
            if place.block.name in self._blocks:
                continue
            path, _, leaf = place.block.name.rpartition(".")
            owner, device = self._model.get_submodule(path), torch.device(place.modules_on)
            for held in (owner._buffers, owner._parameters):
                tensor = held.get(leaf)
                if tensor is not None and not tensor.is_meta and tensor.device != device:
                    tensor.data = tensor.data.to(device)

    def _attach_model(self, devices: Collection[str]) -> None:
        running = {name: b.place.compute for name, b in self._blocks.items() if not b.place.block.is_idle}
        first = next(iter(running.values()), next(iter(self._blocks.values())).place.compute)
        show_device(self._model, first)
        for path, inner in models_in(self._model):
            device = next((device for name, device in running.items() if name.startswith(f"{path}.")), "")
            if device:
                show_device(inner, device)
        hooks.detach(self._model)
        if any(part.visits for part in self._placed.parts()):
            hooks.attach(self._model, SweepHook(first, self.visits, self._skip_keys))
        elif devices != {"cpu"}:
            hooks.align_both_ways(self._model, first, self._skip_keys)

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
        taken = self.beyond_plan(plan)
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
        parts = [part for part in self._placed.parts_of(name) if part.store is not None]
        return ChainMap(*(StoredWeights(part.tensors, part.store) for part in parts))  # type: ignore[arg-type]

    def _attach_experts(self, plan: Plan) -> None:
        """Routed experts come one by one, to the room that the plan has for slots or leaves spare.

        Those that come for prompts alone leave that to the prompts: a longer pass fetches them less often.
        """
        travellers: dict[str, list[ExpertTraveller]] = defaultdict(list)
        self._attach_cpu_experts()
        for part in self._experts.values():
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
            self._expert_lanes[device] = DeviceExperts(device, experts, room, self._homes.reader, streams)
        self._choose_implementation(travellers)

    def _attach_cpu_experts(self) -> None:
        """Tokens come to the experts of blocks that are split."""
        rows: dict[str, Rows] = defaultdict(Rows)
        for part in self._experts.values():
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
            self._usual_experts = self._model.get_experts_implementation()
            self._model.set_experts_implementation("eager")
        elif not travellers and self._usual_experts is not None:
            self._model.set_experts_implementation(self._usual_experts)
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
            self._advice.append([advise_routed(experts, own, places, self._homes.mapped.will_need)])

    def _advise(self) -> None:
        """Ask the system for mapped blocks before they are used, in the first sweep; then it has them."""
        mapped = [block for block in self._blocks.values() if block.place.way == "read" and not block.travels]
        for number, block in enumerate(mapped):
            following = mapped[number + 1 : number + 1 + _AHEAD]
            extents = [extent for b in following if b.file is not None for extent in b.file.extents]
            handles: list[Any] = []

            def advise(_module: Any, _inputs: Any, handles: Any = handles, extents: Any = extents) -> None:
                while handles:
                    handles.pop().remove()
                self._homes.mapped.will_need(extents)

            handles.append(block.module.register_forward_pre_hook(advise))
            self._advice.append(handles)
