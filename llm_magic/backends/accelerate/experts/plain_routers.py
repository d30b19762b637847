"""Routers of experts: the product with their weight is no module, and slow in torch for a few tokens.

So it is caught on its way to torch. Recorded layers multiply in the same way: which experts a token gets does not depend
on how its layer runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.current import current
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.served.served_class import serve, served_by, usual_class_of

_MATRIX = 2  # dimensions


def serve_plain_router(module: Any) -> None:
    """Let a module beside experts multiply by our kernels on the CPU, where it has a weight for that."""
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.dim() == _MATRIX
    if is_matrix and served_by(module) is None and cpu_products.few_routed_tokens(weight.dtype):
        serve(module, _router_by_kernels)


def is_served_router(module: Any) -> bool:
    """Whether products with the weight of a module are made by our kernels, where these can."""
    return served_by(module) is _router_by_kernels


def _router_by_kernels(module: Any, *args: Any, **options: Any) -> Any:
    import torch

    weight = module._parameters.get("weight")
    if weight is None or not cpu_products.are_numbers(weight) or not weight.is_cpu:
        return None
    if current() is None and is_looked_at():
        return None
    states = next((each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)), None)
    if states is None or states.numel() > cpu_products.few_routed_tokens(weight.dtype) * weight.shape[-1]:
        return None
    with _caught():
        return usual_class_of(module).forward(module, *args, **options)


def _caught() -> Any:
    """While it lasts, linear functions of a parameter that kernels take, or of its copy in float32, are theirs.

    So is which numbers are the largest, which torch's CPU code says in no order that is known where some are equal.
    """
    return _mode()()


@cache
def _mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    conversions = torch.Tensor.type, torch.Tensor.to, torch.Tensor.float

    class Caught(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self._copies: dict[int, tuple[Any, Any, int]] = {}

        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            more = {} if kwargs is None else kwargs
            outputs = self._products(*args, **more) if function is torch.nn.functional.linear else None
            if outputs is None and function in (torch.topk, torch.Tensor.topk):
                outputs = _largest(*args, **more)
            if outputs is not None:
                return outputs
            result = function(*args, **more)
            if function in conversions and _is_copy(result, args[0]):
                self._copies[id(result)] = result, args[0], result._version
            return result

        def _products(self, input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 - torch's name
            copy, parameter, version = self._copies.get(id(weight), (weight, weight, -1))
            if copy is weight and parameter is not weight and version != weight._version:
                return None  # somebody has changed it
            return _router_products(input, parameter, bias, is_wide=parameter is not weight)

    return Caught


class Largest(NamedTuple):
    """As what ``torch.topk`` returns."""

    values: Any
    indices: Any


def few_largest(values: Any, count: int) -> Largest:
    """The largest numbers of each row, from the largest on; of equal ones the first comes first."""
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    return Largest(ordered[..., :count].contiguous(), places[..., :count].contiguous())


def _largest(
    input: Any,  # noqa: A002 - torch's names, here and below
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002, ARG001
    **others: Any,
) -> Any:
    """As ``torch.topk``; ``None`` where that is to do it."""
    if others or not largest or dim not in (-1, input.dim() - 1) or input.dim() != _MATRIX:
        return None
    recorder = current()
    return few_largest(input, k) if recorder is None else recorder.few_largest(input, k)


def _is_copy(result: Any, of: Any) -> bool:
    """Whether it is a parameter in float32. Whether one of inference mode is changed nobody could tell."""
    import torch

    is_plain = type(of) is torch.nn.Parameter and type(result) is torch.Tensor
    return is_plain and result.dtype == torch.float32 and not result.is_inference()


def _router_products(states: Any, weight: Any, bias: Any, *, is_wide: bool) -> Any:
    """States times a router's weight by our kernels, with its bias; ``None`` where no kernel takes them.

    ``is_wide``: the states are in float32, and the weight is to be.
    """
    import torch

    if bias is not None and (bias.dtype != states.dtype or (bias.requires_grad and torch.is_grad_enabled())):
        return None
    products = cpu_products.multiplied_router(states, weight, is_wide=is_wide)
    return products if products is None or bias is None else products.add_(bias)
