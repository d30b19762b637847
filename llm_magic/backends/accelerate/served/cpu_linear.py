"""Linear layers that the CPU computes by kernels of ours: packed ones, and those of 16 bits with few tokens."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.packed.weights import packed_weights
from llm_magic.backends.accelerate.served.served_class import serve, served_by, served_class


def serve_linear(layer: Any) -> None:
    """Let a linear layer compute by our kernels on the CPU, where there is one for its weight."""
    serve(layer, linear_by_kernels)


def is_served_linear(layer: Any) -> bool:
    """Whether a layer computes by our kernels, where these can."""
    return served_by(layer) is linear_by_kernels


def served_weights(layer: Any, dtype: Any) -> PackedWeights | None:
    """The weights with which a kernel makes all of a layer's outputs of states in RAM, but for a bias; ``None``: no kernel does.

    Nobody else may see these products: not to differentiate, not to trace.
    """
    import torch

    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    computed = getattr(layer, "compute_dtype", None) or dtype
    if not is_served_linear(layer) or weight is None or type(weight) is torch.Tensor or computed != dtype:
        return None
    if bias is not None and (bias.dtype != dtype or not bias.is_cpu):
        return None
    if type(weight) is not torch.nn.Parameter:
        weights = packed_weights(weight)
    else:  # of 32 bits torch is quick with it, and sums in another order
        weights = plain_matrix(weight, dtype) if cpu_products.few_plain_tokens(dtype) else None
    parts = () if weights is None else (weights.data, weights.scales, weights.shifts)
    return weights if all(part is None or part.is_cpu for part in parts) else None


def plain_matrix(weight: Any, dtype: Any) -> PackedWeights | None:
    """A parameter ``[out, in]`` of plain numbers as kernels take it, if they do."""
    name = str(weight.dtype).removeprefix("torch.")
    is_taken = name in cpu_products.PLAIN and weight.dtype == dtype and weight.is_contiguous()
    return PackedWeights(name, weight, None, None, *weight.shape) if is_taken else None


def is_linear(layer: Any) -> bool:
    """Whether a module is torch's linear layer, served by kernels or not."""
    import torch

    return type(layer) is torch.nn.Linear or type(layer) is served_class(torch.nn.Linear, linear_by_kernels)


def linear_by_kernels(layer: Any, states: Any, *_args: Any, **_options: Any) -> Any:
    """What a linear layer makes of ``states``; ``None`` where it is to do that itself."""
    import torch

    parameters = layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not states.is_cpu or layer.training or weight is None or type(weight) is torch.Tensor:
        return None
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return None
    if type(weight) is torch.nn.Parameter:
        outputs, dtype = cpu_products.multiplied_plain(states, weight), states.dtype
    elif (weights := packed_weights(weight)) is not None:
        dtype = getattr(layer, "compute_dtype", None) or states.dtype  # bitsandbytes' 4-bit layers have one
        outputs = cpu_products.multiplied(states.to(dtype), weights)
    else:
        return None
    if outputs is not None and bias is not None:
        outputs += bias.to(dtype)
    return outputs if outputs is None or dtype == states.dtype else outputs.to(states.dtype)
