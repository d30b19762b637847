"""Routers of experts in a recorded layer: products with the weight of a module that is no linear layer."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

from llm_magic.backends.accelerate.experts.plain_routers import is_served_router
from llm_magic.backends.accelerate.recorded.recording import View


class RouterMatrices:
    """Weights of a layer, and copies of them in float32, in which many routers multiply.

    Parameters
    ----------
    weights
        As in `KnownTensors`: it grows as the layer's code uses them.
    """

    def __init__(self, layer: Any, weights: dict[int, tuple[str, str, View]]) -> None:
        self._layer, self._owners = layer, ChainMap({}, weights)

    def learn(self, function: Any, args: tuple[Any, ...], outputs: tuple[View, ...]) -> None:
        """What an operation has made; ``args`` have views for tensors."""
        if str(function) != "aten._to_copy.default":
            return
        path, name, whole = self._owners.get(args[0].base, ("", "", None))
        if args[0] == whole and str(outputs[0].dtype) == "torch.float32":
            self._owners[outputs[0].base] = path, name, outputs[0]

    def router_of(self, function: Any, shown: tuple[tuple[Any, ...], Any]) -> tuple[Any, int] | None:
        """The module whose router makes a product, and how many experts it has; ``None``: it is something else."""
        args, kwargs = shown
        if str(function) not in ("aten.mm.default", "aten.addmm.default") or kwargs:
            return None
        *added, _, matrix = args
        path, name, whole = self._owners.get(matrix.base, ("", "", matrix))
        if name != "weight" or not is_served_router(self._layer.get_submodule(path)):
            return None
        if (matrix.shape, matrix.stride, matrix.offset) != (
            whole.shape[::-1],
            whole.stride[::-1],
            whole.offset,
        ):
            return None
        module = self._layer.get_submodule(path)
        bias = module._parameters.get("bias")
        is_its_own = self._owners.get(added[0].base) == (path, "bias", added[0]) if added else bias is None
        return (module, whole.shape[0]) if is_its_own else None
