"""Cores are left to the driver while the CPU computes beside a GPU, and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_magic.backends.accelerate.threads import cores_left_for_the_driver
from llm_magic.plan import Placement, Plan
from tests.engines import plan_for


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def placed(folder: Path, *places: tuple[str, str]) -> Plan:
    """The first blocks at (home, compute), the others on the GPU."""
    _, plan = plan_for(folder, "ram")
    others = [("cuda:0", "cuda:0")] * (len(plan.placements) - len(places))
    pairs = zip(plan.placements, [*places, *others], strict=True)
    return replace(plan, placements=tuple(Placement(p.block, *where) for p, where in pairs))


@pytest.mark.usefixtures("eight_threads")
def test_cores_are_left_only_where_both_compute_and_blocks_stream(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    cases = {
        6: placed(folder, ("cpu", "cpu"), ("cpu", "cuda:0")),
        8: placed(folder, ("cpu", "cuda:0")),
    }
    for expected, plan in cases.items():
        with cores_left_for_the_driver(plan):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 8
    _, on_cpu = plan_for(folder, "half")
    with cores_left_for_the_driver(on_cpu):
        assert torch.get_num_threads() == 8
