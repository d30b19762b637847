"""What is done when memory runs out in the middle of an answer: what comes back at once, caches, then blocks.

Layers that stay on the device move to a slower one. Where all of them stream already, the CPU computes
some, which takes their keys and values off the GPU.

The answer so far is safe: the decoding loop has cut the KV cache back to before the pass that failed,
and repeats it when there is room again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from llm_magic.backends.accelerate.memory_errors import is_out_of_memory, release_memory
from llm_magic.errors import LLMMagicError
from llm_magic.host.memory import host_memory
from llm_magic.plan import Placement, Plan
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import slots_for
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited
from llm_magic.planning.setting import Setting
from llm_magic.units import GIB
from llm_magic.views.words import grouped, on_device

_SHARE = 8  # of the layers: one in so many moves at a time
_GPU = re.compile(r"\bGPU (\d+)\b")
_OF_A_GPU = re.compile(r"\b(CUDA|HIP|XPU|MPS)\b|CUBLAS|HIPBLAS")


class Repair:
    """Makes room when an allocation failed.

    Parameters
    ----------
    plan
        Says where everything is now.
    free
        Gives up what can be had again at once; returns whether there was anything.
    drop_caches
        Gives up KV caches that the answer does not need; returns whether there were any.
    apply
        Moves blocks as a new plan says.

    Attributes
    ----------
    notes
        What was done, in a few words each.
    """

    def __init__(
        self,
        plan: Callable[[], Plan],
        free: Callable[[], bool],
        drop_caches: Callable[[], bool],
        apply: Callable[[Plan], object],
    ) -> None:
        self.notes: list[str] = []
        self._plan, self._free, self._drop_caches, self._apply = plan, free, drop_caches, apply

    def __call__(self, error: BaseException) -> bool:
        """Whether there is more room than before."""
        if not is_out_of_memory(error):
            return False
        release_memory()
        device = failed_device(error, self._plan())
        if device != "cpu" and self._free():  # nobody needs to know: it takes no longer than to say so
            release_memory()
            return True
        if self._drop_caches():
            self.notes.append(f"memory ran out {on_device(device)}: KV caches of other chats were dropped")
            release_memory()
            return True
        return self._demote(device) or self._relieve(device)

    def _demote(self, device: str) -> bool:
        """Move some layers to a slower place."""
        plan = self._plan()
        chosen = blocks_to_move(plan, device)
        target = _slower_place(plan, device, _bytes(chosen))
        if not chosen or not target or not self._is_applied(moved_plan(plan, chosen, target)):
            return False
        name = {"cpu": "RAM"}.get(target, target)
        self.notes.append(f"memory ran out {on_device(device)}: {_labels(chosen)} moved to {name}")
        return True

    def _relieve(self, device: str) -> bool:
        """Let the CPU compute some of the layers that stream."""
        plan = self._plan()
        relieved = relieved_plan(plan, device)
        if relieved is None or not self._is_applied(relieved):
            return False
        taken = [
            after
            for before, after in zip(plan.placements, relieved.placements, strict=True)
            if before.compute != "cpu" == after.compute
        ]
        what = f"{_labels(taken)} computed by the CPU" if taken else "the CPU reads prompts, too"
        self.notes.append(f"memory ran out {on_device(device)}: {what}")
        return True

    def _is_applied(self, plan: Plan) -> bool:
        try:
            self._apply(plan)
        except (LLMMagicError, RuntimeError, MemoryError):
            return False
        release_memory()
        return True


def failed_device(error: BaseException, plan: Plan) -> str:
    """The device whose memory ran out, as far as the error or the placement tells."""
    import torch

    text = str(error)
    gpus = list(dict.fromkeys(place.compute for place in plan.placements if place.compute != "cpu"))
    # Not every failed allocation of a GPU comes as torch's own error: graphs, events, workspaces of cuBLAS.
    if not gpus or not (isinstance(error, torch.OutOfMemoryError) or _OF_A_GPU.search(text)):
        return "cpu"
    found = _GPU.search(text)
    return next((gpu for gpu in gpus if found and gpu.endswith(f":{found[1]}")), gpus[0])


def moved_plan(plan: Plan, places: Sequence[Placement], target: str) -> Plan:
    """The plan with some blocks elsewhere, under the same limits."""
    return _planned_anew(plan, edited(plan, {place.block.name: target for place in places}))


def relieved_plan(plan: Plan, device: str) -> Plan | None:
    """The plan with less for a GPU to keep, every block where it is; ``None`` when the CPU can take nothing.

    It is made under a limit that it cannot keep without giving up the keys and values of some layers
    that stream, or, without such layers, those that come along in prompts. How many more is the
    planner's choice: as many as answer fastest.
    """
    layers = [
        place
        for place in plan.placements
        if (place.fetched_to == device and place.way != "read")
        or (place.is_split and place.compute == device)
    ]
    streamed = [place for place in layers if place.compute == device]
    some = streamed[: max(1, len(streamed) // _SHARE)]
    size = max(1, sum(plan.workload.cache_bytes(place.block) for place in some))
    if device == "cpu" or not layers or host_memory().free < size + GIB:
        return None
    relieved = _planned_anew(plan, plan.device_map, {device: plan.use(device).planned - size})
    if not relieved.fits:
        return None
    uses = Setting.of(plan, Constants.from_json(plan.constants)).uses(relieved.placements)
    return replace(relieved, budget=plan.budget, uses=uses)


def _planned_anew(plan: Plan, homes: Mapping[str, str], limits: Mapping[str, int] | None = None) -> Plan:
    """A plan for the same model, machine and workload."""
    asked = {device: plan.budget.limits[device] for device in plan.budget.explicit}
    return make_plan(
        plan.layout,
        plan.machine,
        plan.workload,
        placement=homes,
        policy=plan.policy,
        max_memory=asked | dict(limits or {}),
        source=plan.source,
        options=plan.options,
        constants=Constants.from_json(plan.constants),
    )


def blocks_to_move(plan: Plan, device: str) -> list[Placement]:
    """Tables, where they make as much room as a layer: to look up rows elsewhere takes next to no time. Then layers."""
    tables = [place for place in plan.placements if place.home == device and place.block.looks_up]
    layer = min((block.bytes for block in plan.layout.layers), default=0)
    return tables if tables and _bytes(tables) >= layer else _layers_to_move(plan, device)


def _bytes(places: Sequence[Placement]) -> int:
    return sum(place.home_bytes for place in places)


def _layers_to_move(plan: Plan, device: str) -> list[Placement]:
    """Layers that stay on the device, evenly spaced: enough to make room beside the slots they then need."""
    layers = [
        place
        for place in plan.placements
        if place.home == device
        and place.way in ("resident", "cpu", "split")
        and place.block.kind in ("encoder", "decoder")
    ]
    travelling = sum(place.fetched_to == device and not place.is_split for place in plan.placements)
    count = max(0, slots_for(device) - travelling) + max(1, len(layers) // _SHARE)
    if count >= len(layers):
        return []
    return [layers[(2 * number + 1) * len(layers) // (2 * count)] for number in range(count)]


def _slower_place(plan: Plan, device: str, size: int) -> str:
    if device != "cpu" and plan.machine.has("cpu") and host_memory().free > size + GIB:
        return "cpu"
    return "disk" if plan.machine.has("disk") else ""


def _labels(places: Sequence[Placement]) -> str:
    return ", ".join(grouped(place.block.label for place in places))
