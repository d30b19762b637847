"""A placed model: the same tokens wherever its blocks are, and however they got there.

Without a GPU the device ``cpu:0`` stands for one: torch knows it as the CPU, and nothing here treats it
as such, so its blocks go the way of a GPU's, over streams that are late on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_magic.backends.accelerate.placed import PlacedModel
from llm_magic.plan import Placement, Plan
from tests.engines import plan_for
from tests.fake_streams import HurriedStreams

GPU = "cpu:0"
PROMPT = torch.tensor([[7, 11, 13, 17, 19, 23]])
Place = Callable[[int, str], tuple[str, str, bool]]  # number and label of a block -> home, compute, kept


def placed_plan(folder: Path, place: Place, *, mapped: bool = False) -> Plan:
    """A plan with every block where ``place`` says."""
    _, plan = plan_for(folder, "ram")
    placements = tuple(
        Placement(p.block, *place(number, p.block.label)) for number, p in enumerate(plan.placements)
    )
    return replace(plan, placements=placements, mapped=mapped)


def load_placed(folder: Path, plan: Plan, streams: Callable[[str], Any] = lambda _: None) -> PlacedModel:
    """Everything is loaded into RAM, and moved from there."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).requires_grad_(False)
    _, in_ram = plan_for(folder, "ram")
    placed = PlacedModel(model.eval(), in_ram, sorted(folder.glob("*.safetensors")), streams=streams)
    placed.apply(plan)
    return placed


def tokens(model: Any, count: int = 8) -> list[int]:
    with torch.inference_mode():
        found = model.generate(PROMPT, max_new_tokens=count, do_sample=False, pad_token_id=2)
    return found[0, PROMPT.shape[1] :].tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


def reference(folder: Path, placed: PlacedModel) -> Any:
    """The same model in one piece; experts that are routed to compute one by one, and so must its own."""
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    if any(part.travels for part in placed.experts.values()):
        model.set_experts_implementation("eager")
    return model


@pytest.fixture
def streams() -> Iterator[Callable[[str], Any]]:
    made: list[HurriedStreams] = []

    def make(device: str) -> Any:
        if device == "cpu":
            return None
        made.append(HurriedStreams(len(made), 0.001))
        return made[-1]

    yield make
    for each in made:
        each.close()


def resident(_number: int, _label: str) -> tuple[str, str, bool]:
    return "cpu", "cpu", False


def layers_to(home: str, compute: str, *, kept: bool = False, every: int = 1) -> Place:
    """The layers (each, or every second, ...) somewhere; the rest computes on the same device."""

    def place(number: int, label: str) -> tuple[str, str, bool]:
        if label.startswith("layers.") and number % every == 0:
            return home, compute, kept
        return ("cpu", "cpu", False) if compute == "cpu" else (compute, compute, False)

    return place


WAYS: Mapping[str, tuple[Place, bool]] = {
    "streamed": (layers_to("cpu", GPU), False),
    "every second layer streamed": (layers_to("cpu", GPU, every=2), False),
    "disk to a GPU": (layers_to("disk", GPU), False),
    "disk to a GPU, kept": (layers_to("disk", GPU, kept=True), False),
    "disk to the CPU": (layers_to("disk", "cpu"), False),
    "disk to the CPU, mapped": (layers_to("disk", "cpu"), True),
    "disk to the CPU, kept": (layers_to("disk", "cpu", kept=True), False),
    "everything on disk": (lambda _n, _l: ("disk", "cpu", False), False),
    "everything mapped": (lambda _n, _l: ("disk", "cpu", False), True),
    "everything streamed": (lambda _n, _l: ("cpu", GPU, False), False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "mamba", "gpt2", "gemma"])
def test_logits_are_bit_equal_wherever_the_blocks_are(
    name: str, way: str, tiny_model: Callable[[str], Path], streams: Callable[[str], Any]
) -> None:
    folder = tiny_model(name)
    place, mapped = WAYS[way]
    placed = load_placed(folder, placed_plan(folder, place, mapped=mapped), streams)
    expected = logits(reference(folder, placed))
    for _ in range(3):
        assert torch.equal(logits(placed.model), expected)
    placed.close()
