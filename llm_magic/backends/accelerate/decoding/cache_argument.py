"""What models call the KV cache among their arguments: ``cache`` since transformers 5.24, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from functools import cache as remembered
from typing import Any

_NAMES = ("cache", "past_key_values")


def cache_name(model: Any) -> str:
    """What a model's ``forward`` calls its KV cache; empty where it takes none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in takes), "")


@remembered
def cache_name_of_generate() -> str:
    """What ``generate`` calls it."""
    from transformers.generation import utils

    return next(name for name in _NAMES if name in utils.ALL_CACHE_NAMES)
