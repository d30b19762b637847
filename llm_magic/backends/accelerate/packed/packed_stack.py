"""The experts of a layer as packed matrices, in one module of plain parameters.

transformers keeps a layer's experts in stacks, parameters whose first dimension counts experts. A
`PackedStack` takes the place of one: it has a parameter for each part of a packed matrix, stacked in
the same way. So whatever moves stacks, whole or expert by expert, moves these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.packed import packing
from llm_magic.backends.accelerate.packed.templates import Parts, Template, bind
from llm_magic.backends.accelerate.packed.weights import multiplied, packed_weights
from llm_magic.planning.packed import UNPACKED_EXPERTS_BYTES
from llm_magic.units import MIB

FEW_TOKENS = 16
"""Up to so many tokens, a GPU computes each of them by itself with each of its experts."""

_GATHERED_BYTES = 32 * MIB
"""Of packed matrices that a GPU copies at a time."""


class PackedStack(torch.nn.Module):
    """The matrices of a layer's experts, each packed as the weight of a linear layer.

    Parameters
    ----------
    linear
        The library's packed layer for one expert, on the meta device. It never holds bytes for long.
    shape
        Of the stack that was: ``(experts, out, in)``.
    is_transposed
        Whether that was ``(experts, in, out)`` instead. Matrices are packed as ``(out, in)`` all the same.

    Attributes
    ----------
    dtype
        torch dtype of the numbers.
    template
        What makes a weight of an expert's parts; ``None`` until there are any.
    known
        Experts that were asked for, as long as the module is bound to the same tensors.
    """

    linear: Any

    def __init__(self, linear: Any, shape: tuple[int, ...], *, is_transposed: bool) -> None:
        super().__init__()
        self.__dict__["linear"] = linear  # no submodule: its weight is not among the model's
        self.shape, self.is_transposed, self.dtype = tuple(shape), is_transposed, linear.weight.dtype
        self._names: dict[str, str] = {}  # of a part -> of its parameter
        self.template: Template | None = None
        self.known: dict[int, PackedMatrix] | None = None

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.shape[0]

    @property
    def outputs(self) -> int:
        """Rows of each matrix."""
        return int(self.linear.out_features)

    def matrix(self, stack: Any, expert: int) -> Any:
        """One expert of an unpacked stack, as ``(out, in)``."""
        return stack[expert].T if self.is_transposed else stack[expert]

    def fill(self, packed: Iterable[Parts]) -> None:
        """Hold these experts, one after the other; ``linear`` holds the last of them just then."""
        stacks: Parts = {}
        for index, parts in enumerate(packed):
            for part, tensor in parts.items():
                if index == 0:
                    stacks[part] = tensor.new_empty((self.experts, *tensor.shape))
                stacks[part][index] = tensor
        self.template, self.known = packing.template(self.linear, "weight"), None
        bind(self.template.empty())
        self._names = {part: part.replace(".", "_").strip("_") or "weight" for part in stacks}
        self._parameters.clear()  # another order may have other parts
        for part, name in self._names.items():
            self._parameters[name] = torch.nn.Parameter(stacks[part], requires_grad=False)

    def arrange(self, device: Any) -> None:
        """Put every expert into the order that the kernels of ``device`` read; see `packing.arrange`."""
        arranged = self._arranged(device)
        first, now = next(arranged), self._entry(0)
        if first.keys() != now.keys() or any(first[p].data_ptr() != now[p].data_ptr() for p in now):
            self.fill(itertools.chain([first], arranged))
        else:
            bind(packing.template(self.linear, "weight").empty())

    def _arranged(self, device: Any) -> Iterator[Parts]:
        assert self.template is not None
        for index in range(self.experts):
            bind(self.template.bindings(self._entry(index)))
            packing.arrange(self.linear, device)
            yield packing.parts(self.linear, "weight")

    def __getitem__(self, expert: int) -> PackedMatrix:
        if self.known is None:
            self.known = {}
        if expert not in self.known:
            assert self.template is not None
            self.known[expert] = PackedMatrix(self.template, self._entry(expert))
        return self.known[expert]

    @property
    def in_ram(self) -> PackedWeights | None:
        """The first matrix as kernels for the CPU take it, which the others follow, if they know its kind."""
        return self[0].in_ram

    def made_on(self, device: Any) -> Callable[[Iterable[Any]], PackedMatrix]:
        """What makes an expert of tensors on ``device``, one for each parameter, in their order."""
        assert self.template is not None
        template, parts = self.template.on(device), tuple(self._names)
        return lambda tensors: PackedMatrix(template, dict(zip(parts, tensors, strict=True)))

    def multiplied(self, tokens: Any, experts: Any) -> Any:
        """Each token ``[n, in]`` times the matrices of its experts, whose numbers are ``[n * k]``: ``[n * k, out]``."""
        if tokens.device.type == "cpu" and (weights := self.in_ram) is not None:
            outputs = cpu_products.multiplied_each(tokens, weights, experts)
            if outputs is not None:
                return outputs
        repeated = tokens.repeat_interleave(len(experts) // len(tokens), dim=0)
        rows = zip(repeated.split(1), self.chosen(experts), strict=True)
        return torch.cat([matrix(row) for row, matrix in rows])

    def chosen(self, experts: Any) -> Iterator[PackedMatrix]:
        """The matrices of experts with these numbers ``[n]``.

        A GPU copies them to where they are computed, so that the host need not wait for the numbers.
        """
        if experts.device.type == "cpu":
            yield from (self[expert] for expert in experts.tolist())
            return
        stacks: list[Any] = [self._parameters[name] for name in self._names.values()]
        size, matrix = sum(stack.nbytes for stack in stacks) // self.experts, self.made_on(experts.device)
        for some in experts.split(max(1, _GATHERED_BYTES // size)):
            for tensors in zip(*(stack.index_select(0, some) for stack in stacks), strict=True):
                yield matrix(tensors)

    def unpacked(self, uses: Sequence[int], dtype: Any) -> Iterator[Any]:
        """The numbers of every expert ``[out, in]``; ``None`` for some that are not used."""
        assert self.template is not None
        step = self.at_a_time(dtype)
        held: Mapping[str, Any] = self._parameters
        for start in range(0, self.experts, step):
            some = slice(start, min(start + step, self.experts))
            if any(uses[some]):
                stacks = {part: held[name][some] for part, name in self._names.items()}
                yield from self.template.unpacked(stacks, dtype)
            else:
                yield from [None] * (some.stop - some.start)

    def at_a_time(self, dtype: Any) -> int:
        """How many experts are unpacked together."""
        size: int = dtype.itemsize * self.linear.out_features * self.linear.in_features
        return max(1, UNPACKED_EXPERTS_BYTES // size)

    def unpacking_on(self, device: Any) -> Callable[[Sequence[Any], Any], Any]:
        """What makes numbers ``[n, out, in]`` of experts on ``device``: of the stacks of their parts, and in which dtype."""
        assert self.template is not None
        template, parts = self.template.on(torch.device(device)), tuple(self._names)
        return lambda stacks, dtype: template.unpacked(dict(zip(parts, stacks, strict=True)), dtype)

    def parts_of(self, expert: int) -> tuple[Any, ...]:
        """The plain tensors of one matrix, its data the first."""
        return tuple(self._entry(expert).values())

    def _entry(self, expert: int) -> Parts:
        held: Mapping[str, Any] = self._parameters
        return {part: held[name][expert] for part, name in self._names.items()}


class PackedMatrix:
    """The packed matrix of one expert: called with ``[tokens, in]``, it answers ``[tokens, out]``."""

    def __init__(self, template: Template, parts: Parts) -> None:
        self._template, self._parts = template, parts

    def __call__(self, tokens: Any) -> Any:
        if tokens.device.type == "cpu" and (weights := self.in_ram) is not None:
            outputs = cpu_products.multiplied(tokens, weights)
            if outputs is not None:
                return outputs
        return multiplied(tokens, self._weight)

    @cached_property
    def in_ram(self) -> PackedWeights | None:
        """The matrix as kernels for the CPU take it, if they know its kind."""
        return packed_weights(self._weight)

    def unpacked(self, dtype: Any) -> Any:
        """Its numbers ``[out, in]``."""
        return self._template.unpacked({part: held[None] for part, held in self._parts.items()}, dtype)[0]

    @property
    def _weight(self) -> Any:
        # What is made in inference mode is of no use outside, nor the other way round.
        return self._template.weight(self._parts) if torch.is_inference_mode_enabled() else self._kept

    @cached_property
    def _kept(self) -> Any:
        return self._template.weight(self._parts)
