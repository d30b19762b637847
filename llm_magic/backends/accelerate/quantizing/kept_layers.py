"""Which linear layers are left as they are.

As transformers chooses; and those whose weights are also read without a call, which only their owners' code tells.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from llm_magic.backends.accelerate.served.latent_attention import MATRIX, may_attend_to_latents


def layers_to_keep(model: Any, stays: Sequence[str] | None) -> list[str]:
    """Patterns for their paths; ``stays`` are patterns in place of those that transformers chooses."""
    from transformers.quantizers.base import HfQuantizer

    named = HfQuantizer.get_modules_to_not_convert(model, stays, model._keep_in_fp32_modules)
    # Its names are patterns; ours are whole names.
    return [*named, *(f"{re.escape(path)}$" for path in _read_directly(model))]


def reads_head(model: Any, path: str) -> bool:
    """Whether the code around a model's head uses its weight, or asks for its dtype, as a Mamba does to cast states to it."""
    owner, _, leaf = path.rpartition(".")
    kind: Any = type(model.get_submodule(owner))
    return leaf in _names_in_code(kind, r"self\.(\w+)\.weight\b(?!\.(?:device|shape))")


def _read_directly(model: Any) -> Iterator[str]:
    """Linear layers whose owner's code, or ours in its place, uses ``self.<layer>.weight``, which would be packed bytes."""
    for path, owner in model.named_modules():
        kind: Any = type(owner)
        names = _names_in_code(kind, r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))")
        if may_attend_to_latents(owner):
            names |= {MATRIX}
        for leaf in owner._modules:
            if leaf in names:
                yield f"{path}.{leaf}" if path else leaf


@cache
def _names_in_code(kind: Any, pattern: str) -> frozenset[str]:
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(pattern, code))
