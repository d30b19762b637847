"""The weight of one layer, packed as its library packs it."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.packed import four_bits
from llm_magic.backends.accelerate.quantizing.library_layers import kind_of, was_transposed


def packed_weight(module: Any, value: Any) -> Any:
    """A weight as the packed layer ``module`` holds it; ``value`` is of the checkpoint's orientation."""
    kind = kind_of(module)
    if kind == "bitsandbytes, 4 bits":
        return _pack_4_bits(module, value)
    if kind == "bitsandbytes, 8 bits":
        return _pack_8_bits(module, value)
    if kind == "quanto":
        return _pack_quanto(module, value)
    raise AssertionError("only what was packed before is in scaled floats")


def _pack_4_bits(module: Any, value: Any) -> Any:
    from bitsandbytes.nn import Params4bit

    meta, value = module._parameters["weight"], _as_linear(module, value)
    if value.device.type == "cpu" and not value.numel() % meta.blocksize:
        data, scales = four_bits.packed(value, meta.quant_type, meta.blocksize)
        return four_bit_weight(module, data, scales, value.dtype)
    packed = Params4bit(value, requires_grad=False, module=module, **_options(meta))
    return packed.to(value.device)


def _pack_8_bits(module: Any, value: Any) -> Any:
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    # Its own .to() packs only what comes from the CPU: a weight would leave the GPU and come again.
    data, scales, _ = int8_vectorwise_quant(_as_linear(module, value).contiguous().to(torch.float16))
    return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)


def _pack_quanto(module: Any, value: Any) -> Any:
    import torch
    from optimum.quanto import quantize_weight

    kind, groups = module.weight_qtype, module.weight_group_size
    if kind.bits == 8:
        scale, shift = module.optimizer(value, qtype=kind, axis=0), None
        # Of a row of zeros, as of a token that nobody trained, floats of 8 bits would be nan.
        scale = torch.where(scale == 0, 1, scale)
    else:
        scale, shift = module.optimizer(value, qtype=kind, axis=0, group_size=groups)
    # Not "optimized": for some GPUs that means kernels which it compiles at the first use. ``arrange``
    # chooses the one that torch has.
    packed = quantize_weight(
        value, kind, 0, scale, shift, group_size=groups, activation_qtype=None, optimized=False
    )
    without_activations(module, value.device)
    return torch.nn.Parameter(packed, requires_grad=False)


def four_bit_weight(module: Any, data: Any, scales: Any, dtype: Any) -> Any:
    """A packed weight of its parts; it becomes numbers of ``dtype``."""
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Params4bit

    meta, shape = module._parameters["weight"], torch.Size((module.out_features, module.in_features))
    code = get_4bit_type(meta.quant_type, device=data.device)
    state = QuantState(scales, shape, code, meta.blocksize, meta.quant_type, dtype)
    options = _options(meta) | {"quant_state": state, "bnb_quantized": True}
    return Params4bit(data, requires_grad=False, module=module, **options)


def _options(meta: Any) -> dict[str, Any]:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return {name: getattr(meta, name) for name in names}


def without_activations(module: Any, device: Any) -> None:
    """Give quanto's layer the scales of activations that it does not pack."""
    import torch

    for name in ("input_scale", "output_scale"):
        meta = module._buffers[name]
        module._buffers[name] = torch.ones(meta.shape, dtype=meta.dtype, device=device)


def _as_linear(module: Any, value: Any) -> Any:
    """The weight as ``(out, in)``."""
    return value.T if was_transposed(module) else value
