"""What a decoder layer takes beyond the read of its weights: Python, launches, threads that wait for each other.

It is measured with layers of transformers, on the device: narrow ones, in which that is most of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llm_magic.backends.accelerate.decoding.attention import use_on_cpu, without_plans
from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.served_model import serve_plain_modules
from llm_magic.host.speed import median_of

LAYERS = 20
WIDTH = 576  # 7 MB a layer in bf16, 142 MB together: more than most caches of a processor hold
_PROMPT, _CONTEXT = 32, 1024  # tokens
_UNLIKE_THE_REST = 3  # sweeps: they compile kernels, and find out which layers follow which
_TOO_LONG = 8  # times the budget, for a first sweep: the device is busy with something else
_BUSY_S = 10e-3  # so is one that takes longer for a layer
_OWN_SHARE = 0.9  # of a second that one thread works: less, and others have the processor


def layer_overhead_s(
    device_id: str,
    reads: Callable[[int], float],
    finish: Callable[[], object],
    budget_s: float,
    *,
    are_ahead: bool = False,
) -> float:
    """Seconds of one layer for one token, less those of reading it; 0 when it cannot be measured now.

    Parameters
    ----------
    reads
        How fast the device reads that many bytes of weights over and over, in bytes per second: a part of what the
        layers have may lie in a cache. 0: nobody knows.
    finish
        Returns when the device has done what it was given.
    budget_s
        How long to repeat it.
    are_ahead
        Whether layers of the CPU may be computed before they are called.
    """
    import torch

    try:
        model = _narrow_model(device_id)
        name, cache, ids = (
            cache_name(model),
            _new_cache(model),
            torch.zeros(1, _PROMPT, dtype=torch.long, device=device_id),
        )

        def sweep(tokens: Any) -> None:
            with without_plans():
                model(tokens, use_cache=True, **{name: cache})
            finish()

        began = time.perf_counter()
        sweep(ids)
        if time.perf_counter() - began > _TOO_LONG * budget_s:
            return 0.0
        if device_id == "cpu" and cpu_products.is_there():
            _record(model, are_ahead=are_ahead)
        for _ in range(_UNLIKE_THE_REST):
            sweep(ids[:, :1])
        began, worked = time.perf_counter(), time.process_time()
        seconds = median_of(lambda: sweep(ids[:, :1]), budget_s) / LAYERS
        worked, took = time.process_time() - worked, time.perf_counter() - began
        if device_id == "cpu" and worked < _OWN_SHARE * took:
            return 0.0
    except Exception:  # whatever is not there: forecasts can do without
        return 0.0
    if seconds > _BUSY_S:
        return 0.0
    size: int = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    speed = reads(size)
    return max(0.0, seconds - size / LAYERS / speed) if speed else 0.0


def _narrow_model(device_id: str) -> Any:
    """A Llama of `LAYERS` layers and next to no vocabulary, its weights all the same small number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 192,
        vocab_size=64,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device_id).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    serve_plain_modules(model)
    use_on_cpu(model)
    return model


def _record(model: Any, *, are_ahead: bool) -> None:
    from llm_magic.backends.accelerate.recorded.layers import RecordedLayers
    from llm_magic.backends.accelerate.recorded.recordings import Recordings

    layers = {str(number): layer for number, layer in enumerate(model.model.layers)}
    RecordedLayers(layers, Recordings(), _CONTEXT, are_ahead=are_ahead)


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
