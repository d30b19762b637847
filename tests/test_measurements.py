"""Measurements are kept for this hardware, and a broken file is no obstacle."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest

from llm_magic.host.measurements import (
    DiskSpeed,
    Measurements,
    fingerprint,
    here,
    load_fit,
    load_measurements,
    save_fit,
    save_measurements,
)
from llm_magic.machine import Device, Link, Machine

CPU = Device(
    "cpu", "cpu", "CPU", 1000, 600, 25e9, 1e12, measured_on="2026-11-22", method="bf16 matrix products"
)
GPU = Device("cuda:0", "gpu", "GPU", 500, 400, 1e12 / 3, 1e14, measured_on="2026-11-22", uuid="GPU-1")
MACHINE = Machine(
    "Linux x86_64",
    (GPU, CPU),
    (Link("cpu", "cuda:0", 25e9, "pinned copies", "2026-11-22"), Link("cuda:0", "cpu", 2e9)),
)
KEPT = Measurements(
    MACHINE, {"fe00": DiskSpeed("HDD", 123.4, "2026-11-22", "direct reads"), "1": DiskSpeed("Disk")}
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "machine.json"


def anything(_model: str) -> bool:
    return True


def test_comes_back_as_it_was(path):
    save_measurements(path, "here", KEPT)
    assert load_measurements(path, "here") == KEPT
    assert load_measurements(path, "here").machine.device("cuda:0").uuid == "GPU-1"


def test_other_hardware_is_not_mixed_up(path):
    save_measurements(path, "here", KEPT)
    other = Measurements(replace(MACHINE, devices=(CPU,), links=()))
    save_measurements(path, "there", other)
    assert load_measurements(path, "here") == KEPT
    assert load_measurements(path, "there") == other
    assert load_measurements(path, "elsewhere") is None


def test_keeps_the_newest_machines_only(path):
    for number in range(20):
        save_measurements(path, str(number), KEPT)
    kept = [number for number in range(20) if load_measurements(path, str(number))]
    assert kept == list(range(4, 20))


def test_saving_again_replaces(path):
    save_measurements(path, "here", KEPT)
    save_measurements(path, "here", replace(KEPT, disks={}))
    assert load_measurements(path, "here").disks == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": 1}',
        '{"version": 1, "machines": []}',
        '{"version": 1, "machines": {"here": 7}}',
        '{"version": 1, "machines": {"here": {}}}',
        '{"version": 1, "machines": {"here": {"machine": {}, "uuids": {}, "disks": {}}}}',
        '{"version": 999, "machines": {}}',
    ],
)
def test_corrupt_file_is_ignored_and_written_anew(text, path):
    path.parent.mkdir()
    path.write_text(text)
    assert load_measurements(path, "here") is None
    save_measurements(path, "here", KEPT)
    assert load_measurements(path, "here") == KEPT


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("machine", {"devices": [{"id": "cpu", "total": "lots"}]}),
        ("uuids", []),
        ("disks", []),
        ("disks", {"fe00": {"name": "HDD", "speed": 1}}),
        ("disks", {"fe00": {"name": "HDD", "read_bytes_per_s": "fast"}}),
        ("disks", {"fe00": {"name": 5}}),
        ("disks", {"fe00": {"name": "HDD", "read_bytes_per_s": -1}}),
    ],
)
def test_corrupt_entry_is_ignored(part, value, path):
    save_measurements(path, "here", KEPT)
    data = json.loads(path.read_text())
    data["machines"]["here"][part] = value
    path.write_text(json.dumps(data))
    assert load_measurements(path, "here") is None


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_file_is_private_and_nothing_else_is_left(path):
    save_measurements(path, "here", KEPT)
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    save_measurements(tmp_path / "file" / "machine.json", "here", KEPT)


def test_fingerprint_is_stable_and_tells_hardware_apart(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = fingerprint()
    assert fingerprint() == here
    found = {here, fingerprint(("GPU-1",)), fingerprint(("GPU-2",)), fingerprint(("GPU-1", "GPU-2"))}
    assert fingerprint(("GPU-2", "GPU-1")) in found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found.add(fingerprint())
    assert len(found) == 5


def test_fingerprint_changes_with_the_cards_in_the_computer(tmp_path):
    found = {fingerprint(root=tmp_path)}
    card = tmp_path / "sys/class/drm/card0/device"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "device").write_text("0x744c\n")
    found.add(fingerprint(root=tmp_path))
    driver = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    driver.mkdir(parents=True)
    for uuid in ("GPU-a", "GPU-b"):
        (driver / "information").write_text(f"Model: \t\t RTX\nIRQ: 5\nGPU UUID: \t {uuid}\n")
        found.add(fingerprint(root=tmp_path))
    assert len(found) == 4


# What was fitted to models


def test_a_fit_is_kept_by_model_and_outlives_a_new_measurement(path):
    save_measurements(path, "here", KEPT)
    save_fit(path, "here", "llama", {"launch_s": 0.001})
    save_fit(path, "here", "qwen", {"launch_s": 0.002})
    save_measurements(path, "here", KEPT)
    assert load_measurements(path, "here") == KEPT
    assert load_fit(path, "here", "llama", anything) == {"launch_s": 0.001}
    assert load_fit(path, "there", "llama", anything) is None


def test_a_model_that_was_not_fitted_gets_the_newest_fit(path):
    assert load_fit(path, "here", "gemma", anything) is None
    save_fit(path, "here", "llama", {"n": 1})
    save_fit(path, "here", "qwen", {"n": 2})
    assert load_fit(path, "here", "gemma", anything) == {"n": 2}
    save_fit(path, "here", "llama", {"n": 3})
    assert load_fit(path, "here", "gemma", anything) == {"n": 3}


def test_the_oldest_fits_make_room(path):
    for number in range(70):
        save_fit(path, "here", str(number), {"n": number})
    assert load_fit(path, "here", "69", anything) == {"n": 69}
    assert load_fit(path, "here", "6", anything) == {"n": 6}
    assert load_fit(path, "here", "5", anything) == {"n": 69}  # 64 are kept: 6 to 69


@pytest.mark.parametrize("fits", [None, [], {"llama": 7}, "x"])
def test_fits_that_are_none_do_not_count(path, fits):
    save_measurements(path, "here", KEPT)
    data = json.loads(path.read_text())
    data["machines"]["here"]["fits"] = fits
    path.write_text(json.dumps(data))
    assert load_fit(path, "here", "llama", anything) is None
    assert load_measurements(path, "here") == KEPT
    save_fit(path, "here", "llama", {"n": 1})
    assert load_fit(path, "here", "llama", anything) == {"n": 1}


def test_this_computer_has_a_key_and_a_file_in_the_cache_folder(cache_folder):
    path, key = here()
    assert path == cache_folder / "machine.json"
    assert key == here()[1]
