"""How a parameter of some kind comes apart into plain tensors: a plain one, a stack's part, scaled floats.

Those of libraries have files of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from llm_magic.backends.accelerate.packed.templates import Assignment, Parts, Template


class Kind(ABC):
    """How one library keeps a parameter."""

    @abstractmethod
    def tensors(self, module: Any, name: str) -> Parts:
        """What ``module.name`` is made of, as it is: maybe with gaps, or as parameters."""

    @abstractmethod
    def template(self, module: Any, name: str) -> Template:
        """What is left of ``module.name`` without its bytes."""

    def parts(self, module: Any, name: str) -> Parts:
        """The same as ``tensors``, plain and contiguous."""
        return {part: _plain(tensor) for part, tensor in self.tensors(module, name).items()}

    def shapes(self, module: Any, name: str) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and torch dtype of every part."""
        found = self.tensors(module, name)
        return {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in found.items()}


class Ordered(Kind):
    """A kind whose bytes some devices want in an order of their own."""

    @abstractmethod
    def is_needed(self, module: Any, name: str) -> bool:
        """Whether this parameter is of that sort, on this computer."""

    @abstractmethod
    def arrange(self, module: Any, name: str, device: Any, fresh: bool) -> None:
        """Put the bytes into the order that the kernels of a torch device read; ``fresh``: packed just now."""


def _plain(tensor: Any) -> Any:
    """The tensor itself, without a subclass and without gaps."""
    import torch

    data = tensor.detach() if type(tensor) is torch.Tensor else tensor.data.as_subclass(torch.Tensor)
    return data.contiguous()


def parameter_of(data: Any) -> Any:
    """A parameter that nobody trains."""
    import torch

    return torch.nn.Parameter(data, requires_grad=False)


class PlainKind(Kind):
    """A parameter that is its own single part."""

    def tensors(self, module: Any, name: str) -> Parts:
        return {"": module._parameters[name]}

    def template(self, module: Any, name: str) -> Template:
        return _PlainTemplate(module, name, self.shapes(module, name))


@dataclass(frozen=True)
class _PlainTemplate(Template):
    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        return [(self.module._parameters, self.name, parameter_of(parts[""]))]


@runtime_checkable
class Stacked(Protocol):
    """A module whose parameters are the parts of packed matrices, stacked.

    Attributes
    ----------
    linear
        A packed layer of such a matrix, without bytes.
    template
        What is left of one of the matrices, as its bytes lie now.
    known
        What was made of the parameters; to be forgotten with them.
    """

    linear: Any
    template: Template | None
    known: Any

    def arrange(self, device: Any) -> None:
        """Put all matrices into the order that the kernels of ``device`` read; nothing when they are."""


@dataclass(frozen=True)
class StackKind(Ordered):
    """A part of packed matrices, stacked.

    Attributes
    ----------
    matrix
        The kind of such a matrix.
    """

    matrix: Kind

    def is_needed(self, module: Any, _name: str) -> bool:
        return isinstance(self.matrix, Ordered) and self.matrix.is_needed(module.linear, "weight")

    def tensors(self, module: Any, name: str) -> Parts:
        return {"": module._parameters[name]}

    def template(self, module: Any, name: str) -> Template:
        return _StackTemplate(module, name, self.shapes(module, name), module.template)

    def arrange(self, module: Any, name: str, device: Any, _fresh: bool) -> None:
        if name == next(iter(module._parameters)):  # all parts at once
            module.arrange(device)


@dataclass(frozen=True)
class _StackTemplate(Template):
    matrix: Template

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        return [
            (self.module._parameters, self.name, parameter_of(parts[""])),
            (self.module.__dict__, "template", self.matrix.on(parts[""].device)),
            (self.module.__dict__, "known", None),
        ]


class ScaledKind(Kind):
    """Floats with scales."""

    def tensors(self, module: Any, name: str) -> Parts:
        weight = module._parameters[name]
        return {"": weight.entries, "scales": weight.scales}

    def template(self, module: Any, name: str) -> Template:
        shapes = self.shapes(module, name)
        return _ScaledTemplate(module, name, shapes, module._parameters[name].form)


@dataclass(frozen=True)
class _ScaledTemplate(Template):
    form: Any = None

    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        return self.form.numbers(stacks[""], stacks["scales"], dtype)

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        from llm_magic.backends.accelerate.packed.scaled_floats import ScaledFloats

        made = ScaledFloats(parts[""], parts["scales"], self.form)
        return [(self.module._parameters, self.name, made)]
