"""How fast the CPU multiplies with packed weights, and makes numbers of them, where our kernels do that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.packed import int4_orders
from llm_magic.host.speed import best_of
from llm_magic.machine import PACKED_KINDS
from llm_magic.units import MIB

_COLUMNS, _GROUP = 4096, 32
_MATRIX_BYTES = 8 * MIB
"""As layers have them: in larger ones rows that are read at the same time lie further apart."""

Speeds = tuple[tuple[str, float], ...]


class PackedSpeeds(NamedTuple):
    """(Kind, packed bytes per second), of each of `PACKED_KINDS` for which there is a kernel.

    Attributes
    ----------
    products
        That are multiplied with a token.
    numbers
        That become numbers, as for a prompt.
    """

    products: Speeds = ()
    numbers: Speeds = ()


def packed_speeds(size: int, budget_s: float) -> PackedSpeeds:
    """Measure them; nothing where there are no kernels, or no room.

    Parameters
    ----------
    size
        Bytes of all matrices: more than caches hold.
    budget_s
        How long to repeat one of them.
    """
    import torch

    if not cpu_products.is_there():
        return PackedSpeeds()
    try:
        rows = _MATRIX_BYTES // _COLUMNS
        ones = torch.ones(max(1, size // _MATRIX_BYTES), rows, _COLUMNS, dtype=torch.uint8)
        weights = [(kind, _weights(kind, ones[0])) for kind in PACKED_KINDS]
        products = [(kind, _of_products(each, ones, budget_s)) for kind, each in weights if each is not None]
        numbers = [(kind, _of_numbers(each, budget_s)) for kind, each in weights if each is not None]
        return PackedSpeeds(*(tuple(each for each in some if each[1]) for some in (products, numbers)))
    except Exception:  # whatever is not there, forecasts can do without
        return PackedSpeeds()


def _of_products(weights: PackedWeights, bytes_of_all: Any, budget_s: float) -> float:
    """0 where no kernel takes them."""
    import torch

    token = torch.ones(1, _COLUMNS, dtype=torch.bfloat16)
    some = bytes_of_all.view(weights.data.dtype)
    matrices = [
        replace(weights, data=each.view_as(weights.data), scales=weights.scales.clone()) for each in some
    ]
    if cpu_products.multiplied(token, weights) is None:
        return 0.0
    seconds = best_of(lambda: [cpu_products.multiplied(token, each) for each in matrices], budget_s)
    return float(len(matrices) * (weights.data.nbytes + weights.scales.nbytes) / seconds)


def _of_numbers(weights: PackedWeights, budget_s: float) -> float:
    """0 where no kernel takes them."""
    import torch

    seconds = best_of(lambda: cpu_products.unpack(weights, torch.bfloat16), budget_s)
    is_there = cpu_products.unpack(weights, torch.bfloat16)
    return float((weights.data.nbytes + weights.scales.nbytes) / seconds) if is_there else 0.0


def _weights(kind: str, ones: Any) -> PackedWeights | None:
    """A matrix of a kind with such bytes ``[rows, 4096]``; twice as many rows where a weight takes half of one.

    ``None`` where weights of such a kind lie in no order that a kernel reads.
    """
    import torch

    rows = len(ones)
    if kind == "mxfp4":
        exponents = torch.full((2 * rows, _COLUMNS // _GROUP), 127, dtype=torch.uint8)
        return PackedWeights(kind, ones.view(2 * rows, -1), exponents, None, 2 * rows, _COLUMNS, _GROUP)
    if kind == "int4":
        block, group = int4_orders.block_in_halves(), 4 * _GROUP
        scales = torch.ones(_COLUMNS // group, 2 * rows, 2, dtype=torch.bfloat16)
        data = ones.view(2 * rows, -1)
        return (
            PackedWeights(kind, data, scales, None, 2 * rows, _COLUMNS, group, block=block) if block else None
        )
    if kind == "int8":
        return PackedWeights(kind, ones.view(torch.int8), torch.ones(rows), None, rows, _COLUMNS)
    scales = torch.ones(rows, 1, dtype=torch.bfloat16)
    return PackedWeights(kind, ones.view(torch.float8_e4m3fn), scales, None, rows, _COLUMNS)
