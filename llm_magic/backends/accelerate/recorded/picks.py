"""Rows and numbers that a recorded layer picks by the places of the largest of others: what belongs to chosen experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.kernels.words import PICKED
from llm_magic.backends.accelerate.recorded.known_numbers import topk_places
from llm_magic.backends.accelerate.recorded.lowering import row_major
from llm_magic.backends.accelerate.recorded.plan import Plan
from llm_magic.backends.accelerate.recorded.program import Values, call
from llm_magic.backends.accelerate.recorded.recording import Node, View

_MATRIX = 2  # dimensions


class _Sizes(NamedTuple):
    tables: int
    rows: int
    bytes: int
    apart: int


class Pick:
    """An operation that picks.

    Attributes
    ----------
    made
        What it makes.
    """

    def __init__(self, node: Node, source: View, numbers: View, sizes: _Sizes) -> None:
        self._node, self._source, self._numbers, self._sizes = node, source, numbers, sizes
        self.made: tuple[View, ...] = node.outputs

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``."""
        call(self._node, None, values)

    def add(self, plan: Plan) -> None:
        """Have it done by a kernel."""
        from llm_magic.backends.accelerate.kernels.rows import picked_rows

        (out,) = self.made
        plan.place(out)
        first = plan.begin(picked_rows(), [0, 0, 0, *self._sizes])
        plan.point(first + PICKED.target, out.base)
        plan.point_at(first + PICKED.source, self._source)
        plan.point_at(first + PICKED.numbers, self._numbers)


def limits_of(nodes: Sequence[Node]) -> dict[int, int]:
    """By base, below what the places are that operations find."""
    return {
        node.outputs[1].base: topk_places(node.args)
        for node in nodes
        if str(node.name) == "aten.topk.default"
    }


def pick(node: Any, limits: dict[int, int]) -> Pick | None:
    """What picks by places that are there; ``None``: it is something else."""
    if not isinstance(node, Node) or str(node.name) not in _PICKING or node.kwargs:
        return None
    source, numbers, dim = _PICKING[str(node.name)](*node.args)
    if not (isinstance(numbers, View) and all(map(_lies_in_order, (source, numbers, node.outputs[0])))):
        return None
    size, most = source.dtype.itemsize, source.shape[dim]
    if str(numbers.dtype) != "torch.int64" or limits.get(numbers.base, most + 1) > most:
        return None
    if dim == 0:
        return Pick(node, source, numbers, _Sizes(1, prod(numbers.shape), size * prod(source.shape[1:]), 0))
    if len(source.shape) != _MATRIX or numbers.shape[0] != source.shape[0]:
        return None
    tables, rows = numbers.shape
    return Pick(node, source, numbers, _Sizes(tables, rows, size, size * most))


def _index(source: View, places: Sequence[Any]) -> tuple[View, Any, int]:
    return source, places[0] if len(places) == 1 else None, 0


_PICKING: dict[str, Any] = {
    "aten.index_select.default": lambda source, dim, numbers: (source, numbers, dim),
    "aten.gather.default": lambda source, dim, numbers: (source, numbers, dim % len(source.shape)),
    "aten.index.Tensor": _index,
}
"""Of their arguments the table, the numbers, and the dimension."""


def _lies_in_order(view: View) -> bool:
    sizes = zip(view.shape, view.stride, row_major(view.shape), strict=True)
    return all(length == 1 or one == other for length, one, other in sizes)
