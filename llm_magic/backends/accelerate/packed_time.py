"""How fast the CPU multiplies a token with packed weights, where our kernels do that."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.cpu_products import PackedWeights
from llm_magic.host.speed import best_of
from llm_magic.machine import PACKED_KINDS

_COLUMNS, _GROUP = 4096, 32


def packed_speeds(size: int, budget_s: float) -> tuple[tuple[str, float], ...]:
    """(kind, packed bytes per second) of each of `PACKED_KINDS`; of none where there are no kernels, or no room.

    Parameters
    ----------
    size
        Bytes of the matrix: more than caches hold.
    budget_s
        How long to repeat one of them.
    """
    import torch

    if not cpu_products.is_there():
        return ()
    try:
        ones = torch.ones(size // _COLUMNS, _COLUMNS, dtype=torch.uint8)
        return tuple((kind, _speed(_weights(kind, ones), budget_s)) for kind in PACKED_KINDS)
    except (RuntimeError, MemoryError):
        return ()


def _speed(weights: PackedWeights, budget_s: float) -> float:
    import torch

    token = torch.ones(1, _COLUMNS, dtype=torch.bfloat16)
    count = weights.data.nbytes + weights.scales.nbytes
    return float(count / best_of(lambda: cpu_products.multiplied(token, weights), budget_s))


def _weights(kind: str, ones: Any) -> PackedWeights:
    """A matrix of a kind with such bytes ``[rows, 4096]``; twice as many rows where a weight takes half of one."""
    import torch

    rows = len(ones)
    if kind == "mxfp4":
        exponents = torch.full((2 * rows, _COLUMNS // _GROUP), 127, dtype=torch.uint8)
        return PackedWeights(kind, ones.view(2 * rows, -1), exponents, None, 2 * rows, _COLUMNS, _GROUP)
    if kind == "int8":
        return PackedWeights(kind, ones.view(torch.int8), torch.ones(rows), None, rows, _COLUMNS)
    scales = torch.ones(rows, 1, dtype=torch.bfloat16)
    return PackedWeights(kind, ones.view(torch.float8_e4m3fn), scales, None, rows, _COLUMNS)
