"""Plans in which the CPU computes a mixture's experts, and a GPU everything else of their layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_magic.machine import Machine
from llm_magic.model import ModelLayout
from llm_magic.placing import changes_in_words
from llm_magic.plan import Placement, Plan, Workload
from llm_magic.planning.planner import make_plan, with_room_for_prompts
from llm_magic.planning.policies import POLICIES
from llm_magic.planning.setting import Setting
from llm_magic.planning.sweep import block_sweep, can_capture
from llm_magic.states import map_state
from llm_magic.units import GIB, MIB
from llm_magic.views.llama_cpp import llama_cpp_options
from llm_magic.views.map import map_report
from llm_magic.views.plan import plan_report
from llm_magic.views.words import placement_words, tier_bytes
from tests.layouts import disk, four_gpus, gpu, h100, llama, machine, moe30b, packed, ram

AUTO = next(planner for planner in POLICIES if planner.name == "auto")
GPU = "cuda:0"


def mixture(method: str = "nf4", **details: object) -> ModelLayout:
    """The 30B mixture, packed, whose experts can be elsewhere than their layers."""
    return replace(packed(moe30b(), method), details={"routed_experts": True, **details})


def desktop(vram: float, memory: float = 64) -> Machine:
    """A GPU of a few GB beside RAM of 45 GB/s."""
    small = gpu(0, round(vram * GIB), read=4.5e11)
    cpu = replace(ram(round(memory * GIB), read=4.5e10), flops=8e11, threads=8, capability="avx2")
    return machine(small, cpu, disk(1000 * GIB, read=3e9), bus=2.3e10)


def planned(layout: ModelLayout, on: Machine, context: int = 8192, **options: object) -> Plan:
    asked = {"placement": AUTO, "policy": "auto", **options}
    return make_plan(layout, on, Workload(context), **asked)  # type: ignore[arg-type]


def ways(plan: Plan) -> set[str]:
    return {place.way for place in plan.placements if place.block.kind == "decoder"}


@pytest.mark.parametrize("vram", [6, 8, 12, 16])
def test_layers_that_have_no_room_are_split(vram: int) -> None:
    """All of them: the GPU has less room for whole layers, and yet each token comes sooner."""
    plan = planned(mixture(), desktop(vram))
    assert plan.fits
    assert ways(plan) == {"resident", "split"}
    split = [place for place in plan.placements if place.is_split]
    assert {(p.home, p.compute, p.prefill) for p in split} == {("cpu", GPU, GPU)}
    whole = planned(replace(mixture(), details={}), desktop(vram))
    assert "split" not in ways(whole)
    assert plan.forecast.decode_tps > 1.1 * whole.forecast.decode_tps
    resident = [sum(p.way == "resident" for p in each.placements) for each in (plan, whole)]
    assert resident[0] <= resident[1] + 2  # slots for whole blocks are not needed


def test_a_long_context_stays_on_the_gpu_as_far_as_it_has_room() -> None:
    short, long = (planned(mixture(), desktop(8), context) for context in (4096, 32768))
    assert ways(long) == ways(short) == {"resident", "split"}
    caches = [plan.use(GPU).kv_cache for plan in (short, long)]
    assert caches[1] == 8 * caches[0]
    assert long.use("cpu").kv_cache == 0
    longer = planned(mixture(), desktop(8), 131072)
    assert longer.fits
    assert longer.use("cpu").kv_cache > 0


@pytest.mark.parametrize("vram", [4, 6])
@pytest.mark.parametrize("memory", [14.0, 14.5, 14.75, 15.25, 15.75])
def test_what_fits_without_fits_with_split_layers(vram: int, memory: float) -> None:
    """RAM has to have the experts, and keys and values of what the CPU computes."""
    whole = planned(replace(mixture(), details={}), desktop(vram, memory))
    assert planned(mixture(), desktop(vram, memory)).fits or not whole.fits
    by_hand = {"": GPU, **{f"layers.{i}": "cpu" for i in range(8, 48)}}
    plans = [
        planned(each, desktop(6, memory), placement=by_hand, policy="hand")
        for each in (replace(mixture(), details={}), mixture())
    ]
    assert plans[1].fits or not plans[0].fits


def test_memory_by_purpose() -> None:
    plan = planned(mixture(), desktop(8))
    split = [place for place in plan.placements if place.is_split]
    block = split[0].block
    gpu_use, cpu_use = plan.use(GPU), plan.use("cpu")
    assert gpu_use.split == len(split) * (block.bytes - block.expert_bytes)
    assert gpu_use.kv_cache == sum(plan.workload.cache_bytes(b) for b in plan.layout.layers)
    assert gpu_use.slots == block.expert_bytes // 4
    blocks = tuple(replace(b, experts=4, active_experts=2) if b.experts else b for b in plan.layout.blocks)
    few = replace(plan.layout, blocks=blocks)
    assert planned(few, desktop(8)).use(GPU).slots == block.expert_bytes // 2  # two of four
    assert cpu_use.weights >= len(split) * block.expert_bytes
    assert sum(use.weights + use.split for use in plan.uses) == plan.layout.bytes
    assert gpu_use.planned == sum(
        getattr(gpu_use, name)
        for name in ("weights", "split", "kept", "draft", "buffers", "kv_cache", "activations", "slots")
    )


def test_a_sweep_reads_experts_in_ram_and_the_rest_on_the_gpu() -> None:
    plan = planned(mixture(), desktop(8))
    place = next(p for p in plan.placements if p.is_split)
    block, rest = place.block, place.block.bytes - place.block.expert_bytes
    one = block_sweep(plan.layout, plan.workload, place, tokens=1)
    assert one.reads["cpu"] == block.expert_bytes * 8 // 128
    assert one.reads[GPU] == rest + block.cache.bytes_for(512)
    assert not one.moves
    assert (one.layers[GPU], one.layers["cpu"], one.splits["cpu"]) == (1, 0, 1)
    several = block_sweep(plan.layout, plan.workload, place, tokens=4)
    assert one.reads["cpu"] < several.reads["cpu"] < 4 * one.reads["cpu"]
    many = block_sweep(plan.layout, plan.workload, place, tokens=512)
    assert many.reads["cpu"] == block.expert_bytes
    assert many.flops["cpu"] + many.flops[GPU] == pytest.approx(
        512 * one.flops["cpu"] + 512 * one.flops[GPU], rel=1
    )
    assert plan.long_sweep > 8


def test_a_step_is_captured_unless_experts_or_blocks_come_in_the_midst_of_it() -> None:
    plan = planned(mixture(), desktop(8))
    assert can_capture(plan.layout, plan.machine, plan.placements)
    plain = [
        replace(tensor, shape=(128, 10, 10), bytes=128 * 10 * 10 * 2)
        for tensor in plan.placements[1].block.tensors
    ]
    with_plain = [
        replace(p, block=replace(p.block, tensors=tuple(plain))) if p.block.experts else p
        for p in plan.placements
    ]
    assert not can_capture(plan.layout, plan.machine, with_plain)
    stays = [replace(p, prefill="") for p in with_plain]
    assert can_capture(plan.layout, plan.machine, stays)
    head = [replace(p, home="cpu") if p.block.kind == "head" else p for p in plan.placements]
    assert not can_capture(plan.layout, plan.machine, head)


def test_what_a_gpu_orders_in_another_way_visits_it_all_the_same() -> None:
    plan = planned(mixture("int4"), desktop(8))
    assert any(place.is_split for place in plan.placements)
    assert all(place.prefill for place in plan.placements if place.is_split)


def test_a_map_by_hand_has_its_layers_split_as_far_as_there_is_room() -> None:
    layout = mixture()
    homes = {"": GPU, **{f"layers.{i}": "cpu" for i in range(24, 48)}}
    roomy = planned(layout, desktop(24), 32768, placement=homes, policy="hand")
    assert [p.is_split for p in roomy.placements if p.block.kind == "decoder"] == [False] * 24 + [True] * 24
    assert roomy.device_map["model.layers.30"] == "cpu"
    limit = roomy.use(GPU).planned - 256 * MIB
    tight = planned(layout, desktop(24), 32768, placement=homes, policy="hand", max_memory={GPU: limit})
    counts = [sum(p.is_split for p in plan.placements) for plan in (roomy, tight)]
    assert 0 < counts[1] < counts[0]
    assert tight.fits
    assert ways(tight) == {"resident", "split", "cpu"}


def test_layers_without_experts_stay_on_the_gpu() -> None:
    """Their experts are what the CPU is for."""
    layout = mixture()
    dense = replace(layout.layers[0], experts=0, expert_bytes=0, active_experts=0)
    names = {f"model.layers.{i}" for i in range(3)}
    blocks = tuple(
        replace(dense, name=b.name, label=b.label) if b.name in names else b for b in layout.blocks
    )
    plan = planned(replace(layout, blocks=blocks), desktop(8))
    assert {p.way for p in plan.placements if p.block.name in names} == {"resident"}


def test_kept_copies_of_blocks_on_disk_are_split() -> None:
    layout = mixture()
    homes = {"": GPU, **{f"layers.{i}": "disk" for i in range(40, 48)}}
    plan = planned(layout, desktop(24), placement=homes, policy="hand")
    split = [p for p in plan.placements if p.is_split]
    assert len(split) == 8
    assert {(p.home, p.kept, p.way) for p in split} == {("disk", True, "split")}
    assert plan.use("cpu").kept == sum(p.block.expert_bytes for p in split)


def test_no_layer_is_split_where_it_is_no_use() -> None:
    for layout, on in (
        (mixture(), desktop(48)),  # all fits
        (replace(llama(layers=8), details={"routed_experts": True}), desktop(1, 8)),  # no experts
        (mixture(), machine(ram(64 * GIB), disk(1000 * GIB))),  # no GPU
    ):
        assert "split" not in ways(planned(layout, on))


def test_several_gpus_have_the_rest_of_their_own_layers() -> None:
    layout = mixture()
    small = replace(
        four_gpus(),
        devices=tuple(
            replace(d, total_bytes=4 * GIB, free_bytes=4 * GIB) if d.kind == "gpu" else replace(d, flops=8e11)
            for d in four_gpus().devices
        ),
    )
    plan = planned(layout, small)
    assert plan.fits
    split = [p for p in plan.placements if p.is_split]
    assert split
    assert len({p.compute for p in split}) > 1


def test_views_say_what_happens() -> None:
    plan = planned(mixture(), desktop(8))
    text = " ".join(map_report(plan).text.split())
    assert "S experts by the CPU, the rest by a GPU" in text
    assert "layers without their experts" in text
    assert "experts computed by the CPU, the rest by cuda:0" in map_report(plan).html
    assert "experts stream to cuda:0 for" in map_report(plan).html
    assert "split" in plan_report(plan).text
    assert sum(tier_bytes(plan).values()) == plan.layout.bytes
    assert "GPU" in placement_words(plan)
    assert r"\.ffn_.*_exps=CPU" in llama_cpp_options(plan)
    state = map_state(plan, policies=[])
    blocks = [block for block in state.plan.blocks if block.way == "split"]
    assert blocks[0].rest_bytes == plan.use(GPU).split // len(blocks)
    assert next(tier.split for tier in state.plan.tiers if tier.device == GPU) == plan.use(GPU).split


def test_moves_in_words() -> None:
    before = planned(
        replace(mixture(), details={}), desktop(8), placement={"": GPU, "layers.5": "cpu"}, policy="hand"
    )
    after = replace(
        before,
        placements=tuple(
            replace(p, compute=GPU, prefill="", is_split=True) if p.home == "cpu" else p
            for p in before.placements
        ),
    )
    assert "experts computed by the CPU now, the rest by cuda:0" in " ".join(changes_in_words(before, after))


def test_what_a_split_layer_costs_is_measured_on_an_h100_too() -> None:
    """A large GPU that something else fills."""
    plan = planned(mixture(), h100(), max_memory={GPU: 6 * GIB})
    assert ways(plan) == {"resident", "split"}
    setting = Setting(plan.layout, plan.machine, plan.budget, plan.workload)
    assert setting.uses(plan.placements) == plan.uses


def with_room(layout: ModelLayout, on: Machine, context: int = 8192, **options: object) -> tuple[Plan, Plan]:
    """A plan for passes of 512 tokens, and what becomes of it."""

    def of_passes(tokens: int) -> Plan:
        asked = {"placement": AUTO, "policy": "auto", **options}
        return make_plan(layout, on, Workload(context, prefill_tokens=tokens), **asked)  # type: ignore[arg-type]

    usual = of_passes(512)
    return usual, with_room_for_prompts(usual, of_passes)


def test_prompts_have_room_for_longer_passes_where_they_wait_for_the_bus() -> None:
    usual, plan = with_room(mixture(), desktop(8))
    assert plan.workload.prefill_tokens == 2048
    assert plan.forecast.prefill_tps > 2 * usual.forecast.prefill_tps
    assert plan.forecast.decode_tps > 0.93 * usual.forecast.decode_tps
    assert plan.use(GPU).activations > usual.use(GPU).activations
    assert "for 2,048 tokens at a time" in " ".join(plan_report(plan).text.split())


@pytest.mark.parametrize(
    ("layout", "on", "options"),
    [
        (mixture(), desktop(48), {}),  # nothing comes over the bus
        (mixture(), machine(ram(64 * GIB), disk(1000 * GIB)), {}),  # no GPU
        (mixture(), desktop(8, 8), {"max_memory": {"disk": 0}}),  # it does not fit
        (mixture(), desktop(8), {"context": 600}),  # no prompt is longer
    ],
)
def test_passes_stay_as_they_are_elsewhere(
    layout: ModelLayout, on: Machine, options: dict[str, object]
) -> None:
    usual, plan = with_room(layout, on, **options)  # type: ignore[arg-type]
    assert plan is usual


def test_a_prompt_waits_for_the_launches_of_many_small_experts() -> None:
    """Of few large ones, of as many bytes, it does not."""

    def launched(experts: int, method: str = "nf4", home: str = "cpu") -> int:
        block = next(block for block in moe30b().blocks if block.experts)
        layout = mixture(method) if method else moe30b()
        changed = replace(block, experts=experts, active_experts=2)
        place = Placement(changed, home, GPU)
        return block_sweep(layout, Workload(8192), place, tokens=512).experts[GPU]

    assert launched(128, home=GPU) == launched(128) == 128, "in runs"
    assert launched(8) == 5 * 8, "large ones come one by one"
    assert launched(128, home="disk") == 5 * 128
    assert launched(128, "") == 5 * 128, "plain ones, too"
    assert launched(128, "", home=GPU) == 0, "those are one kernel"

    few = tuple(
        replace(block, experts=16, active_experts=1) if block.experts else block for block in mixture().blocks
    )
    many, few_of_them = mixture(), replace(mixture(), blocks=few)
    speeds = [planned(layout, desktop(40)).forecast.prefill_tps for layout in (many, few_of_them)]
    assert speeds[0] < speeds[1]
