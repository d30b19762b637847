"""What torch's dispatcher shows: every operation of a thread, or none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def seen_by(operation: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> AbstractContextManager[Any]:
    """While it lasts, every operation of this thread is asked of ``operation``: a function, its args and its kwargs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    def dispatch(_self: Any, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(function, args, kwargs or {})

    mode: AbstractContextManager[Any] = type("Mode", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})()
    return mode


def unseen() -> AbstractContextManager[Any]:
    """While it lasts, operations are torch's again: for what a recording computes for itself."""
    from torch.utils._python_dispatch import _disable_current_modes

    disabled: AbstractContextManager[Any] = _disable_current_modes()
    return disabled
