"""A layer's code runs to be seen: what it keeps in its modules is put back."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CannotRecordError(BaseException):
    """The layer is not one that can be recorded.

    It is no ``Exception``, all of which a layer's code may catch to go on with something else.
    """


@contextmanager
def as_it_was(layer: Any) -> Iterator[None]:
    """Put everything back that a layer's code keeps in its modules; code that does so is not to be recorded.

    Raises
    ------
    CannotRecordError
        When there was something.
    """
    modules = list(layer.modules())
    before = [_kept(module) for module in modules]
    try:
        yield
    finally:
        changes = [_put_back(module, held) for module, held in zip(modules, before, strict=True)]
    if any(changes):
        raise CannotRecordError("it changes what its modules keep")


def _kept(module: Any) -> list[tuple[Any, Any]]:
    """All that may change in a module, and what is in it."""
    import torch

    collections = [each for each in vars(module).values() if type(each) in (list, dict, set, OrderedDict)]
    kept = [(each, each.copy()) for each in (vars(module), *collections)]
    tensors = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [*kept, *((each, each.data) for each in tensors if isinstance(each, torch.Tensor))]


def _put_back(module: Any, kept: list[tuple[Any, Any]]) -> bool:
    """Whether something was another."""
    now = _kept(module)
    is_same = len(now) == len(kept) and all(
        held is other and _is_same(value, what)
        for (held, value), (other, what) in zip(kept, now, strict=True)
    )
    for held, value in () if is_same else kept:
        _fill(held, value)
    return not is_same


def _is_same(before: Any, now: Any) -> bool:
    import torch

    if isinstance(before, torch.Tensor):
        return bool(before.data_ptr() == now.data_ptr() and before.shape == now.shape)
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(now[name] is value for name, value in before.items())
    return len(before) == len(now) and all(map(operator.is_, before, now))


def _fill(held: Any, value: Any) -> None:
    import torch

    if isinstance(held, torch.Tensor):
        held.data = value
        return
    held.clear()
    held.extend(value) if isinstance(held, list) else held.update(value)
