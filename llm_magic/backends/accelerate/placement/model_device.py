"""Where a placed model takes its tokens, as its ``device``.

transformers takes the device of the first parameter for that, and brings every input there. A placed model
may have that parameter anywhere: in RAM as a part of a table or of an idle tower, or nowhere between two sweeps.
"""

from __future__ import annotations

from typing import Any

_ATTRIBUTE = "_input_device"
_kinds: dict[Any, Any] = {}


def show_device(model: Any, device: Any) -> None:
    """Let ``model.device`` be ``device``, whatever its parameters say."""
    if not hasattr(type(model), _ATTRIBUTE):
        kind = type(model)
        _kinds[kind] = _kinds.get(kind) or _saying_its_device(kind)
        model.__class__ = _kinds[kind]
    setattr(model, _ATTRIBUTE, device)


def _device(model: Any) -> Any:
    return getattr(model, _ATTRIBUTE)


def _saying_its_device(kind: Any) -> Any:
    """The same class, by the same name, with another ``device``: the one of ``kind`` is a property without a setter."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names | {_ATTRIBUTE: None, "device": property(_device)})
