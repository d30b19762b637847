"""What was learned of one model serves those like it, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.calibration import calibrate, keep_constants, kept_constants
from llm_magic.events import SweepSpeed
from llm_magic.machine import Device, Machine
from llm_magic.model import ModelLayout
from llm_magic.plan import Plan, Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from tests.fake_backend import FakeEngine
from tests.layouts import h100, llama8b, moe30b, packed, qwen32b, starter

LEARNED = Constants(cpu_layer_s=0.7e-3)
HERE = replace(h100(), described=False)


def with_layers(machine: Machine, *, cpu_s: float, gpu_s: float) -> Machine:
    """The machine with devices on which the time of a layer was measured."""
    seconds = {"cpu": cpu_s, "gpu": gpu_s, "disk": 0.0}
    return replace(machine, devices=tuple(replace(d, layer_s=seconds[d.kind]) for d in machine.devices))


@pytest.mark.usefixtures("cache_folder")
def test_a_fit_serves_models_of_the_same_kernels_and_about_the_same_width() -> None:
    keep_constants(llama8b(), LEARNED, Constants())
    assert kept_constants(llama8b(), HERE) == LEARNED
    assert kept_constants(qwen32b(), HERE) == LEARNED  # 5,120 wide, not 4,096
    for other in (starter(), packed(llama8b()), replace(llama8b(), dtype="float32")):
        assert kept_constants(other, HERE) == Constants()


def test_a_fit_of_long_ago_that_cannot_be_read_is_none(cache_folder: Path) -> None:
    keep_constants(llama8b(), LEARNED, Constants())
    for file in cache_folder.rglob("*.json"):
        file.write_text("{")
    assert kept_constants(llama8b(), HERE) == Constants()


@pytest.mark.usefixtures("cache_folder")
def test_what_layers_take_here_is_known_before_a_model_was_measured() -> None:
    measured = with_layers(HERE, cpu_s=1.5e-3, gpu_s=0.4e-3)
    assert kept_constants(llama8b(), measured) == Constants(cpu_layer_s=1.5e-3, gpu_layer_s=0.4e-3)
    keep_constants(llama8b(), LEARNED, Constants())
    # a model's own sweeps know better, of what they have told
    assert kept_constants(llama8b(), measured) == replace(LEARNED, gpu_layer_s=0.4e-3)
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


def test_layers_that_are_one_call_take_less_where_they_are_alike() -> None:
    """Of 436 MB each there are none, of 54 MB four: the first of them waits for Python."""
    cpu = replace(HERE.device("cpu"), layer_s=1e-3, ahead_s=0.2e-3, state_s=2e-8)
    large, small = llama8b(), starter()

    def layer_s(layout: ModelLayout | None, device: Device = cpu) -> float:
        machine = replace(HERE, devices=tuple(device if d.id == "cpu" else d for d in HERE.devices))
        return Constants.of(machine, layout).cpu_layer_s

    assert layer_s(None) == layer_s(large) == 1e-3
    together = len(small.layers)  # of 7 MB
    assert layer_s(small) == pytest.approx(0.2e-3 + 0.8e-3 / together)
    assert layer_s(replace(small, details={**small.details, "keeps_states": True})) == 1e-3
    assert layer_s(small, replace(cpu, ahead_s=0.0)) == 1e-3
    first, *rest = small.blocks[1:]
    windowed = replace(first, cache=replace(first.cache, window=64))
    assert layer_s(replace(small, blocks=(small.blocks[0], windowed, *rest))) == 1e-3


def test_what_prompts_take_beside_products_is_forecast() -> None:
    cpu = next(planner for planner in POLICIES if planner.name == "cpu")

    def prefill_s(state_s: float) -> float:
        devices = tuple(replace(d, state_s=state_s) if d.id == "cpu" else d for d in HERE.devices)
        machine = replace(HERE, devices=devices)
        constants = Constants.of(machine)
        plan = make_plan(
            llama8b(), machine, Workload(1024, 1, 512), placement=cpu, policy="cpu", constants=constants
        )
        return 512 / plan.forecast.prefill_tps

    assert prefill_s(4e-7) - prefill_s(2e-7) == pytest.approx(32 * 512 * 4096 * 2e-7 / 0.95, rel=1e-3)


def test_numbers_of_packed_weights_are_a_part_of_prompts() -> None:
    """A second for each of the layers' 3.4 GB and some in 4 bits, at 1 GB/s."""
    cpu = {f"model.layers.{i}": "cpu" for i in range(32)}
    cpu |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    layout = packed(llama8b())

    def prefill_s(unpacked: tuple[tuple[str, float], ...]) -> float:
        here = replace(HERE.device("cpu"), state_s=2e-8, unpacked=unpacked)
        machine = replace(HERE, devices=tuple(here if d.id == "cpu" else d for d in HERE.devices))
        constants = Constants.of(machine, layout)
        assert (constants.cpu_prefill == Constants.of(machine, llama8b()).cpu_prefill) == bool(unpacked)
        workload = Workload(1024, 1, 512)
        plan = make_plan(layout, machine, workload, placement=cpu, policy="cpu", constants=constants)
        return 512 / plan.forecast.prefill_tps

    packed_bytes = sum(block.bytes for block in layout.layers)
    slow, quick = prefill_s((("mxfp4", 1e9),)), prefill_s((("mxfp4", 2e9),))
    assert slow - quick == pytest.approx(packed_bytes * 0.5e-9 / 0.95, rel=1e-2)
    assert prefill_s(()) > 0


def test_packed_weights_and_experts_read_prompts_more_slowly() -> None:
    cpu = replace(HERE.device("cpu"), state_s=2e-8)
    machine = replace(HERE, devices=tuple(cpu if d.id == "cpu" else d for d in HERE.devices))
    plain, four_bits, experts = (
        Constants.of(machine, layout).cpu_prefill for layout in (llama8b(), packed(llama8b()), moe30b())
    )
    assert plain > four_bits > experts == Constants().cpu_prefill
    recurrent = replace(llama8b(), details=llama8b().details | {"keeps_states": True})
    assert plain > Constants.of(machine, recurrent).cpu_prefill > experts
    assert Constants.of(HERE, llama8b()) == Constants()


def both_at_work(machine: Machine) -> Machine:
    """A CPU that reads 60 GB/s alone and a bus of 54.7: 30 and 40 at once, of a memory that gives no more."""
    devices = tuple(replace(d, beside_bytes_per_s=3e10) if d.id == "cpu" else d for d in machine.devices)
    links = tuple(replace(k, beside_bytes_per_s=4e10) if k.source == "cpu" else k for k in machine.links)
    return replace(machine, devices=devices, links=links)


def half_in_ram(machine: Machine, constants: Constants) -> Plan:
    places = {f"model.layers.{i}": "cpu" if i % 2 else "cuda:0" for i in range(32)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cuda:0")
    return make_plan(llama8b(), machine, Workload(1024), placement=places, policy="half", constants=constants)


def test_what_the_cpu_and_the_bus_reach_together_is_forecast() -> None:
    machine = both_at_work(h100())
    constants = Constants.of(machine)
    assert constants.cpu_beside_bus == pytest.approx(0.5)
    assert constants.dram_factor == pytest.approx(7 / 6)  # of 60 GB/s, the faster one
    assert Constants.of(h100()) == Constants() == Constants.of(replace(machine, links=h100().links))
    # 16 layers of 436.2 MB in RAM: together they cannot come faster than at 70 GB/s
    limit_tps = 70e9 / (16 * 436.2e6)
    assert half_in_ram(machine, constants).forecast.decode_tps <= limit_tps
    assert half_in_ram(machine, Constants()).forecast.decode_tps > limit_tps


@pytest.mark.usefixtures("cache_folder")
def test_a_fit_begins_with_the_machine_as_it_is_measured_now() -> None:
    engine = FakeEngine([], half_in_ram(HERE, Constants()))
    engine.speed = SweepSpeed(0.1, 0.2, 512)  # as RAM allows
    calibrate("a", engine, lambda: both_at_work(HERE), lambda _event: None)
    assert kept_constants(llama8b(), both_at_work(HERE)).dram_factor == pytest.approx(7 / 6, rel=0.05)
    assert kept_constants(llama8b(), HERE).dram_factor == Constants().dram_factor  # measured anew, it counts
