"""What tests of packed weights share: quanto's integers without the extension that it would compile."""

from __future__ import annotations

from typing import Any


def unpacked(packed: Any) -> Any:
    """The integers of a quanto ``PackedTensor``, one at a time, as its documentation says."""
    import torch

    bits, rows = packed.bits, packed.shape[0]
    stored = packed._data.tolist()
    lines = [
        [value >> bits * place & (1 << bits) - 1 for value in line]
        for place in range(8 // bits)
        for line in stored
    ]
    return torch.tensor(lines[:rows], dtype=torch.uint8)


def without_extension(network: Any) -> Any:
    """The same model, its packed integers as plain bytes, which quanto takes as well."""
    for module in network.modules():
        weight = module._parameters.get("weight")
        if type(getattr(weight, "_data", None)).__name__ == "PackedTensor":
            weight._data = unpacked(weight._data)
    return network


def extension_was_loaded() -> bool:
    """Whether quanto compiled its extension for CPUs, or loaded it."""
    from optimum.quanto.library.extensions import get_extension

    return get_extension("quanto_cpp")._lib is not None
