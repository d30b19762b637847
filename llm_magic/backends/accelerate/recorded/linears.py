"""The linear layers of a recorded layer: those that see the same tokens, in one call of a kernel.

They are the modules that they were, and their weights are asked for in every sweep: a block that is read from the disk
has them in another place each time. Whatever no kernel takes computes as its module does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.cpu_linear import served_weights
from llm_magic.backends.accelerate.placement.cpu_products import PackedWeights, Products, address
from llm_magic.backends.accelerate.recorded.program import Values, shown
from llm_magic.backends.accelerate.recorded.recording import Node, View

_MOST_KEPT = 16
"""Weights of a module that are known: as many as a lane may have slots, and some."""


class Linears:
    """Linear layers of the same tokens.

    Parameters
    ----------
    nodes, modules
        Of each.
    """

    def __init__(self, nodes: Sequence[Node], modules: Sequence[Any]) -> None:
        import torch

        self._view: View = nodes[0].args[0]
        self._outputs = [node.outputs[0] for node in nodes]
        self._modules = list(modules)
        self._known: list[dict[int, tuple[Any, PackedWeights | None]]] = [{} for _ in modules]
        self._products: dict[tuple[Any, ...], Products | None] = {}
        self._dtype = self._view.dtype
        self._name = str(self._dtype).removeprefix("torch.")
        self._tokens = 1
        for size in self._view.shape[:-1]:
            self._tokens *= size
        # Not on the default device, which somebody may have set.
        self._empty, self._byte = partial(torch.empty, device=torch.device("cpu")), torch.uint8

    def run(self, values: Values) -> None:
        """Put what they make into ``values``."""
        states = shown(self._view, values)
        found = [self._weights(number) for number in range(len(self._modules))]
        weights = [each for each in found if each is not None]
        products = self._prepared(weights) if len(weights) == len(found) else None
        if products is None:
            for module, out in zip(self._modules, self._outputs, strict=True):
                values[out.base] = module.forward(states).contiguous()
            return
        self._multiply(products, states.contiguous(), weights, values)

    def _multiply(self, products: Products, states: Any, weights: Sequence[Any], values: Values) -> None:
        room = self._empty(products.room, dtype=self._byte) if products.room else None
        addresses = []
        for out, of in zip(self._outputs, weights, strict=True):
            result = values[out.base] = self._empty(products.places, of.rows, dtype=self._dtype)
            addresses += [address(of.data), address(of.scales), address(of.shifts), result.data_ptr()]
        products.run(products.words(states.data_ptr(), address(room), addresses))
        for module, out in zip(self._modules, self._outputs, strict=True):
            result = values[out.base] if products.places == self._tokens else values[out.base][: self._tokens]
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
        packed = served_weights(module, self._dtype)
        known[id(weight)] = weight, packed
        return packed

    def _prepared(self, weights: Sequence[PackedWeights]) -> Products | None:
        key = tuple([(of.layout, of.rows) for of in weights])
        if key not in self._products:
            layouts = {of.layout for of in weights}
            is_few = self._tokens <= cpu_products.most_by_bytes(weights[0].kind, self._dtype)
            rows = tuple(of.rows for of in weights)
            alike = len(layouts) == 1 and is_few
            self._products[key] = (
                cpu_products.prepared(weights[0].layout, rows, self._name, self._tokens) if alike else None
            )
        return self._products[key]


def _is_such(weight: Any, packed: PackedWeights) -> bool:
    """Whether a parameter still is what it was: ``model.float()`` changes one of plain numbers where it is."""
    if packed.data is not weight:
        return True
    if packed.kind not in cpu_products.PLAIN:  # its own shape is that of bytes
        return bool(weight.is_cpu)
    shape = (packed.rows, packed.columns)
    is_same = weight.shape == shape and str(weight.dtype) == f"torch.{packed.kind}"
    return is_same and weight.is_contiguous() and weight.is_cpu
