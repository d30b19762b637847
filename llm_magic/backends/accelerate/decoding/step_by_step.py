"""Attention that torch's kernels do not have, with sinks or capped scores, without copies of keys and values.

transformers computes it step by step, and copies keys and values for each query head first: for gpt-oss
eight times, which over a long cache are more bytes than its layers. Here the query heads that share keys
are rows of one product, as in `attention`, and nothing is copied. Of a long prompt transformers has the scores of all
heads at once, gigabytes of them; here some of its tokens attend at a time.

The function that is replaced is a global of the file of each architecture. Whether this one computes the
same is tried with random numbers, not read from its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

from llm_magic.backends.accelerate.current import current
from llm_magic.backends.accelerate.decoding import cpu_attention
from llm_magic.backends.accelerate.decoding.capturable import attention_of
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS
from llm_magic.planning.costs import SCORES_BYTES

_NAME = "eager_attention_forward"
_MARK = "attends_step_by_step"
_KNOWN = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "kwargs"}
_SHARED, _WIDTH = 3, 8  # of the trial: query heads for each of two of keys, and their width


def use(model: Any) -> None:
    """Let layers of ``model`` that attend step by step do it as this file has it, in sweeps of few tokens and of many.

    Other models of its architecture do not see a difference.
    """
    if attention_of(model) != "eager":
        return
    for module in model.modules():
        if hasattr(module, "is_causal") and _is_served(module):
            setattr(module, _MARK, True)


def serves(model: Any) -> bool:
    """Whether `use` would make all layers of a model attend like this."""
    modules = [module for module in model.modules() if hasattr(module, "is_causal")]
    return attention_of(model) == "eager" and bool(modules) and all(map(_usual_of, modules))


def attend(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Any = None,
) -> Any:
    """Masked attention with capped scores, or sinks that take a share of the attention and give nothing.

    Parameters
    ----------
    query, key, value
        ``[batch, heads, tokens, width]``; the heads of keys and values divide those of the query.
    mask
        ``[batch, 1, tokens, places]``, added to the scores.
    scale
        Of the scores.
    softcap
        Scores stay within plus and minus this (Gemma 2, arXiv 2408.00118, 2.2).
    sinks
        ``[heads]``: a further score of every query (gpt-oss; "Efficient Streaming Language Models with Attention
        Sinks", arXiv 2309.17453).

    Returns
    -------
    Tensor
        ``[batch, tokens, heads, width]``.
    """
    import torch

    batch, heads, tokens, _ = query.shape
    shared = heads // key.shape[1]
    rows = query.unflatten(1, (-1, shared)).flatten(2, 3)  # [batch, key heads, shared * tokens, width]
    scores: Any = torch.matmul(rows, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores.unflatten(2, (shared, tokens)) + mask[:, :, None]).float()
    if sinks is not None:
        further = sinks.view(1, -1, shared, 1, 1).expand(batch, -1, -1, tokens, 1)
        scores = torch.cat([scores, further.to(scores.dtype)], dim=-1)
    shares = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype).flatten(2, 3)
    found: Any = torch.matmul(shares, value)
    out = found.unflatten(2, (shared, tokens))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _is_served(module: Any) -> bool:
    """Whether a layer's attention is what `attend` computes; its file's function knows this one from then on."""
    usual = _usual_of(module)
    if usual is None:
        return False
    if inspect.unwrap(usual) is usual:
        _scope_of(module)[_NAME] = _replaced(usual)
    return True


def _usual_of(module: Any) -> Any:
    """The function of a layer's file, if it is what `attend` computes."""
    usual = _scope_of(module).get(_NAME)
    if usual is None or not set(inspect.signature(usual).parameters) <= _KNOWN:
        return None
    has_sinks = getattr(module, "sinks", None) is not None
    return usual if _computes_the_same(inspect.unwrap(usual), has_sinks) else None


def looked_up(module: Any) -> Callable[[], Any]:
    """What tells which function an attention module calls, by its configuration: now, whenever that is."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own, known = ALL_ATTENTION_FUNCTIONS._local_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
    scope = _scope_of(module)

    def function() -> Any:
        name = module.config._attn_implementation
        found = own.get(name) or known.get(name)
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, scope.get(_NAME)) if found is None else found

    return function


def attends_by_kernel(module: Any, function: Any, options: dict[str, Any]) -> bool:
    """Whether few tokens of a module in RAM attend by the compiled kernel, where it calls this function."""
    is_asked = options.get("dropout") or options.get("output_attentions")
    is_ours = function is not None and inspect.unwrap(function) is not function and hasattr(function, _MARK)
    return is_ours and hasattr(module, _MARK) and not is_asked and cpu_attention.is_there()


def call_by_kernel(
    module: Any,
    dtype: Any,
    lie: tuple[cpu_attention.Lies, cpu_attention.Lies, cpu_attention.Lies],
    mask: Any,
    options: dict[str, Any],
) -> cpu_attention.Call | None:
    """What computes query, keys and values that lie so, in one dtype; ``None`` where no kernel does."""
    (batch, _, tokens, _), (_, _, places, _) = lie[0][0], lie[1][0]
    if mask is None or mask.dtype != dtype or mask.shape != (batch, 1, tokens, places):
        return None
    return cpu_attention.call_for(dtype, lie, mask, _scale(module, options), **_further(module, options))


def _scale(module: Any, options: dict[str, Any]) -> float:
    scale: float | None = options.get("scaling")
    return float(module.head_dim**-0.5) if scale is None else scale


def _further(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {"softcap": options.get("softcap"), "sinks": getattr(module, "sinks", None)}


def _scope_of(module: Any) -> dict[str, Any]:
    scope: dict[str, Any] = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return scope


def _replaced(usual: Any) -> Any:
    import torch

    @wraps(usual)
    def forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **options: Any
    ) -> tuple[Any, Any]:
        if (recorder := current()) is not None and not args:
            noted: tuple[Any, Any] = recorder.attention(module, query, key, value, attention_mask, **options)
            return noted
        is_asked = args or options.get("dropout") or options.get("output_attentions")
        is_ours = hasattr(module, _MARK) and not is_asked and _is_plain(query, key, attention_mask)
        if not (is_ours and (query.shape[2] <= FEW_TOKENS or _is_long(query, key))):
            found: tuple[Any, Any] = usual(module, query, key, value, attention_mask, *args, **options)
            return found
        scale, further = _scale(module, options), _further(module, options)
        if query.device.type == "cpu" and query.shape[2] <= FEW_TOKENS:
            out = cpu_attention.attended(query, key, value, attention_mask, scale, **further)
            if out is not None:
                return out, None
        some = max(1, SCORES_BYTES // _score_bytes(query, key))
        parts = zip(query.split(some, dim=2), attention_mask.split(some, dim=2), strict=True)
        outs = [attend(q, key, value, mask, scale=scale, **further) for q, mask in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), None

    setattr(forward, _MARK, True)
    return forward


def _is_plain(query: Any, key: Any, mask: Any) -> bool:
    return (
        mask is not None
        and mask.dtype == query.dtype
        and tuple(mask.shape) == (query.shape[0], 1, query.shape[2], key.shape[2])
    )


def _is_long(query: Any, key: Any) -> bool:
    """Whether scores and copies of a pass would take more than some scores at a time."""
    shared = query.shape[1] // key.shape[1]
    copied = 2 * key.nbytes * shared if shared > 1 else 0
    return bool(query.shape[2] * _score_bytes(query, key) + copied > SCORES_BYTES)


def _score_bytes(query: Any, key: Any) -> int:
    """What the scores of one token's heads take: twice in float32, and once as they come."""
    return int(query.shape[0] * query.shape[1] * key.shape[2] * (8 + query.element_size()))


@cache
def _computes_the_same(usual: Any, has_sinks: bool) -> bool:
    """Try a layer's function on a module that has what it needs, of small random tensors."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        single = torch.float32
        query = torch.randn(2, 2 * _SHARED, 3, _WIDTH, dtype=single)
        key, value = torch.randn(2, 2, 2, 20, _WIDTH, dtype=single).unbind()
        mask = torch.randn(2, 1, 3, 20, dtype=single)
        sinks = torch.randn(2 * _SHARED, dtype=single) if has_sinks else None
        like = SimpleNamespace(
            num_key_value_groups=_SHARED, head_dim=_WIDTH, training=False, sinks=sinks, is_causal=True
        )
        options: dict[str, Any] = {"scaling": 0.4}
        if "softcap" in inspect.signature(usual).parameters:
            options["softcap"] = 3.0
        try:
            theirs = usual(like, query, key, value, mask, dropout=0.0, **options)[0]
        except Exception:  # it wants what this trial does not have
            return False
        ours = attend(query, key, value, mask, scale=0.4, softcap=options.get("softcap"), sinks=sinks)
        return bool(theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5, rtol=1e-4))
