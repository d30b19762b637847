"""Multi-head latent attention, by a few tokens to the latents as the KV cache has them.

What a layer keeps of a token is one latent, of which a matrix makes keys and values of all heads. transformers makes
them of all tokens that there are for every new one: work and memory that grow with the text, some hundred times what
attending takes. For few tokens the matrix goes to the other side ("absorbed", DeepSeek-V2, arXiv 2405.04434, 2.1.2):
the part of the keys is multiplied with each head's query, the part of the values with what it has attended to. A latent
is key and value of all heads then.
"""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.served.between_latents import BetweenKernels, Sizes, kernels_between
from llm_magic.backends.accelerate.served.cpu_linear import is_linear, served_weights

TAKES_LATENTS = "takes_latents"
"""What an attention function has that is called with latents, and the other part of all keys, for keys and values."""

MATRIX = "kv_b_proj"
"""The linear layer that makes keys and values of latents."""

_EXPANSION, _MARK = "expand_kv", "_hands_latents_on"
_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def keeps_latents(module: Any) -> bool:
    """Whether an attention module puts latents into the KV cache, and expands what it gets of that."""
    return _order(module) == ["update", _EXPANSION]


def keeps_expanded(module: Any) -> bool:
    """Whether it expands latents before, as sparse attention does in transformers 5.17."""
    return _order(module) == [_EXPANSION, "update"]


def _order(module: Any) -> list[str]:
    """What its code does with latents; names of a function are in the order in which it first uses them."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return [name for name in (code.co_names if code else ()) if name in (_EXPANSION, "update")]


def use(model: Any) -> None:
    """Let layers hand latents on to attention functions that take them; see `TAKES_LATENTS`."""
    for module in model.modules():
        if may_attend_to_latents(module) and not hands_on(module):
            usual: Any = type(module)
            module.__class__ = _handing_on(usual)


def hands_on(module: Any) -> bool:
    """Whether a module's attention function gets latents, if it takes them."""
    return hasattr(module, _MARK)


def may_attend_to_latents(module: Any) -> bool:
    """Whether it is a module of attention whose `MATRIX` is read directly, where a few tokens attend."""
    attends_by = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return attends_by == "sdpa" and keeps_latents(module) and _has_what_is_needed(module)


def _has_what_is_needed(module: Any) -> bool:
    linear = getattr(module, MATRIX, None)
    if linear is None or linear.bias is not None or not all(hasattr(module, name) for name in _WIDTHS):
        return False
    latent, own, rotated, values = (getattr(module, name) for name in _WIDTHS)
    return (latent, rotated) != (own + rotated, values)  # what is expanded would look the same with one head


@cache
def _handing_on(usual_class: Any) -> Any:
    """A subclass, with the same name, of which there is one for all layers: what is compiled for one serves the others."""

    def expand_kv(self: Any, latents: Any, rotated: Any) -> Any:
        return (latents, rotated) if _are_taken(self) else usual_class.expand_kv(self, latents, rotated)

    def reduced(self: Any, _protocol: Any) -> Any:  # to be pickled: no module has this class
        return _new, (usual_class,), self.__dict__

    members = {
        _MARK: usual_class,
        _EXPANSION: expand_kv,
        "__reduce_ex__": reduced,
        "__module__": usual_class.__module__,
    }
    return type(usual_class.__name__, (usual_class,), members)


def _new(usual_class: Any) -> Any:
    kind = _handing_on(usual_class)
    return kind.__new__(kind)


def _are_taken(module: Any) -> bool:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    if torch.compiler.is_compiling():
        return bool(name == "sdpa")
    return hasattr(ALL_ATTENTION_FUNCTIONS.get(name), TAKES_LATENTS)


def expanded(module: Any, latents: Any, rotated: Any) -> tuple[Any, Any]:
    """Keys and values of all heads, as the module makes them."""
    keys, values = getattr(type(module), _MARK).expand_kv(module, latents, rotated)
    return keys, values


def are_latents(module: Any, key: Any, value: Any) -> bool:
    """Whether an attention function got latents ``[batch, 1, places, width]``, and the rest of the keys."""
    if not hands_on(module):
        return False
    widths = module.kv_lora_rank, module.qk_rope_head_dim
    return key.shape[1] == 1 and (key.shape[3], value.shape[3]) == widths


def whole_keys(latents: Any, rotated: Any) -> Any:
    """``[batch, 1, places, latent + rotated]``: a view where both lie side by side, as in a cache at fixed addresses."""
    import torch

    width = latents.shape[3] + rotated.shape[3]
    if not torch.compiler.is_compiling() and _are_side_by_side(latents, rotated, width):
        return latents.as_strided((*latents.shape[:3], width), latents.stride(), latents.storage_offset())
    return torch.cat((latents, rotated), dim=-1)


def _are_side_by_side(latents: Any, rotated: Any, width: int) -> bool:
    return bool(
        latents.stride() == rotated.stride()
        and latents.stride(3) == 1
        and latents.stride(2) >= width
        and latents.untyped_storage().data_ptr() == rotated.untyped_storage().data_ptr()
        and rotated.storage_offset() - latents.storage_offset() == latents.shape[3]
    )


@dataclass(frozen=True)
class Heads:
    """What is between a module's heads and latents.

    Attributes
    ----------
    weights
        ``[heads * (own + values), latent]``: how keys and values are made of a latent. Numbers, or packed.
    own, values
        Widths of a head: of a key without the part that all heads share, and of a value.
    """

    weights: PackedWeights
    own: int
    values: int

    def queries(self, query: Any) -> Any:
        """``[batch, heads, tokens, own + shared]`` as ``[batch, heads, tokens, latent + shared]``."""
        import torch

        found = self._summed_by_kernel(query) if query.is_cpu else None
        if found is not None:
            return found
        matrix = self._matrix(query.dtype)
        of_heads = _of_each_head(query[..., : self.own].transpose(0, 1), matrix[:, : self.own])
        return torch.cat((of_heads.transpose(0, 1), query[..., self.own :]), dim=-1)

    def to_values(self, attended: Any) -> Any:
        """``[batch, tokens, heads, latent]`` as ``[batch, tokens, heads, values]``."""
        found = self._multiplied_by_kernel(attended) if attended.is_cpu else None
        if found is not None:
            return found
        back = self._matrix(attended.dtype)[:, self.own :].transpose(1, 2)
        return _of_each_head(attended.permute(2, 0, 1, 3), back).permute(1, 2, 0, 3).contiguous()

    def kernels(self, dtype: Any, tokens: int, shared: int = 0) -> BetweenKernels | None:
        """Those for so many tokens, whose queries have a part beside ``own``."""
        heads = self.weights.rows // (self.own + self.values)
        sizes = Sizes(heads, tokens, self.own, self.values, shared)
        return kernels_between(self.weights.layout, sizes, _name(dtype))

    def _matrix(self, dtype: Any) -> Any:
        """Numbers ``[heads, own + values, latent]``."""
        weights = self.weights
        numbers = weights.data if weights.scales is None else cpu_products.numbers_of(weights, dtype)
        return numbers.view(-1, self.own + self.values, weights.columns)

    def _summed_by_kernel(self, query: Any) -> Any:
        """As `queries`, of one sequence."""
        if len(query) > 1 or query.stride(3) != 1 or not self._may_be_read(query):
            return None
        latent, shared = self.weights.columns, query.shape[3] - self.own
        kernels = self.kernels(query.dtype, query.shape[2], shared)
        if kernels is None:
            return None
        results = query.new_empty(*query.shape[:3], latent + shared)
        results[..., latent:] = query[..., self.own :]
        words, places = kernels.words(query.stride()[1:3]), kernels.sum_words
        words[places.queries], words[places.results] = query.data_ptr(), results.data_ptr()
        words[places.data] = self.weights.data.data_ptr()
        if places.scales is not None:
            words[places.scales] = self.weights.scales.data_ptr()
        words[places.team] = team() if kernels.shares > 1 else 0
        kernels.sums((ctypes.c_int64 * len(words))(*words))
        return results

    def _multiplied_by_kernel(self, attended: Any) -> Any:
        """As `to_values`: products with matrices of a stack, of which each head has some."""
        tokens = attended.reshape(-1, self.weights.columns)
        kernels = self.kernels(attended.dtype, len(tokens) // attended.shape[2])
        if kernels is None or kernels.products is None or not self._may_be_read(attended):
            return None
        found = cpu_products.multiplied_each(tokens, self._of_values(kernels), kernels.numbers)
        return None if found is None else found.view(*attended.shape[:-1], self.values)

    def _of_values(self, kernels: BetweenKernels) -> PackedWeights:
        """The first matrix of the stack that makes values."""
        (rows,) = kernels.products.rows if kernels.products else (0,)
        return replace(self.weights, rows=rows)

    def _may_be_read(self, states: Any) -> bool:
        """Whether all is there, in RAM, and nobody looks on."""
        weights = self.weights
        if is_looked_at() or (weights.scales is None and states.dtype != weights.data.dtype):
            return False
        return bool(weights.data.is_cpu) and _need_no_gradient(states, weights.data)


def _of_each_head(states: Any, matrices: Any) -> Any:
    """``[heads, batch, tokens, width]`` times the matrices of the heads.

    As matrices of three dimensions: where torch spreads one over a batch it copies it, for every token.
    """
    import torch

    return torch.bmm(states.flatten(1, 2), matrices).view(*states.shape[:3], -1)


def _need_no_gradient(*tensors: Any) -> bool:
    import torch

    return not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors)


def heads_of(module: Any, latents: Any) -> Heads | None:
    """What is between a module's heads and latents; ``None`` where it is not worth to find out for so few of them."""
    weights = _weights(module, latents)
    return None if weights is None else Heads(weights, module.qk_nope_head_dim, module.v_head_dim)


def _weights(module: Any, latents: Any) -> PackedWeights | None:
    import torch

    linear, dtype = module.kv_b_proj, latents.dtype
    if not ("forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks):
        weight = linear._parameters.get("weight")
        if is_linear(linear) and type(weight) is torch.nn.Parameter:
            return plain_weights(weight) if weight.dtype == dtype and weight.is_contiguous() else None
        packed = served_weights(linear, dtype) if latents.is_cpu else None
        if packed is not None and cpu_products.summed_rows(packed.layout, _name(dtype)) is not None:
            return packed
        numbers = None if packed is None else cpu_products.numbers_of(packed, dtype)
        if numbers is not None:
            return plain_weights(numbers)
    if latents.shape[2] <= module.kv_lora_rank:
        return None
    # Whatever it computes: adapters, and packed weights of others.
    return plain_weights(
        linear(torch.eye(module.kv_lora_rank, dtype=dtype, device=latents.device)).T.contiguous()
    )


def plain_weights(matrix: Any) -> PackedWeights:
    """Numbers ``[out, in]``."""
    return PackedWeights(_name(matrix.dtype), matrix, None, None, *matrix.shape)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
