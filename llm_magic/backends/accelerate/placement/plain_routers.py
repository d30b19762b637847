"""Routers of experts in 16 bits: the product with their weight is no module, and slow in torch for a few tokens.

So it is caught on its way to torch. Recorded layers multiply in the same way: which experts a token gets does not depend
on how its layer runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.served_class import serve, served_by, usual_class_of

_MATRIX = 2  # dimensions


def serve_plain_router(module: Any) -> None:
    """Let a module beside experts multiply by our kernels on the CPU, where it has a weight for that."""
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == _MATRIX
    if is_matrix and served_by(module) is None and cpu_products.few_plain_tokens(weight.dtype):
        serve(module, _router_by_kernels)


def is_served_router(module: Any) -> bool:
    """Whether products with the weight of a module are made by our kernels, where these can."""
    return served_by(module) is _router_by_kernels


def _router_by_kernels(module: Any, *args: Any, **options: Any) -> Any:
    import torch

    weight = module._parameters.get("weight")
    if weight is None or not cpu_products.are_numbers(weight) or not weight.is_cpu or is_looked_at():
        return None
    states = next((each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)), None)
    if states is None or states.numel() > cpu_products.few_plain_tokens(weight.dtype) * weight.shape[-1]:
        return None
    with _caught():
        return usual_class_of(module).forward(module, *args, **options)


def _caught() -> Any:
    """While it lasts, linear functions of a parameter that kernels take, or of its copy in float32, are theirs."""
    return _mode()()


@cache
def _mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    conversions = torch.Tensor.type, torch.Tensor.to, torch.Tensor.float

    class Caught(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self._copies: dict[int, tuple[Any, Any]] = {}

        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            more = {} if kwargs is None else kwargs
            outputs = self._products(*args, **more) if function is torch.nn.functional.linear else None
            if outputs is not None:
                return outputs
            result = function(*args, **more)
            if function in conversions and _is_copy(result, args[0]):
                self._copies[id(result)] = result, args[0]  # so that nobody else gets the number
            return result

        def _products(self, input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 - torch's name
            _, parameter = self._copies.get(id(weight), (None, weight))
            return _router_products(input, parameter, bias, is_wide=parameter is not weight)

    return Caught


def _is_copy(result: Any, of: Any) -> bool:
    """Whether it is a parameter in float32."""
    import torch

    return type(of) is torch.nn.Parameter and type(result) is torch.Tensor and result.dtype == torch.float32


def _router_products(states: Any, weight: Any, bias: Any, *, is_wide: bool) -> Any:
    """States times a router's weight by our kernels, with its bias; ``None`` where no kernel takes them.

    ``is_wide``: the states are in float32, and the weight is to be.
    """
    import torch

    if bias is not None and (bias.dtype != states.dtype or (bias.requires_grad and torch.is_grad_enabled())):
        return None
    products = cpu_products.multiplied_plain(states, weight, is_wide=is_wide)
    return products if products is None or bias is None else products.add_(bias)
