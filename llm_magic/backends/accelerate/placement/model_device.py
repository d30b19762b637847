"""Where a placed model takes its tokens, as its ``device``.

transformers takes the device of the first parameter for that, and brings every input there. A placed model
may have that parameter anywhere: in RAM as a part of a table or of an idle tower, or nowhere between two sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ATTRIBUTE = "_input_device"
_kinds: dict[Any, Any] = {}


def show_device(model: Any, device: str) -> None:
    """Let ``model.device`` be this one, whatever its parameters say."""
    import torch

    kind = type(model)
    if not hasattr(kind, _ATTRIBUTE):
        if kind not in _kinds:
            _kinds[kind] = _saying_its_device(kind)
        model.__class__ = _kinds[kind]
    setattr(model, _ATTRIBUTE, torch.device(device))


def models_in(model: Any) -> Iterator[tuple[str, Any]]:
    """The models that a model is made of, by their paths: some bring their input to their own ``device``."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel):
            yield path, module


def _device(model: Any) -> Any:
    return getattr(model, _ATTRIBUTE)


def _saying_its_device(kind: Any) -> Any:
    """The same class, by the same name, with another ``device``: the one of ``kind`` is a property without a setter."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names | {_ATTRIBUTE: None, "device": property(_device)})
