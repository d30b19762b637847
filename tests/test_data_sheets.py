"""Data sheets are found by the names that drivers give."""

from __future__ import annotations

import pytest

from llm_magic.host.data_sheets import data_sheet


@pytest.mark.parametrize(
    ("name", "gigabytes_per_s"),
    [
        ("NVIDIA GeForce RTX 4090", 1008),
        ("rtx 3090 ti", 1008),
        ("RTX 3090", 936),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100 80GB PCIe", 2039),
        ("Apple M3 Max GPU", 300),
        ("Tesla T4", 320),
    ],
)
def test_known(name, gigabytes_per_s):
    sheet = data_sheet(name)
    assert sheet is not None
    assert sheet.read_bytes_per_s == gigabytes_per_s * 1e9


@pytest.mark.parametrize(
    "name", ["", "Quadro K2000", "NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4080 SUPER", "NVIDIA"]
)
def test_unknown_and_other_variants(name):
    assert data_sheet(name) is None
