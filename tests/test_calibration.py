"""What was learned of one model serves those like it, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.calibration import keep_constants, kept_constants
from llm_magic.machine import Machine
from llm_magic.plan import Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from tests.layouts import h100, llama8b, packed, qwen32b, starter

LEARNED = Constants(cpu_layer_s=0.7e-3)
HERE = replace(h100(), described=False)


def with_layers(machine: Machine, *, cpu_s: float, gpu_s: float) -> Machine:
    """The machine with devices on which the time of a layer was measured."""
    seconds = {"cpu": cpu_s, "gpu": gpu_s, "disk": 0.0}
    return replace(machine, devices=tuple(replace(d, layer_s=seconds[d.kind]) for d in machine.devices))


@pytest.mark.usefixtures("cache_folder")
def test_a_fit_serves_models_of_the_same_kernels_and_about_the_same_width() -> None:
    keep_constants(llama8b(), LEARNED)
    assert kept_constants(llama8b(), HERE) == LEARNED
    assert kept_constants(qwen32b(), HERE) == LEARNED  # 5,120 wide, not 4,096
    for other in (starter(), packed(llama8b()), replace(llama8b(), dtype="float32")):
        assert kept_constants(other, HERE) == Constants()


def test_a_fit_of_long_ago_that_cannot_be_read_is_none(cache_folder: Path) -> None:
    keep_constants(llama8b(), LEARNED)
    for file in cache_folder.rglob("*.json"):
        file.write_text("{")
    assert kept_constants(llama8b(), HERE) == Constants()


@pytest.mark.usefixtures("cache_folder")
def test_what_layers_take_here_is_known_before_a_model_was_measured() -> None:
    measured = with_layers(HERE, cpu_s=1.5e-3, gpu_s=0.4e-3)
    assert kept_constants(llama8b(), measured) == Constants(cpu_layer_s=1.5e-3, gpu_layer_s=0.4e-3)
    keep_constants(llama8b(), LEARNED)
    assert kept_constants(llama8b(), measured) == LEARNED  # a model's own sweeps know better
    described = replace(measured, described=True)
    assert kept_constants(llama8b(), described) == Constants(cpu_layer_s=1.5e-3, gpu_layer_s=0.4e-3)


def test_layers_that_take_longer_are_forecast_to() -> None:
    def decode_s(cpu_s: float) -> float:
        machine = with_layers(h100(), cpu_s=cpu_s, gpu_s=0.0)
        constants = Constants.of(machine)
        policy = next(planner for planner in POLICIES if planner.name == "cpu")
        plan = make_plan(
            llama8b(), machine, Workload(1024), placement=policy, policy="cpu", constants=constants
        )
        return 1 / plan.forecast.decode_tps

    assert decode_s(2e-3) - decode_s(1e-3) == pytest.approx(32 * 1e-3)
    assert decode_s(0.0) == decode_s(Constants().cpu_layer_s)
