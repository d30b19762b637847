"""The computer at hand: measured once, kept, and looked at again without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.host.memory import host_memory
from llm_magic.host.probe import machine_to_json, probe_machine, read_machine
from llm_magic.machine import Device, Link, Machine
from llm_magic.units import GIB

GPU = Device("cuda:0", "gpu", "Card", 24 * GIB, 20 * GIB, other_bytes=3 * GIB)
SPEEDS = {
    "read_bytes_per_s": 9e11,
    "flops": 1e14,
    "measured_on": "2026-11-22",
    "method": "bf16 matrix products",
}
CPU_SPEED = Device(
    "cpu", "cpu", "", 0, 0, 5e10, 7e11,
    measured_on="2026-11-22", method="bf16, 2 threads", capability="avx512_bf16",
)  # fmt: skip
LINKS = (Link("cpu", "cuda:0", 24e9, "pinned copies", "2026-11-22"),)


class Backend:
    """A backend that reports these devices, and remembers how it was asked."""

    def __init__(self, *devices: Device, links: tuple[Link, ...] = ()) -> None:
        self.devices, self.links, self.asked = devices, links, []

    def __call__(self, measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
        self.asked.append(measure)
        if not measure:
            return tuple(d for d in self.devices if d.id != "cpu"), ()
        measured = (replace(d, **SPEEDS) if d.kind == "gpu" else d for d in self.devices)
        return tuple(measured), self.links


@pytest.fixture
def probe(cache_folder: Path, tmp_path: Path) -> Callable[..., Machine]:
    def run(backend: Backend, **options: object) -> Machine:
        return probe_machine(backend, disk_folder=tmp_path / "offload", **options)

    return run


def test_first_call_measures_and_the_next_one_uses_it(probe, cache_folder):
    backend = Backend()
    first, second = probe(backend), probe(backend)
    assert backend.asked == [True]
    assert (cache_folder / "machine.json").is_file()
    for device in first.devices:
        again = second.device(device.id)
        assert again.read_bytes_per_s == device.read_bytes_per_s
        assert again.flops == device.flops
        assert again.measured_on == device.measured_on
    assert second.links == first.links


def test_this_computer_makes_sense(probe):
    machine = probe(Backend())
    cpu, disk = machine.device("cpu"), machine.device("disk")
    assert not machine.described
    assert 0 < cpu.free_bytes <= cpu.total_bytes <= host_memory().total
    assert cpu.read_bytes_per_s > 1e8
    assert cpu.flops > 1e8
    assert 0 < disk.free_bytes <= disk.total_bytes
    assert disk.read_bytes_per_s > 1e6
    assert machine.bytes_per_s("disk", "cpu") == disk.read_bytes_per_s
    assert "core" in cpu.name


def test_measure_asks_again(probe):
    backend = Backend()
    probe(backend)
    probe(backend, measure=True)
    assert backend.asked == [True, True]


def test_speed_of_the_backend_on_the_cpu_counts(probe):
    cpu = probe(Backend(CPU_SPEED)).device("cpu")
    assert (cpu.read_bytes_per_s, cpu.flops, cpu.method) == (5e10, 7e11, "bf16, 2 threads")
    assert cpu.capability == "avx512_bf16"
    assert cpu.total_bytes == host_memory().total
    assert cpu.assumed == ()


def test_room_of_a_gpu_is_looked_up_and_its_speed_kept(probe):
    probe(Backend(GPU, CPU_SPEED, links=LINKS))
    fuller = Backend(replace(GPU, free_bytes=2 * GIB, other_bytes=21 * GIB), CPU_SPEED)
    machine = probe(fuller)
    gpu = machine.device("cuda:0")
    assert fuller.asked == [False]
    assert (gpu.free_bytes, gpu.used_bytes, gpu.other_bytes) == (2 * GIB, 22 * GIB, 21 * GIB)
    assert (gpu.read_bytes_per_s, gpu.flops, gpu.measured_on) == (9e11, 1e14, "2026-11-22")
    assert machine.links[0] == LINKS[0]
    # nobody measured the way back, so it is assumed and says so
    back = next(link for link in machine.links if (link.source, link.target) == ("cuda:0", "cpu"))
    assert back.assumed


def test_another_gpu_is_measured_anew(probe):
    probe(Backend(CPU_SPEED))  # nothing kept says that there is a GPU …
    probe(Backend(GPU, CPU_SPEED), measure=True)
    second = Backend(GPU, replace(GPU, id="cuda:1"), CPU_SPEED)
    machine = probe(second)
    assert second.asked == [False, True]
    assert [gpu.id for gpu in machine.gpus] == ["cuda:0", "cuda:1"]


def test_unified_memory_follows_the_ram_without_the_backend(probe):
    unified = Device("mps", "gpu", "Apple M3 Max GPU", 48 << 40, 1, unified=True)
    backend = Backend(unified, CPU_SPEED)
    probe(backend)
    machine = probe(backend)
    assert backend.asked == [True]
    assert machine.device("mps").free_bytes == pytest.approx(machine.device("cpu").free_bytes)
    assert [link.target for link in machine.links] == ["cpu"]


def test_what_cannot_be_measured_is_assumed_and_marked(probe):
    machine = probe(lambda measure: ((replace(GPU, name="NVIDIA GeForce RTX 3090"),), ()))
    gpu = machine.device("cuda:0")
    assert (gpu.read_bytes_per_s, gpu.assumed, gpu.measured_on) == (936e9, ("read", "flops"), "")
    assert all(link.assumed for link in machine.links if "cuda:0" in (link.source, link.target))


def test_what_cannot_be_measured_again_is_as_it_was(probe):
    """Beside a model that leaves no room, for one."""
    probe(Backend(GPU, CPU_SPEED, links=LINKS))
    full = replace(GPU, flops=2e14, layer_s=3e-4, measured_on="2026-12-01", method="bf16 matrix products")

    def without_room(measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
        return (full, replace(CPU_SPEED, read_bytes_per_s=6e10, layer_s=1e-3)), ()

    machine = probe(without_room, measure=True)
    gpu, cpu = machine.device("cuda:0"), machine.device("cpu")
    assert (gpu.read_bytes_per_s, gpu.flops, gpu.layer_s, gpu.assumed) == (9e11, 2e14, 3e-4, ())
    assert gpu.measured_on == "2026-12-01"
    assert (cpu.read_bytes_per_s, cpu.flops, cpu.layer_s) == (6e10, 7e11, 1e-3)
    assert LINKS[0] in machine.links
    assert probe(Backend(GPU, CPU_SPEED)).device("cuda:0").read_bytes_per_s == 9e11  # kept so


def test_nothing_is_taken_over_from_another_gpu_or_from_assumptions(probe):
    probe(lambda measure: ((replace(GPU, name="NVIDIA GeForce RTX 3090", uuid="GPU-1"), CPU_SPEED), ()))
    probe(Backend(replace(GPU, uuid="GPU-1"), CPU_SPEED, links=LINKS), measure=True)
    other = replace(GPU, name="NVIDIA GeForce RTX 4090", uuid="GPU-2")
    machine = probe(lambda measure: ((other, CPU_SPEED), ()), measure=True)
    assert (machine.device("cuda:0").read_bytes_per_s, machine.device("cuda:0").assumed) == (
        1008e9,
        ("read", "flops"),
    )
    assert all(link.assumed for link in machine.links if "cuda:0" in (link.source, link.target))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "machines": {}}'])
def test_corrupt_cache_is_measured_anew(text, probe, cache_folder):
    cache_folder.mkdir()
    (cache_folder / "machine.json").write_text(text)
    backend = Backend()
    probe(backend)
    probe(backend)
    assert backend.asked == [True]


def test_a_second_disk_is_measured_alone(probe, cache_folder):
    backend = Backend()
    machine = probe(backend)
    kept = json.loads((cache_folder / "machine.json").read_text())
    (entry,) = kept["machines"].values()
    assert len(entry["disks"]) == 1
    entry["disks"] = {"another": {"name": "HDD", "read_bytes_per_s": 1.0, "measured_on": "", "method": ""}}
    (cache_folder / "machine.json").write_text(json.dumps(kept))
    assert probe(backend).device("disk").name == machine.device("disk").name
    assert backend.asked == [True]


def test_measuring_leaves_no_file_but_its_record(probe, cache_folder, tmp_path):
    probe(Backend())
    assert [path.name for path in cache_folder.iterdir()] == ["machine.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_saved_machine_reads_back_as_a_description(probe, tmp_path):
    machine = probe(Backend(GPU, CPU_SPEED, links=LINKS))
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(machine_to_json(machine)))
    assert read_machine(path) == replace(machine, described=True)


def test_nothing_heavy_is_imported_and_nothing_names_the_user(cache_folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from llm_magic.host.probe import probe_machine, machine_to_json\n"
        "from llm_magic.backends.accelerate.devices import accelerators\n"
        "machine = probe_machine(accelerators, disk_folder=Path(sys.argv[1]))\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules); print(machine_to_json(machine))"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        ).stdout
        for _ in range(2)
    ]
    assert answers[0].startswith("True")
    if "'cuda" not in answers[1] and "'xpu" not in answers[1]:  # their memory is the driver's to tell
        assert answers[1].startswith("False False")
    assert str(Path.home()) not in answers[1]
    assert str(tmp_path) not in answers[1]
