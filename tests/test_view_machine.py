"""The picture of a machine: golden text, and HTML that carries no script and fetches nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm_magic.host.machine_file import read_machine
from llm_magic.machine import Device, Link, Machine
from llm_magic.units import GIB
from llm_magic.views.machine import machine_report

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "machines").glob("*.json"))
MEASURED = Machine(
    "Linux x86_64",
    (
        Device("cuda:0", "gpu", "RTX 4090", 24 * GIB, 12 * GIB, 9.1e11, 1.6e14, measured_on="2026-11-22", other_bytes=6 * GIB),
        Device("cpu", "cpu", "AMD EPYC · 2 cores", 64 * GIB, 48 * GIB, 3.2e10, 9e11, measured_on="2026-11-22", other_bytes=8 * GIB),
        Device("disk", "disk", "NVMe SSD", 1024 * GIB, 512 * GIB, 8.3e8, measured_on="2026-11-20"),
    ),
    (
        Link("cpu", "cuda:0", 25.1e9, "pinned copies", "2026-11-22"),
        Link("cuda:0", "cpu", 24.2e9, "pinned copies", "2026-11-22"),
        Link("disk", "cpu", 8.3e8, "NVMe SSD", "2026-11-20"),
    ),
)  # fmt: skip


def example(name: str) -> Machine:
    return read_machine(next(path for path in EXAMPLES if path.stem == name))


def test_measured_machine():
    assert machine_report(MEASURED).text == (
        "Linux x86_64 · measured 2026-11-20 to 2026-11-22\n"
        "\n"
        "device  what it is          used          free       total     reads      computes\n"
        "cuda:0  RTX 4090            ███▒▒▒░░░░░░  12.0 GiB   24.0 GiB  910 GB/s   160 TFLOPS\n"
        "cpu     AMD EPYC · 2 cores  █▒▒░░░░░░░░░  48.0 GiB   64.0 GiB  32.0 GB/s  900 GFLOPS\n"
        "disk    NVMe SSD            ██████░░░░░░  512.0 GiB  1.0 TiB   830 MB/s\n"
        "\n"
        "link          speed      over\n"
        "cpu → cuda:0  25.1 GB/s  pinned copies\n"
        "cuda:0 → cpu  24.2 GB/s  pinned copies\n"
        "disk → cpu    830 MB/s   NVMe SSD\n"
        "\n"
        "Other programs hold 6.0 GiB of cuda:0."
    )


def test_described_machine_marks_assumptions():
    assert machine_report(example("two-3090")).text == (
        "Workstation with two RTX 3090 · described in a file\n"
        "\n"
        "device  what it is               used          free         total       reads       computes\n"
        "cuda:0  RTX 3090                 ░░░░░░░░░░░░  ≈ 23.5 GiB   ≈ 24.0 GiB  ≈ 936 GB/s  ≈ 71 TFLOPS\n"
        "cuda:1  RTX 3090                 ▒▒░░░░░░░░░░  20.0 GiB     ≈ 24.0 GiB  ≈ 936 GB/s  ≈ 71 TFLOPS\n"
        "cpu     Threadripper Pro 3955WX  █░░░░░░░░░░░  ≈ 115.2 GiB  128.0 GiB   120 GB/s    ≈ 500 GFLOPS\n"
        "disk    NVMe SSD                 ███████░░░░░  838.2 GiB    1.8 TiB     ≈ 3.0 GB/s\n"
        "\n"
        "link             speed        over\n"
        "cuda:0 ↔ cuda:1  45.0 GB/s    NVLink bridge\n"
        "cpu ↔ cuda:0     ≈ 25.0 GB/s  PCIe 4 x16\n"
        "cpu ↔ cuda:1     ≈ 25.0 GB/s  PCIe 4 x16\n"
        "disk → cpu       ≈ 3.0 GB/s   NVMe SSD\n"
        "\n"
        "Other programs hold 4.0 GiB of cuda:1.\n"
        "≈ is assumed, not measured (data sheet, typical NVMe speed)."
    )


def test_links_of_many_gpus_are_told_together():
    text = machine_report(example("8xh100")).text
    assert "GPU ↔ GPU       400 GB/s   NVLink 4" in text
    assert "cpu ↔ each GPU  50.0 GB/s  PCIe 5 x16" in text
    assert text.count("↔") == 2


def test_measured_links_of_many_gpus_show_their_range():
    machine = example("8xh100")
    links = tuple(
        replace(link, bytes_per_s=48e9 + number * 1e9) if link.source == "cpu" else link
        for number, link in enumerate(machine.links)
    )
    text = machine_report(replace(machine, links=links)).text
    assert "cpu → each GPU  48.0 GB/s – 55.0 GB/s  PCIe 5 x16" in text
    assert "each GPU → cpu  50.0 GB/s              PCIe 5 x16" in text


def test_unified_memory_and_npu_are_explained():
    text = machine_report(example("mac-unified")).text
    assert "mps and cpu share one memory" in text
    assert "npu:0 (Apple Neural Engine) is named only" in text
    assert "shared by GPU and CPU" in machine_report(example("mac-unified")).html


def test_no_gpu_is_said():
    assert "No GPU" in machine_report(example("laptop-no-gpu")).text


def test_assumptions_of_this_computer_name_the_command_that_measures():
    machine = Machine("box", (Device("cpu", "cpu", "CPU", 10, 5, 4e10, assumed=("read",)),))
    assert "%llm machine --measure" in machine_report(machine).text
    assert "· assumed" in machine_report(machine).text


class _Checker(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def checked(source: str) -> _Checker:
    checker = _Checker()
    checker.feed(source)
    assert checker.open == []
    return checker


@pytest.mark.parametrize(
    "machine", [MEASURED, *map(read_machine, EXAMPLES)], ids=lambda machine: machine.name
)
def test_html_is_static_and_says_the_same(machine):
    report = machine_report(machine)
    page = checked(report.html)
    assert page.tags <= {"div", "span", "strong"}
    assert page.attributes <= {"style", "role", "aria-label"}
    assert not re.search(r"url\(|https?:|/home/|/root|\bon\w+=", report.html)
    text = " ".join(" ".join(page.words).split())
    for device in machine.devices:
        assert device.id in text
        assert device.name in text
    assert ("described in a file" if machine.described else "measured 2026-11-20 to 2026-11-22") in text


def test_html_tells_what_other_programs_hold():
    text = " ".join(checked(machine_report(MEASURED).html).words)
    assert "12.0 GiB used, 6.0 GiB of it by other programs" in text
    assert "↑ 25.1 GB/s" in text
    assert "↓ 24.2 GB/s" in text


def test_names_are_escaped():
    hostile = '<img src=x onerror=alert(1)>"&'
    device = Device("cpu", "cpu", hostile, 10, 5, 1e9)
    link = Link("disk", "cpu", 1e9, hostile)
    disk = Device("disk", "disk", hostile, 10, 5, 1e9)
    page = checked(machine_report(Machine(hostile, (device, disk), (link,))).html)
    assert page.tags <= {"div", "span", "strong"}
    assert sum(hostile in words for words in page.words) >= 3
