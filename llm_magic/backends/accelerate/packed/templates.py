"""A parameter without its bytes: shapes, dtypes, code tables, classes.

A `Template` makes the assignments that bind given tensors into the module, once for every buffer; a sweep then only
runs those assignments, so that nothing is packed, copied or allocated while tokens are made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.packed.weights import numbers

Parts = dict[str, Any]
"""Plain contiguous tensors by the name of what they are in their parameter; ``""`` is the data."""

Assignment = tuple[dict[str, Any], str, object]
"""``(mapping, key, value)``: binding is ``mapping[key] = value``."""


@dataclass(frozen=True)
class Template(ABC):
    """A parameter without its bytes.

    Attributes
    ----------
    module, name
        The parameter is ``module.name``.
    tensors
        Shape and torch dtype of every part, in the order of ``parts``.
    """

    module: Any
    name: str
    tensors: Mapping[str, tuple[tuple[int, ...], Any]]

    @property
    def bytes(self) -> int:
        """Bytes of all parts, without padding between them."""
        total = 0
        for shape, dtype in self.tensors.values():
            count = dtype.itemsize
            for extent in shape:
                count *= extent
            total += count
        return total

    @abstractmethod
    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        """What to assign so that the module computes with ``parts``, which are neither copied nor moved.

        The parts must have the shapes and dtypes of ``tensors`` and lie on one device.
        """

    def on(self, device: Any) -> Template:  # noqa: ARG002
        """The same with what else it holds on ``device``: nothing is copied when a weight is made there then."""
        return self

    def weight(self, parts: Mapping[str, Any]) -> Any:
        """What ``parts`` make, without putting it into its module."""
        return next(value for _, key, value in self.bindings(parts) if key == self.name)

    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        """Several weights as numbers of ``dtype`` ``[n, out, in]``; ``stacks`` are their parts ``[n, ...]``.

        Their bytes must lie in the order that GPUs read.
        """
        import torch

        count = len(next(iter(stacks.values())))
        alone = ({part: stack[i] for part, stack in stacks.items()} for i in range(count))
        return torch.stack([numbers(self.weight(parts)).to(dtype) for parts in alone])

    def empty(self) -> list[Assignment]:
        """What to assign so that the module holds no bytes: the same parameter on the meta device."""
        import torch

        return self.bindings(
            {
                part: torch.empty(shape, dtype=dtype, device="meta")
                for part, (shape, dtype) in self.tensors.items()
            }
        )


def bind(assignments: list[Assignment]) -> None:
    """Run assignments: dictionary writes only."""
    for mapping, key, value in assignments:
        mapping[key] = value
