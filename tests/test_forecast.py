"""Forecasts against seconds computed by hand, against measured speeds, and fitted to new measurements."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_magic.events import SweepSpeed
from llm_magic.hookspecs import Planner
from llm_magic.machine import Machine
from llm_magic.model import CacheCost, ModelLayout
from llm_magic.plan import Placement, Plan, Workload
from llm_magic.planning.constants import Constants, limits
from llm_magic.planning.fitting import fit
from llm_magic.planning.forecast import engine_of, prompt_seconds
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from llm_magic.planning.setting import Setting
from llm_magic.planning.sweep import block_sweep, in_long_sweep, parts, sweep_of
from llm_magic.planning.ways import shared_out
from llm_magic.units import GIB, KIB, MIB
from tests.layouts import (
    cramped,
    disk,
    eight_gpus,
    gpu,
    h100,
    laptop,
    llama,
    llama8b,
    llama405b,
    machine,
    moe30b,
    packed,
    ram,
    starter,
)

AUTO = next(planner for planner in POLICIES if planner.name == "auto")
HALF = {"": "cuda:0"} | {f"layers.{i}": "cpu" for i in range(0, 32, 2)}
ALL_LAYERS = {"": "cuda:0"} | {f"layers.{i}": "cpu" for i in range(32)}
ON_GPU = {"": "cuda:0"}


def plan_for(layout: ModelLayout, box: Machine, placement=AUTO, *, batch: int = 1, **options) -> Plan:
    return make_plan(layout, box, Workload(1024, batch), placement=placement, policy="test", **options)


def slow_cpu(bus: float = 12e9) -> Machine:
    """A GPU beside a CPU that is too slow to compute anything for it."""
    return machine(gpu(0, 24 * GIB), ram(64 * GIB, read=1e9), disk(100 * GIB), bus=bus)


def ways(plan: Plan) -> str:
    """One letter a block: resident, streamed, cpu, read (disk), kept or looked up."""
    letters = {"resident": "g", "streamed": "s", "cpu": "c", "read": "d", "kept": "k", "looked-up": "l"}
    return "".join(letters[place.way] for place in plan.placements)


# --- By hand


def test_a_resident_model_on_the_cpu():
    # starter: 30 layers of 7,080,192 bytes, the tied head reads 56,623,104, the norm 1,152,
    # the embedding one row of 1,152; cache of 512 tokens: 30 * 512 * 768
    plan = plan_for(starter(), laptop())
    read = 30 * 7_080_192 + 56_623_104 + 1_152 + 1_152 + 30 * 512 * 768
    assert plan.forecast.bytes_per_token == {("cpu", "cpu"): read}
    # 2.0e10 B/s, and 0.3 ms for each of 30 layers
    assert plan.forecast.decode_tps == pytest.approx(1 / (read / 2.0e10 + 30 * 0.3e-3))
    assert plan.forecast.limit_tps == pytest.approx(2.0e10 / read)
    assert plan.forecast.bound_by == "RAM, 20.0 GB/s"


def test_blocks_in_the_page_cache_are_read_there():
    plan = plan_for(starter(), laptop(), max_memory={"cpu": 190 * MIB})
    layers = [place.block for place in plan.placements if place.way == "read"]
    whole = plan_for(starter(), laptop()).forecast.bytes_per_token["cpu", "cpu"]
    mapped = 7_080_192 * len(layers)
    # nine tenths of 2.0e10 B/s for those, without a slot or a copy
    seconds = (whole - mapped + mapped / 0.9) / 2.0e10 + 30 * 0.3e-3
    assert layers
    assert plan.forecast.bytes_per_token == {("cpu", "cpu"): whole}
    assert plan.forecast.decode_tps == pytest.approx(1 / seconds)


def test_reads_from_the_disk_hide_the_computing():
    # three layers of 100 MiB come at nine tenths of 800 MB/s; all that is read takes 35 ms of 2.0e10 B/s
    plan = plan_for(llama(layers=6), cramped(590 * MIB))
    count = ways(plan).count("d")
    assert count == 3
    assert plan.forecast.bytes_per_token["disk", "cpu"] == count * 100 * MIB
    assert plan.forecast.decode_tps == pytest.approx(0.9 * 8e8 / (count * 100 * MIB))
    assert plan.forecast.limit_tps == pytest.approx(8e8 / (count * 100 * MIB))
    assert plan.forecast.bound_by == "disk, 800 MB/s"


def test_streaming_takes_as_long_as_the_bus():
    # two of four layers in RAM: 200 MiB over 0.97 of a 12 GB/s link, while everything computes
    map_ = ON_GPU | {"layers.1": "cpu", "layers.3": "cpu"}
    plan = plan_for(llama(), slow_cpu(), map_)
    moved = 200 * MIB
    # read by the GPU: 4 layers, head 40 MiB, norm 128, one embedding row 128, cache 4 * 512 KiB
    read = 440 * MIB + 128 + 128 + 4 * 512 * KIB
    assert plan.forecast.bytes_per_token == {("cpu", "cuda:0"): moved, ("cuda:0", "cuda:0"): read}
    assert plan.forecast.decode_tps == pytest.approx(0.97 * 12e9 / moved)
    assert plan.forecast.limit_tps == pytest.approx(12e9 / moved)
    assert plan.forecast.bound_by == "bus to cuda:0, 12.0 GB/s"


def test_a_captured_step_has_no_launches_and_an_eager_one_hides_its_reads():
    read = 440 * MIB + 128 + 128 + 4 * 512 * KIB
    captured = plan_for(llama(), slow_cpu())
    assert captured.forecast.decode_tps == pytest.approx(1 / (read / 1e12 + 4 * 0.14e-3))
    eager = replace(llama(), details={**llama().details, "eager": "an architecture of its own"})
    assert plan_for(eager, slow_cpu()).forecast.decode_tps == pytest.approx(1 / 4e-3, rel=0.01)
    assert plan_for(eager, slow_cpu()).forecast.bound_by == "launching kernels on cuda:0"


def test_an_eager_step_of_large_layers_takes_no_less_than_a_captured_one():
    # four layers of 2 GiB, head 40 MiB, norm and row of 128 bytes, cache; the rest of a layer's kernels 0.14 ms
    state = CacheCost(1024, 1)  # recurrent: no static cache, no graph
    layout = llama(layer_elements=GIB)
    blocks = [replace(b, cache=state) if b.label == "layers.0" else b for b in layout.blocks]
    plan = plan_for(replace(layout, blocks=tuple(blocks)), slow_cpu())
    read = 4 * 2 * GIB + 40 * MIB + 128 + 128 + 4 * 512 * KIB
    assert plan.forecast.decode_tps == pytest.approx(1 / (read / 1e12 + 4 * 0.14e-3), rel=1e-6)
    assert plan.forecast.bound_by.startswith("memory of cuda:0")


def test_layers_of_several_gpus_are_recorded_one_by_one():
    box = machine(gpu(0, 24 * GIB), gpu(1, 24 * GIB), ram(64 * GIB))
    two = ON_GPU | {"layers.2": "cuda:1", "layers.3": "cuda:1"}
    read = 440 * MIB + 128 + 128 + 4 * 512 * KIB
    # what is between the products of a layer takes as long as in one graph; launching four takes 0.6 ms
    assert plan_for(llama(), box, two).forecast.decode_tps == pytest.approx(1 / (read / 1e12 + 4 * 0.14e-3))
    for detail in ({"eager": "an architecture of its own"}, {"keeps_states": True}):
        alone = replace(llama(), details={**llama().details, **detail})
        # 1 ms for each of four layers, and the head on the first one hides behind them
        assert plan_for(alone, box, two).forecast.decode_tps == pytest.approx(1 / 4e-3, rel=0.01)


@pytest.mark.parametrize("device", ["mps", "xpu:0"])
def test_nothing_is_recorded_on_other_accelerators(device: str):
    one = replace(gpu(0, 24 * GIB), id=device, unified=device == "mps")
    plan = plan_for(llama(), machine(one, ram(64 * GIB)), {"": device})
    assert plan.forecast.decode_tps == pytest.approx(1 / 4e-3, rel=0.01)  # a millisecond for each layer


def test_what_comes_from_the_disk_takes_the_bus_too():
    # 100 MiB from RAM and 300 from the disk on one bus of 1 GB/s; RAM takes 100 and the ring of two
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB, read=1e9), disk(100 * GIB, read=5e9), bus=1e9)
    map_ = ON_GPU | {"layers.0": "cpu", "layers.1": "disk", "layers.2": "disk", "layers.3": "disk"}
    plan = plan_for(llama(layers=6), box, map_, max_memory={"cpu": 300 * MIB})
    assert ways(plan) == "gsdddgggg"
    assert plan.forecast.bound_by == "bus to cuda:0, 1.0 GB/s"
    assert plan.forecast.decode_tps == pytest.approx(0.97e9 / (400 * MIB))
    assert plan.forecast.limit_tps == pytest.approx(1e9 / (400 * MIB))
    slower = replace(
        box, links=tuple(replace(k, bytes_per_s=5e8) if k.source == "disk" else k for k in box.links)
    )
    plan = plan_for(llama(layers=6), slower, map_, max_memory={"cpu": 300 * MIB})
    assert plan.forecast.bound_by == "disk, 500 MB/s"
    assert plan.forecast.decode_tps == pytest.approx(0.9 * 5e8 / (300 * MIB))


def test_a_prefill_is_bound_by_products_when_resident():
    # 512 tokens, 4 layers of 50 Mi weights, 2 operations each, half of 1.6e14 a second
    products = 2 * 512 * 4 * 50 * MIB / 0.8e14
    plan = plan_for(llama(), slow_cpu())
    assert plan.forecast.prefill_tps == pytest.approx(512 / max(products, 4e-3), rel=1e-3)


def test_a_prefill_that_streams_is_bound_by_the_bus():
    plan = plan_for(llama(), slow_cpu(), ON_GPU | {"layers.1": "cpu"})
    assert plan.forecast.prefill_tps == pytest.approx(512 * 0.97 * 12e9 / (100 * MIB))


def test_only_routed_experts_are_read_and_moved():
    resident = plan_for(moe30b(), machine(gpu(0, 80 * GIB), ram(64 * GIB)))
    layer = 2 * 623_000_000
    experts = layer * 9 // 10
    token = layer - experts + experts * 8 // 128
    total = resident.forecast.bytes_per_token["cuda:0", "cuda:0"]
    head, norm, row, cache = 2 * 151936 * 2048, 4096, 4096, 48 * 512 * 2048
    assert total == 48 * token + head + norm + row + cache
    # a GPU copies those of a token to one place first: it reads and writes them
    seconds = (total + 2 * 48 * (experts * 8 // 128)) / 1e12 + 48 * 0.14e-3
    assert resident.forecast.decode_tps == pytest.approx(1 / seconds)
    assert resident.forecast.limit_tps == pytest.approx(1e12 / total)
    streamed = plan_for(moe30b(), slow_cpu())
    count = ways(streamed).count("s")
    assert count
    assert streamed.forecast.bytes_per_token["cpu", "cuda:0"] == count * token
    # the router's choice is known when the layer runs: nothing hides those copies
    chosen = count * (experts * 8 // 128)
    assert 1 / streamed.forecast.decode_tps > chosen / (0.97 * 12e9) + 48 * 1e-3


def test_more_sequences_route_to_more_experts():
    # of 128 experts, four sequences that take 8 each take 128 * (1 - (120 / 128) ** 4) = 29.1
    map_ = ON_GPU | {"layers.0": "cpu"}
    plan = plan_for(moe30b(), machine(gpu(0, 80 * GIB), ram(64 * GIB, read=1e9)), map_, batch=4)
    layer = 2 * 623_000_000
    experts = layer * 9 // 10
    expected = layer - experts + experts * (1 - (120 / 128) ** 4)
    assert plan.forecast.bytes_per_token["cpu", "cuda:0"] == pytest.approx(expected)


@pytest.mark.parametrize("part", ["cpu", "disk", "bus", "gpu"])
def test_an_unknown_bandwidth_makes_the_forecast_unknown(part: str):
    box = machine(
        gpu(0, 24 * GIB, read=0 if part == "gpu" else 1e12),
        ram(64 * GIB, read=0 if part == "cpu" else 2e10),
        disk(100 * GIB, read=0 if part == "disk" else 8e8),
        bus=0 if part == "bus" else 2.5e10,
    )
    homes = {
        "cpu": {"": "cpu"},
        "disk": {"": "cpu", "layers.1": "disk", "layers.2": "disk"},
        "bus": {"": "cuda:0", "layers.1": "cpu"},
    }
    # the disk's block passes the ring in RAM, and neither RAM nor its page cache has room for it
    layout = llama(layer_elements=22 * GIB) if part == "disk" else llama()
    plan = plan_for(layout, box, homes.get(part, ON_GPU))
    assert (plan.forecast.decode_tps, plan.forecast.limit_tps) == (0, 0)
    assert plan.forecast.prefill_tps == 0
    assert plan.forecast.bound_by == "unknown"


# --- As measured


def without_cpu() -> Machine:
    """The H100's machine with a CPU that computes nothing."""
    box = h100()
    devices = tuple(replace(d, read_bytes_per_s=1e9) if d.id == "cpu" else d for d in box.devices)
    return replace(box, devices=devices)


@pytest.mark.parametrize(
    ("layout", "map_", "measured_tps"),
    [
        (llama8b(), ON_GPU, 107),
        (llama8b(), HALF, 7.7),
        (llama8b(), ALL_LAYERS, 3.87),
        (packed(llama8b()), ON_GPU, 131),
        (packed(llama8b()), HALF, 27.3),
        (packed(llama8b()), ALL_LAYERS, 13.8),
    ],
    ids=["resident", "half streamed", "all streamed", "nf4", "nf4 half", "nf4 all"],
)
def test_measured_figures_of_an_h100(layout: ModelLayout, map_: dict[str, str], measured_tps: float):
    plan = plan_for(layout, without_cpu(), map_)
    assert "c" not in ways(plan)
    assert plan.forecast.decode_tps == pytest.approx(measured_tps, rel=0.05)


# --- CPU and buses at once


def test_cpu_and_bus_finish_together():
    # a block takes 436 MB / (0.97 * 54.7 GB/s) = 8.22 ms on the bus; on the CPU 10.4 ms at 0.7 of 60 GB/s
    # and 0.3 ms more; a layer of the GPU, which is recorded, reads 0.15 ms and has 0.14 ms between its products.
    # n on the CPU: max((16 - n) * 8.22, n * 10.7 + (32 - n) * 0.29 + 0.4 for the head)
    # n = 5: 90.4, 61.8; 6: 82.2, 72.1; 7: 74.0, 82.5. Six is best, with 12.16 tok/s
    plan = plan_for(llama8b(), h100(), HALF)
    assert ways(plan).count("c") == 6
    assert ways(plan).count("s") == 10
    assert plan.forecast.decode_tps == pytest.approx(12.16, rel=0.01)
    assert plan.forecast.decode_tps > 1.55 * 0.97 * 5.47e10 / (16 * 2 * 218_112_000)


def test_blocks_of_the_cpu_are_spread_and_keep_their_cache_in_ram():
    plan = plan_for(llama8b(), h100(), HALF)
    on_cpu = [i for i, place in enumerate(plan.placements) if place.way == "cpu"]
    gaps = [b - a for a, b in pairwise(on_cpu)]
    assert min(gaps) >= 3
    assert {plan.placements[i].home for i in on_cpu} == {"cpu"}
    # 6 layers of 2 * 8 * 128 * 2 bytes for each of 1024 tokens
    assert plan.use("cpu").kv_cache == 6 * 4096 * 1024
    assert plan.use("cuda:0").kv_cache == 26 * 4096 * 1024
    assert plan.use("cpu").activations > 0
    assert plan.use("cpu").weights == 16 * 2 * 218_112_000  # once: what streams is not there twice


def test_the_cpu_computes_nothing_when_ram_cannot_take_its_cache():
    whole = 16 * 2 * 218_112_000
    full = plan_for(llama8b(), h100(), HALF, max_memory={"cpu": whole + MIB})
    assert full.fits
    assert ways(full).count("c") == 0
    needed = plan_for(llama8b(), h100(), HALF).use("cpu")
    limit = needed.planned - 4 * 4096 * 1024  # the cache of two blocks instead of six
    assert ways(plan_for(llama8b(), h100(), HALF, max_memory={"cpu": limit})).count("c") == 2


def with_flops(*, cpu: float, gpu: float = 6e14) -> Machine:
    """The H100's machine with devices that multiply otherwise."""
    flops = {"cpu": cpu, "gpu": gpu, "disk": 0.0}
    return replace(h100(), devices=tuple(replace(d, flops=flops[d.kind]) for d in h100().devices))


def test_a_cpu_that_gains_little_stays_idle():
    assert "c" not in ways(plan_for(llama8b(), without_cpu(), HALF))
    by_libraries = replace(packed(llama8b()), details={"no_cpu_kernels": True})
    assert "c" not in ways(plan_for(by_libraries, h100(), HALF))  # it would unpack every weight
    assert "c" in ways(plan_for(packed(llama8b()), h100(), HALF))


# --- Prompts, for which the CPU's blocks stream too


def test_a_prompt_is_read_as_fast_as_if_the_cpu_computed_nothing():
    plan, alone = plan_for(llama8b(), h100(), HALF), plan_for(llama8b(), without_cpu(), HALF)
    assert {place.prefill for place in plan.placements if place.way == "cpu"} == {"cuda:0"}
    assert {place.prefill for place in plan.placements if place.way != "cpu"} == {""}
    assert plan.forecast.prefill_tps == alone.forecast.prefill_tps
    # 16 layers of 436 MB over 0.97 of 54.7 GB/s
    assert plan.forecast.prefill_tps == pytest.approx(512 / (16 * 2 * 218_112_000 / (0.97 * 5.47e10)))


def test_a_sweep_is_long_from_where_streaming_is_faster_on():
    # six layers of 2 * 218 M operations a token at 0.4 of 3e12 a second, 0.3 ms more and 1 ms for each of the 26
    # others; from 30 tokens on all 16 are on the bus as fast: 131.5 ms
    plan = plan_for(llama8b(), h100(), HALF)

    def with_cpu_s(tokens: int) -> float:
        products = 2 * tokens * 218_112_000 / (0.4 * 3e12)
        return 6 * (max(products, 2 * 218_112_000 / (0.7 * 6e10)) + 0.3e-3) + 26e-3

    streamed_s = 16 * 2 * 218_112_000 / (0.97 * 5.47e10)
    assert with_cpu_s(plan.long_sweep - 1) <= streamed_s < with_cpu_s(plan.long_sweep)
    assert plan_for(llama8b(), with_flops(cpu=1e11), HALF).long_sweep < plan.long_sweep
    assert plan_for(llama8b(), with_flops(cpu=0), HALF).long_sweep == 32
    assert plan_for(llama8b(), without_cpu(), HALF).long_sweep == 0


LAYER_BYTES, TOKEN_BYTES = 2 * 218_112_000, 4096  # of a layer, and of a token's keys and values in it


def test_keys_and_values_of_a_block_that_visits_cross_the_bus_both_ways():
    plan = plan_for(llama8b(), h100(), HALF)
    visiting = next(place for place in in_long_sweep(plan.placements) if place.prefill)
    sweep = block_sweep(plan.layout, plan.workload, visiting, tokens=64, cached=400)
    assert sweep.moves["cpu", "cuda:0"] == LAYER_BYTES + 400 * TOKEN_BYTES
    assert sweep.moves["cuda:0", "cpu"] == 64 * TOKEN_BYTES
    assert sweep.staged["cuda:0"] == 464 * TOKEN_BYTES
    # 4096 values of a query, and as many of the output, for each token with each of those before it
    products = 2 * 64 * 218_112_000
    assert sweep.flops["cuda:0"] == pytest.approx(products + 4 * 64 * 400 * 4096, rel=1e-3)
    streamed = replace(visiting, prefill="")
    sweep = block_sweep(plan.layout, plan.workload, streamed, tokens=64, cached=400)
    assert +sweep.moves == {("cpu", "cuda:0"): LAYER_BYTES}
    assert not +sweep.staged


def test_each_pass_of_a_prompt_takes_along_what_the_ones_before_have_left():
    plan = plan_for(llama8b(), h100(), HALF)
    bus = 0.97 * 5.47e10
    first_s = 16 * LAYER_BYTES / bus
    assert prompt_seconds(plan, 512) == pytest.approx(first_s)
    assert prompt_seconds(plan, 512) == pytest.approx(512 / plan.forecast.prefill_tps)
    second_s = (16 * LAYER_BYTES + 6 * 512 * TOKEN_BYTES) / bus
    assert prompt_seconds(plan, 1024) == pytest.approx(first_s + second_s)
    unknown = replace(h100(), links=())
    assert prompt_seconds(plan_for(llama8b(), unknown, HALF), 512) is None


def test_new_keys_and_values_on_their_way_back_may_be_what_a_prompt_waits_for():
    # 2 MiB for each token of a layer: 1 GiB of new ones from each of 16, beside 436 MB to each; RAM, which
    # gives twice the CPU's 60 GB/s, sees them three times
    blocks = tuple(
        replace(b, cache=CacheCost(2 * MIB)) if b.kind == "decoder" else b for b in llama8b().blocks
    )
    plan = plan_for(replace(llama8b(), blocks=blocks), h100(), HALF)
    placed = tuple(
        replace(p, compute="cpu", prefill="cuda:0") if p.home == "cpu" else p for p in plan.placements
    )
    engine = engine_of(Setting.of(plan, Constants()), placed, plan.uses)
    sweep = sweep_of(plan.layout, plan.workload, in_long_sweep(placed), tokens=512)
    legs = {leg.words.split(",")[0]: leg.seconds for leg in parts(sweep, engine, is_prefill=True)}
    assert legs["bus to cuda:0"] == pytest.approx(16 * LAYER_BYTES / (0.97 * 5.47e10))
    assert legs["bus from cuda:0"] == pytest.approx(16 * 512 * 2 * MIB / (0.97 * 5.47e10))
    assert legs["RAM for CPU and buses"] == pytest.approx(16 * (LAYER_BYTES + 3 * 512 * 2 * MIB) / (2 * 6e10))


def test_blocks_stay_with_the_cpu_when_their_keys_and_values_take_longer():
    # Half-way through 4096 tokens a pass comes behind 1792. The CPU multiplies six layers for 512 more in 119 ms, and
    # the GPU launches the others in 26; all 16 are on the bus for 132 ms, with 256 KiB a token in each of six 53 more.
    def visiting(token_bytes: int) -> set[str]:
        cache = CacheCost(token_bytes)
        blocks = tuple(replace(b, cache=cache) if b.kind == "decoder" else b for b in llama8b().blocks)
        plan = make_plan(
            replace(llama8b(), blocks=blocks),
            with_flops(cpu=3e13),
            Workload(4096),
            placement=HALF,
            policy="test",
        )
        assert plan.fits
        return {place.prefill for place in plan.placements if place.way == "cpu"}

    assert visiting(TOKEN_BYTES) == {"cuda:0"}
    assert visiting(256 * KIB) == {""}


def test_a_cpu_that_multiplies_slowly_still_decodes():
    for flops in (1e11, 3e12):
        assert ways(plan_for(llama8b(), with_flops(cpu=flops), HALF)).count("c") == 6


def test_a_cpu_that_multiplies_faster_than_the_bus_carries_reads_prompts_itself():
    plan = plan_for(llama8b(), with_flops(cpu=6e14), HALF)
    assert ways(plan).count("c") == 6
    assert {place.prefill for place in plan.placements} == {""}
    assert plan.long_sweep == 0


def test_blocks_stay_with_the_cpu_whose_state_cannot_come_along():
    blocks = tuple(
        replace(b, cache=CacheCost(1024, 1)) if b.kind == "decoder" else b for b in llama8b().blocks
    )
    plan = plan_for(replace(llama8b(), blocks=blocks), with_flops(cpu=1e13), HALF)
    assert "c" in ways(plan)
    assert {place.prefill for place in plan.placements} == {""}


def test_room_on_the_gpu_is_counted_for_visits():
    plan = plan_for(llama8b(), h100(), HALF)
    alone = plan_for(llama8b(), without_cpu(), HALF)
    assert plan.use("cuda:0").slots == alone.use("cuda:0").slots
    # Of one layer, which comes along; of two more the 512 tokens of a pass, which are on their way back.
    cache, new = 4096 * 1024, 4096 * 512
    assert plan.use("cuda:0").activations == alone.use("cuda:0").activations + cache + 2 * new
    assert plan.use("cuda:0").planned == alone.use("cuda:0").planned - 6 * cache + cache + 2 * new
    assert plan.use("cpu").slots == 4 * cache // 2  # pinned buffers for keys or values of a layer
    tight = plan_for(llama8b(), h100(), HALF, max_memory={"cuda:0": alone.use("cuda:0").planned})
    assert tight.fits
    assert [place.prefill for place in tight.placements] == [place.prefill for place in plan.placements]


def test_a_map_without_a_gpu_computes_on_the_cpu():
    plan = plan_for(llama8b(), h100(), {"": "cpu"})
    assert set(ways(plan)) == {"c"}
    assert plan.forecast.bytes_per_token.keys() == {("cpu", "cpu")}


def test_kept_copies_can_be_computed_by_the_cpu():
    map_ = {"": "cuda:0"} | {f"layers.{i}": "disk" for i in range(0, 32, 2)}
    plan = plan_for(llama8b(), h100(), map_)
    assert ways(plan).count("k") == 16
    assert sum(place.compute == "cpu" for place in plan.placements) == 6
    assert plan.use("cpu").kept == 16 * 2 * 218_112_000
    assert plan.forecast.decode_tps == plan_for(llama8b(), h100(), HALF).forecast.decode_tps


# --- What a GPU has no room for

LONG = 65536  # tokens: 256 MiB of keys and values in each of the 32 layers, as much as the GPU has


def long_plan(box: Machine, placement=AUTO, context: int = LONG, **options) -> Plan:
    policy = getattr(placement, "name", "map.json")
    return make_plan(llama8b(), box, Workload(context), placement=placement, policy=policy, **options)


def small_gpus(count: int = 1, **cpu: float) -> Machine:
    return machine(*(gpu(i, 8 * GIB) for i in range(count)), ram(64 * GIB, **cpu), disk(100 * GIB))


def decoded_by_cpu(plan: Plan) -> list[Placement]:
    return [p for p in plan.placements if p.compute == "cpu" and p.block.kind == "decoder"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("policy", POLICIES[:4], ids=lambda policy: policy.name)
def test_a_context_that_gpus_cannot_hold_is_shared_with_ram(policy: Planner, count: int):
    """Instead of leaving the GPUs out: they still hold layers, and compute all of them in prompts."""
    context = LONG * count
    plan = long_plan(small_gpus(count), policy, context)
    assert plan.fits
    taken = decoded_by_cpu(plan)
    cache = 4096 * context
    assert plan.use("cpu").kv_cache == len(taken) * cache
    assert sum(plan.use(f"cuda:{i}").kv_cache for i in range(count)) == (32 - len(taken)) * cache
    assert 0 < len(taken) < 32
    assert all(place.prefill for place in taken)
    assert sum(f"that of {len(taken)} layers" in warning for warning in plan.warnings) == 1
    alone = long_plan(small_gpus(count), POLICIES[4], context)
    assert plan.forecast.prefill_tps > 100 * alone.forecast.prefill_tps
    if policy.name == "auto":
        assert plan.forecast.decode_tps > alone.forecast.decode_tps
        assert {p.way for p in plan.placements} >= {"resident", "cpu"}


@pytest.mark.parametrize("context", [8192, 16384, 32768])
@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[1], POLICIES[3]], ids=lambda policy: policy.name)
def test_no_room_is_left_for_keys_and_values_that_are_in_ram(policy: Planner, context: int):
    """What the CPU decodes has them there: so layers fill the GPU, up to one more and its keys and values."""
    plan = long_plan(machine(gpu(0, 8 * GIB), ram(64 * GIB), disk(100 * GIB)), policy, context)
    taken = decoded_by_cpu(plan)
    assert plan.fits
    assert taken
    layer = plan.layout.layers[0]
    assert plan.use("cuda:0").spare < layer.bytes + plan.workload.cache_bytes(layer)
    assert not any(
        "KV cache of all layers" in warning for warning in plan.warnings
    )  # it is quicker so, anyway


def test_a_context_that_fits_says_nothing_of_it():
    for context in (8192, 32768):
        plan = long_plan(small_gpus(), context=context)
        assert decoded_by_cpu(plan)  # because that is faster
        assert plan.warnings == ()


@pytest.mark.parametrize("speed", [1e9, 0])
def test_a_map_gets_no_more_layers_on_the_cpu_than_it_takes(speed: float):
    """A slow CPU, and one of unknown speed: with one layer less the GPU has no room."""
    plan = long_plan(small_gpus(read=speed), ALL_LAYERS)
    assert plan.fits
    assert plan.device_map == long_plan(small_gpus(), ALL_LAYERS).device_map
    taken = decoded_by_cpu(plan)
    assert 0 < len(taken) < 32
    one_less = [replace(p, compute="cuda:0", prefill="") if p is taken[0] else p for p in plan.placements]
    assert Setting.of(plan, Constants()).uses(one_less)[0].spare < 0


def test_without_ram_for_its_cache_a_long_context_does_not_fit():
    weights = 32 * 2 * 218_112_000
    plan = long_plan(small_gpus(), ALL_LAYERS, max_memory={"cpu": weights + 300 * MIB})
    assert not plan.fits
    assert "cuda:0 lacks" in plan.problems[0]


def test_layers_on_disk_are_decoded_from_their_copies_in_ram():
    """Copies come first: the CPU computes from them. Where they left no room for a cache, fewer are kept."""
    on_disk = {"": "cuda:0"} | {f"layers.{i}": "disk" for i in range(32)}
    plan = long_plan(small_gpus(), on_disk)
    assert plan.fits
    assert {place.way for place in decoded_by_cpu(plan)} == {"kept"}
    mixed = on_disk | {f"layers.{i}": "cpu" for i in range(12)}
    tight = long_plan(small_gpus(), mixed, LONG // 2, max_memory={"cpu": 12 * GIB, "cuda:0": 6 * GIB})
    assert tight.fits
    assert decoded_by_cpu(tight)


@pytest.mark.parametrize("size", [8.5, 9, 10, 12])
def test_layers_of_two_kinds_are_chosen_by_what_they_free(size: float):
    """More of them do not always free more, where some have a window."""
    layout = llama8b()
    blocks = [
        replace(block, cache=replace(block.cache, window=1024)) if number % 3 else block
        for number, block in enumerate(layout.blocks)
    ]
    box = machine(gpu(0, round(size * GIB)), ram(64 * GIB))
    plan = make_plan(
        replace(layout, blocks=tuple(blocks)),
        box,
        Workload(131072),
        placement=ALL_LAYERS,
        policy="test",
    )
    assert plan.fits, plan.problems


def test_only_the_gpu_that_lacks_room_gives_layers_to_the_cpu():
    box = machine(gpu(0, 40 * GIB), gpu(1, 5 * GIB), ram(64 * GIB))
    homes = {"": "cuda:0"} | {f"layers.{i}": "cpu" for i in range(1, 32)} | {"layers.16": "cuda:1"}
    plan = long_plan(box, homes, 2 * LONG)
    assert plan.fits
    taken = decoded_by_cpu(plan)
    assert {place.prefill for place in taken} <= {"cuda:1", ""}
    assert {int(place.block.label.removeprefix("layers.")) for place in taken} <= set(range(17, 32))
    assert any("does not fit cuda:1:" in warning for warning in plan.warnings)


def test_a_plan_that_does_not_fit_says_nothing_of_layers_that_the_cpu_decodes():
    plan = long_plan(machine(gpu(0, 2 * GIB), ram(8 * GIB)), ALL_LAYERS)
    assert not plan.fits
    assert not any("decodes" in warning for warning in plan.warnings)


def test_packed_layers_are_decoded_where_they_are_too():
    for method in ("nf4", "int4"):  # which lies in another order there
        layout = packed(llama8b(), method)
        plan = make_plan(layout, small_gpus(), Workload(2 * LONG), placement=ALL_LAYERS, policy="test")
        assert plan.fits
        assert {place.prefill for place in decoded_by_cpu(plan)} <= {"cuda:0", "cuda:1", "cuda:2", "cuda:3"}


# --- Several GPUs


def crossings(plan: Plan) -> int:
    devices = [place.compute for place in plan.placements]
    return sum(a != b for a, b in pairwise(devices))


def carried(plan: Plan) -> dict[str, int]:
    return {to: size for (source, to), size in plan.forecast.bytes_per_token.items() if source != to}


def two_gpus(*buses: float) -> Machine:
    box = machine(gpu(0, 24 * GIB), gpu(1, 24 * GIB), ram(64 * GIB, read=1e9), disk(100 * GIB))
    speeds = dict(zip(("cuda:0", "cuda:1"), buses, strict=True))
    links = tuple(replace(k, bytes_per_s=speeds.get(k.target, k.bytes_per_s)) for k in box.links)
    return replace(box, links=links)


def test_offloaded_blocks_use_every_bus_and_stay_beside_their_neighbours():
    plan = plan_for(llama405b(), eight_gpus())
    assert plan.fits
    assert crossings(plan) == 7
    each = carried(plan)
    assert len(each) == 8
    assert max(each.values()) <= 1.2 * min(each.values())


def test_a_faster_bus_carries_more():
    # 24 layers of 100 MiB; 12 and 6 GB/s: twice as many on the first
    limits = {"0": 1200 * MIB, "1": 1200 * MIB}
    plan = plan_for(llama(layers=24), two_gpus(12e9, 6e9), max_memory=limits)
    each = carried(plan)
    assert plan.fits
    assert crossings(plan) == 1
    assert each["cuda:0"] / each["cuda:1"] == pytest.approx(2, rel=0.35)


def test_a_tail_in_ram_is_shared_too():
    map_ = {"": "cuda:0"} | {f"layers.{i}": "cuda:1" for i in range(4, 8)}
    map_ |= {f"layers.{i}": "cpu" for i in range(8, 24)} | {"norm": "cuda:1", "head": "cuda:1"}
    plan = plan_for(llama(layers=24), two_gpus(12e9, 12e9), map_)
    assert carried(plan) == {"cuda:0": 800 * MIB, "cuda:1": 800 * MIB}


def test_a_full_gpu_takes_no_blocks_of_others():
    # cuda:1 has room for its own layers only
    map_ = (
        {"": "cuda:0"}
        | {f"layers.{i}": "cuda:1" for i in range(12, 24)}
        | {"norm": "cuda:1", "head": "cuda:1"}
    )
    map_ |= {f"layers.{i}": "cpu" for i in range(2, 8)}
    limits = {"1": (1200 + 40 + 12 + 8) * MIB}
    plan = plan_for(llama(layers=24), two_gpus(12e9, 12e9), map_, max_memory=limits)
    assert plan.fits
    assert carried(plan) == {"cuda:0": 600 * MIB}


@given(
    st.lists(st.integers(0, 1000), max_size=40),
    st.lists(st.floats(1, 100), min_size=1, max_size=8),
)
def test_shares_are_contiguous_and_as_large_as_the_speeds_say(sizes: list[int], speeds: list[float]):
    shares = shared_out(sizes, speeds)
    assert shares == sorted(shares)
    assert all(0 <= share < len(speeds) for share in shares)
    largest = max(sizes, default=0)
    for index, speed in enumerate(speeds):
        mine = sum(size for size, share in zip(sizes, shares, strict=True) if share == index)
        assert abs(mine - sum(sizes) * speed / sum(speeds)) <= largest + 1e-6


# --- Fitting


def speed(decode_s: float, prefill_s: float = 0.0) -> SweepSpeed:
    return SweepSpeed(decode_s, prefill_s, 512 if prefill_s else 0)


FITTED = {
    "cpu": lambda **options: plan_for(starter(), laptop(), **options),
    "mapped": lambda **options: plan_for(starter(), laptop(), max_memory={"cpu": 190 * MIB}, **options),
    "disk": lambda **options: plan_for(llama(layers=6), cramped(590 * MIB), **options),
    "resident": lambda **options: plan_for(llama8b(), h100(), ON_GPU, **options),
    "streamed": lambda **options: plan_for(llama8b(), without_cpu(), HALF, **options),
    "packed": lambda **options: plan_for(packed(llama8b()), h100(), ON_GPU, **options),
    "hybrid": lambda **options: plan_for(llama8b(), h100(), HALF, **options),
}


@pytest.mark.parametrize("factor", [0.8, 0.95, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("name", FITTED)
def test_the_forecast_of_a_fitted_plan_is_what_was_measured(name: str, factor: float):
    plan = FITTED[name]()
    measured = speed(factor / plan.forecast.decode_tps, factor * 512 / plan.forecast.prefill_tps)
    constants = fit(plan, measured, Constants())
    assert fit(plan, measured, constants) == constants
    again = make_plan(
        plan.layout,
        plan.machine,
        plan.workload,
        placement=plan.device_map,
        policy="again",
        max_memory={use.device: use.limit for use in plan.uses},
        constants=constants,
    )
    if name == "hybrid":  # other constants may choose another share for the CPU
        return
    if (name, factor) not in {("streamed", 0.8), ("packed", 0.8)}:
        assert again.forecast.decode_tps == pytest.approx(1 / measured.decode_s, rel=0.01)
    if name in ("cpu", "mapped", "resident"):
        assert again.forecast.prefill_tps == pytest.approx(512 / measured.prefill_s, rel=0.01)


def test_a_bus_can_not_be_fitted_beyond_what_it_is():
    plan = FITTED["streamed"]()
    constants = fit(plan, speed(0.5 / plan.forecast.decode_tps), Constants())
    assert constants.bus_share == limits("bus_share")[1]


def test_constants_change_the_plan():
    plan = plan_for(llama8b(), h100(), HALF)
    weak = plan_for(llama8b(), h100(), HALF, constants=Constants(cpu_beside_bus=0.2))
    assert ways(weak).count("c") < ways(plan).count("c")


@given(
    st.sampled_from(sorted(FITTED)),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True),
)
@settings(max_examples=60, deadline=None)
def test_fitting_odd_measurements_stays_sane(name: str, decode_s: float, prefill_s: float):
    plan = PLANS[name]
    measured = SweepSpeed(decode_s, prefill_s, 512)
    constants = fit(plan, measured, Constants())
    for each in fields(Constants):
        least, most = limits(each.name)
        assert least <= getattr(constants, each.name) <= most
    assert Constants.from_json(constants.to_json()) == constants
    assert fit(plan, measured, constants) == constants


PLANS = {name: make() for name, make in FITTED.items()}


def test_constants_survive_a_file():
    constants = Constants(cpu_layer_s=0.5e-3, bus_share=0.9)
    assert Constants.from_json(json.loads(json.dumps(constants.to_json()))) == constants


@pytest.mark.parametrize("data", [None, [], 3, "x", {}, {"bus_share": "fast"}, {"gone": 1.0}, {3: 4}])
def test_hostile_or_old_files_give_the_defaults(data: object):
    assert Constants.from_json(data) == Constants()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 0, 1e9, True, None, [1.0], 10**400])
def test_a_value_that_is_no_sane_number_gives_its_default(value: object):
    found = Constants.from_json({"bus_share": value, "disk_share": 0.5})
    assert found == Constants(disk_share=0.5)
