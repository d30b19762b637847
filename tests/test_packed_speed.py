"""What plans make of packed weights, by the kernels that a machine has for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_magic.machine import Device, Link, Machine
from llm_magic.model import ModelLayout
from llm_magic.plan import Placement, Plan, Workload
from llm_magic.planning.packed import GUEST_PASSES, Kernel, kernel_of, numbers_per_s, share_of
from llm_magic.planning.planner import make_plan
from llm_magic.planning.sweep import block_sweep
from llm_magic.units import GIB
from tests.engines import POLICY
from tests.layouts import llama8b, packed, qwen32b

RTX3060 = Device(
    "cuda:0", "gpu", "RTX 3060", 12 * GIB, 11 * GIB, 360e9, flops=60e12, layer_s=1e-3, capability="8.6"
)
RAM = Device("cpu", "cpu", "RAM", 64 * GIB, 58 * GIB, 45e9, flops=1e12)
WAYS = (Link("cpu", "cuda:0", 12e9), Link("cuda:0", "cpu", 12e9), Link("disk", "cpu", 3e9))
METHODS = ("nf4", "fp4", "int8", "quanto-int8", "int4", "int2", "float8")


def planned(layout: ModelLayout, *, gpu: Device = RTX3060, cpu: Device = RAM) -> Plan:
    disk = Device("disk", "disk", "SSD", 1000 * GIB, 500 * GIB, 3e9)
    machine = Machine("PC", (gpu, cpu, disk), WAYS)
    workload = Workload(4096, prefill_tokens=512)
    return make_plan(layout, machine, workload, placement=POLICY["auto"], policy="auto")


def computed_by_cpu(plan: Plan) -> int:
    return sum(place.compute == "cpu" for place in plan.placements if place.block.kind == "decoder")


def by_libraries(layout: ModelLayout) -> ModelLayout:
    return replace(layout, details={**layout.details, "no_cpu_kernels": True})


@pytest.mark.parametrize("capability", ["avx512_bf16", "avx512", "avx2", ""])
def test_4_bit_layers_stream_where_the_cpu_would_unpack_them_first(capability: str) -> None:
    layout, cpu = packed(qwen32b()), replace(RAM, capability=capability)
    quick, slow = planned(layout, cpu=cpu), planned(by_libraries(layout), cpu=cpu)
    assert computed_by_cpu(quick) > 2 * computed_by_cpu(slow)
    assert slow.forecast.decode_tps < quick.forecast.decode_tps


def test_more_threads_get_through_more_until_ram_gives_no_more() -> None:
    kernel = kernel_of(packed(llama8b()))
    one, two, many = (share_of(kernel, replace(RAM, threads=count)) for count in (1, 2, 16))
    assert 2 * one == pytest.approx(two)
    assert two < many < 1
    uncounted = share_of(kernel, replace(RAM, threads=0))
    assert one < uncounted <= many
    assert share_of(kernel, replace(RAM, read_bytes_per_s=0)) > 0


def test_speeds_that_were_measured_count_before_those_of_the_table() -> None:
    """Threads of one core: a quarter of what the table has for 4 bits, half of it for 8."""
    measured = ("mxfp4", 8e9), ("int4", 5e9), ("int8", 18e9)
    cpu = replace(RAM, threads=2, capability="avx512_bf16", packed=measured)
    read = cpu.read_bytes_per_s
    shares = {
        method: share_of(Kernel(method), cpu) for method in ("mxfp4", "nf4", "int4", "int2", "int8", "float8")
    }
    assert shares == {
        "mxfp4": pytest.approx(8e9 / read),
        "nf4": pytest.approx(9e9 / read),
        "int4": pytest.approx(5e9 / read),
        "int2": pytest.approx(7.2e9 / read),  # by the table: two threads
        "int8": pytest.approx(18e9 / read),
        "float8": pytest.approx(36e9 / read),
    }
    before = replace(cpu, packed=measured[:1])
    assert share_of(Kernel("int4"), before) == share_of(Kernel("nf4"), before), (
        "as long as nobody measured it"
    )
    libraries = Kernel("nf4", is_compiled=False)
    assert share_of(libraries, cpu) == share_of(libraries, replace(cpu, packed=()))
    assert share_of(Kernel("int8"), replace(cpu, packed=(("int8", 1e12),))) < 1


def test_a_plan_says_what_is_missing_where_the_cpu_computes() -> None:
    tiny = replace(RTX3060, total_bytes=GIB, free_bytes=GIB // 2)
    for method in METHODS:
        layout = packed(llama8b(), method)
        assert not any("llvmlite" in warning for warning in planned(layout, gpu=tiny).warnings)
        plan = planned(by_libraries(layout), gpu=tiny)
        is_slow = computed_by_cpu(plan) and method not in ("int4", "quanto-int8")
        assert any("without the kernels that llvmlite" in warning for warning in plan.warnings) == bool(
            is_slow
        )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_kernels(method: str) -> None:
    for dtype in ("bfloat16", "float16"):
        kernel = kernel_of(replace(packed(llama8b(), method), dtype=dtype))
        assert 0 < share_of(kernel, RTX3060) < 1
        by_cpu = [share_of(kernel, replace(RAM, capability=c)) for c in ("avx512_bf16", "avx512", "avx2")]
        assert all(0 < share < 1 for share in by_cpu)
        assert by_cpu[0] >= by_cpu[-1]
        slow = share_of(replace(kernel, is_compiled=False), RAM)
        assert slow <= by_cpu[-1] or method == "quanto-int8"


def test_torchs_4_bit_kernel_takes_bfloat16_in_groups_of_128() -> None:
    layout = packed(llama8b(), "int4")
    quick = share_of(kernel_of(layout), RTX3060)
    for other in (replace(layout, dtype="float16"), replace(layout, hidden_size=576)):
        assert share_of(kernel_of(other), RTX3060) < quick / 5
    for gpu in (
        replace(RTX3060, capability="7.5"),
        replace(RTX3060, capability="gfx90a"),
        replace(RTX3060, id="mps"),
    ):
        assert share_of(kernel_of(layout), gpu) < quick / 5
    for capability in ("", "8.0", "12.0"):
        assert share_of(kernel_of(layout), replace(RTX3060, capability=capability)) == quick
    for group in (0, 32, 64, 96, 128, 256):  # of a checkpoint that was packed before
        share = share_of(kernel_of(replace(layout, details=layout.details | {"group": group})), RTX3060)
        assert (share == quick) == (group in (32, 64, 128, 256))


def test_a_plan_says_what_a_gpu_has_no_kernel_for() -> None:
    roomy = replace(RTX3060, total_bytes=48 * GIB, free_bytes=47 * GIB)
    layout = packed(llama8b(), "int4")
    half = replace(layout, dtype="float16")
    rows = replace(layout, details=layout.details | {"group": 0})
    expected = {"": layout, "--dtype bfloat16 is": half, "--quantize nf4 is": rows}
    for words, each in expected.items():
        found = [text for text in planned(each, gpu=roomy).warnings if "by several kernels" in text]
        assert len(found) == bool(words)
        assert all(words in text for text in found)
    old = planned(layout, gpu=replace(roomy, capability="7.5")).warnings
    assert any("--quantize nf4 is" in text for text in old)
    assert not any("by several kernels" in text for text in planned(packed(llama8b()), gpu=roomy).warnings)


def test_a_gpu_that_unpacks_all_for_every_token_is_no_faster_than_with_plain_weights() -> None:
    resident = {"gpu": replace(RTX3060, total_bytes=48 * GIB, free_bytes=47 * GIB)}
    plain = planned(llama8b(), **resident).forecast.decode_tps
    integers = planned(packed(llama8b(), "quanto-int8", bits=8), **resident).forecast.decode_tps
    floats = planned(packed(llama8b(), "float8", bits=8), **resident).forecast.decode_tps
    halves = planned(packed(llama8b(), "nf4"), **resident).forecast.decode_tps
    assert floats < integers < plain < halves


def test_integers_in_the_order_of_a_cpu_cost_a_gpu_that_they_visit() -> None:
    layout = packed(llama8b(), "int4")
    block = next(block for block in layout.blocks if block.kind == "decoder")
    streamed = Placement(block, "cpu", "cuda:0")
    visiting = replace(streamed, prefill="cuda:0")
    for each, passes in ((layout, GUEST_PASSES), (replace(layout, dtype="float16"), 0)):
        there, usual = (block_sweep(each, Workload(1024), p, tokens=512) for p in (visiting, streamed))
        assert there.copied["cuda:0"] - usual.copied["cuda:0"] == passes * there.packed["cuda:0"]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4 unpacked", "nf4", "quanto-int8", "quanto-int8 unpacked"])
def test_a_cpu_makes_numbers_of_what_a_gpu_has_no_kernel_for_as_well(name: str) -> None:
    cpu = replace(RAM, unpacked=(("mxfp4", 5e9), ("int8", 5e9)))
    assert numbers_per_s(Kernel(name), cpu) == 5e9
    for other in (Kernel("int4 unpacked"), Kernel("int2"), Kernel(name, is_compiled=False), Kernel()):
        assert numbers_per_s(other, cpu) == 0
