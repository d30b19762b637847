"""Rows and numbers that a recorded layer picks by the places of the largest of others: what belongs to chosen experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.experts.plain_routers import few_largest
from llm_magic.backends.accelerate.kernels.cpu_products import are_read
from llm_magic.backends.accelerate.kernels.words import LARGEST, PICKED
from llm_magic.backends.accelerate.recorded.lowering import row_major
from llm_magic.backends.accelerate.recorded.plan import Plan
from llm_magic.backends.accelerate.recorded.program import Values, call
from llm_magic.backends.accelerate.recorded.recording import Node, View

_MATRIX = 2  # dimensions
_WITHOUT_DIM = 2  # arguments of torch's ``topk``
_MOST = 1024
"""See `kernels.largest`."""


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
    found: dict[int, int] = {}
    for node in nodes:
        if node.changes is not None:
            found.pop(node.changes, None)
        if node.name is few_largest:
            found[node.outputs[1].base] = node.args[0].shape[-1]
        elif str(node.name) == "aten.topk.default":
            dim = node.args[2] if len(node.args) > _WITHOUT_DIM else -1
            found[node.outputs[1].base] = node.args[0].shape[dim]
    return found


class Largest:
    """The operation that tells which numbers are the largest.

    Attributes
    ----------
    made
        These, and their places.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._source, self._count = node.args
        self.made: tuple[View, ...] = node.outputs

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``."""
        call(self._node, None, values)

    def add(self, plan: Plan) -> None:
        """Have it done by a kernel."""
        from llm_magic.backends.accelerate.kernels.largest import largest

        view = self._source
        for made in self.made:
            plan.place(made)
        (rows, columns), kernel = view.shape, largest(str(view.dtype).removeprefix("torch."))
        first = plan.begin(kernel, [0, 0, 0, rows, columns, self._count, view.stride[0]])
        plan.point_at(first + LARGEST.source, view)
        for word, made in zip((LARGEST.values, LARGEST.places), self.made, strict=True):
            plan.point(first + word, made.base)


def pick(node: Any, limits: dict[int, int]) -> Pick | Largest | None:
    """What finds the largest numbers, or picks by places that are there; ``None``: it is something else."""
    if not isinstance(node, Node):
        return None
    if node.name is few_largest:
        source = node.args[0]
        is_taken = source.stride[-1] == 1 and source.shape[-1] <= _MOST and are_read(_name(source))
        return Largest(node) if is_taken else None
    return _pick(node, limits) if str(node.name) in _PICKING and not node.kwargs else None


def _pick(node: Node, limits: dict[int, int]) -> Pick | None:
    source, numbers, dim = _PICKING[str(node.name)](*node.args)
    if not (isinstance(numbers, View) and all(map(_lies_in_order, (source, numbers, node.outputs[0])))):
        return None
    size, most = source.dtype.itemsize, source.shape[dim]
    if str(numbers.dtype) != "torch.int64" or limits.get(numbers.base, most + 1) > most:
        return None
    by_row = str(node.name) != "aten.gather.default"
    if dim == 0 and (by_row or len(source.shape) == 1):
        return Pick(node, source, numbers, _Sizes(1, prod(numbers.shape), size * prod(source.shape[1:]), 0))
    is_of_matrix = len(source.shape) == len(numbers.shape) == _MATRIX and dim == 1 and not by_row
    if not is_of_matrix or numbers.shape[0] != source.shape[0]:
        return None
    tables, rows = numbers.shape
    return Pick(node, source, numbers, _Sizes(tables, rows, size, size * most))


def _index(source: View, places: Sequence[Any]) -> tuple[View, Any, int]:
    return source, places[0] if len(places) == 1 else None, 0


_PICKING: dict[str, Any] = {
    "aten.index_select.default": lambda source, dim, numbers: (source, numbers, dim % len(source.shape)),
    "aten.gather.default": lambda source, dim, numbers: (source, numbers, dim % len(source.shape)),
    "aten.index.Tensor": _index,
}
"""Of their arguments the table, the numbers, and the dimension."""


def _lies_in_order(view: View) -> bool:
    sizes = zip(view.shape, view.stride, row_major(view.shape), strict=True)
    return all(length == 1 or one == other for length, one, other in sizes)


def _name(view: View) -> str:
    return str(view.dtype).removeprefix("torch.")
