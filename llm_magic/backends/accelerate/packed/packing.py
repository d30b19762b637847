"""One parameter and the plain tensors that it is made of.

A block travels as bytes in one flat buffer, so every parameter in it must come apart into plain
tensors and be put together again around views of another buffer. A plain weight is its own single
part; a packed one (bitsandbytes, optimum.quanto, scaled floats) has its data and its statistics. What is
left when the parts are taken away is a `Template`, which binds them again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from llm_magic.backends.accelerate.packed.bitsandbytes_kinds import EightBitKind, FourBitKind
from llm_magic.backends.accelerate.packed.kinds import (
    Kind,
    Ordered,
    PlainKind,
    ScaledKind,
    Stacked,
    StackKind,
)
from llm_magic.backends.accelerate.packed.quanto_kind import QuantoKind
from llm_magic.backends.accelerate.packed.templates import Parts, Template


def parts(module: Any, name: str) -> Parts:
    """The plain tensors of ``module.name``; contiguous, and sharing its memory where it is.

    ==================  =========================================================================
    plain               ``""``
    bitsandbytes 4-bit  ``""``, ``absmax``; with packed statistics also ``offset``, ``state2.absmax``
    bitsandbytes 8-bit  ``""`` and ``SCB``
    optimum.quanto      the inner tensors: ``_data`` (or ``_data._data``), ``_scale``, ``_shift``, …
    scaled floats       ``""`` and ``scales``
    ==================  =========================================================================

    Raises
    ------
    ValueError
        When the parameter is of a packed kind and was not packed yet, or of an unknown kind.
    """
    return _kind(module, name).parts(module, name)


def template(module: Any, name: str) -> Template:
    """What is left of ``module.name`` without its bytes.

    Raises
    ------
    ValueError
        As ``parts``.
    """
    return _kind(module, name).template(module, name)


def parameters(block: Any) -> Iterator[tuple[str, Any, str]]:
    """``(dotted name, owner, leaf)`` of every parameter of a block; a shared one once."""
    seen: set[int] = set()
    for path, module in block.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{leaf}" if path else leaf), module, leaf


def arrange(block: Any, device: Any, *, fresh: bool = False) -> None:
    """Put the packed parameters of ``block`` into the order that the kernels of ``device`` read.

    Values and number of bytes stay the same. One kernel wants an order of its own: torch's for 4-bit
    quanto in bfloat16, whose CPU and CUDA orders differ. Do it when another kind of device is to
    compute the block, never in a sweep. The parameters must hold their bytes; new tensors replace
    those whose order changes. They are in RAM when a GPU's kernel reads one of the orders, and on
    ``device`` when the weights are fresh.

    Parameters
    ----------
    device
        The torch device that will compute the block.
    fresh
        The weights were packed just now, and may still take a kernel's own statistics: quanto's
        are rounded once more for it.
    """
    for _, module, leaf in list(parameters(block)):
        if leaf in module._parameters:  # parts of a stack may have changed with the first of them
            arrange_one(module, leaf, device, fresh=fresh)


def arrange_one(module: Any, name: str, device: Any, *, fresh: bool = False) -> None:
    """As `arrange`, for ``module.name`` alone."""
    import torch

    kind = _kind(module, name)
    if isinstance(kind, Ordered):
        kind.arrange(module, name, torch.device(device), fresh)


def has_order(module: Any, name: str) -> bool:
    """Whether some devices want the bytes of ``module.name`` in an order of their own."""
    kind = _kind(module, name)
    return isinstance(kind, Ordered) and kind.is_needed(module, name)


def _kind(module: Any, name: str) -> Kind:
    import torch

    from llm_magic.backends.accelerate.packed.scaled_floats import ScaledFloats

    parameter = module._parameters[name]
    if isinstance(module, Stacked):
        return StackKind(_kind(module.linear, "weight"))
    # Whoever holds a packed parameter has imported its library: ours to look at, not to import.
    if (library := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(parameter, library.nn.Params4bit):
            return FourBitKind()
        if isinstance(parameter, library.nn.Int8Params):
            return EightBitKind()
    if (library := sys.modules.get("optimum.quanto")) is not None and isinstance(parameter, library.QTensor):
        return QuantoKind()
    if isinstance(parameter, ScaledFloats):
        return ScaledKind()
    if type(parameter) not in (torch.nn.Parameter, torch.Tensor):
        raise ValueError(f"{name} is a {type(parameter).__name__}, whose bytes nobody here can take apart.")
    return PlainKind()
