"""What is measured of a GPU: beside others' memory, beyond its cache, and together with the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from llm_magic.backends.accelerate import devices  # noqa: E402
from llm_magic.backends.accelerate.beside import rates_together  # noqa: E402
from llm_magic.machine import Device  # noqa: E402

pytestmark = pytest.mark.gpu


def the_gpu(found: tuple[Device, ...]) -> Device:
    return next(device for device in found if device.id == "cuda:0")


def test_everything_is_measured_alone_and_together() -> None:
    found, links = devices.accelerators(True)
    gpu, cpu = the_gpu(found), next(device for device in found if device.id == "cpu")
    assert gpu.read_bytes_per_s > 0
    assert gpu.flops > 0
    assert cpu.beside_bytes_per_s > 0
    for link in links:
        assert link.bytes_per_s > 0
        assert (link.beside_bytes_per_s > 0) == (link.source == "cpu")


def test_a_buffer_that_its_cache_may_hold_tells_nothing_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_MANY_CACHES", 1 << 20)
    gpu = the_gpu(devices.accelerators(True)[0])
    assert gpu.read_bytes_per_s == 0
    assert gpu.flops > 0


def test_what_the_allocator_keeps_is_room_to_measure_in() -> None:
    kept = torch.ones(64 << 20, dtype=torch.uint8, device="cuda:0")
    del kept
    before, _ = torch.cuda.mem_get_info(0)
    assert the_gpu(devices.accelerators(True)[0]).free_bytes >= before + (64 << 20)


def test_a_gpu_without_room_ends_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_magic.backends.accelerate.beside._COPY_BYTES", 1 << 48)
    with pytest.raises(RuntimeError):
        rates_together(lambda: None, 1, ["cuda:0"], 0.0)
