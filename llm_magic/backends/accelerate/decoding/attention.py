"""Attention of a sweep's few tokens to a KV cache at fixed addresses.

What such a sweep may see is said by a mask, and torch's kernel for masks gives each head to one of a GPU's
processors, however long the cache is: a model with eight heads of keys leaves most of them idle. Layers that
are compiled copy all keys and values for each query head besides. Here the query heads that share keys are rows
of one query, and a long cache is cut into parts that are attended to side by side. Each part tells the logarithm
of its sum of exponentials, by which the parts are weighed (as in "Flash-Decoding for long-context inference",
Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_magic.backends.accelerate.current import current
from llm_magic.backends.accelerate.decoding import cpu_attention
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS
from llm_magic.backends.accelerate.process_wide import ProcessWide
from llm_magic.backends.accelerate.served import latent_attention

LONG = 2048
"""Places of a cache from which on it is attended to in parts."""

PART = 256
"""Places of the smallest part."""

HIDDEN = -3e4
"""Added to the scores of what a sweep does not see: float16 has no more, and infinities would meet in a part."""

_MOST_PARTS, _ENOUGH_PARTS = 128, 16
_ALIGNED = 8  # elements, of 16 bits: what the kernel reads at a time
_MARK, _CPU_MARK = "attends_to_fixed_cache", "attends_by_kernel_on_cpu"


@contextmanager
def _without_cudnn() -> Iterator[None]:
    import torch

    cuda: Any = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)


without_plans = ProcessWide(_without_cudnn)
"""Leaves cuDNN's attention out, which torch prefers on an H100 or B200.

It makes a plan for each length of a cache, in each thread anew: a growing cache would have one made for every
token, and a new thread's answer begins with none.
"""


def use(model: Any) -> None:
    """Let a model's masked sweeps of few tokens run as this file has it; everything else is as it was."""
    _mark(model, _MARK)


def use_latents(model: Any) -> None:
    """Let a model's few tokens attend to latents as they are, if it keeps such; see `latent_attention`."""
    latent_attention.use(model)
    _register()


def use_on_cpu(model: Any) -> None:
    """Let a model's sweeps of few tokens attend by a compiled kernel where a layer is on the CPU; all else is as it was.

    Towers are for images, and never attend in such sweeps.
    """
    if cpu_attention.is_there():
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        _mark(model if decoder is None else decoder, _CPU_MARK)


def leave(model: Any) -> None:
    """Undo ``use``."""
    for module in _attention_modules(model):
        vars(module).pop(_MARK, None)


def _mark(model: Any, mark: str) -> None:
    _register()
    for module in _attention_modules(model):
        setattr(module, mark, True)


def _register() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:  # nobody else has a better one
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention


def _attention_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def sdpa_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Any, None]:
    """As transformers' attention function ``"sdpa"``.

    Parameters
    ----------
    query, key, value
        ``[batch, heads, tokens, width]``; the heads of keys and values divide those of the query.
    attention_mask
        Of a sweep: ``[batch, 1, tokens, places]`` of the query's dtype, 0 or `HIDDEN`. Otherwise whatever
        transformers makes.

    Returns
    -------
    out, None
        ``[batch, tokens, heads, width]``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (recorder := current()) is not None:
        noted: tuple[Any, None] = recorder.attention(module, query, key, value, attention_mask, **options)
        return noted
    if latent_attention.are_latents(module, key, value):
        found = _to_latents(module, (query, key, value), attention_mask, options)
        if found is not None:
            return found, None
        key, value = latent_attention.expanded(module, key, value)
    if query.device.type == "cpu" and _CPU_MARK in vars(module):
        found = _on_cpu(module, (query, key, value), attention_mask, options)
        if found is not None:
            return found, None
    if not (hasattr(module, _MARK) and _is_sweep(query, key, attention_mask, options)):
        usual: tuple[Any, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return usual
    out = few_tokens(query, key, value, attention_mask, options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


setattr(sdpa_attention, latent_attention.TAKES_LATENTS, True)


def _on_cpu(module: Any, states: tuple[Any, Any, Any], mask: Any, options: dict[str, Any]) -> Any:
    """What the kernel finds, ``[batch, tokens, heads, width]``; ``None`` where it does not take this."""
    tokens = states[0].shape[2]
    if tokens > FEW_TOKENS or not _is_plain(options):
        return None
    is_causal = _is_causal(module, tokens, mask, options)
    return cpu_attention.attended(*states, mask, options.get("scaling"), is_causal=is_causal)


def attends_by_kernel(module: Any, options: dict[str, Any]) -> bool:
    """Whether few tokens of a module in RAM attend by the compiled kernel: to keys and values, or to latents."""
    return _CPU_MARK in vars(module) and _is_plain(options)


def call_by_kernel(
    module: Any,
    dtype: Any,
    lie: tuple[cpu_attention.Lies, cpu_attention.Lies, cpu_attention.Lies],
    mask: Any,
    options: dict[str, Any],
) -> cpu_attention.Call | None:
    """What `sdpa_attention` has compute query, keys and values that lie so, in one dtype; ``None`` where no kernel does."""
    tokens = lie[0][0][2]
    is_causal = _is_causal(module, tokens, mask, options)
    return cpu_attention.call_for(dtype, lie, mask, options.get("scaling"), is_causal=is_causal)


def call_to_latents(
    module: Any,
    dtype: Any,
    lie: tuple[cpu_attention.Lies, cpu_attention.Lies, cpu_attention.Lies],
    mask: Any,
    options: dict[str, Any],
) -> cpu_attention.Call | None:
    """As `call_by_kernel`, of queries that attend to latents, these, and the rest of the keys."""
    query, latents, rest = lie
    is_causal = _is_causal(module, query[0][2], mask, options)
    if not _is_of_all_heads(mask):
        return None
    scale = _scale(options, module.qk_nope_head_dim + module.qk_rope_head_dim)
    return cpu_attention.call_for(
        dtype, (query, latents, latents), mask, scale, is_causal=is_causal, rest_of_key=rest
    )


def _scale(options: dict[str, Any], width: int) -> float:
    scale: float | None = options.get("scaling")
    return float(width**-0.5) if scale is None else scale


def _is_of_all_heads(mask: Any) -> bool:
    """Whether a mask, if there is one, is the same for all heads."""
    return mask is None or (mask.dim() == 4 and mask.shape[1] == 1)


def _is_causal(module: Any, tokens: int, mask: Any, options: dict[str, Any]) -> bool:
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return bool(is_causal and tokens > 1 and mask is None)


def _to_latents(module: Any, states: tuple[Any, Any, Any], mask: Any, options: dict[str, Any]) -> Any:
    """What few tokens find, ``[batch, tokens, heads, value width]``; ``None`` where latents are to be expanded."""
    query, latents, rotated = states
    tokens = query.shape[2]
    if tokens > FEW_TOKENS or not (_is_of_all_heads(mask) and _is_plain(options)):
        return None
    heads = latent_attention.heads_of(module, latents)
    if heads is None:
        return None
    scale, is_causal = _scale(options, query.shape[3]), _is_causal(module, tokens, mask, options)
    query, found = heads.queries(query), None
    if query.is_cpu and _CPU_MARK in vars(module):
        found = cpu_attention.attended(
            query, latents, latents, mask, scale, is_causal=is_causal, rest_of_key=rotated
        )
    if found is None:
        keys = latent_attention.whole_keys(latents, rotated)
        found = few_tokens(query, keys, latents, _of_sweep(query, keys, mask, is_causal), scale).transpose(
            1, 2
        )
    return heads.to_values(found)


def _of_sweep(query: Any, key: Any, mask: Any, is_causal: bool) -> Any:
    """A mask of any kind as that of a sweep, but for the batch, which it may be the same for."""
    import torch

    if mask is None:
        shape = query.shape[0], 1, query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device)
        mask = mask.tril() if is_causal else mask
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, HIDDEN)
    return mask.to(query.dtype).expand(query.shape[0], -1, -1, -1)


def _is_plain(options: dict[str, Any]) -> bool:
    return not (
        any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        or options.get("dropout")
        or options.get("output_attentions")
    )


def _is_sweep(query: Any, key: Any, mask: Any, options: dict[str, Any]) -> bool:
    return (
        _is_plain(options)
        and query.shape[2] <= FEW_TOKENS
        and mask is not None
        and mask.dtype == query.dtype
        and tuple(mask.shape) == (query.shape[0], 1, query.shape[2], key.shape[2])
    )


def few_tokens(query: Any, key: Any, value: Any, mask: Any, scale: float | None = None) -> Any:
    """Masked attention, ``[batch, heads, tokens, width]``.

    Parameters
    ----------
    query, key, value, mask
        As for `sdpa_attention`, of a sweep; keys and values are slices of contiguous buffers.
    scale
        Of the scores; one by the root of the width by default.
    """
    import torch

    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], shared * tokens, width)
    bias = mask[:, :, None].expand(-1, -1, shared, -1, -1).reshape(batch, 1, shared * tokens, -1)
    can_part = key.device.type == "cuda" and torch.version.hip is None
    is_aligned = not (width % _ALIGNED or value.shape[-1] % _ALIGNED)
    count = parts_of(key.shape[2]) if can_part and is_aligned else 1
    if count == 1:
        out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    else:
        out = _in_parts((rows, key, value), bias, scale, count)
    return out.reshape(batch, heads, tokens, value.shape[-1])


def parts_of(places: int) -> int:
    """How many parts of one length a cache is cut into; 1 where it is short, or has no such parts."""
    if places < LONG or places % PART:
        return 1
    smallest = places // PART
    most = max(count for count in range(1, _MOST_PARTS + 1) if smallest % count == 0)
    return most if most >= _ENOUGH_PARTS or smallest <= _MOST_PARTS else smallest


def _in_parts(states: tuple[Any, Any, Any], bias: Any, scale: float | None, count: int) -> Any:
    """Attention to ``count`` parts side by side, as if each were a head: ``[batch, key heads, rows, width]``."""
    import torch

    rows, key, value = states
    batch, heads, number, width = rows.shape
    every = batch * heads
    least = bias.clamp_min(HIDDEN)  # a mask of the model's own may have less
    parted = least.unflatten(3, (count, -1)).transpose(2, 3).expand(-1, heads, -1, -1, -1)
    outs, sums = torch.ops.aten._scaled_dot_product_efficient_attention(
        rows.reshape(every, 1, number, width).expand(-1, count, -1, -1),
        key.reshape(every, count, -1, width),
        value.reshape(every, count, -1, value.shape[3]),
        parted.reshape(every, count, number, -1),
        True,  # the logarithms of the sums, too
        scale=scale,
    )[:2]
    weights = sums[:, :, :number, None].softmax(1)  # [every, count, rows, 1] in float32
    out = (outs * weights).sum(1).to(rows.dtype)
    return out.reshape(batch, heads, number, -1)
