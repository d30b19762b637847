"""The nouns of a machine."""

from __future__ import annotations

import pytest

from llm_magic.machine import Device, Link, Machine

GPU = Device("cuda:0", "gpu", "RTX 4090", 100, 30, 1000.0, other_bytes=50)
CPU = Device("cpu", "cpu", "CPU", 400, 500, 40.0)
MACHINE = Machine("box", (GPU, CPU), (Link("cpu", "cuda:0", 25.0),))


def test_used_is_what_is_not_free_and_never_negative():
    assert GPU.used_bytes == 70
    assert CPU.used_bytes == 0


def test_bandwidth_is_the_links_and_within_a_device_its_own():
    assert MACHINE.bytes_per_s("cpu", "cuda:0") == 25.0
    assert MACHINE.bytes_per_s("cuda:0", "cuda:0") == 1000.0
    assert MACHINE.bytes_per_s("cuda:0", "cpu") == 0.0


def test_devices_are_found_by_id():
    assert MACHINE.gpus == (GPU,)
    assert MACHINE.device("cpu") is CPU
    assert MACHINE.has("cpu")
    assert not MACHINE.has("disk")
    with pytest.raises(KeyError):
        MACHINE.device("disk")


def test_identity_of_the_hardware_is_not_shown():
    assert "GPU-1234" not in repr(Device("cuda:0", "gpu", "RTX", 1, 1, uuid="GPU-1234"))
