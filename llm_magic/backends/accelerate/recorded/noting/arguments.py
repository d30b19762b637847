"""Arguments of a layer's call, one by one: in a recording they have the numbers that they have here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """All arguments of a call, those in tuples one by one."""
    found: list[Any] = []
    for each in (*args, *kwargs.values()):
        if isinstance(each, tuple):
            found.extend(each)
        else:
            found.append(each)
    return found


def unflattened(leaves: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``args`` and ``kwargs`` like these, of what stands for each argument of `flat`."""
    rest = iter(leaves)

    def taken(each: Any) -> Any:
        return tuple(next(rest) for _ in each) if isinstance(each, tuple) else next(rest)

    return tuple(map(taken, args)), {name: taken(each) for name, each in kwargs.items()}
