"""Classes of modules that compute by kernels of ours where those can, and are for everybody else what they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

_MARK = "_computes_by"


def serve(module: Any, by_kernels: Callable[..., Any]) -> None:
    """Let a module compute by kernels: it is of a subclass from now on, with the same name.

    Parameters
    ----------
    by_kernels
        Called as the class's ``forward``; ``None`` where that is to compute.
    """
    module.__class__ = served_class(module.__class__, by_kernels)


def is_served(module: Any) -> bool:
    """Whether a module computes by kernels of ours, as far as there are any."""
    return served_by(module) is not None


def served_by(module: Any) -> Any:
    """What it was served with; ``None`` where it was not."""
    return getattr(type(module), _MARK, None)


def usual_forward(module: Any) -> Callable[..., Any]:
    """The forward of a served module's class, called as a method of it."""
    kinds: tuple[Any, ...] = type(module).__mro__
    served = next(place for place, kind in enumerate(kinds) if _MARK in vars(kind))
    usual: Callable[..., Any] = kinds[served + 1].forward
    return usual


@cache
def served_class(usual_class: Any, by_kernels: Callable[..., Any]) -> Any:
    """The subclass of a class whose modules are served."""
    usual = usual_class.forward

    @wraps(usual)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        outputs = by_kernels(self, *args, **options)
        return usual_class.forward(self, *args, **options) if outputs is None else outputs

    def reduced(self: Any, _protocol: Any) -> Any:  # to be pickled: no module has this class
        return _new, (usual_class, by_kernels), self.__dict__

    members = {
        _MARK: staticmethod(by_kernels),
        "forward": forward,
        "__reduce_ex__": reduced,
        "__module__": usual_class.__module__,
    }
    return type(usual_class.__name__, (usual_class,), members)


def _new(usual_class: Any, by_kernels: Callable[..., Any]) -> Any:
    served = served_class(usual_class, by_kernels)
    return served.__new__(served)
