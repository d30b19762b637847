"""Devices as torch sees them here, and the CPU's speed with torch's own kernels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from llm_magic.backends.accelerate import devices, layer_time, packed_time
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.machine import PACKED_KINDS


def test_without_measuring_there_are_only_gpus_and_no_speeds():
    found, links = devices.accelerators(False)
    assert links == ()
    for device in found:
        assert device.kind == "gpu"
        assert 0 <= device.free_bytes <= device.total_bytes
        assert device.read_bytes_per_s == 0


def test_measuring_gives_the_cpu_its_speed_and_every_gpu_its_links(monkeypatch):
    for limit in ("_TOO_LONG", "_BUSY_S", "_PROMPTS_S"):  # other tests may keep the machine busy
        monkeypatch.setattr(layer_time, limit, float("inf"))
    for share in ("_OWN_SHARE", "_ALL_THREADS"):
        monkeypatch.setattr(layer_time, share, 0.0)
    found, links = devices.accelerators(True)
    cpu = next(device for device in found if device.id == "cpu")
    assert cpu.read_bytes_per_s > 1e8
    assert cpu.flops > 1e8
    assert cpu.layer_s > 1e-5
    assert 0 < cpu.state_s < 1e-5
    assert (cpu.ahead_s > 0) == (cpu_products.is_there() and not gpus_of(found))
    kinds = PACKED_KINDS if cpu_products.is_there() else ()
    for speeds in (cpu.packed, cpu.unpacked):
        assert {kind: 1e7 < speed < 1e13 for kind, speed in speeds} == dict.fromkeys(kinds, True)
    assert cpu.measured_on
    assert "bf16" in cpu.method
    assert cpu.capability
    gpus = [device.id for device in gpus_of(found) if not device.unified]
    assert {("cpu", gpu) for gpu in gpus} <= {(link.source, link.target) for link in links}


def gpus_of(found):
    return [device for device in found if device.kind == "gpu"]


@pytest.mark.parametrize(("limit", "value"), [("_TOO_LONG", 0.0), ("_BUSY_S", 0.0), ("_OWN_SHARE", 1000.0)])
def test_a_busy_device_gives_no_speed_of_layers(limit, value, monkeypatch):
    monkeypatch.setattr(layer_time, limit, value)
    found, _ = devices.accelerators(True)
    assert [device.layer_s for device in found if device.id == "cpu"] == [0.0]


@pytest.mark.parametrize(
    ("limits", "is_known"),
    [({}, True), ({"_ALL_THREADS": 1000.0}, False), ({"_PROMPTS_S": 0.0}, False)],
    ids=["idle", "busy", "slow"],
)
def test_a_busy_processor_or_a_slow_one_gives_no_speed_of_prompts(limits, is_known, monkeypatch):
    for limit, value in ({"_ALL_THREADS": 0.0, "_PROMPTS_S": float("inf")} | limits).items():
        monkeypatch.setattr(layer_time, limit, value)
    assert (prompts(1e15) > 0) == is_known


def test_prompts_that_are_no_slower_than_their_products_are_known_to_be_so(monkeypatch):
    monkeypatch.setattr(layer_time, "_ALL_THREADS", 0.0)
    assert 0 < prompts(1e3) < 1e-11


def prompts(flops):
    """What prompts take beside products at a speed of these."""
    import torch

    with torch.no_grad():
        return layer_time._Layers("cpu", lambda: None).state_s(flops, 0.01)


@pytest.mark.skipif(not cpu_products.is_there(), reason="no kernels for this processor")
@pytest.mark.parametrize("name", ["multiplied", "unpack"])
def test_a_kind_without_a_kernel_has_no_speed(name, monkeypatch):
    usual = getattr(cpu_products, name)

    def without(*args):
        kinds = [each.kind for each in args if isinstance(each, cpu_products.PackedWeights)]
        return None if kinds == ["int8"] else usual(*args)

    monkeypatch.setattr(cpu_products, name, without)
    products, numbers = packed_time.packed_speeds(32 << 20, 0.001)
    known, lacking = (numbers, products) if name == "multiplied" else (products, numbers)
    assert [kind for kind, _ in known] == list(PACKED_KINDS)
    assert [kind for kind, _ in lacking] == [kind for kind in PACKED_KINDS if kind != "int8"]


def test_whatever_goes_wrong_gives_no_speed_of_packed_weights(monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr(packed_time, "_weights", fail)
    assert packed_time.packed_speeds(32 << 20, 0.001) == ((), ())


@pytest.mark.parametrize(("again", "expected"), [(3e11, 3e11), (1e11, 2e11), (0.0, 2e11)])
def test_a_gpu_that_reads_faster_after_some_work_is_as_fast_as_that(again, expected, monkeypatch):
    monkeypatch.setattr(devices, "_read_speed", lambda *_: again)
    import torch

    device = devices.Device("cuda:0", "gpu", "GPU", 8 << 30, 8 << 30, read_bytes_per_s=2e11)
    assert devices._read_again(torch, device, 0.0).read_bytes_per_s == expected


def test_no_room_to_measure_in_gives_no_speed():
    import torch

    device = devices._gpu("cuda:0", "full", 100, 100, 0, unified=False)
    assert devices._measured(torch, device, 0.0) == device


@pytest.mark.parametrize(
    ("total", "free", "own", "expected"),
    [(100, 30, 20, (30, 50)), (100, 120, 0, (100, 0)), (100, -5, 100, (0, 0)), (100, 0, 0, (0, 100))],
)
def test_what_others_hold_is_used_but_not_ours(total, free, own, expected):
    device = devices._gpu("cuda:0", "GPU", total, free, own, unified=False)
    assert (device.free_bytes, device.other_bytes) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, "avx512_bf16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "avx512"),
        ({"avx2": True, "avx512_f": False}, "avx2"),
        ({"neon": True}, "default"),
        (None, "default"),
    ],
)
def test_a_cpu_is_known_by_its_widest_vectors(found, expected):
    cpu = SimpleNamespace() if found is None else SimpleNamespace(get_capabilities=lambda: found)
    backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "DEFAULT"))
    assert devices._cpu_capability(SimpleNamespace(cpu=cpu, backends=backends)) == expected


@pytest.mark.parametrize(("hip", "expected"), [(None, "8.6"), ("7.1", "gfx90a")])
def test_a_gpu_is_known_by_its_compute_capability_or_architecture(hip, expected):
    facts = SimpleNamespace(major=8, minor=6, gcnArchName="gfx90a:sramecc+:xnack-")
    torch = SimpleNamespace(version=SimpleNamespace(hip=hip))
    assert devices._gpu_capability(torch, facts) == expected


def test_no_devices_where_torch_cannot_be_imported():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from llm_magic.backends.accelerate.devices import accelerators\n"
        "assert accelerators(True) == ((), ())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layer_takes_nothing_that_is_known_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from llm_magic.backends.accelerate.devices import accelerators\n"
        "(cpu,) = (device for device in accelerators(True)[0] if device.id == 'cpu')\n"
        "assert cpu.layer_s == 0 and cpu.read_bytes_per_s > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
