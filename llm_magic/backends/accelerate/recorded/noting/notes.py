"""What is written down of a layer, in order: operations of torch, and large parts, which only seem to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors, tensors_in
from llm_magic.backends.accelerate.recorded.noting.made_up import MadeUp
from llm_magic.backends.accelerate.recorded.recording import VARYING, Node, View

_OF_THE_TEXT = ("cache", "take")
"""Kinds of parts that give keys and values of all tokens: they have another shape in each sweep."""


class Notes:
    """Of one run.

    Attributes
    ----------
    nodes
        What the layer does.
    leaves
        As in a `Rehearsal`.
    """

    def __init__(self, layer: Any, tensors: KnownTensors, made_up: MadeUp) -> None:
        self.nodes: list[Node] = []
        self.leaves: list[tuple[list[Any], tuple[Any, ...]]] = []
        self._tensors, self._made_up = tensors, made_up
        self._paths = {id(module): path for path, module in layer.named_modules()}

    def path_of(self, module: Any) -> str | None:
        """Where a module is in the layer; ``None``: it is none of it."""
        return self._paths.get(id(module))

    def operation(
        self, function: Any, call: tuple[Any, Any], outputs: tuple[View, ...], changes: int | None = None
    ) -> None:
        """One of torch; ``call`` and the rest are as in a `Node`."""
        self.nodes.append(Node(len(self.nodes), "op", function, *call, outputs, changes))

    def module(
        self, kind: str, module: Any, call: tuple[Any, Any], shapes: Sequence[tuple[int, ...]], dtype: Any
    ) -> tuple[Any, ...]:
        """As `part`, by the name that a module of the layer has there."""
        path = self.path_of(module)
        if path is None:
            raise CannotRecordError("a part of it is another layer's")
        return self.part(kind, path, call, shapes, dtype)

    def part(
        self, kind: str, name: Any, call: tuple[Any, Any], shapes: Sequence[tuple[int, ...]], dtype: Any
    ) -> tuple[Any, ...]:
        """One that is not computed now.

        Parameters
        ----------
        kind, name
            As in a `Node`.
        call
            ``args`` and ``kwargs``.

        Returns
        -------
        Made-up tensors of these shapes, which the layer's code goes on with.
        """
        import torch

        shown = self._tensors.shown_call(*call)
        is_of_the_text = kind in _OF_THE_TEXT
        if is_of_the_text:  # only large parts take them, which look at nothing of them but how many there are
            made = tuple(torch.zeros((), dtype=dtype, device="cpu").expand(shape) for shape in shapes)
        else:
            made = tuple(self._made_up.drawn(shape).to(dtype) for shape in shapes)
        # Copies, for the layer may change what it gets, and what it gave.
        got = [each.clone() for each in tensors_in(call) if self._tensors.view(each).shape != VARYING]
        self.leaves.append((got, made if is_of_the_text else tuple(each.clone() for each in made)))
        if is_of_the_text:
            outputs = tuple(self._tensors.new(each, is_whole=False) for each in made)
        else:
            outputs = tuple(map(self._tensors.new_own, made))
        self.nodes.append(Node(len(self.nodes), kind, name, *shown, outputs))
        return made
