"""The orders of torch's 4-bit kernels: of CUDA as its sources say, of this CPU as torch's kernel makes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.packed import int4_orders
from llm_magic.backends.accelerate.packed.int4_orders import integers, is_for_cuda, reordered

SIZES = [(16, 32), (48, 256), (64, 128), (80, 128), (208, 96)]
"""Rows and columns; CPUs take 64 or 32 rows together, and what is left in pairs."""


def in_both_orders(rows: int, columns: int) -> tuple[Any, Any, Any]:
    """Random integers, and these as the kernels of CUDA and of this CPU want them."""
    import torch

    from tests.simulated_cuda.int4 import in_lanes

    torch.manual_seed(0)
    plain = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    for_cuda = in_lanes(plain[:, ::2] << 4 | plain[:, 1::2])
    return plain, for_cuda, torch._convert_weight_to_int4pack_for_cpu(plain.int(), 2)


@pytest.mark.parametrize("at_a_time", [1 << 22, 64 * 128])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_each_order_comes_from_the_other(
    rows: int, columns: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(int4_orders, "_AT_A_TIME", at_a_time)
    plain, for_cuda, for_cpu = in_both_orders(rows, columns)
    assert is_for_cuda(for_cuda)
    assert not is_for_cuda(for_cpu)
    assert torch.equal(integers(for_cuda, columns), plain)
    assert torch.equal(integers(for_cpu, columns), plain)
    assert torch.equal(reordered(for_cuda, columns), for_cpu)
    assert torch.equal(reordered(for_cpu, columns), for_cuda)


OTHER_CPU = """
import torch
from llm_magic.backends.accelerate.packed.int4_orders import integers
for rows, columns in ((48, 256), (80, 128), (208, 96)):
    plain = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack_for_cpu(plain.int(), 2)
    assert torch.equal(integers(packed, columns), plain)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_cpu_with_other_instructions_is_asked_for_its_order(capability: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    here = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", OTHER_CPU], env=environment, cwd=here, check=False)
    assert run.returncode == 0
