"""Where a driver would take RAM for what a GPU has no room for, torch refuses it."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from llm_magic.backends.accelerate.memory_errors import refuse_overflow
from llm_magic.units import GIB, MIB

FREE, TOTAL, RESERVED = 10 * GIB, 16 * GIB, 2 * GIB
SYSTEMS = {"win32": ("win32", "10"), "wsl": ("linux", "5.15.167.4-microsoft-standard-WSL2")}


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    found: dict[str, float] = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: RESERVED)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: found.update({str(device): share}),
    )
    return found


def pretend(system: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system[0])
    monkeypatch.setattr(platform, "release", lambda: system[1])


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_windows_and_wsl(
    system: tuple[str, str], fractions: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(system, monkeypatch)
    refuse_overflow(["cuda:0", "cpu", "disk", "xpu:0", "cuda:1"])
    # 2 GiB that torch has, and 10 GiB less a quarter for the driver
    assert fractions == dict.fromkeys(("cuda:0", "cuda:1"), (12 * GIB - 256 * MIB) / TOTAL)


@pytest.mark.parametrize(
    ("free", "allowed"),
    [
        (0, RESERVED),  # what torch has it may use
        (100 * MIB, RESERVED),
        (TOTAL, TOTAL),  # more cannot be allowed, whatever a driver says
    ],
)
def test_full_and_empty(
    free: int, allowed: int, fractions: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(SYSTEMS["wsl"], monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, TOTAL))
    refuse_overflow(["cuda:0"])
    assert fractions == {"cuda:0": allowed / TOTAL}


def test_a_small_gpu(fractions: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(SYSTEMS["wsl"], monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 2 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    refuse_overflow(["cuda:0"])
    assert fractions == {"cuda:0": (GIB - 128 * MIB) / (2 * GIB)}  # a sixteenth stays out


def test_elsewhere_drivers_refuse_by_themselves(
    fractions: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(("linux", "6.8.0-generic"), monkeypatch)
    refuse_overflow(["cuda:0"])
    assert fractions == {}
