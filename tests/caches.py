"""KV caches by the name that the transformers at hand has for them."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name_of_generate


def given(cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model, a layer, or ``generate``."""
    return {cache_name_of_generate(): cache}


def cache_of(output: Any) -> Any:
    """The cache among what a model returns."""
    return getattr(output, cache_name_of_generate())
