"""``--machine FILE``: what it reads, what it assumes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.errors import OptionError
from llm_magic.host.machine_file import machine_from_json, machine_to_json, read_machine
from llm_magic.machine import Device, Link, Machine
from llm_magic.units import GIB, TIB

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "machines").glob("*.json"))
CPU = {"id": "cpu", "total": "64GiB"}


def described(*devices, links=()):
    return machine_from_json({"devices": [*devices, CPU], "links": list(links)})


def written(tmp_path, data):
    path = tmp_path / "box.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_smallest_description_is_filled_with_marked_assumptions(tmp_path):
    machine = read_machine(written(tmp_path, {"devices": [{"id": "cuda:0", "name": "RTX 4090"}, CPU]}))
    assert machine.described
    assert machine.name == "box"
    gpu, cpu, disk = machine.devices
    # the data sheet: 24 GiB, 1008 GB/s, 165 TFLOPS; half a GiB is not free
    assert (gpu.total_bytes, gpu.free_bytes) == (24 * GIB, 24 * GIB - GIB // 2)
    assert (gpu.read_bytes_per_s, gpu.flops) == (1008e9, 165e12)
    assert set(gpu.assumed) == {"total", "free", "read", "flops"}
    # 10 % of 64 GiB is more than 2 GiB
    assert (cpu.total_bytes, cpu.free_bytes, cpu.read_bytes_per_s) == (
        64 * GIB,
        64 * GIB - 64 * GIB // 10,
        40e9,
    )
    assert set(cpu.assumed) == {"free", "read", "flops"}
    assert (disk.name, disk.total_bytes, disk.free_bytes, disk.read_bytes_per_s) == (
        "NVMe SSD",
        TIB,
        TIB // 2,
        3e9,
    )
    assert set(disk.assumed) == {"total", "free", "read"}
    assert {(k.source, k.target, k.bytes_per_s, k.assumed) for k in machine.links} == {
        ("disk", "cpu", 3e9, True),
        ("cpu", "cuda:0", 25e9, True),
        ("cuda:0", "cpu", 25e9, True),
    }


def test_what_is_said_is_not_assumed():
    gpu = {
        "id": "cuda:0", "name": "Card", "total": "24GiB", "free": 23 * GIB, "other": "1GiB",
        "read": "1008 GB/s", "flops": "165 TFLOPS", "layer_s": 0.0004, "beside": "7 GB/s",
        "packed": {"int8": "9 GB/s", "mxfp4": 5e9}, "unpacked": {"int4": 2e9}, "ahead_s": 0.0003, "state_s": 2e-8,
        "measured_on": "2026-11-22", "capability": "8.9", "threads": 3,
    }  # fmt: skip
    link = {"from": "cpu", "to": "cuda:0", "bandwidth": 12e9, "beside": 9e9, "name": "PCIe 3 x16"}
    machine = described(gpu, links=[link])
    assert machine.device("cuda:0") == Device(
        "cuda:0",
        "gpu",
        "Card",
        24 * GIB,
        23 * GIB,
        1008e9,
        165e12,
        0.0004,
        7e9,
        (("int8", 9e9), ("mxfp4", 5e9)),
        (("int4", 2e9),),
        0.0003,
        2e-8,
        measured_on="2026-11-22",
        other_bytes=GIB,
        capability="8.9",
        threads=3,
    )
    assert machine.links[0] == Link("cpu", "cuda:0", 12e9, "PCIe 3 x16", beside_bytes_per_s=9e9)
    assert machine_from_json(machine_to_json(machine)) == machine


def test_unified_memory_is_part_of_the_ram_and_has_no_bus():
    machine = described({"id": "mps", "name": "Apple M3 Max GPU"})
    gpu = machine.device("mps")
    assert gpu.unified
    assert gpu.total_bytes == 48 * GIB
    assert gpu.free_bytes <= machine.device("cpu").free_bytes
    assert [(k.source, k.target) for k in machine.links] == [("disk", "cpu")]


def test_a_little_memory_leaves_nothing_free_but_is_no_error():
    cpu = machine_from_json({"devices": [{"id": "cpu", "total": "1GiB"}]}).device("cpu")
    assert cpu.free_bytes == 0


def test_links_of_a_family_and_an_exception_from_them():
    gpus = [{"id": f"cuda:{n}", "total": "80GiB"} for n in range(3)]
    machine = described(
        *gpus,
        links=[
            {"from": "cuda:*", "to": "cuda:*", "bandwidth": "400 GB/s"},
            {"from": "cuda:0", "to": "cuda:2", "bandwidth": "20 GB/s"},
        ],
    )
    assert machine.bytes_per_s("cuda:1", "cuda:0") == 400e9
    assert machine.bytes_per_s("cuda:0", "cuda:2") == 20e9
    assert all(link.source != link.target for link in machine.links)


def test_disk_speed_by_kind():
    speeds = {
        name: described({"id": "disk", "name": name}).device("disk").read_bytes_per_s
        for name in ("HDD", "SSD")
    }
    assert speeds == {"HDD": 0.15e9, "SSD": 0.5e9}


def test_npu_is_named_and_has_no_speed():
    npu = described({"id": "npu:0", "name": "Intel NPU"}).device("npu:0")
    assert (npu.kind, npu.total_bytes, npu.flops, npu.assumed) == ("npu", 0, 0.0, ())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_read_and_round_trip(path, tmp_path):
    machine = read_machine(path)
    assert machine.has("cpu")
    assert machine.has("disk")
    assert read_machine(written(tmp_path, machine_to_json(machine))) == machine


def test_examples_are_there():
    assert {path.stem for path in EXAMPLES} == {
        "rtx4090",
        "two-3090",
        "mac-unified",
        "laptop-no-gpu",
        "8xh100",
    }


def test_measured_machine_round_trips_exactly():
    machine = Machine(
        "Linux x86_64",
        (
            Device(
                "cuda:0",
                "gpu",
                "GPU",
                85_000_000_001,
                3,
                3.1e12 / 7,
                1e15 / 3,
                measured_on="2026-11-22",
                other_bytes=5,
                capability="9.0",
            ),
            Device("cpu", "cpu", "CPU · 1 core", 2 * GIB, GIB + 1, 1e10 / 3, 1e11, method="numpy, 1 threads"),
            Device("disk", "disk", "HDD", 10, 0, 123.456, assumed=("read",), method="typical HDD speed"),
            Device("npu:0", "npu", "Intel NPU", 0, 0, unified=True),
        ),
        (
            Link("disk", "cpu", 123.456, "HDD", assumed=True),
            Link("cpu", "cuda:0", 49.9e9, "pinned copies", "2026-11-22"),
            Link("cuda:0", "cpu", 50e9, "pinned copies", "2026-11-21"),
        ),
    )
    text = json.dumps(machine_to_json(machine))
    assert machine_from_json(json.loads(text)) == replace(machine, described=False)


GPU = {"id": "cuda:0", "total": "24GiB"}
LINK = {"from": "cpu", "to": "cuda:0", "bandwidth": "25 GB/s"}
BAD = {
    "list": ([], "no JSON object"),
    "number": (7, "no JSON object"),
    "unknown key": ({"devices": [CPU], "gpus": []}, "unknown key"),
    "devices no list": ({"devices": {"cpu": CPU}}, "no JSON list"),
    "device no object": ({"devices": ["cpu"]}, "no JSON object"),
    "no devices": ({}, '"cpu"'),
    "no cpu": ({"devices": [GPU]}, '"cpu"'),
    "cpu without total": ({"devices": [{"id": "cpu"}]}, "no total"),
    "zero ram": ({"devices": [{"id": "cpu", "total": 0}]}, "no total"),
    "gpu without total": ({"devices": [{"id": "cuda:0", "name": "Card"}, CPU]}, "no total"),
    "misspelt key": ({"devices": [{**CPU, "totl": 1}]}, "unknown key"),
    "no id": ({"devices": [{"total": "1GiB"}, CPU]}, "has the id null"),
    "bare cuda": ({"devices": [{"id": "cuda"}, CPU]}, 'has the id "cuda"'),
    "id no text": ({"devices": [{"id": 0}, CPU]}, "has the id 0"),
    "twice": ({"devices": [CPU, CPU]}, "there twice"),
    "size without number": ({"devices": [{"id": "cpu", "total": "lots"}]}, "no size"),
    "size with wrong unit": ({"devices": [{"id": "cpu", "total": "4 parsec"}]}, "no size"),
    "negative size": ({"devices": [{"id": "cpu", "total": -1}]}, "no size"),
    "true as size": ({"devices": [{"id": "cpu", "total": True}]}, "no size"),
    "size too large": ({"devices": [{"id": "cpu", "total": "99999999TiB"}]}, "no size"),
    "endless digits": ({"devices": [{"id": "cpu", "total": 10**400}]}, "no size"),
    "more free than there is": ({"devices": [{**CPU, "free": "65GiB"}]}, "free of"),
    "speed without time": ({"devices": [{**CPU, "read": "40 GB"}]}, "no speed"),
    "speed per minute": ({"devices": [{**CPU, "read": "40 GB/min"}]}, "no speed"),
    "flops": ({"devices": [{**CPU, "flops": "fast"}]}, "flops of cpu"),
    "layer_s": ({"devices": [{**CPU, "layer_s": "1 ms"}]}, "layer_s of cpu"),
    "packed": ({"devices": [{**CPU, "packed": {"int8": "quick"}}]}, "int8 of packed of cpu"),
    "unpacked": ({"devices": [{**CPU, "unpacked": {"int8": "quick"}}]}, "int8 of unpacked of cpu"),
    "packed kind": ({"devices": [{**CPU, "packed": {"int9": 1e9}}]}, "packed of cpu has an unknown key"),
    "layer_s too long": ({"devices": [{**CPU, "layer_s": 2}]}, "layer_s of cpu"),
    "flops list": ({"devices": [{**CPU, "flops": [1]}]}, "flops of cpu"),
    "unified": ({"devices": [{**GPU, "unified": "yes"}, CPU]}, "unified is"),
    "date": ({"devices": [{**CPU, "measured_on": "yesterday"}]}, "measured_on of cpu"),
    "assumed": ({"devices": [{**CPU, "assumed": ["everything"]}]}, "assumed of cpu"),
    "name no text": ({"devices": [{**CPU, "name": 5}]}, "name is 5"),
    "link to nowhere": ({"devices": [CPU], "links": [LINK]}, "'cuda:0'"),
    "link of no family": ({"devices": [CPU], "links": [{**LINK, "to": "*"}]}, "'*'"),
    "link to itself": ({"devices": [CPU], "links": [{**LINK, "to": "cpu"}]}, "to itself"),
    "link without bandwidth": ({"devices": [GPU, CPU], "links": [{"from": "cpu", "to": "cuda:0"}]}, "is missing"),
    "link with bad bandwidth": ({"devices": [GPU, CPU], "links": [{**LINK, "bandwidth": "x16"}]}, "no speed"),
    "link key": ({"devices": [GPU, CPU], "links": [{**LINK, "speed": 1}]}, "unknown key"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), BAD.values(), ids=BAD.keys())
def test_refused_with_a_next_step(data, says, tmp_path):
    with pytest.raises(OptionError) as caught:
        read_machine(written(tmp_path, data))
    assert says in caught.value.message
    assert caught.value.next_step
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"devices": [}', "[" * 100_000, '{"devices": [{"id": "cpu", "total": ' + "9" * 5000 + "}]}", "\udcff", " " * (5 << 20)],
    ids=["empty", "open", "broken", "deep", "digits", "no UTF-8", "large"],
)  # fmt: skip
def test_no_json(text, tmp_path):
    path = tmp_path / "box.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OptionError) as caught:
        read_machine(path)
    assert "box.json" in caught.value.message
    assert caught.value.next_step


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(value, tmp_path):
    with pytest.raises(OptionError, match="no size"):
        read_machine(written(tmp_path, f'{{"devices": [{{"id": "cpu", "total": {value}}}]}}'))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(OptionError, match="Cannot read") as caught:
            read_machine(path)
        assert str(tmp_path) not in str(caught.value).replace(path.name, "")


def test_hint_for_a_misspelt_key(tmp_path):
    with pytest.raises(OptionError) as caught:
        read_machine(written(tmp_path, {"devices": [{**CPU, "totl": 1}]}))
    assert "'total'" in caught.value.next_step


def test_names_are_single_lines_of_printable_text():
    name = described({"id": "cuda:0", "total": "1GiB", "name": "A\n\x1b[31mB"}).device("cuda:0").name
    assert name == "A [31mB"


def test_more_devices_or_links_than_any_computer_has_are_refused(tmp_path):
    gpus = [{"id": f"cuda:{n}", "total": "1GiB"} for n in range(64)]
    with pytest.raises(OptionError, match="65 devices"):
        read_machine(written(tmp_path, {"devices": [CPU, *gpus]}))
    links = [{"from": "cpu", "to": "disk", "bandwidth": "1 GB/s"}] * 1025
    with pytest.raises(OptionError, match="1025 links"):
        read_machine(written(tmp_path, {"devices": [CPU], "links": links}))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"devices": ' + "[" * 900 + "]" * 900 + "}"])
def test_nesting_without_end_is_refused(tmp_path, text):
    with pytest.raises(OptionError):
        read_machine(written(tmp_path, text))
