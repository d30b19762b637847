"""Plans against bytes computed by hand, and properties that hold for every layout, machine and policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_magic.errors import PlanError
from llm_magic.hookspecs import Planner
from llm_magic.host.probe import read_machine
from llm_magic.machine import Machine
from llm_magic.model import Block, CacheCost, ModelLayout, TensorInfo
from llm_magic.plan import Plan, Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import SCORES_BYTES, activation_bytes, logits_bytes, longest_pass
from llm_magic.planning.forecast import make_forecast
from llm_magic.planning.planner import make_budget, make_plan, read_device_map, refusal, register_planners
from llm_magic.planning.setting import Setting
from llm_magic.planning.ways import computing_places, lacking
from llm_magic.units import GIB, KIB, MIB
from tests.layouts import (
    cramped,
    disk,
    eight_gpus,
    four_gpus,
    gpu,
    laptop,
    llama,
    llama8b,
    llama405b,
    mac,
    machine,
    moe30b,
    packed,
    qwen32b,
    ram,
    starter,
    tensor,
    workstation,
)

POLICIES: dict[str, Planner] = {}
register_planners(lambda planner: POLICIES.__setitem__(planner.name, planner))


def slow_cpu() -> Machine:
    """A GPU beside a CPU that is too slow to compute anything for it."""
    return machine(gpu(0, 24 * GIB), ram(64 * GIB, read=1e9), disk(100 * GIB))


def plan_for(layout: ModelLayout, box: Machine, context: int = 1024, policy: str = "auto", **options) -> Plan:
    return make_plan(layout, box, Workload(context), placement=POLICIES[policy], policy=policy, **options)


def homes(plan: Plan) -> str:
    """One sign a block: GPU number, R or D."""
    return "".join({"cpu": "R", "disk": "D"}.get(home, home[-1]) for home in plan.device_map.values())


# --- Bytes by purpose, by hand


def toy(**changes) -> ModelLayout:
    """Layers of 100 MiB (50 Mi bf16 elements), embedding and head of 40 MiB, KV cache of 1 KiB a token."""
    return llama(**changes)


# hidden 64, MLP 256, bf16, 512 tokens, KV of one layer at 1024 tokens 1 MiB:
# 2 * 512*64*2                    = 131072   residual and norm
# max(6 * 512*64*2 = 393216, 8 * 512*64 = 262144, 3 * 512*256*2 = 786432)
# 1 MiB / 2                       = 524288   torch.cat of the cache
# 512*1024 * (2 + 2)              = 2097152  masks of a pass after a prefix: two of booleans, one in bf16
ACTIVATIONS = 131072 + 786432 + 524288 + 2 * MIB
# vocabulary 1000: bf16 logits, fp32 copy, sorted fp32, int64 indices, fp32 softmax
LOGITS = 1000 * (2 + 4 + 4 + 8 + 4)


def test_activation_and_logits_peaks():
    assert activation_bytes(toy(), Workload(1024)) == ACTIVATIONS
    assert logits_bytes(toy(), Workload(1024)) == LOGITS
    assert logits_bytes(toy(), Workload(1024, batch=3)) == 3 * LOGITS


def test_experts_multiply_the_mlp_peak():
    # 4 experts a token: 4 * 512 * 4*256 * 2 = 4194304, since gate and up are one, of which both halves stay;
    # gathered tokens 512 * 4*64 * 2 = 262144
    layout = toy(experts=8, active=4)
    assert activation_bytes(layout, Workload(1024)) == 131072 + 4194304 + 262144 + 524288 + 2 * MIB


@pytest.mark.parametrize("width", [64, 65536])
def test_rows_for_every_layer_take_room_beside_the_hidden_states(width: int):
    # 512 tokens: narrow rows are less than what a layer takes, wide ones are most before the first layer
    table = Block(
        "model.embed_tokens_per_layer",
        "embed_tokens_per_layer",
        "embedding",
        (replace(tensor("t", 1000 * width), shape=(1000, width)),),
        looks_up=True,
    )
    layout = replace(toy(), blocks=(*toy().blocks, table))
    rows = 512 * width * 2
    before = 2 * rows + 512 * width * 8
    assert activation_bytes(layout, Workload(1024)) == max(ACTIVATIONS + rows, before)


def test_grouped_queries_repeat_the_prefix():
    # 12 heads share 3 keys and values: attention after a prefix repeats the layer's 1 MiB 4 times
    layout = toy()
    grouped = replace(layout, details={"attention_heads": 12, "kv_heads": 3})
    assert activation_bytes(grouped, Workload(1024)) == ACTIVATIONS + 4 * MIB
    whole = Workload(1024, prefill_tokens=1024)  # the first pass of its sequence: neither mask nor copies
    assert activation_bytes(grouped, whole) == 2 * (131072 + 786432) + 524288


def test_eager_attention_makes_the_scores_of_every_head():
    layout = replace(toy(), details={"attention": "eager", "attention_heads": 8, "kv_heads": 8})
    # scores of 8 heads, 512 x 1024: twice in bf16, once in fp32; the mask is in ACTIVATIONS
    assert activation_bytes(layout, Workload(1024)) == ACTIVATIONS + 8 * 512 * 1024 * (2 + 2 + 4)


def test_scores_that_are_made_in_parts_have_an_end():
    layout = replace(toy(), details={"attention": "eager", "attention_heads": 64, "kv_heads": 8})
    in_parts = replace(layout, details={**layout.details, "attends_in_parts": True})
    short = Workload(64)
    assert activation_bytes(in_parts, short) == activation_bytes(layout, short)
    whole, parts = (activation_bytes(each, Workload(32768)) for each in (layout, in_parts))
    assert whole - parts == 64 * 512 * 32768 * 8 + 8 * 32 * MIB - SCORES_BYTES


@pytest.mark.parametrize("spare", [0, 1, 500 * KIB, 3 * MIB, 64 * MIB])
def test_a_long_prompt_is_read_in_the_largest_parts_that_fit(spare: int):
    layout = toy()
    needed = plan_for(layout, laptop()).use("cpu").planned
    plan = plan_for(layout, laptop(), policy="cpu", max_memory={"cpu": needed + spare})
    room = activation_bytes(layout, plan.workload) + plan.use("cpu").spare
    assert plan.use("cpu").spare == spare
    for prompt, cached in ((1024, 0), (1024, 300), (700, 0), (500, 0), (513, 511)):
        tokens = longest_pass(plan, prompt, cached)
        assert min(512, prompt - cached) <= tokens <= prompt - cached
        assert activation_bytes(layout, Workload(prompt, prefill_tokens=tokens)) <= room
        if tokens < prompt - cached:
            assert activation_bytes(layout, Workload(prompt, prefill_tokens=tokens + 1)) > room


def test_what_an_engine_has_beyond_its_plan_is_no_room_for_a_pass():
    layout = toy()
    needed = plan_for(layout, laptop()).use("cpu").planned
    tight, roomy = (
        plan_for(layout, laptop(), policy="cpu", max_memory={"cpu": needed + spare})
        for spare in (0, 64 * MIB)
    )
    for prompt, cached in ((1024, 0), (1024, 300), (513, 511)):
        taken = {"cpu": 64 * MIB, "cuda:0": 1}
        assert longest_pass(roomy, prompt, cached, taken) == longest_pass(tight, prompt, cached)
    assert longest_pass(roomy, 1024, 300) > longest_pass(tight, 1024, 300)


def test_a_recurrent_state_takes_the_prompt_in_one_pass_and_a_warning():
    layout = toy()
    blocks = [replace(b, cache=CacheCost(0, 2 * MIB)) if b.kind == "decoder" else b for b in layout.blocks]
    layout = replace(layout, blocks=tuple(blocks), architecture="MambaForCausalLM")
    needed = plan_for(layout, laptop()).use("cpu").planned
    plan = plan_for(layout, laptop(), policy="cpu", max_memory={"cpu": needed + 2 * MIB})
    assert longest_pass(plan, 1024) == 1024
    assert any("prompt of more than about" in warning for warning in plan.warnings)
    attention = plan_for(toy(), laptop(), max_memory={"cpu": 390 * MIB})
    assert not any("prompt of more than" in warning for warning in attention.warnings)


def test_recurrent_states_of_a_scan():
    # one state of 1000 bytes: Mamba keeps 3 a token (512), chunked scans 3 for each 64 tokens (8)
    block = Block("m.layers.0", "layers.0", "decoder", (tensor("a", 8),), cache=CacheCost(0, 1000))
    layout = replace(toy(), blocks=(block,))
    plain = activation_bytes(replace(layout, blocks=(replace(block, cache=CacheCost()),)), Workload(1024))
    # half of the state counts as a cache: 500
    assert activation_bytes(layout, Workload(1024)) == plain + 500 + 3 * 8 * 1000
    mamba = replace(layout, architecture="MambaForCausalLM")
    assert activation_bytes(mamba, Workload(1024)) == plain + 500 + 3 * 512 * 1000


def test_all_in_ram():
    plan = plan_for(toy(), laptop())
    use = plan.use("cpu")
    assert homes(plan) == "RRRRRRR"
    assert use.weights == (4 * 100 + 2 * 40) * MIB + 64 * 2  # the norm: 64 elements
    assert use.kv_cache == 4 * MIB
    assert use.activations == ACTIVATIONS + LOGITS
    assert use.slots == 0
    assert plan.fits
    assert plan.problems == ()


# six layers of 100 MiB, embedding and head of 40 each, the norm; KV cache of 1 MiB a layer
SIX = (6 * 100 + 2 * 40) * MIB + 128
REST = 6 * MIB + ACTIVATIONS + LOGITS


def test_disk_blocks_of_a_cpu_arrive_in_two_slots():
    # three layers in RAM 300, ring of two 200, embedding + head 80; evenly: 1, 3 and 5 of 0 to 5
    plan = plan_for(toy(layers=6), cramped(SIX - 100 * MIB + REST))
    assert homes(plan) == "RRDRDRDRR"
    use = plan.use("cpu")
    assert use.weights == 380 * MIB + 128
    assert use.slots == 200 * MIB
    assert (use.kept, use.spare) == (0, 0)
    assert plan.use("disk").weights == 300 * MIB
    assert all(place.compute == "cpu" for place in plan.placements)
    assert [place.way for place in plan.placements] == ["cpu", *("cpu", "read") * 3, "cpu", "cpu"]
    assert plan.fits
    assert not plan.mapped


def test_one_byte_less_puts_one_more_layer_on_disk():
    exact = SIX - 100 * MIB + REST
    assert homes(plan_for(toy(layers=6), cramped(exact))).count("D") == 3
    assert homes(plan_for(toy(layers=6), cramped(exact - 1))).count("D") == 4


def test_disk_blocks_that_fit_the_free_ram_are_used_in_the_page_cache():
    # a limit of 300 MiB in a laptop with 5.2 GiB free: two layers 200, embedding + head 80, 8 for the rest
    plan = plan_for(toy(), laptop(), max_memory={"cpu": 290 * MIB})
    assert homes(plan) == "RRDRDRR"
    use = plan.use("cpu")
    assert (use.weights, use.slots, use.kept) == (280 * MIB + 128, 0, 0)
    assert plan.mapped
    assert plan.fits
    assert ("disk", "cpu") not in plan.forecast.bytes_per_token
    assert "the system's page cache has room" in " ".join(plan.warnings)


def test_the_page_cache_must_hold_all_of_them_to_the_byte():
    whole = SIX + REST
    map_ = {"": "cpu", "layers.1": "disk", "layers.4": "disk"}

    def mapped(usable: int) -> bool:
        limits = {"cpu": whole - 200 * MIB}  # nothing to keep in RAM
        request = {"placement": map_, "policy": "map.json", "max_memory": limits}
        return make_plan(toy(layers=6), cramped(usable), Workload(1024), **request).mapped

    assert mapped(whole)
    assert not mapped(whole - 1)


def test_offloaded_blocks_keep_their_cache_on_the_gpu():
    # 2 layers on the GPU: 200 + slots 300 + embedding, head 80 + KV of all six layers 6, 4 for the rest
    limit = (200 + 300 + 80) * MIB + 128 + REST
    plan = plan_for(toy(layers=6), slow_cpu(), max_memory={"cuda:0": limit})
    assert homes(plan).count("R") == 4
    use = plan.use("cuda:0")
    assert (use.weights, use.kv_cache, use.slots) == (280 * MIB + 128, 6 * MIB, 300 * MIB)
    assert use.activations == ACTIVATIONS + LOGITS
    assert use.spare == 0
    assert plan.use("cpu").planned == plan.use("cpu").weights == 400 * MIB
    assert {place.compute for place in plan.placements} == {"cuda:0"}


@pytest.mark.parametrize(("offloaded", "slots"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_no_more_slots_than_offloaded_blocks(offloaded: int, slots: int):
    map_ = {"": "cuda:0"} | {f"layers.{i}": "cpu" for i in range(offloaded)}
    plan = make_plan(toy(layers=6), slow_cpu(), Workload(1024), placement=map_, policy="map.json")
    assert plan.use("cuda:0").slots == slots * 100 * MIB


def test_blocks_from_the_disk_pass_a_ring_in_ram_on_their_way_to_a_gpu():
    # RAM has room for the ring of two and no copies: 200 MiB
    map_ = {"": "cuda:0"} | {f"layers.{i}": "disk" for i in (0, 2, 4)}
    options = {"policy": "map.json", "max_memory": {"cpu": 200 * MIB}}
    plan = make_plan(toy(layers=6), slow_cpu(), Workload(1024), placement=map_, **options)
    assert plan.use("cpu").slots == plan.use("cpu").planned == 200 * MIB
    assert plan.use("cuda:0").slots == 300 * MIB
    assert not plan.mapped
    assert {place.way for place in plan.placements} == {"resident", "read"}


@pytest.mark.parametrize(
    ("room", "kept", "slots"),
    [
        (299, 0, 200),  # ring 200, and a copy more would take 100
        (300, 1, 200),
        (399, 1, 200),
        (499, 2, 200),
        (500, 5, 0),  # all five of them, and nothing is read: no ring
    ],
)
def test_copies_of_disk_blocks_stay_in_the_ram_that_is_left(room: int, kept: int, slots: int):
    map_ = {"": "cuda:0"} | {f"layers.{i}": "disk" for i in range(5)}
    options = {"policy": "map.json", "max_memory": {"cpu": room * MIB}}
    plan = make_plan(toy(layers=6), slow_cpu(), Workload(1024), placement=map_, **options)
    assert plan.use("cpu").kept == kept * 100 * MIB
    assert plan.use("cpu").slots == slots * MIB
    assert sum(place.kept for place in plan.placements) == kept
    assert plan.fits
    # only what is not kept comes from the disk, the others from RAM
    moved = plan.forecast.bytes_per_token
    assert moved.get(("disk", "cuda:0"), 0) == (5 - kept) * 100 * MIB
    assert moved.get(("cpu", "cuda:0"), 0) == kept * 100 * MIB


def test_kept_copies_are_spread_evenly():
    map_ = {"": "cuda:0"} | {f"layers.{i}": "disk" for i in range(9)}
    options = {"policy": "map.json", "max_memory": {"cpu": 500 * MIB}}
    plan = make_plan(toy(layers=10), slow_cpu(), Workload(1024), placement=map_, **options)
    assert [i for i, place in enumerate(plan.placements[1:10]) if place.kept] == [1, 4, 7]


def test_copies_in_ram_need_no_slots_where_the_cpu_computes():
    # RAM: 120 of weights, 6 + 4; of 500 MiB on disk three copies 300 and the ring 200 would not fit, two do
    map_ = {"": "disk", "embed": "cpu", "head": "cpu", "norm": "cpu", "layers.0": "cpu"}
    box = cramped(180 * MIB + 128 + REST + 400 * MIB)
    plan = make_plan(toy(layers=6), box, Workload(1024), placement=map_, policy="map.json")
    assert (plan.use("cpu").kept, plan.use("cpu").slots, plan.use("cpu").spare) == (200 * MIB, 200 * MIB, 0)
    assert plan.forecast.bytes_per_token["disk", "cpu"] == 300 * MIB


def test_a_draft_model_stays_whole_where_the_model_computes():
    # its 4 layers of 10 MiB, embedding and head of 2, the norm, KV cache of 1 MiB a layer
    draft = toy(layer_elements=5 * MIB, embed_elements=MIB)
    size = (4 * 10 + 2 * 2 + 4) * MIB + 128
    layout = replace(toy(), draft=draft)
    assert plan_for(layout, laptop()).use("cpu").draft == size
    beside = plan_for(layout, slow_cpu())
    assert (beside.use("cuda:0").draft, beside.use("cpu").draft) == (size, 0)
    # 24 bytes less than the model and its draft take: one layer goes, one slot stays, so more have to
    whole = plan_for(layout, slow_cpu()).use("cuda:0").planned
    assert homes(plan_for(layout, slow_cpu(), max_memory={"0": whole})) == "0000000"
    assert "R" in homes(plan_for(layout, slow_cpu(), max_memory={"0": whole - 1}))


def test_a_prefill_unpacks_the_largest_packed_matrix():
    # layers of 50 Mi weights in 9 tensors: the last one has 50 Mi - 8 * (50 Mi // 9) = 5825432, 1422 rows
    # of 4096 in bf16: 11649024 bytes; 4.5 bits a weight
    layout = packed(toy())
    assert activation_bytes(layout, Workload(1024)) == ACTIVATIONS + 1422 * 4096 * 2
    each = sum(round(n * 4.5 / 8) for n in [50 * MIB // 9] * 8 + [50 * MIB - 8 * (50 * MIB // 9)])
    assert plan_for(layout, laptop()).use("cpu").weights == 4 * each + 80 * MIB + 128


@pytest.mark.parametrize(
    ("experts", "unpacked"),
    [
        (4, 4 * 1024 * 512 * 2),  # all of them
        (128, 64 * MIB),  # some at a time
        (2, 2 * 1024 * 512 * 2),
    ],
)
def test_a_prefill_unpacks_some_experts_at_a_time(experts: int, unpacked: int):
    whole = toy(experts=experts, active=2)
    stack = TensorInfo(
        "model.layers.0.mlp.experts.down_proj", (experts, 1024, 512), "nf4", experts * 1024 * 288
    )
    first = replace(whole.blocks[1], tensors=(stack,), expert_bytes=stack.bytes)
    layout = replace(whole, quantization="nf4", blocks=(whole.blocks[0], first, *whole.blocks[2:]))
    without = replace(layout, quantization="")
    assert activation_bytes(layout, Workload(1024)) == activation_bytes(without, Workload(1024)) + unpacked


@pytest.mark.parametrize(
    ("method", "each"), [("quanto-int8", 2), ("float8", 2 + 2), ("int4", 4), ("int2", 4)]
)
def test_what_quanto_unpacks_is_there_twice_before_its_scale(method, each):
    layout = packed(toy(), method)
    assert activation_bytes(layout, Workload(1024)) == ACTIVATIONS + 1422 * 4096 * each


def test_the_mlp_of_llm_int8_keeps_sums_of_32_bits():
    # for each of 512 * 256 values 10 bytes instead of 6: act(gate) in bf16, up in int32, fp16 and bf16
    layout = packed(toy(), "int8")
    assert activation_bytes(layout, Workload(1024)) == ACTIVATIONS + 512 * 256 * 4 + 1422 * 4096 * 2


def test_an_embedding_in_ram_is_looked_up_there():
    map_ = {"": "cuda:0", "embed": "cpu"}
    plan = make_plan(toy(), slow_cpu(), Workload(1024), placement=map_, policy="map.json")
    assert (plan.placements[0].way, plan.placements[0].compute) == ("looked-up", "cuda:0")
    assert plan.use("cuda:0").slots == 0
    assert plan.use("cpu").planned == plan.use("cpu").weights == 40 * MIB
    assert [way for way in plan.forecast.bytes_per_token if "cpu" in way] == []
    tied = make_plan(
        toy(tied=True), slow_cpu(), Workload(1024), placement=map_ | {"head": "cpu"}, policy="m.json"
    )
    assert tied.placements[0].way == "streamed"  # the head wants the matrix on its GPU


@pytest.mark.parametrize("lacks", [1, 40 * MIB])
def test_a_table_leaves_the_gpu_before_any_layer(lacks):
    whole = plan_for(toy(), slow_cpu())
    assert homes(whole) == "0" * 7
    limit = whole.use("cuda:0").planned - lacks
    assert homes(plan_for(toy(), slow_cpu(), max_memory={"cuda:0": limit})) == "R" + "0" * 6
    on_disk = plan_for(toy(), slow_cpu(), max_memory={"cuda:0": limit, "cpu": 0})
    assert homes(on_disk) == "D" + "0" * 6
    assert (on_disk.placements[0].way, on_disk.use("cpu").planned) == ("looked-up", 0)
    assert on_disk.forecast.decode_tps == pytest.approx(whole.forecast.decode_tps, rel=1e-3)


def test_a_table_stays_where_its_room_helps_no_layer():
    # embedding and head 80, 8 layers, slots 300, cache 12: the table's 40 would not hold another layer
    limit = (80 + 800 + 300 + 12) * MIB + 128 + ACTIVATIONS + LOGITS
    exact = plan_for(toy(layers=12), slow_cpu(), max_memory={"cuda:0": limit})
    assert homes(exact) == "00R00R00R00R000"
    one_byte_less = plan_for(toy(layers=12), slow_cpu(), max_memory={"cuda:0": limit - 1})
    assert homes(one_byte_less) == "R0R00R00R00R000"


def test_a_table_leaves_several_gpus_first():
    two = machine(gpu(0, 24 * GIB), gpu(1, 24 * GIB), ram(64 * GIB, read=1e9), disk(100 * GIB), bus=12e9)
    limits = {"cuda:0": 420 * MIB, "cuda:1": 460 * MIB}
    plan = plan_for(toy(layers=8), two, max_memory=limits)
    assert homes(plan) == "R0000" + "1" * 6
    assert plan.use("cuda:0").slots == 0


@pytest.mark.parametrize(("layout", "large"), [(llama8b, 12), (qwen32b, 24), (qwen32b, 48)])
@pytest.mark.parametrize("small", [1, 2, 4])
def test_a_small_gpu_beside_a_large_one_makes_no_plan_slower(layout, large: int, small: int):
    """One that has room for nothing but a table would be given layers of others to compute."""

    def decode_tps(*gib: int) -> float:
        gpus = [gpu(number, size * GIB) for number, size in enumerate(gib)]
        box = machine(*gpus, ram(64 * GIB), disk(200 * GIB), bus=25e9)
        plan = plan_for(layout(), box, 2048)
        assert plan.fits
        return plan.forecast.decode_tps

    assert decode_tps(small, large) > 0.99 * decode_tps(large)


def test_where_nothing_streams_by_itself_more_than_the_fewest_layers_are_tried():
    """Like Gemma 3n E4B with a context of 32,768: a table of 4.6 GB, and layers of which the CPU takes some."""
    layout = llama("n", layers=35, layer_elements=68 * MIB, kv_per_token=4096, hidden=2048)
    embed = replace(layout.blocks[0], tensors=(tensor("model.embed_tokens.weight", 2200 * MIB),))
    layout = replace(layout, blocks=(embed, *layout.blocks[1:]))
    box = machine(gpu(0, 4 * GIB), ram(64 * GIB, read=12e9), disk(100 * GIB), bus=12e9)
    plan = plan_for(layout, box, 32768)
    assert plan.fits
    assert {"streamed", "cpu"} <= {place.way for place in plan.placements}


def test_buffers_stay_where_the_block_computes():
    layout = toy()
    blocks = tuple(replace(b, buffer_bytes=10) if b.label == "layers.1" else b for b in layout.blocks)
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB))
    map_ = {"": "cuda:0", "layers.1": "cpu"}
    plan = make_plan(replace(layout, blocks=blocks), box, Workload(1024), placement=map_, policy="map.json")
    assert plan.use("cuda:0").buffers == 10
    assert plan.use("cpu").buffers == 0


def test_window_and_batch_limit_and_multiply_the_cache():
    # window of 256 tokens: 4 layers * 1 KiB * 256 * 2 sequences
    blocks = tuple(
        replace(b, cache=CacheCost(1024, 0, 256)) if b.kind == "decoder" else b for b in toy().blocks
    )
    plan = make_plan(
        replace(toy(), blocks=blocks),
        laptop(),
        Workload(4096, batch=2),
        placement=POLICIES["cpu"],
        policy="cpu",
    )
    assert plan.use("cpu").kv_cache == 4 * KIB * 256 * 2


def test_a_tied_head_has_no_bytes_and_stays_with_the_embedding():
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB))
    for policy in POLICIES:
        plan = plan_for(toy(tied=True), box, policy=policy, max_memory={"0": 388 * MIB})
        assert plan.device_map["lm_head"] == plan.device_map["model.embed_tokens"]
        assert sum(use.weights for use in plan.uses) == 440 * MIB + 128


# --- Policies


def test_auto_spreads_offloaded_layers_and_keeps_the_ends():
    # resident: 80 of embedding and head, 8 layers; slots 300; cache 12; 4 for the rest
    plan = plan_for(toy(layers=12), slow_cpu(), max_memory={"0": (80 + 800 + 300 + 12 + 4) * MIB})
    assert homes(plan) == "0" + "0R0" * 4 + "00"


def test_auto_fills_ram_before_the_disk_and_spreads_what_goes_there():
    # four layers on the GPU; RAM: five and the ring of two
    limits = {"0": (80 + 400 + 300 + 12 + 4) * MIB, "cpu": 700 * MIB}
    plan = plan_for(toy(layers=12), slow_cpu(), max_memory=limits)
    assert homes(plan).count("0") == 4 + 3
    assert homes(plan).count("R") == 5
    on_disk = [i for i, sign in enumerate(homes(plan)) if sign == "D"]
    assert len(on_disk) == 3
    assert min(on_disk[1] - on_disk[0], on_disk[2] - on_disk[1]) >= 3
    assert plan.use("cpu").spare == 0


def test_sequential_is_contiguous():
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    limits = {"0": 400 * MIB, "cpu": 550 * MIB}
    signs = homes(plan_for(toy(layers=12), box, policy="sequential", max_memory=limits))
    assert signs == "".join(sorted(signs, key="0RD".index))
    assert set(signs) == set("0RD")


def test_balanced_is_even_and_auto_fills_the_first():
    box = machine(*(gpu(i, 24 * GIB) for i in range(4)), ram(64 * GIB))
    layout = toy(layers=16)
    assert homes(plan_for(layout, box)) == "0" * 19
    counts = [homes(plan_for(layout, box, policy="balanced")).count(str(i)) for i in range(4)]
    assert max(counts) - min(counts) <= 2
    weights = [use.weights for use in plan_for(layout, box, policy="balanced").uses if use.device != "cpu"]
    assert max(weights) - min(weights) <= 100 * MIB


def test_balanced_low_0_leaves_the_first_gpu_empty_while_it_can():
    box = machine(*(gpu(i, 24 * GIB) for i in range(3)), ram(64 * GIB))
    signs = homes(plan_for(toy(layers=16), box, policy="balanced_low_0"))
    assert set(signs) == {"1", "2"}
    # The others take 800 MiB each less 4 of activations and cache: 7 layers; two must go to the first
    limits = {"1": 800 * MIB, "2": 800 * MIB}
    signs = homes(plan_for(toy(layers=16), box, policy="balanced_low_0", max_memory=limits))
    assert signs.count("0") == 1 + 2  # the embedding and two layers
    assert "R" not in signs


def test_cpu_policy_ignores_gpus():
    plan = plan_for(toy(), workstation(), policy="cpu")
    assert homes(plan) == "R" * 7
    assert plan.warnings[0].startswith("cuda:0 is not used")


def test_a_gpu_too_small_for_one_block_leaves_the_work_to_the_cpu_and_says_so():
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB))
    plan = plan_for(toy(), box, max_memory={"0": 90 * MIB})
    assert homes(plan) == "R" * 7
    assert plan.fits
    assert "cuda:0 is not used, its 90.0 MiB cannot take" in plan.warnings[0]


def test_unified_memory_is_counted_once_and_never_a_store():
    plan = plan_for(qwen32b(), mac(), context=8192)
    assert set(plan.device_map.values()) == {"mps", "disk"}
    assert [use.device for use in plan.uses] == ["mps", "disk"]
    assert "share one memory" in " ".join(plan.warnings)


def test_a_described_mac_counts_its_memory_once():
    box = read_machine(Path(__file__).parent.parent / "examples" / "machines" / "mac-unified.json")
    plan = plan_for(qwen32b(), box, context=8192)
    assert set(plan.device_map.values()) == {"mps", "disk"}
    assert sum(use.planned for use in plan.uses if use.device != "disk") < 48 * GIB


def test_unified_memory_refuses_what_only_fits_when_counted_twice():
    # 34 GiB of memory are free; 24 on mps and 20 on the CPU would each fit alone
    layout = toy(layers=44, layer_elements=512 * MIB)  # layers of 1 GiB
    map_ = {"": "mps"} | {f"layers.{i}": "cpu" for i in range(20)}
    plan = make_plan(layout, mac(), Workload(1024), placement=map_, policy="map.json")
    assert plan.use("mps").spare > 0
    assert plan.use("cpu").spare > 0
    assert not plan.fits
    assert "mps and cpu share one memory, which lacks" in plan.problems[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_405b_on_eight_gpus_is_covered_and_planned_at_once(policy):
    plan = plan_for(llama405b(), eight_gpus(), context=8192, policy=policy)
    assert list(plan.device_map) == [block.name for block in llama405b().blocks]
    assert plan.fits


# --- Budgets


def test_budget_keeps_a_reserve_and_never_exceeds_what_is_free():
    box = machine(gpu(0, 24 * GIB, 20 * GIB), ram(64 * GIB, 40 * GIB), disk(1000 * GIB, 10 * GIB))
    budget = make_budget(box, {"0": 30 * GIB, "cpu": 8 * GIB})
    reserve = 512 * MIB + 24 * GIB // 50
    assert budget.reserve["cuda:0"] == reserve
    assert budget.limits["cuda:0"] == 20 * GIB - reserve
    assert budget.limits["cpu"] == 8 * GIB
    assert budget.limits["disk"] == 999 * GIB  # blocks are read from files that are there
    assert budget.explicit == {"cuda:0", "cpu"}


def test_a_limit_above_what_is_free_is_lowered_with_a_word():
    plan = plan_for(toy(), laptop(), max_memory={"cpu": 20 * GIB})
    assert any(w.startswith("cpu: 20.0 GiB were asked for, 5.") for w in plan.warnings)


@pytest.mark.parametrize(
    ("limits", "says", "next_step"),
    [
        ({"cuda:1": GIB}, "no device 'cuda:1'", "Did you mean cuda:0?"),
        ({"1": GIB}, "no device '1'", "Devices: cuda:0, cpu, disk"),
        ({"ram": GIB}, "no device 'ram'", "Did you mean cpu?"),
        ({"0": GIB, "cuda:0": GIB}, "names cuda:0 twice", "Keep one"),
    ],
)
def test_bad_limits(limits, says, next_step):
    with pytest.raises(PlanError, match=says) as caught:
        make_budget(workstation(), limits)
    assert next_step in caught.value.next_step


# --- Problems and remedies


def test_the_remedy_is_true_context():
    # 180 MiB of cache at 8192 tokens do not fit 150; the remedy's context does
    plan = plan_for(starter(), laptop(), context=8192, max_memory={"cpu": 150 * MIB})
    assert not plan.fits
    assert plan.problems[0].startswith("cpu (RAM) lacks ")
    context = int(plan.remedies[0].split("--ctx-size ")[1].split()[0])
    assert plan_for(starter(), laptop(), context=context, max_memory={"cpu": 150 * MIB}).fits
    assert not plan_for(starter(), laptop(), context=context + 256, max_memory={"cpu": 150 * MIB}).fits


def test_the_remedy_is_true_limit_and_names_the_block():
    box = cramped(400 * MIB)  # less than the model: no page cache
    plan = plan_for(toy(tied=True), box, context=256, max_memory={"cpu": 60 * MIB})
    assert plan.remedies[0].startswith(
        "2 blocks at a time of 100.0 MiB (layers.0) do not fit the 60.0 MiB of cpu."
    )
    least = int(plan.remedies[0].split("cpu=")[1].split("MiB")[0])
    assert plan_for(toy(tied=True), box, context=256, max_memory={"cpu": least * MIB}).fits
    assert not plan_for(toy(tied=True), box, context=256, max_memory={"cpu": (least - 1) * MIB}).fits


def test_the_remedy_is_a_smaller_dtype_or_another_policy():
    full = llama(layers=8, layer_elements=256 * MIB, dtype="float32")  # 8 GiB, 4 in bf16
    box = machine(ram(8 * GIB, 6 * GIB))
    plan = plan_for(full, box)
    assert "With --dtype bfloat16 it fits." in plan.remedies
    assert "or a disk to offload to" in plan.remedies[-1]
    plan = plan_for(full, laptop(), policy="cpu")
    assert "With --device-map auto it fits." in plan.remedies


def test_refusal_is_two_lines_with_what_would_fit():
    error = refusal(plan_for(qwen32b(), workstation(), policy="cpu"))
    assert isinstance(error, PlanError)
    assert error.message.startswith("Qwen3-32B does not fit: cpu (RAM) lacks")
    assert error.next_step.endswith("fits.")
    assert len(str(error).splitlines()) == 2


def test_warnings():
    shared = replace(gpu(0, 24 * GIB, 14 * GIB), other_bytes=8 * GIB)  # and 2 GiB of our own
    box = machine(shared, ram(64 * GIB, 8 * GIB), disk(100 * GIB, 2 * GIB))
    plan = plan_for(qwen32b(), box, context=50_000)
    text = "\n".join(plan.warnings)
    assert "on disk, read again for every token at 800 MB/s: slow." in text
    assert "The disk has 2.0 GiB free" in text
    assert "50,000 tokens is longer than the 40,960" in text
    assert "Other programs hold 8.0 GiB of cuda:0" in text
    assert plan_for(toy(), laptop()).warnings[0] == "No GPU was found: the CPU computes."
    roomy = machine(shared, ram(64 * GIB), disk(100 * GIB))
    assert not plan_for(toy(), roomy).warnings  # all of it is on the GPU: nobody is in the way


def test_streaming_that_is_slower_than_the_cpu_is_said():
    # 61 GiB of weights: over a bus of 25 GB/s 0.4 tok/s, read by a CPU at 60 GB/s 0.9. This CPU takes
    # minutes for a prompt, so it is not made to compute beside the GPU unasked where its state cannot visit it
    def hints(box: Machine, policy: str = "auto") -> list[str]:
        return [w for w in plan_for(layout, box, policy=policy).warnings if "--device-map cpu is" in w]

    recurrent = tuple(replace(b, cache=replace(b.cache, fixed_bytes=1)) for b in qwen32b().blocks)
    layout = replace(qwen32b(), blocks=recurrent)
    fast, space = ram(128 * GIB, read=6.0e10), disk(1000 * GIB)
    assert len(hints(machine(gpu(0, 8 * GIB), fast, space))) == 1
    assert not hints(machine(gpu(0, 8 * GIB), fast, space), "cpu")
    assert not hints(machine(gpu(0, 96 * GIB), fast, space))  # nothing is offloaded
    assert not hints(machine(gpu(0, 8 * GIB), ram(128 * GIB, read=1.0e9), space))  # the CPU is slower
    assert not hints(machine(gpu(0, 30 * GIB), ram(50 * GIB, read=6.0e10), space))  # the RAM takes not all
    layout = qwen32b()
    assert not hints(machine(gpu(0, 8 * GIB), fast, space))  # the CPU decodes beside the GPU


def test_a_gpu_that_others_have_filled_is_named_in_the_refusal():
    full = replace(gpu(0, 24 * GIB, 1 * GIB), other_bytes=22 * GIB)
    box = machine(full, ram(64 * GIB), disk(1000 * GIB))
    plan = make_plan(qwen32b(), box, Workload(1024), placement={"": "cuda:0"}, policy="gpu.json")
    error = refusal(plan)
    assert error.message.startswith("Qwen3-32B does not fit: cuda:0 lacks")
    assert error.message.endswith("Other programs hold 22.0 GiB of it.")
    assert error.next_step == "With --device-map auto it fits."
    ours = machine(replace(full, other_bytes=0), ram(64 * GIB), disk(1000 * GIB))
    plan = make_plan(qwen32b(), ours, Workload(1024), placement={"": "cuda:0"}, policy="gpu.json")
    assert "Other programs" not in refusal(plan).message + " ".join(plan.warnings)


def test_the_first_remedy_is_one():
    # neither RAM nor GPU takes two blocks at this context; their size is told after what helps
    box = machine(gpu(0, 24 * GIB, 1 * GIB), ram(8 * GIB, 5 * GIB), disk(1000 * GIB))
    plan = plan_for(qwen32b(), box, context=8192)
    assert "it fits" in plan.remedies[0]
    assert any(" not fit the" in remedy for remedy in plan.remedies[1:])


def test_an_empty_model_is_refused():
    with pytest.raises(PlanError, match="no blocks"):
        plan_for(replace(toy(), blocks=()), laptop())


# --- Device maps


def write(tmp_path, content: str):
    path = tmp_path / "map.json"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("map_", "expected"),
    [
        ({"": "cuda:0"}, "0000000"),
        ({"": 0}, "0000000"),
        ({"": "0"}, "0000000"),
        ({"model": 0, "lm_head": "cpu"}, "000000R"),
        ({"": 0, "model.layers": "cpu", "layers.3": "disk"}, "0RRRD00"),
        (
            {
                "embed": 0,
                "layers.0": 0,
                "layers.1": 0,
                "layers.2": 0,
                "model.layers.3": 0,
                "norm": 0,
                "head": 0,
            },
            "0000000",
        ),
        ({"": 0, "model.layers.1.part": "cpu"}, "00R0000"),
    ],
)
def test_device_maps_expand(tmp_path, map_, expected):
    found = read_device_map(write(tmp_path, json.dumps(map_)), toy(), workstation())
    assert list(found) == [block.name for block in toy().blocks]
    plan = make_plan(toy(), workstation(), Workload(1024), placement=found, policy="map.json")
    assert homes(plan) == expected


@pytest.mark.parametrize(
    ("content", "says", "next_step"),
    [
        ("{", "no JSON", "Write it like"),
        ("[1]", "no JSON object", "Write it like"),
        ("[" * 100_000, "no JSON", "Write it like"),
        ('{"": "cpu", "": "disk"}', "names '' twice", "Keep one"),
        (
            '{"": "cpu", "layers.1": "disk", "model.layers.1": "disk"}',
            "places model.layers.1 twice",
            "not both",
        ),
        ('{"": "gpu"}', "no device 'gpu'", "cuda:0"),
        ('{"": "cuda:7"}', "no device 'cuda:7'", "Devices: cuda:0, cpu, disk"),
        ('{"": 7}', "no device '7'", "Devices"),
        ('{"": null}', "no device name", "cuda:0"),
        ('{"": true}', "no device name", "cuda:0"),
        ('{"": {"a": 1}}', "no device name", "cuda:0"),
        ('{"": "cpu", "layers.9": "disk"}', "no block 'layers.9'", "Did you mean"),
        ('{"": "cpu", "xyzzy": "disk"}', "no block 'xyzzy'", "%llm map"),
        ('{"model": "cpu"}', "leaves out head", "parent"),
        ('{"layers.0": "cpu"}', "leaves out embed, layers.1, layers.2, layers.3 and 2 more", "parent"),
        ("{}", "leaves out", "parent"),
        ('{"": 0, "model.layers.1.part.0": "cpu"}', "splits layers.1 over cpu and cuda:0", "model.layers.1"),
    ],
)
def test_device_map_errors(tmp_path, content, says, next_step):
    with pytest.raises(PlanError) as caught:
        read_device_map(write(tmp_path, content), toy(), workstation())
    assert says in caught.value.message
    assert next_step in caught.value.next_step
    assert str(tmp_path) not in str(caught.value)


def test_device_map_file_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match=r"Cannot read the device map no\.json") as caught:
        read_device_map(tmp_path / "no.json", toy(), workstation())
    assert str(tmp_path) not in str(caught.value)


def test_tied_blocks_on_two_devices_are_refused(tmp_path):
    # the head holds no tensor of its own, so it follows the embedding when the map leaves it out
    tied = toy(tied=True)
    with pytest.raises(PlanError, match="embed, head share a tensor") as caught:
        read_device_map(write(tmp_path, '{"": "cpu", "head": "cuda:0"}'), tied, workstation())
    assert caught.value.next_step == "Put them all on cpu."
    found = read_device_map(write(tmp_path, '{"model": "cuda:0"}'), tied, workstation())
    assert found["lm_head"] == "cuda:0"


def test_a_block_of_buffers_only_may_be_left_out(tmp_path):
    rotary = Block("model.rotary_emb", "rotary_emb", "other", buffer_bytes=256)
    layout = toy()
    layout = replace(layout, blocks=(layout.blocks[0], rotary, *layout.blocks[1:]))
    map_ = {"embed": "cpu", "model.layers": "cpu", "norm": "cuda:0", "head": "cuda:0"}
    found = read_device_map(write(tmp_path, json.dumps(map_)), layout, workstation())
    assert found["model.rotary_emb"] == "cuda:0"
    plan = make_plan(layout, workstation(), Workload(1024), placement=found, policy="map.json")
    assert plan.use("cuda:0").buffers == 256


@pytest.mark.parametrize(
    "answer", [None, [], "cpu", {3: "cpu"}, {"": None}, {"": "cuda:7"}, {"nowhere": "cpu"}]
)
def test_a_planner_that_answers_nonsense_is_named(answer: object):
    broken = Planner("odd", "a broken plugin", lambda *_: answer)
    with pytest.raises(PlanError, match="The policy odd gave") as caught:
        make_plan(toy(), laptop(), Workload(1024), placement=broken, policy="odd")
    assert caught.value.next_step.startswith("Use --device-map auto")


def test_a_planner_that_fails_is_named():
    broken = Planner("odd", "a broken plugin", lambda *_: {}["gone"])
    with pytest.raises(PlanError, match="The policy odd failed: KeyError: 'gone'"):
        make_plan(toy(), laptop(), Workload(1024), placement=broken, policy="odd")


def test_a_planner_that_leaves_a_block_out_is_named():
    broken = Planner("half", "a broken plugin", lambda layout, *_: {layout.blocks[0].name: "cpu"})
    with pytest.raises(PlanError, match="The policy half gave an invalid map: The device map leaves out"):
        make_plan(toy(), laptop(), Workload(1024), placement=broken, policy="half")


# --- Properties


@st.composite
def layouts(draw) -> ModelLayout:
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
    tied = draw(st.booleans())
    layout = llama(
        layers=len(sizes),
        embed_elements=draw(st.integers(1, 300)) * MIB // 2,
        tied=tied,
        kv_per_token=draw(st.integers(0, 4096)),
        experts=draw(st.sampled_from([0, 8])),
        active=2,
    )
    blocks, ties = list(layout.blocks), draw(st.integers(0, 3))
    for i, size in enumerate(sizes, 1):
        blocks[i] = replace(
            blocks[i], tensors=(tensor(f"model.layers.{i - 1}.w", size * MIB // 2),), expert_bytes=0
        )
    if ties == 3 and len(sizes) > 2:  # layers that share a tensor, as some small models do
        blocks[1] = replace(blocks[1], tied_to=(blocks[3].name,))
        blocks[3] = replace(blocks[3], tied_to=(blocks[1].name,))
    return replace(layout, blocks=tuple(blocks))


@st.composite
def machines(draw) -> Machine:
    def memory() -> tuple[int, int]:
        total = draw(st.integers(1, 4096)) * MIB
        return total, draw(st.integers(0, total))

    unified = draw(st.booleans())
    if unified:
        shared = memory()
        devices = [replace(gpu(0, *shared), unified=True), ram(*shared, unified=True)]
    else:
        devices = [*(gpu(i, *memory()) for i in range(draw(st.integers(0, 4)))), ram(*memory())]
    if draw(st.booleans()):
        devices.append(disk(*memory()))
    return machine(*devices)


@given(layouts(), machines(), st.sampled_from(sorted(POLICIES)), st.integers(1, 8192), st.data())
@settings(max_examples=250, deadline=None)
def test_every_plan_holds(layout, box, policy, context, data):
    limits = data.draw(
        st.dictionaries(st.sampled_from([d.id for d in box.devices]), st.integers(0, 2048 * MIB), max_size=3)
    )
    plan = plan_for(layout, box, context, policy, max_memory=limits)
    # every block once, in model order, on a device that is there
    assert [place.block.name for place in plan.placements] == [block.name for block in layout.blocks]
    assert sum(use.weights for use in plan.uses) == layout.bytes
    assert all(box.has(place.home) and box.device(place.compute).kind != "disk" for place in plan.placements)
    # ties kept
    for block in layout.blocks:
        assert {plan.device_map[name] for name in block.tied_to} <= {plan.device_map[block.name]}
    # limits respected, nothing negative, and no user limit or free byte exceeded
    for use in plan.uses:
        purposes = (
            use.weights,
            use.buffers,
            use.kv_cache,
            use.activations,
            use.slots,
            use.kept,
            use.draft,
            use.reserve,
            use.other,
        )
        assert min(purposes) >= 0
        assert use.limit <= limits.get(use.device, use.limit)
        if plan.fits:
            assert use.planned <= use.limit
            device = box.device(use.device)
            assert (
                use.planned + use.reserve
                <= (device.total_bytes if use.device == "disk" else device.free_bytes)
                or not use.planned
            )
    assert plan.fits == (not plan.problems)
    assert bool(plan.remedies) == (not plan.fits)
    assert plan.forecast.decode_tps >= 0
    assert all(size >= 0 for size in plan.forecast.bytes_per_token.values())


@st.composite
def roomy_machines(draw) -> Machine:
    """Up to three GPUs, a fast or a slow CPU; enough memory for most maps."""
    gpus = [gpu(i, draw(st.integers(2, 8)) * GIB, read=2e12) for i in range(draw(st.integers(0, 3)))]
    memory = ram(draw(st.integers(1, 8)) * GIB, read=draw(st.sampled_from([1e9, 2e10, 6e10])))
    memory = replace(memory, flops=draw(st.sampled_from([1e11, 1e13])))
    return machine(*gpus, memory, disk(100 * GIB), bus=draw(st.sampled_from([6e9, 2.5e10])))


@given(layouts(), roomy_machines(), st.integers(1, 4096), st.booleans(), st.data())
@settings(max_examples=250, deadline=None)
def test_what_the_planner_adds_to_a_map_fits_and_changes_no_home(layout, box, context, is_packed, data):
    layout = packed(layout, columns=64) if is_packed else layout
    layout = replace(layout, draft=toy(layers=1, layer_elements=MIB)) if data.draw(st.booleans()) else layout
    names = [d.id for d in box.devices]
    map_ = {"": names[0]} | {
        b.name: data.draw(st.sampled_from(names)) for b in layout.blocks if not b.tied_to
    }
    limits = {"cpu": data.draw(st.integers(0, 5000)) * MIB} if data.draw(st.booleans()) else {}
    options = {"placement": map_, "policy": "map.json", "max_memory": limits}
    assert_places_were_only_improved(make_plan(layout, box, Workload(context), **options))


def assert_places_were_only_improved(plan: Plan):
    """What the planner added to a map fits where the map alone did, changes no home and makes nothing slower."""
    setting = Setting.of(plan, Constants())
    plain = computing_places(setting, plan.device_map)
    assert [place.home for place in plan.placements] == [place.home for place in plain]
    fits = all(use.spare >= 0 for use in setting.uses(plain))
    assert all(use.spare >= 0 for use in plan.uses) or not fits
    gpus = {gpu.id for gpu in plan.machine.gpus}
    for place, before in zip(plan.placements, plain, strict=True):
        assert place.compute in {place.home} | gpus | {"cpu"}
        assert place.compute in gpus or place.home not in gpus
        assert not place.kept or place.home == "disk"
        if place.compute != before.compute:  # the CPU takes over what lies in RAM, and nothing else
            assert place.compute == "cpu"
            assert place.home == "cpu" or place.kept
    if not gpus & set(plan.device_map.values()):
        assert {place.compute for place in plan.placements} == {"cpu"}
    else:
        assert not plan.mapped
    # nor slower: but what a GPU has no room for could not be loaded at any speed
    if not lacking(setting, plain):
        before = make_forecast(setting, plain, setting.uses(plain))
        assert plan.forecast.decode_tps >= 0.999 * before.decode_tps


def test_a_gpu_gives_away_what_it_has_no_room_for_even_to_a_slower_cpu():
    # cuda:0 has three layers, and a slot for the one on disk: 100 MiB at 0.9 of 800 MB/s are 0.15 s. With a
    # byte less the CPU computes it from a copy: 100 MiB and 512 KiB of cache at 500 MB/s are 0.21 s, beside
    # 0.3 ms for a layer of the CPU and three recorded ones of the GPU.
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB, read=5e8), disk(100 * GIB))
    options = {"placement": {"": "cuda:0", "layers.1": "disk"}, "policy": "map.json"}
    room = make_plan(toy(), box, Workload(1024), **options).use("cuda:0").planned
    plan = make_plan(toy(), box, Workload(1024), **options, max_memory={"cuda:0": room - 1})
    assert plan.fits
    assert plan.warnings[0].endswith("A smaller -c N takes less.")
    on_gpu_s = sum(
        (p.block.bytes + (0.5 * MIB if p.block.kind == "decoder" else 0)) / 1e12
        for p in plan.placements
        if p.compute != "cpu"
    )
    spent_s = 100.5 * MIB / 5e8 + 0.3e-3 + on_gpu_s + 3 * 0.14e-3
    assert plan.forecast.decode_tps == pytest.approx(1 / spent_s, rel=1e-3)
    assert_places_were_only_improved(plan)
    # without the 4 MiB of all keys and values it would lack a byte all the same
    plan = make_plan(toy(), box, Workload(1024), **options, max_memory={"cuda:0": room - 4 * MIB - 1})
    assert plan.fits
    assert plan.warnings[0] == (
        "There is no room on cuda:0 for all layers to compute there: the CPU decodes 1 layer of those in RAM."
    )


def test_a_copy_of_a_small_block_slows_no_large_layers_down():
    # layers of 2 GiB take a GPU of 1 TB/s longer to read than to launch; with a copy of the norm, which was
    # read from the disk when its turn came, a step is a graph
    box = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(100 * GIB))
    map_ = {"": "cuda:0", "norm": "disk"}
    plan = make_plan(toy(layer_elements=GIB), box, Workload(1024), placement=map_, policy="map.json")
    assert [place.block.label for place in plan.placements if place.kept] == ["norm"]
    assert_places_were_only_improved(plan)


@given(
    layouts(),
    machines(),
    st.dictionaries(st.text(max_size=12), st.text(max_size=8) | st.integers(-2, 9), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_any_map_gives_a_plan_or_a_plan_error(layout, box, map_):
    try:
        plan = make_plan(layout, box, Workload(512), placement=map_, policy="map.json")
    except PlanError as error:
        plan, next_step = None, error.next_step
    assert next_step if plan is None else len(plan.placements) == len(layout.blocks)


@pytest.mark.parametrize("box", [laptop, workstation, four_gpus, eight_gpus, mac])
def test_a_plan_of_auto_fits_whenever_sequential_does(box):
    for layout in (starter(), qwen32b(), moe30b()):
        if plan_for(layout, box(), 4096, "sequential").fits:
            assert plan_for(layout, box(), 4096, "auto").fits


def test_what_has_no_bytes_is_read_from_no_disk() -> None:
    """A block of buffers alone, which somebody has sent there: nothing is slower for it."""
    layout = llama8b()
    rotary = Block("model.rotary_emb", "rotary_emb", "other", (), buffer_bytes=512)
    layout = replace(layout, blocks=(layout.blocks[0], rotary, *layout.blocks[1:]))
    on = machine(gpu(0, 24 * GIB), ram(64 * GIB), disk(900 * GIB, read=3e9))
    plans = [
        make_plan(layout, on, Workload(2048), placement={"": "cuda:0", **homes}, policy="hand")
        for homes in ({}, {"model.rotary_emb": "disk"})
    ]
    assert plans[0].forecast == plans[1].forecast
    assert not [warning for warning in plans[1].warnings if "disk" in warning]
