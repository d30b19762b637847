"""A module that runs something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def running(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run this in place of its forward, whatever is in its place now."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def below_its_hook(module: Any) -> Callable[..., Any]:
    """What a module computes with, without Accelerate's hook around it."""
    forward: Callable[..., Any] = vars(module).get("_old_forward", module.forward)
    return forward
