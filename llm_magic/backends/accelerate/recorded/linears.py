"""The linear layers of a recorded layer: those that see the same tokens, in one call of a kernel; routers, and experts.

They are the modules that they were, and their weights are asked for in every sweep: a block that is read from the disk
has them in another place each time. Whatever no kernel takes computes as its module does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from llm_magic.backends.accelerate.experts.plain_experts import PlainStack
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights, Products, address
from llm_magic.backends.accelerate.kernels.torch_threads import FEW_NUMBERS, one_thread
from llm_magic.backends.accelerate.recorded.program import Values, as_noted, shown
from llm_magic.backends.accelerate.recorded.recording import Node, View
from llm_magic.backends.accelerate.served.cpu_linear import plain_matrix, served_weights

_MOST_KEPT = 16
"""Weights of a module that are known: as many as a lane may have slots, and some."""


class Linears:
    """Linear layers of the same tokens.

    Parameters
    ----------
    tokens
        What they see.
    outputs, modules
        Of each.

    Attributes
    ----------
    matrices
        The numbers of matrices of a stack, one for each row of the results; ``None``: there is no stack.
    """

    matrices: View | None = None

    def __init__(self, tokens: View, outputs: Sequence[View], modules: Sequence[Any]) -> None:
        import torch

        self.tokens_view = tokens
        self.outputs = list(outputs)
        self._modules = list(modules)
        self._known: list[dict[int, tuple[Any, PackedWeights | None]]] = [{} for _ in modules]
        self._products: dict[tuple[Any, ...], Products | None] = {}
        self.dtype = self.tokens_view.dtype
        self._name = str(self.dtype).removeprefix("torch.")
        self.tokens = 1
        for size in self.tokens_view.shape[:-1]:
            self.tokens *= size
        # Not on the default device, which somebody may have set.
        self._empty, self._byte = partial(torch.empty, device=torch.device("cpu")), torch.uint8

    @property
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where their parameters are."""
        return [(module._parameters, name) for module in self._modules for name in ("weight", "bias")]

    def run(self, values: Values) -> None:
        """Put what they make into ``values``."""
        states = shown(self.tokens_view, values)
        weights = self.weights()
        products = None if weights is None else self.prepared(weights)
        if weights is None or products is None:
            for number, out in enumerate(self.outputs):
                with one_thread() if self._is_small(out) else nullcontext():
                    values[out.base] = self._otherwise(number, states)
            return
        self._multiply(products, states.contiguous(), weights, values)

    def _otherwise(self, number: int, states: Any) -> Any:
        """What one of them makes where no kernel does."""
        return self._modules[number].forward(states).contiguous()

    def _served(self, module: Any) -> PackedWeights | None:
        return served_weights(module, self.dtype)

    def _is_small(self, out: View) -> bool:
        return bool(out.shape[-1] * self.tokens_view.shape[-1] <= FEW_NUMBERS)

    @property
    def may_be_chained(self) -> bool:
        """Whether they read tokens as these lie, and are products of a kernel, as far as is known now."""
        size, strides = 1, list[int]()
        for length in reversed(self.tokens_view.shape):
            strides.insert(0, size)
            size *= length
        dimensions = zip(self.tokens_view.shape, self.tokens_view.stride, strides, strict=True)
        if self.biases() is None or not all(length == 1 or one == other for length, one, other in dimensions):
            return False
        weights = self.weights()
        return weights is not None and self.prepared(weights) is not None

    def biases(self) -> list[Any] | None:
        """What each adds, ``None`` for nothing; ``None`` where one is something else than numbers in RAM of the same dtype."""
        found = [module._parameters.get("bias") for module in self._modules]
        for bias, out in zip(found, self.outputs, strict=True):
            if bias is not None and not _are_numbers(bias, out.shape[-1], self.dtype):
                return None
        return found

    def weights(self) -> list[PackedWeights] | None:
        """Those of all of them; ``None`` where one is to compute itself."""
        found = [self._weights(number) for number in range(len(self._modules))]
        weights = [each for each in found if each is not None]
        return weights if len(weights) == len(found) else None

    def _multiply(self, products: Products, states: Any, weights: Sequence[Any], values: Values) -> None:
        room = self._empty(products.room, dtype=self._byte) if products.room else None
        addresses = []
        for out, of in zip(self.outputs, weights, strict=True):
            result = values[out.base] = self._empty(products.places, of.rows, dtype=self.dtype)
            addresses += [address(of.data), address(of.scales), address(of.shifts), result.data_ptr()]
        products.run(products.words(states.data_ptr(), address(room), addresses))
        for module, out in zip(self._modules, self.outputs, strict=True):
            result = values[out.base] if products.places == self.tokens else values[out.base][: self.tokens]
            bias = module._parameters.get("bias")
            if bias is not None:
                result += bias
            values[out.base] = result.view(out.shape)

    def _weights(self, number: int) -> PackedWeights | None:
        """Those of a module as the kernels take them; ``None`` where it is to compute itself."""
        module, known = self._modules[number], self._known[number]
        weight = module._parameters.get("weight")
        held = known.get(id(weight))
        if held is not None:
            packed = held[1]
            if packed is None or _is_such(weight, packed):
                return packed
        if len(known) >= _MOST_KEPT:
            known.clear()
        packed = self._served(module)
        known[id(weight)] = weight, packed
        return packed

    def prepared(self, weights: Sequence[PackedWeights]) -> Products | None:
        """Their products; ``None`` where no kernel makes them."""
        key = tuple([(of.layout, of.rows) for of in weights])
        if key not in self._products:
            layouts = {of.layout for of in weights}
            fits = all(
                (of.rows, of.columns) == (out.shape[-1], self.tokens_view.shape[-1])
                for of, out in zip(weights, self.outputs, strict=True)
            )
            is_few = self.tokens <= cpu_products.most_by_bytes(weights[0].kind, self.dtype)
            rows = tuple(of.rows for of in weights)
            alike = len(layouts) == 1 and is_few and fits
            self._products[key] = (
                cpu_products.prepared(weights[0].layout, rows, self._name, self.tokens) if alike else None
            )
        return self._products[key]


class Router(Linears):
    """The product of tokens with a router's weight, which is no linear layer: the tokens may be in float32 where it is of 16 bits."""

    def __init__(self, node: Node, module: Any) -> None:
        super().__init__(node.args[0], node.outputs, [module])

    def _served(self, module: Any) -> PackedWeights | None:
        import torch

        weight = module._parameters["weight"]
        is_taken = cpu_products.are_numbers(weight) and self.dtype in (weight.dtype, torch.float32)
        return plain_matrix(weight, weight.dtype) if is_taken else None

    def _otherwise(self, number: int, states: Any) -> Any:
        from torch.nn import functional

        weight, bias = (self._modules[number]._parameters.get(name) for name in ("weight", "bias"))
        return functional.linear(states, weight.to(states.dtype), bias)


class Experts(Linears):
    """Products of tokens, each with some matrices of a stack."""

    def __init__(self, node: Node, module: Any) -> None:
        self._name_of_stack, tokens, experts = node.args
        super().__init__(tokens, node.outputs, [module])
        self.matrices = experts
        self._count, self.tokens = self.tokens, self.outputs[0].shape[0]
        self._plain: tuple[Any, PackedWeights | None] = None, None

    @property
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """As of `Linears`: of the stack."""
        (module,), name = self._modules, self._name_of_stack
        stack = module._modules.get(name)
        if stack is None:
            return [(module._parameters, name)]
        return [(held, each) for held in (stack._parameters, stack._buffers) for each in held]

    @property
    def may_be_chained(self) -> bool:
        """Whether their numbers lie side by side, too."""
        assert self.matrices is not None
        is_plain = str(self.matrices.dtype) == "torch.int64" and self.matrices.stride == (1,)
        return is_plain and super().may_be_chained

    def run(self, values: Values) -> None:
        """As that of `Linears`."""
        (out,) = self.outputs
        products = self._stack().multiplied(shown(self.tokens_view, values), shown(self.matrices, values))
        values[out.base] = as_noted(products, out)

    def biases(self) -> list[Any] | None:
        """None of them: what experts have beside their matrices is added by another operation."""
        return [None]

    def weights(self) -> list[PackedWeights] | None:
        """The first matrix of the stack."""
        (module,) = self._modules
        stack = module._modules.get(self._name_of_stack)
        if stack is not None:
            found = stack.in_ram
        else:
            matrices = module._parameters[self._name_of_stack]
            if self._plain[0] is not matrices or not _is_such_stack(matrices, self._plain[1]):
                self._plain = matrices, PlainStack(matrices).in_ram
            found = self._plain[1]
        return None if found is None else [found]

    def prepared(self, weights: Sequence[PackedWeights]) -> Products | None:
        """As that of `Linears`."""
        (first,), (out,) = weights, self.outputs
        key = first.layout, first.rows
        if key not in self._products:
            is_such = first.kind not in cpu_products.PLAIN or first.kind == self._name
            fits = is_such and (first.rows, first.columns) == (out.shape[-1], self.tokens_view.shape[-1])
            of_each = self.tokens // self._count
            self._products[key] = (
                cpu_products.prepared_each(first.layout, first.rows, self._name, self._count, of_each)
                if fits and (first.scales is None) == (first.kind in cpu_products.PLAIN)
                else None
            )
        return self._products[key]

    def _stack(self) -> Any:
        (module,) = self._modules
        name = self._name_of_stack
        return module._modules.get(name) or PlainStack(module._parameters[name])


def _is_such_stack(matrices: Any, known: PackedWeights | None) -> bool:
    """As `_is_such`."""
    if known is None:
        return False
    is_same = (
        matrices.shape[1:] == (known.rows, known.columns) and str(matrices.dtype) == f"torch.{known.kind}"
    )
    return is_same and matrices.is_contiguous() and matrices.is_cpu


def _are_numbers(bias: Any, count: int, dtype: Any) -> bool:
    return (
        cpu_products.are_numbers(bias)
        and bias.shape == (count,)
        and bias.is_cpu
        and bias.is_contiguous()
        and bias.dtype is dtype
    )


def _is_such(weight: Any, packed: PackedWeights) -> bool:
    """Whether a parameter still is what it was: ``model.float()`` changes one of plain numbers where it is."""
    if packed.data is not weight:
        return True
    if packed.kind not in cpu_products.PLAIN:  # its own shape is that of bytes
        return bool(weight.is_cpu)
    shape = (packed.rows, packed.columns)
    is_same = weight.shape == shape and str(weight.dtype) == f"torch.{packed.kind}"
    return is_same and weight.is_contiguous() and weight.is_cpu
