"""The library's 4-bit formats, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.packed import four_bits
from llm_magic.backends.accelerate.quantizing.libraries import import_library

KINDS = ("nf4", "fp4")
functional: Any = import_library("bitsandbytes").functional


def by_the_library(values: Any, kind: str) -> tuple[Any, Any]:
    data, state = functional.quantize_4bit(values, blocksize=64, quant_type=kind)
    return data, state.absmax


def same(values: Any, kind: str) -> None:
    for mine, theirs in zip(four_bits.packed(values, kind, 64), by_the_library(values, kind), strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_random_weights(kind: str, dtype: Any) -> None:
    torch.manual_seed(0)
    same((torch.randn(192, 320) * 0.02).to(dtype), kind)
    same((torch.randn(3, 5, 64) * 1e-30).to(dtype), kind)
    same(torch.randn(320, 128).to(dtype).T, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_at_and_around_every_bound(kind: str) -> None:
    """And at the edges of the table's bins, where rounding could choose the neighbour."""
    values = functional.get_4bit_type(kind, device="cpu").sort()[0]
    numbers = torch.cat([values, (values[:-1] + values[1:]) / 2, torch.arange(4097) * (2 / 4096) - 1])
    around = [torch.nextafter(numbers, torch.tensor(far)) for far in (-9.0, 9.0)]
    near = [numbers + shift for shift in (1e-7, -1e-7, 2e-7, -2e-7, 5e-7, -5e-7)]
    all_of_them = torch.cat([numbers, *around, *near]).clamp(-1, 1)
    rows = torch.nn.functional.pad(all_of_them, (0, -len(all_of_them) % 63)).view(-1, 63)
    same(torch.cat([rows, torch.ones(len(rows), 1)], dim=1).contiguous(), kind)  # its scale is 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_and_what_is_no_number(kind: str) -> None:
    values = torch.zeros(3, 64)
    values[1, 5], values[2, 7] = torch.nan, torch.inf
    same(values, kind)
