"""Tiny placed models for tests: plans with every block where a test wants it, and late copies.

Without a GPU the device ``cpu:0`` stands for one: torch knows it as the CPU, and nothing here treats it
as such, so its blocks go the way of a GPU's, over streams that are late on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.model import Block
from llm_magic.plan import Placement, Plan
from tests.engines import plan_for
from tests.fake_streams import HurriedStreams

GPU = "cpu:0"
PROMPT = torch.tensor([[7, 11, 13, 17, 19, 23]])
Where = (
    tuple[str, str, bool, str] | tuple[str, str, bool, str, bool]
)  # home, compute, kept, prefill, is_split
LONG = 4  # tokens of a long sweep: fewer than the prompt has
Place = Callable[[int, str], Where]  # of a block's number and label

HOMES: Mapping[str, Where] = {
    "cpu": ("cpu", "cpu", False, ""),
    "read": ("disk", "cpu", False, ""),
    "kept": ("disk", "cpu", True, ""),
    "resident": (GPU, GPU, False, ""),
    "streamed": ("cpu", GPU, False, ""),
    "read to a GPU": ("disk", GPU, False, ""),
    "kept for a GPU": ("disk", GPU, True, ""),
    "visiting": ("cpu", "cpu", False, GPU),
    "kept, visiting": ("disk", "cpu", True, GPU),
}
"""Every place that a block can have, by a name."""


def placed_plan(
    folder: Path, place: Place, *, mapped: bool = False, options: Mapping[str, str] | None = None
) -> Plan:
    """A plan with every block where ``place`` says; a tied block goes with its owner."""
    _, plan = plan_for(folder, "ram", options=options)
    where = {p.block.name: place(number, p.block.label) for number, p in enumerate(plan.placements)}
    placements = tuple(Placement(p.block, *where[_owner(p.block)]) for p in plan.placements)
    return replace(plan, placements=placements, mapped=mapped, long_sweep=LONG)


def _owner(block: Block) -> str:
    """The block that has the tensors of a tied one."""
    return block.name if block.bytes else next(iter(block.tied_to), block.name)


def mixed_plan(plan: Plan, homes: Mapping[str, str], *, mapped: bool = False) -> Plan:
    """The plan with blocks (by label) in places of `HOMES`; a tied block goes with its owner."""
    by_name = {p.block.name: HOMES[homes[p.block.label]] for p in plan.placements if p.block.label in homes}
    placements = []
    for place in plan.placements:
        where = by_name.get(_owner(place.block))
        placements.append(Placement(place.block, *where) if where else place)
    return replace(plan, placements=tuple(placements), mapped=mapped, long_sweep=LONG)


def load_placed(
    folder: Path,
    plan: Plan | None = None,
    streams: Callable[[str], Any] = lambda _: None,
    *,
    dtype: Any = "auto",
    **options: Any,
) -> PlacedModel:
    """Everything is loaded into RAM, and moved from there."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=dtype)
    in_ram = placed_plan(folder, everywhere("cpu"), options=plan.options if plan else None)
    files = sorted(folder.glob("*.safetensors"))
    placed = PlacedModel(model.requires_grad_(False).eval(), in_ram, files, streams=streams, **options)
    if plan is not None:
        placed.apply(plan)
    return placed


def stock(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False).eval()


def everywhere(home: str) -> Place:
    """Every block in one place of `HOMES`."""
    return lambda _number, _label: HOMES[home]


def layers_to(home: str, *, every: int = 1) -> Place:
    """The layers (each, or every second, ...) in a place of `HOMES`; the rest stays where it computes."""
    _, compute, _, prefill = HOMES[home]
    rest = "cpu" if compute == "cpu" and not prefill else "resident"

    def place(number: int, label: str) -> Where:
        return HOMES[home if label.startswith("layers.") and number % every == 0 else rest]

    return place


WAYS: Mapping[str, tuple[Place, bool]] = {
    "streamed": (layers_to("streamed"), False),
    "every second layer streamed": (layers_to("streamed", every=2), False),
    "disk to a GPU": (layers_to("read to a GPU"), False),
    "disk to a GPU, kept": (layers_to("kept for a GPU"), False),
    "disk to the CPU": (layers_to("read"), False),
    "disk to the CPU, mapped": (layers_to("read"), True),
    "disk to the CPU, kept": (layers_to("kept"), False),
    "visiting a GPU": (layers_to("visiting"), False),
    "every second layer visiting, kept": (layers_to("kept, visiting", every=2), False),
    "everything on disk": (everywhere("read"), False),
    "everything mapped": (everywhere("read"), True),
    "everything streamed": (everywhere("streamed"), False),
}
"""Placement and ``mapped``, by name."""


@contextmanager
def late_streams(delay_s: float = 0.001) -> Iterator[Callable[[str], Any]]:
    """Streams for a `PlacedModel`, late on purpose wherever a GPU has its own."""
    made: list[HurriedStreams] = []

    def make(device: str) -> Any:
        if device == "cpu":
            return None
        made.append(HurriedStreams(len(made), delay_s))
        return made[-1]

    try:
        yield make
    finally:
        for each in made:
            each.close()


def tokens(model: Any, count: int = 8, **options: Any) -> list[int]:
    """Greedy tokens after the prompt."""
    with torch.inference_mode():
        found = model.generate(PROMPT, max_new_tokens=count, do_sample=False, pad_token_id=2, **options)
    return found[0, PROMPT.shape[1] :].tolist()


def logits(model: Any, prompt: Any = PROMPT) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] of the prompt."""
    with torch.inference_mode():
        return model(prompt).logits
