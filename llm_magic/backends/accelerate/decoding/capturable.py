"""Which models can be captured, as they are placed, and what is to be known of their layers for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.backends.accelerate.architecture import decoder_of
from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.decoding.layer_kinds import has_state, is_plain, is_windowed, with_tokens
from llm_magic.backends.accelerate.experts.stacks import are_packed

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.decoding.capture import Lane
    from llm_magic.plan import Plan

_ON_CPU, _SEVERAL = "the CPU computes some blocks", "several GPUs"


def why_not(model: Any, plan: Plan, lanes: Sequence[Lane] = ()) -> str:
    """Why the sweeps of a model cannot be captured as it is placed, in a few words; empty when they can.

    What this cannot foresee shows when the capture is tried.
    """
    packing = packing_reason(plan.layout.quantization)
    reason = _placement_reason(plan) or _experts_reason(model, plan) or packing or model_reason(model)
    if not reason and not all(lane.is_capturable for lane in lanes):
        return "blocks in RAM that is not pinned"
    return reason


def layers_to_capture(model: Any, plan: Plan) -> dict[int, tuple[Any, Any]]:
    """Decoder layers that can be captured one by one, where a sweep as a whole cannot; none where that is no use.

    Returns index in the cache -> (layer, torch device that computes it).
    """
    import torch

    is_mixed = _placement_reason(plan) in (_ON_CPU, _SEVERAL)
    if (
        not is_mixed
        or _experts_reason(model, plan)
        or model_reason(model)
        or not has_layers_alone(model, plan)
    ):
        return {}
    places = {place.block.name: place for place in plan.placements}
    return {
        index: (model.get_submodule(block.name), torch.device(places[block.name].compute))
        for index, block in enumerate(plan.layout.layers)
        if places[block.name].compute.startswith("cuda")
    }


def has_layers_alone(model: Any, plan: Plan) -> bool:
    """Whether each layer needs nothing but keys and values of its own, by its number: it can be compiled by itself.

    Layers that run several times in a sweep have several; some have another one's.
    """
    return has_plain_cache(model) and len(plan.layout.layers) == len(_cache_layers(model))


def has_plain_cache(model: Any) -> bool:
    """Whether layers keep keys and values alone."""
    return all(is_plain(layer) for layer in _cache_layers(model))


def _placement_reason(plan: Plan) -> str:
    devices = {placement.compute for placement in plan.placements}
    gpus = {device for device in devices if device.startswith("cuda")}
    if not gpus:
        return "the CPU computes every block" if devices == {"cpu"} else "no CUDA device computes a block"
    # The CPU's experts come between two graphs, where no copy may be on its way.
    is_split = any(p.is_split for p in plan.placements) and any(p.is_offloaded for p in plan.placements)
    if "cpu" in devices or is_split:
        return _ON_CPU
    if len(devices) > 1:
        return _SEVERAL
    for placement in plan.placements:
        if placement.way == "read":
            return "blocks are read from the disk"
        if placement.block.experts and placement.is_offloaded:
            return "experts move on demand"
    return ""


def _experts_reason(model: Any, plan: Plan) -> str:
    """Which experts there is a token for is asked on the host, where they are taken one after the other."""
    with_experts = [placement for placement in plan.placements if placement.block.experts]
    config = model.config.get_text_config(decoder=True)
    if not with_experts or getattr(config, "_experts_implementation", None) != "eager":
        return ""
    come = any(placement.is_offloaded and placement.compute != "cpu" for placement in with_experts)
    return "experts are taken one after the other" if come or not are_packed(model) else ""


def packing_reason(method: str) -> str:
    """Why sweeps of layers that this method packs cannot be captured; empty when they can."""
    # LLM.int8() multiplies large activations apart, and asks in every layer whether there are any.
    return "int8 looks for outliers on the host" if method == "int8" else ""


def model_reason(model: Any) -> str:
    """Why sweeps of an architecture cannot be captured wherever it is placed; empty when they can."""
    import inspect
    import sys

    takes = inspect.signature(model.forward).parameters
    attention = attention_of(model)
    checks = {
        "encoder-decoder": not model.config.is_encoder_decoder,
        "a forward pass without cache or positions": "position_ids" in takes and cache_name(model) != "",
        "layers that keep more than keys and values, or a state": _is_known(model),
        "windows of several kinds": len(kinds_of(windows_of(model))) <= 1 + (0 in windows_of(model)),
        # transformers' own word for models that work with a cache of fixed size.
        "the architecture needs a cache that grows": getattr(model, "_can_compile_fullgraph", False),
        "rotary tables that follow the length": not _has_growing_rotary_tables(model),
        f"{attention} attention": attention in ("sdpa", "eager"),
        # Others make masks of their own (ALiBi) out of one with two dimensions.
        "the architecture makes its own masks": hasattr(
            sys.modules[type(decoder_of(model)).__module__], "create_causal_mask"
        ),
    }
    return next((reason for reason, passed in checks.items() if not passed), "")


def _has_growing_rotary_tables(model: Any) -> bool:
    """Whether the length of the text is compared on the host, to make the tables anew."""
    found = (getattr(module, "rope_type", "") for module in model.modules())
    kinds = {kind for each in found for kind in (each.values() if isinstance(each, dict) else (each,))}
    return bool(kinds & {"dynamic", "longrope"})


def _is_known(model: Any) -> bool:
    layers = with_tokens(_cache_layers(model))
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    are_known = all(is_plain(layer) or has_state(layer) for layer in layers)
    return any(map(is_plain, layers)) and are_known and "chunked_attention" not in kinds


def windows_of(model: Any) -> list[int | None]:
    """Of every layer of the cache, the tokens that it attends to, 0: all; ``None`` for one with a recurrent state."""
    return [
        None if has_state(layer) else layer.sliding_window if is_windowed(layer) else 0
        for layer in _cache_layers(model)
    ]


def kinds_of(windows: Sequence[int | None]) -> list[int]:
    """The different windows among these, in order."""
    return sorted({window for window in windows if window is not None})


def _cache_layers(model: Any) -> list[Any]:
    from transformers import DynamicCache

    layers: list[Any] = DynamicCache(config=model.config).layers
    return layers


def attention_of(model: Any) -> str:
    """Transformers' name of the model's attention implementation."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)
