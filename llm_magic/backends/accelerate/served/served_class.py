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


def served_by(module: Any) -> Any:
    """What it was served with; ``None`` where it was not."""
    return getattr(type(module), _MARK, None)


def usual_class_of(module: Any) -> Any:
    """The class that a served module is of for everybody else; of other modules their own."""
    kinds = type(module).__mro__
    served = next((place for place, kind in enumerate(kinds) if _MARK in vars(kind)), -1)
    return kinds[served + 1]


@cache
def served_class(usual_class: Any, by_kernels: Callable[..., Any]) -> Any:
    """The subclass of a class whose modules are served."""
    usual = usual_class.forward

    @wraps(usual)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        is_usual = usual_class.forward is usual  # nobody has put another one there meanwhile
        outputs = by_kernels(self, *args, **options) if is_usual else None
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
