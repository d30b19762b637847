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
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.cpu_linear import is_linear, served_weights
from llm_magic.backends.accelerate.preparation import preparing

TAKES_LATENTS = "takes_latents"
"""What an attention function has that is called with latents, and the other part of all keys, for keys and values."""

MATRIX = "kv_b_proj"
"""The linear layer that makes keys and values of latents."""

_EXPANSION, _MARK = "expand_kv", "_hands_latents_on"
_OF_A_SHARE = 1 << 16
"""Weights of a share at least: some microseconds, for which it is worth to have another thread take it."""
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
    matrix
        ``[heads, own + value width, latent]``: how keys and values are made of a latent.
    own
        The width of a key without the part that all heads share.
    """

    matrix: Any
    own: int

    def queries(self, query: Any) -> Any:
        """``[batch, heads, tokens, own + shared]`` as ``[batch, heads, tokens, latent + shared]``."""
        import torch

        found = self._summed_by_kernel(query) if query.is_cpu else None
        if found is not None:
            return found
        of_heads = _of_each_head(query[..., : self.own].transpose(0, 1), self.matrix[:, : self.own])
        return torch.cat((of_heads.transpose(0, 1), query[..., self.own :]), dim=-1)

    def values(self, attended: Any) -> Any:
        """``[batch, tokens, heads, latent]`` as ``[batch, tokens, heads, value width]``."""
        found = self._by_kernel(attended) if attended.is_cpu else None
        if found is not None:
            return found
        back = self.matrix[:, self.own :].transpose(1, 2)
        return _of_each_head(attended.permute(2, 0, 1, 3), back).permute(1, 2, 0, 3).contiguous()

    def _summed_by_kernel(self, query: Any) -> Any:
        """As `queries`, of one sequence."""
        heads, rows, width = self.matrix.shape
        tokens, dtype = query.shape[2], query.dtype
        if len(query) > 1 or query.stride(3) != 1 or dtype != self.matrix.dtype or not self.matrix.is_cpu:
            return None
        if is_looked_at() or not _need_no_gradient(query, self.matrix):
            return None
        kernel = _row_sums(width, str(dtype).removeprefix("torch."))
        if kernel is None:
            return None
        results = query.new_empty(1, heads, tokens, width + query.shape[3] - self.own)
        results[..., width:] = query[..., self.own :]
        addresses = (each.data_ptr() for each in (query, self.matrix, results))
        strides = (*query.stride()[1:3], rows * width, *results.stride()[1:3])
        shares = heads * self.own * width // _OF_A_SHARE
        words = (*addresses, heads, tokens, self.own, *strides, team() if shares > 1 else 0, shares)
        kernel((ctypes.c_int64 * len(words))(*words))
        return results

    def _by_kernel(self, attended: Any) -> Any:
        """As `values`, of 16 bits: products with matrices of a stack, of which each head has some."""
        heads, rows, width = self.matrix.shape
        tokens = attended.reshape(-1, width)
        size = gcd(rows, self.own)
        numbers = _numbers(heads, rows // size, self.own // size, len(tokens) // heads)
        found = cpu_products.multiplied_each_plain(tokens, self.matrix.view(-1, size, width), numbers)
        return None if found is None else found.view(*attended.shape[:-1], rows - self.own)


def _of_each_head(states: Any, matrices: Any) -> Any:
    """``[heads, batch, tokens, width]`` times the matrices of the heads.

    As matrices of three dimensions: where torch spreads one over a batch it copies it, for every token.
    """
    import torch

    return torch.bmm(states.flatten(1, 2), matrices).view(*states.shape[:3], -1)


def _need_no_gradient(*tensors: Any) -> bool:
    import torch

    return not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors)


@cache
def _row_sums(columns: int, dtype: str) -> Any:
    if not cpu_products.are_read(dtype):
        return None
    from llm_magic.backends.accelerate.kernels.row_sums import row_sums

    try:
        with preparing():
            return row_sums(columns, dtype)
    except RuntimeError:  # LLVM's: it has no such instruction after all
        return None


@cache
def _numbers(heads: int, of_head: int, first: int, tokens: int) -> Any:
    """Which matrices of a stack make the values, where a head has so many: for each token and head those from ``first`` on."""
    import torch

    with torch.inference_mode(False):
        of_all = torch.arange(heads * of_head, device="cpu").view(heads, of_head)
        return of_all[:, first:].expand(tokens, -1, -1).reshape(-1)


def heads_of(module: Any, latents: Any) -> Heads | None:
    """What is between a module's heads and latents; ``None`` where it is not worth to find out for so few of them."""
    matrix = _matrix(module, latents)
    if matrix is None:
        return None
    own, values = module.qk_nope_head_dim, module.v_head_dim
    return Heads(matrix.view(-1, own + values, module.kv_lora_rank), own)


def _matrix(module: Any, latents: Any) -> Any:
    import torch

    linear, dtype = module.kv_b_proj, latents.dtype
    if not ("forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks):
        weight = linear._parameters.get("weight")
        if is_linear(linear) and type(weight) is torch.nn.Parameter:
            return weight if weight.dtype == dtype and weight.is_contiguous() else None
        packed = served_weights(linear, dtype) if latents.is_cpu else None
        numbers = None if packed is None else cpu_products.numbers_of(packed, dtype)
        if numbers is not None:
            return numbers
    if latents.shape[2] <= module.kv_lora_rank:
        return None
    # Whatever it computes: adapters, and packed weights of others.
    return linear(torch.eye(module.kv_lora_rank, dtype=dtype, device=latents.device)).T.contiguous()
