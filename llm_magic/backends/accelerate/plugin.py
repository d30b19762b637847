"""The entry point: names the backend without importing what it needs."""

from __future__ import annotations

from collections.abc import Callable

from llm_magic.backends.accelerate.backend import TransformersBackend
from llm_magic.hookspecs import Backend, hookimpl


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    """Register the transformers backend."""
    register(TransformersBackend())
