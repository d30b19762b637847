"""Blocks that no pass visits, as the vision tower of a model that is asked by text: a place, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_magic.hookspecs import Planner
from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.placing import changed, changes_in_words
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from llm_magic.planning.select import edited
from llm_magic.states import plan_state
from llm_magic.units import GIB, MIB
from llm_magic.views.map import map_report, placement_words, processor_words
from llm_magic.views.plan import plan_report
from tests.layouts import (
    disk,
    four_gpus,
    gpu,
    laptop,
    llama,
    mac,
    machine,
    moe30b,
    qwen32b,
    ram,
    starter,
    tensor,
)

POLICY = {planner.name: planner for planner in POLICIES}
TOWER, BUFFERS = 300 * MIB, 4096


def seeing(layout: ModelLayout) -> ModelLayout:
    """The model with a tower of 300 MiB and a projector of 2 MiB behind it."""
    names = (("model.vision_tower", TOWER, BUFFERS), ("model.multi_modal_projector", 2 * MIB, 0))
    towers = (
        Block(name, name.rpartition(".")[2], "tower", (tensor(f"{name}.weight", size // 2),), buffers)
        for name, size, buffers in names
    )
    return replace(layout, blocks=(*layout.blocks, *towers))


def plan_of(
    layout: ModelLayout, box: Machine, placement: Planner | dict[str, str] | str = "auto", **options
) -> Plan:
    chosen = POLICY[placement] if isinstance(placement, str) else placement
    return make_plan(layout, box, Workload(1024), placement=chosen, policy="test", **options)


def towers_of(plan: Plan) -> set[str]:
    """Homes of the blocks that are not used."""
    return {place.home for place in plan.placements if place.block.is_idle}


def streaming() -> Machine:
    """RAM and GPU that hold a part of a 32B model each."""
    return machine(gpu(0, 24 * GIB), ram(32 * GIB), disk(1000 * GIB))


PLANS = {
    "all on the GPU": (starter, lambda: machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))),
    "streamed": (qwen32b, lambda: machine(gpu(0, 24 * GIB), ram(96 * GIB), disk(100 * GIB))),
    "streamed from RAM and disk": (qwen32b, streaming),
    "four GPUs": (qwen32b, four_gpus),
    "experts": (moe30b, lambda: machine(gpu(0, 24 * GIB), ram(96 * GIB), disk(100 * GIB))),
    "no GPU": (starter, laptop),
    "unified memory": (starter, mac),
}


@pytest.mark.parametrize("policy", POLICY)
@pytest.mark.parametrize("name", PLANS)
def test_all_else_is_as_without_a_tower(name: str, policy: str) -> None:
    make, box = PLANS[name]
    without, plan = plan_of(make(), box(), policy), plan_of(seeing(make()), box(), policy)
    assert [place for place in plan.placements if not place.block.is_idle] == list(without.placements)
    assert plan.forecast == without.forecast
    assert plan.long_sweep == without.long_sweep
    assert plan.mapped == without.mapped
    for use, before in zip(plan.uses, without.uses, strict=False):
        mine = sum(p.block.bytes for p in plan.placements if p.block.is_idle and p.home == use.device)
        assert use.weights == before.weights + mine
        assert (use.slots, use.kv_cache, use.activations, use.kept) == (
            before.slots,
            before.kv_cache,
            before.activations,
            before.kept,
        )


def test_a_tower_is_in_ram_that_is_left_and_else_on_the_disk() -> None:
    roomy = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    assert towers_of(plan_of(seeing(starter()), roomy)) == {"cpu"}
    cramped = plan_of(seeing(starter()), roomy, max_memory={"cpu": 256 * MIB})
    assert towers_of(cramped) == {"disk"}
    assert cramped.fits
    assert towers_of(plan_of(seeing(qwen32b()), streaming())) == {"disk"}  # as layers are
    assert towers_of(plan_of(seeing(starter()), mac())) == {"disk"}  # its RAM is the GPU's


def test_buffers_of_a_tower_are_where_it_could_run() -> None:
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    without = plan_of(starter(), box)
    for home, device in {"cpu": "cpu", "disk": "cpu", "cuda:0": "cuda:0"}.items():
        layout = seeing(starter())
        homes = {"": "cuda:0", "vision_tower": home, "multi_modal_projector": home}
        plan = plan_of(layout, box, homes)
        assert plan.use(device).buffers == without.use(device).buffers + BUFFERS
        assert plan.use(home).weights == TOWER + 2 * MIB + (without.use(home).weights)


def test_a_tower_alone_on_a_gpu_does_not_make_it_compute() -> None:
    box = machine(gpu(0, 24 * GIB), gpu(1, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    plan = plan_of(seeing(starter()), box, {"": "cpu", "vision_tower": "cuda:1"})
    assert {place.compute for place in plan.placements} == {"cpu"}
    assert plan.use("cuda:1").planned == TOWER + BUFFERS
    on_gpu = plan_of(seeing(starter()), box, {"": "cuda:0", "vision_tower": "cuda:1"})
    assert {place.compute for place in on_gpu.placements} == {"cuda:0"}


def test_a_tower_that_was_moved_is_told_of_and_nothing_else_is() -> None:
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    plan = plan_of(seeing(starter()), box)
    moved = plan_of(plan.layout, box, edited(plan, {"model.vision_tower": "disk"}))
    assert changes_in_words(plan, moved) == ["vision_tower (300.0 MiB) RAM → disk"]
    elsewhere = plan_of(plan.layout, box, {"": "cpu"})
    assert {new.block.kind for _, new in changed(plan, elsewhere)}.isdisjoint({"tower"})


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_views_say_that_it_is_not_used(home: str) -> None:
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    homes = {"": "cuda:0", "vision_tower": home, "multi_modal_projector": home}
    plan, where = plan_of(seeing(starter()), box, homes), {"cpu": "in RAM", "disk": "on disk"}[home]
    assert placement_words(plan) == "100 % GPU"
    assert processor_words(plan) == "100% GPU"
    text, html = map_report(plan).text, map_report(plan).html
    assert f"not used for text, {where}: vision_tower, multi_modal_projector" in text
    assert f"vision_tower · 300.0 MiB · bfloat16 · {where}, not used for text" in html
    assert "streams" not in html
    assert ("not read" in text) == (home == "disk")
    state = {block.label: block for block in plan_state(plan).blocks}["vision_tower"]
    assert (state.way, state.kind, state.home) == ("idle", "tower", home)
    assert "30 layers" in plan_report(plan).text


def test_python_takes_the_class_that_the_layout_names() -> None:
    layout = replace(seeing(starter()), details={"auto_class": "AutoModelForImageTextToText"})
    text = plan_report(plan_of(layout, laptop())).text
    assert "from transformers import AutoModelForImageTextToText" in text
    assert "model = AutoModelForImageTextToText.from_pretrained(" in text


def test_a_layout_of_a_plugin_may_tie_a_tower_to_what_is_used() -> None:
    layout = seeing(llama())
    embed, tower = layout.block("embed"), layout.block("vision_tower")
    tied = {
        embed.name: replace(embed, tied_to=(tower.name,)),
        tower.name: replace(tower, tied_to=(embed.name,)),
    }
    layout = replace(layout, blocks=tuple(tied.get(block.name, block) for block in layout.blocks))
    plan = plan_of(layout, streaming())
    assert plan.device_map[embed.name] == plan.device_map[tower.name]
