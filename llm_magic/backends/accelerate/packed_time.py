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
    try:
        return (
            tuple((kind, _speed(kind, size, budget_s)) for kind in PACKED_KINDS)
            if cpu_products.is_there()
            else ()
        )
    except (RuntimeError, MemoryError):
        return ()


def _speed(kind: str, size: int, budget_s: float) -> float:
    import torch

    weights, token = _ones(kind, size), torch.ones(1, _COLUMNS, dtype=torch.bfloat16)
    count = weights.data.nbytes + weights.scales.nbytes
    return float(count / best_of(lambda: cpu_products.multiplied(token, weights), budget_s))


def _ones(kind: str, size: int) -> PackedWeights:
    """A matrix whose weights are all the same."""
    import torch

    columns = _COLUMNS // 2 if kind == "mxfp4" else _COLUMNS
    rows = size // columns
    data: Any = torch.ones(rows, columns, dtype=torch.uint8)
    if kind == "mxfp4":
        exponents = torch.full((rows, _COLUMNS // _GROUP), 127, dtype=torch.uint8)
        return PackedWeights(kind, data, exponents, None, rows, _COLUMNS, _GROUP)
    if kind == "int8":
        return PackedWeights(kind, data.view(torch.int8), torch.ones(rows), None, rows, _COLUMNS)
    scales = torch.ones(rows, 1, dtype=torch.bfloat16)
    return PackedWeights(kind, data.view(torch.float8_e4m3fn), scales, None, rows, _COLUMNS)
