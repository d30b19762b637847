"""Which tensor is which of those that a layer's code has in hand, and what is written down for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.recording import VARYING, Argument, Constant, View

_OF_A_CONSTANT = 64  # numbers at most


class KnownTensors:
    """By identity: each is kept, so that no other comes in its place.

    Attributes
    ----------
    weights
        Parameters and buffers that the code has used: base -> path of the module, name, and all of it.
    constants
        As in `Constant`, those that it has used.
    """

    def __init__(self, layer: Any) -> None:
        self.weights: dict[int, tuple[str, str, View]] = {}
        self.constants: list[Constant] = []
        self._places = {
            id(tensor): (path, name)
            for path, module in layer.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self._views: dict[int, View] = {}
        self._arguments: dict[int, Argument] = {}
        self._own: dict[int, View] = {}
        self._fixed: set[int] = set()
        self._alive: list[Any] = []
        self._bases = 0

    def new(self, tensor: Any, *, is_whole: bool = True) -> View:
        """Of one that lies in no other; one that is not whole has another shape in each sweep, or is known to kernels only."""
        shape, stride = (tuple(tensor.shape), tuple(tensor.stride())) if is_whole else (VARYING, ())
        view = View(self._bases, shape, stride, 0, tensor.dtype)
        self._bases += 1
        self._know(tensor, view)
        return view

    def new_own(self, tensor: Any) -> View:
        """As `new`, of one that the layer has made, and so may change."""
        view = self.new(tensor)
        self._own[view.base] = view
        return view

    def know_part(self, part: Any, of: Any) -> None:
        """Of a tensor that lies within another one."""
        whole, start = self._views[id(of)], of.storage_offset()
        offset = whole.offset + part.storage_offset() - start
        self._know(part, View(whole.base, tuple(part.shape), part.stride(), offset, part.dtype))

    def know_argument(self, stand: Any, number: int) -> None:
        """Of what stands for an argument that is no tensor and no plain value."""
        self._alive.append(stand)
        self._arguments[id(stand)] = Argument(number)

    def is_known(self, tensor: Any) -> bool:
        """Whether it has a place in the recording already."""
        return id(tensor) in self._views

    def fix(self, made: Any) -> None:
        """Of what code makes of nothing but numbers of its own."""
        self._alive.append(made)
        self._fixed |= {id(each) for each in tensors_in(made)}

    def is_fixed(self, tensor: Any) -> bool:
        """Whether code has made it of nothing but numbers of its own."""
        return id(tensor) in self._fixed

    def may_change(self, tensor: Any) -> bool:
        """Whether it is the layer's own, and no two see its memory as different numbers."""
        view = self._views.get(id(tensor))
        return view is not None and view.base in self._own

    def change(self, tensor: Any) -> tuple[int, View]:
        """Note that its memory is changed: what lies in it has another base from then on.

        Returns
        -------
        The base that it had, and all of the memory as it is now.
        """
        before = self._views[id(tensor)].base
        after = replace(self._own[before], base=self._bases)
        self._bases += 1
        self._own[after.base] = after
        for number, view in self._views.items():
            if view.base == before:
                self._views[number] = replace(view, base=after.base)
        return before, after

    def disown(self, tensor: Any) -> None:
        """Of one whose memory nobody may change any more."""
        self._own.pop(self._views[id(tensor)].base, None)

    def view(self, tensor: Any) -> View:
        """Of a tensor that the code uses.

        Raises
        ------
        CannotRecordError
            When nobody knows where it is from.
        """
        known = self._views.get(id(tensor))
        if known is not None:
            return known
        if id(tensor) in self._fixed:
            return self._constant(tensor)
        place = self._places.get(id(tensor))
        if place is None:
            raise CannotRecordError("it uses a tensor that is none of its weights")
        view = self.new(tensor)
        self.weights[view.base] = (*place, view)
        return view

    def shown(self, value: Any) -> Any:
        """What is written down for an argument or a result: nested tuples, with a `View` for each tensor.

        Raises
        ------
        CannotRecordError
            When it is nothing that can be written down.
        """
        import torch

        if isinstance(value, torch.Tensor):
            return self.view(value)
        if id(value) in self._arguments:
            return self._arguments[id(value)]
        if isinstance(value, (tuple, list)):
            return tuple(self.shown(each) for each in value)
        if value is None or isinstance(
            value,
            (Argument, bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format),
        ):
            return value
        raise CannotRecordError(f"it passes a {type(value).__name__} on")

    def shown_call(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """As `shown`, of a call: as ``args`` and ``kwargs`` of a `Node`."""
        return self.shown(args), tuple((name, self.shown(value)) for name, value in sorted(kwargs.items()))

    def _know(self, tensor: Any, view: View) -> None:
        self._alive.append(tensor)
        self._views[id(tensor)] = view

    def _constant(self, tensor: Any) -> View:
        if tensor.numel() > _OF_A_CONSTANT or tensor.dtype.is_complex:
            raise CannotRecordError("it makes many numbers of its own")
        with unseen():
            view = self.new(tensor.contiguous())
            self.constants.append(Constant(view, tuple(tensor.reshape(-1).tolist())))
        self._views[id(tensor)] = view
        return view


def tensors_in(value: Any) -> Iterator[Any]:
    """All tensors of a call, in the order of `views_in` what is noted of it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from tensors_in(value[name])
