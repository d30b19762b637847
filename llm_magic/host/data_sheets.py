"""What vendors state for common devices, for machines that are described and not measured.

Memory in GiB as sold, memory bandwidth in GB/s, dense bf16 or fp16 with fp32 accumulation in
TFLOPS without sparsity. Where a name covers several variants, the smaller one is listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm_magic.units import GIB


@dataclass(frozen=True)
class DataSheet:
    """Stated facts of one product: bytes, bytes per second, operations per second; 0 is not stated."""

    total_bytes: int
    read_bytes_per_s: float
    flops: float


# name: (GiB, GB/s, TFLOPS)
_GPUS: dict[str, tuple[float, float, float]] = {
    "RTX 3060": (12, 360, 25),
    "RTX 3070": (8, 448, 40),
    "RTX 3080": (10, 760, 59),
    "RTX 3080 Ti": (12, 912, 68),
    "RTX 3090": (24, 936, 71),
    "RTX 3090 Ti": (24, 1008, 80),
    "RTX 4060": (8, 272, 30),
    "RTX 4060 Ti": (8, 288, 44),
    "RTX 4070": (12, 504, 58),
    "RTX 4070 Ti": (12, 504, 80),
    "RTX 4080": (16, 717, 97),
    "RTX 4090": (24, 1008, 165),
    "RTX 5060 Ti": (8, 448, 47),
    "RTX 5070": (12, 672, 62),
    "RTX 5070 Ti": (16, 896, 88),
    "RTX 5080": (16, 960, 113),
    "RTX 5090": (32, 1792, 209),
    "RTX A6000": (48, 768, 155),
    "T4": (16, 320, 65),
    "V100": (16, 900, 125),
    "A10": (24, 600, 125),
    "A10G": (24, 600, 70),
    "A40": (48, 696, 150),
    "A100": (40, 1555, 312),
    "A100 80GB": (80, 2039, 312),
    "L4": (24, 300, 121),
    "L40S": (48, 864, 362),
    "H100": (80, 3350, 989),
    "H100 PCIe": (80, 2000, 756),
    "H200": (141, 4800, 989),
    "B200": (180, 8000, 2250),
    "MI210": (64, 1638, 181),
    "MI300X": (192, 5300, 1307),
    "RX 7900 XTX": (24, 960, 123),
    "M1": (0, 68, 2.6),
    "M1 Pro": (0, 200, 5.2),
    "M1 Max": (0, 400, 10.4),
    "M1 Ultra": (0, 800, 20.8),
    "M2": (0, 100, 3.6),
    "M2 Pro": (0, 200, 6.8),
    "M2 Max": (0, 400, 13.6),
    "M2 Ultra": (0, 800, 27.2),
    "M3": (0, 100, 4.1),
    "M3 Pro": (0, 150, 7.4),
    "M3 Max": (0, 300, 14.2),
    "M3 Ultra": (0, 819, 28.4),
    "M4": (0, 120, 4.6),
    "M4 Pro": (0, 273, 9.2),
    "M4 Max": (0, 410, 16.0),
}
_WORDS_WITHOUT_MEANING = {"nvidia", "geforce", "apple", "amd", "radeon", "instinct", "tesla", "gpu"}


def data_sheet(name: str) -> DataSheet | None:
    """The data sheet of the product in ``name`` (``"NVIDIA GeForce RTX 4090"``), or ``None``.

    The longest known name whose words all stand at the beginning of ``name`` counts, unless a word
    follows that makes it another product (``"RTX 4090 Laptop"``, ``"RTX 4080 SUPER"``).
    """
    words = [word for word in re.split(r"[\s\-]+", name.lower()) if word not in _WORDS_WITHOUT_MEANING]
    known = {tuple(key.lower().split()): value for key, value in _GPUS.items()}
    for length in range(len(words), 0, -1):
        facts = known.get(tuple(words[:length]))
        if facts is not None:
            return (
                None
                if _is_variant(words[length:])
                else DataSheet(round(facts[0] * GIB), facts[1] * 1e9, facts[2] * 1e12)
            )
    return None


def _is_variant(rest: list[str]) -> bool:
    return bool({"laptop", "mobile", "max", "super", "ti", "pro", "ultra"} & set(rest))
