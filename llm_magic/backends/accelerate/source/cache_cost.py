"""What each layer keeps between tokens: keys and values, or the state of a recurrent layer.

The widths are taken from the projections that make keys and values, so layers that differ from
one another (as in hybrid models) are each counted as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llm_magic.backends.accelerate.served.latent_attention import keeps_expanded
from llm_magic.backends.accelerate.source.config_values import of_layer
from llm_magic.model import CacheCost

_KEY = {"k_proj", "k", "key", "k_lin"}
_VALUE = {"v_proj", "v", "value", "v_lin"}
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_WINDOWED = ("sliding_attention", "hybrid_sliding", "reference_sliding_attention")
_STATE_BYTES = 4  # recurrent states are accumulated, and kept, in float32


def cache_costs(model: Any, layers: list[Any], dtype: Any) -> Iterator[CacheCost]:
    """The cost of each of ``layers``, in their order, for one sequence.

    Layers of an encoder keep nothing. A decoder layer that looks at an encoder keeps the keys and
    values of the prompt too; they are counted per token of the whole context, which is their limit.

    Parameters
    ----------
    layers
        Modules of the encoder and decoder layers, in model order.
    dtype
        torch dtype of keys and values.
    """
    config = model.config.get_text_config(decoder=True)
    decoders = _decoder_modules(model)
    position = 0
    for layer in layers:
        if id(layer) not in decoders:
            yield CacheCost()
            continue
        yield _cost(layer, of_layer(config, position), position, dtype.itemsize)
        position += 1


def _decoder_modules(model: Any) -> set[int]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return {id(module) for module in decoder.modules()}


def _cost(layer: Any, config: Any, position: int, itemsize: int) -> CacheCost:
    kind = _layer_type(config, position)
    if kind == "reuse":
        return CacheCost()
    modules = dict(layer.named_modules())
    fixed = _convolution_elements(layer) * itemsize + _state_elements(layer, config) * _STATE_BYTES
    names = {name.rpartition(".")[2] for name in modules}
    has_attention = {"k_proj", "v_proj"} <= names or any(_ATTENTION.search(name) for name in modules)
    recurrent_only = kind in ("linear_attention", "conv", "mamba", "recurrent")
    width = 0 if recurrent_only or not has_attention else _attention_width(modules, config)
    width += _number(config, "index_head_dim", "indexer_head_dim") if "indexer" in names else 0
    return CacheCost(width * itemsize, fixed, _window(config, kind) if width else 0)


def _layer_type(config: Any, position: int) -> str:
    if _has_those_of_another(config, position):
        return "reuse"
    kinds = getattr(config, "layer_types", None)
    if kinds and position < len(kinds):
        return str(kinds[position])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def _has_those_of_another(config: Any, position: int) -> bool:
    """Whether a layer attends to keys and values of one before it. transformers 5.17 says how many do, the last ones."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return position < len(modes) and modes[position] == "reuse"
    shared = _number(config, "num_kv_shared_layers")
    return bool(shared) and position >= config.num_hidden_layers - shared


def _window(config: Any, kind: str) -> int:
    """Tokens that a windowed layer keeps: transformers' caches drop the oldest one of the window."""
    if kind in _WINDOWED:
        return max(1, int(getattr(config, "sliding_window", None) or 0) - 1)
    if kind == "chunked_attention":
        return max(1, int(getattr(config, "attention_chunk_size", None) or 0) - 1)
    return 0


def _attention_width(modules: dict[str, Any], config: Any) -> int:
    """Elements of keys and values that one token adds, cross attention included."""
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        # multi-head latent attention: transformers caches the compressed latent and the rotary key, or
        # what it makes of them for each head
        if not any(map(keeps_expanded, modules.values())):
            return int(config.kv_lora_rank + config.qk_rope_head_dim)
        widths = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return int(config.num_attention_heads * sum(getattr(config, width) for width in widths))
    keys = [module for name, module in modules.items() if name.rpartition(".")[2] in _KEY]
    values = [module for name, module in modules.items() if name.rpartition(".")[2] in _VALUE]
    found = sum(_outputs(module) for module in (*keys, *values))
    if keys and not values:  # keys that serve as values too
        return 2 * found
    if found:
        return found
    crosses = sum(bool(_CROSS.search(name.rpartition(".")[2])) for name in modules)
    return 2 * _kv_heads(config) * _head_dim(config) * (1 + min(crosses, 1))


def _outputs(module: Any) -> int:
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return 0
    # GPT-2's Conv1D holds its weight the other way round
    return int(weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0])


def _kv_heads(config: Any) -> int:
    if getattr(config, "new_decoder_architecture", False):  # Falcon spreads its keys over all heads first
        return int(config.num_attention_heads)
    if getattr(config, "multi_query", False):
        return 1
    return _number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_heads")


def _head_dim(config: Any) -> int:
    return _number(config, "head_dim", "d_kv") or int(config.hidden_size // config.num_attention_heads)


def _convolution_elements(layer: Any) -> int:
    """Inputs that the causal convolutions of a layer remember: channels x kernel."""
    return sum(
        int(weight.shape[0] * weight.shape[-1])
        for name, weight in layer.named_parameters()
        if name.endswith(("conv.weight", "conv1d.weight"))
        if weight.dim() == 3 and weight.shape[1] == 1
    )


def _state_elements(layer: Any, config: Any) -> int:
    """Elements of the recurrent state: Mamba, Mamba 2 or a gated delta rule, told by ``A_log``."""
    total = 0
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[2] != "A_log":
            continue
        if max(parameter.shape) < parameter.numel():  # Mamba: (channels, state), of one or several heads
            total += parameter.numel()
        else:  # a matrix for each head
            total += parameter.numel() * _head_state(config)
    return total


def _head_state(config: Any) -> int:
    keys = _number(config, "linear_key_head_dim", "linear_head_dim")
    if keys:  # delta rule: keys x values
        return keys * (_number(config, "linear_value_head_dim") or keys)
    head = _number(config, "mamba_d_head", "mamba_head_dim", "head_dim")
    return head * (_number(config, "mamba_d_state", "ssm_state_size", "state_size") or head)


def _number(config: Any, *names: str) -> int:
    """The first of these settings that is a whole number; 0 when none is."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)
