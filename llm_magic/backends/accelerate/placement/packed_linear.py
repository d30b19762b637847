"""Packed linear layers of bitsandbytes and quanto which the CPU computes by kernels of ours.

They stay what they are for everybody else: of a subclass, with the library's name.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.packing import packed_weights


def served_by_kernels(layer: Any) -> None:
    """Let a packed linear layer compute by our kernels on the CPU, where there is one for its weight."""
    layer.__class__ = _with_kernels(layer.__class__)


@cache
def _with_kernels(library_class: Any) -> Any:
    def forward(self: Any, states: Any, *args: Any, **options: Any) -> Any:
        outputs = _by_kernel(self, states)
        return library_class.forward(self, states, *args, **options) if outputs is None else outputs

    return type(
        library_class.__name__, (library_class,), {"forward": forward, "__module__": library_class.__module__}
    )


def _by_kernel(layer: Any, states: Any) -> Any:
    """What the layer makes of ``states``; ``None`` where its library is to compute it."""
    if states.device.type != "cpu" or layer.training:
        return None
    if (weights := packed_weights(layer._parameters["weight"])) is None:
        return None
    dtype = getattr(layer, "compute_dtype", None) or states.dtype  # bitsandbytes' 4-bit layers have one
    if (outputs := cpu_products.multiplied(states.to(dtype), weights)) is None:
        return None
    if layer.bias is not None:
        outputs += layer.bias.to(dtype)
    return outputs.to(states.dtype)
