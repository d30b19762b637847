"""The packed layers that a prepared model has in the place of linear ones: whose each of them is, and its shape."""

from __future__ import annotations

import sys
from typing import Any, Literal

from llm_magic.errors import SourceError

Kind = Literal["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "quanto", "scaled floats"]
"""Whose a layer is, which says how its weight is packed."""


def kind_of(module: Any) -> Kind | None:
    """Whose a packed layer is; ``None`` for other modules."""
    from llm_magic.backends.accelerate.packed.scaled_floats import ScaledLinear

    # Whoever holds a packed layer has imported its library.
    bitsandbytes, quanto = (sys.modules.get(library) for library in ("bitsandbytes", "optimum.quanto"))
    if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit):
        return "bitsandbytes, 4 bits"
    if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return "bitsandbytes, 8 bits"
    if quanto is not None and isinstance(module, quanto.QModuleMixin):
        return "quanto"
    return "scaled floats" if isinstance(module, ScaledLinear) else None


def is_packed(module: Any) -> bool:
    """Whether a layer is one of the libraries' packed ones."""
    return kind_of(module) is not None


def was_transposed(module: Any) -> bool:
    """Whether it is in place of a GPT-2 ``Conv1D``, whose weight is stored the other way round."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(module, "source_cls", object), Conv1D)


def shape_of(module: Any) -> tuple[int, ...]:
    """``(out, in)``, as weights are packed."""
    return module.out_features, module.in_features


def check_shape(expected: tuple[int, ...], shape: tuple[int, ...], what: str) -> None:
    """Refuse a weight of another shape: what computes with it reads as many bytes as its shape says.

    Raises
    ------
    SourceError
        Where it begins with ``what``.
    """
    if shape != expected:
        raise SourceError(
            f"{what} has the shape {shape} where config.json says {expected}.",
            "The files do not belong together: download the model again.",
        )
