"""Ways in which a few tokens of a recorded layer attend by kernels: to keys and values, or to latents."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.attention import call_to_latents
from llm_magic.backends.accelerate.decoding.cpu_attention import OUT, QUERY, WORDS, Call, Lies
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.words import (
    ADDRESSES,
    ARRANGED,
    DATA,
    HEAD_WORDS,
    RESULTS,
    SCALES,
    SOURCE,
    TARGET,
    TEAM,
    TOKENS,
)
from llm_magic.backends.accelerate.recorded.lowering import row_major
from llm_magic.backends.accelerate.recorded.plan import Plan
from llm_magic.backends.accelerate.recorded.recording import View
from llm_magic.backends.accelerate.served.between_latents import BetweenKernels
from llm_magic.backends.accelerate.served.latent_attention import heads_of

_TOKENS = 2  # dimension of queries

Tensors = tuple[Any, Any, Any, Any, Any]
"""Keys, values, mask, sinks and the rest of the keys; see `Call.tell`."""


class More(NamedTuple):
    """What a module has for its attention.

    Attributes
    ----------
    tensors
        Sinks; or the matrix between heads and latents, and its scales if it has some, for each kernel that reads it.
    kernels
        Beside that of attention.
    """

    tensors: tuple[Any, ...] = ()
    kernels: BetweenKernels | None = None


class ToKeys:
    """Attention to keys and values as the cache has them.

    Parameters
    ----------
    call_by_kernel
        What computes for a module, a dtype, query, keys and values that lie so, a mask, and options.

    Attributes
    ----------
    kernels
        How many it takes.
    """

    kernels = 1

    def __init__(
        self, module: Any, query: View, options: dict[str, Any], call_by_kernel: Callable[..., Call | None]
    ) -> None:
        self._module, self._options, self._call_by_kernel = module, options, call_by_kernel
        self._query, self._dtype = (query.shape, query.stride), query.dtype

    def more(self, _layer: Any) -> More | None:
        """Sinks; ``None`` where these are not what a kernel reads."""
        sinks = self._module._parameters.get("sinks")  # quicker than to miss an attribute
        if sinks is None:
            return More()
        is_read = cpu_products.are_numbers(sinks) and sinks.is_cpu and sinks.is_contiguous()
        return More((sinks,)) if is_read else None

    def call(self, lie: tuple[Lies, Lies], mask: Any) -> Call | None:
        """What computes for keys and values that lie so; ``None`` where no kernel does."""
        return self._call_by_kernel(self._module, self._dtype, (self._query, *lie), mask, self._options)

    def add(self, plan: Plan, query: View, out: View, how: tuple[Call, More]) -> tuple[int, ...]:
        """Have it computed: where the words of `Call` begin, and which words are addresses of tensors."""
        call, _ = how
        first = plan.begin(call.kernel, [0] * WORDS)
        plan.place(out)
        plan.point_at(first + QUERY, query)
        plan.point(first + OUT, out.base)
        return (first,)

    def tensors(self, keys: Any, values: Any, mask: Any, more: More) -> Tensors:
        """What the kernel is told of."""
        return keys, values, mask, more.tensors[0] if more.tensors else None, None


class ToLatents:
    """Attention to latents, and to the part of the keys that all heads share; see `served.latent_attention`.

    Attributes
    ----------
    kernels
        As of `ToKeys`: two before it make of queries what attends to latents, one after it makes values of what that finds.
    """

    kernels = 4

    def __init__(self, module: Any, query: View, options: dict[str, Any]) -> None:
        self._module, self._query, self._options = module, query, options
        batch, heads, tokens, width = query.shape
        self._shared = width - module.qk_nope_head_dim
        shape = batch, heads, tokens, module.kv_lora_rank + self._shared
        self._absorbed = shape, row_major(shape)

    def more(self, layer: Any) -> More | None:
        """The matrix, and its kernels; ``None`` where there are none, or latents are to be expanded."""
        query = self._query
        heads = heads_of(self._module, layer.keys) if query.shape[0] == 1 and query.stride[3] == 1 else None
        if heads is None or not heads.weights.data.is_cpu:
            return None
        kernels = heads.kernels(query.dtype, query.shape[_TOKENS], self._shared)
        if kernels is None or kernels.products is None:
            return None
        data, scales = heads.weights.data, heads.weights.scales
        return More(2 * ((data,) if scales is None else (data, scales)), kernels)

    def call(self, lie: tuple[Lies, Lies], mask: Any) -> Call | None:
        """As of `ToKeys`."""
        told = self._query.dtype, (self._absorbed, *lie)
        return call_to_latents(self._module, *told, mask, self._options)

    def add(self, plan: Plan, query: View, out: View, how: tuple[Call, More]) -> tuple[int, ...]:
        """As of `ToKeys`."""
        call, (_, kernels) = how
        assert kernels is not None
        absorbed, found = (
            plan.take(self._bytes(kernels.width)),
            plan.take(self._bytes(kernels.layout.columns)),
        )
        of_queries = self._add_queries(plan, query, kernels, absorbed)
        first = plan.begin(call.kernel, [0] * WORDS)
        plan.point_inside(first + QUERY, absorbed)
        plan.point_inside(first + OUT, found)
        return first, *of_queries, *self._add_values(plan, out, kernels, found)

    def _bytes(self, width: int) -> int:
        """Of all heads of all tokens."""
        size: int = self._query.dtype.itemsize
        return prod(self._query.shape[:-1]) * width * size

    def _add_queries(
        self, plan: Plan, query: View, kernels: BetweenKernels, absorbed: int
    ) -> tuple[int, ...]:
        from llm_magic.backends.accelerate.kernels.rows import copied_rows

        size, own = query.dtype.itemsize, kernels.sizes.own
        words, strides = kernels.sum_words, query.stride[1:3]
        first = plan.begin(kernels.sums, kernels.words(strides))
        plan.point_at(first + words.queries, query)
        plan.point_inside(first + words.results, absorbed)
        if kernels.shares > 1:
            plan.have_team(first + words.team)
        counts = 1, *query.shape[1:3], self._shared * size
        to_target, to_source = (
            [step * size for step in steps] for steps in (self._absorbed[1][1:3], strides)
        )
        copy = plan.begin(copied_rows(), [0, 0, *counts, 0, *to_target, 0, *to_source])
        plan.point_inside(copy + TARGET, absorbed + kernels.layout.columns * size)
        plan.point(copy + SOURCE, query.base, (query.offset + own) * size)
        return tuple(first + word for word in (words.data, words.scales) if word is not None)

    def _add_values(self, plan: Plan, out: View, kernels: BetweenKernels, found: int) -> tuple[int, ...]:
        products = kernels.products
        assert products is not None
        numbers = kernels.numbers.data_ptr()
        first = plan.begin(products.kernel, products.words(0, 0, [0] * ADDRESSES, numbers))
        plan.point_inside(first + TOKENS, found)
        if products.room:
            plan.point_inside(first + ARRANGED, plan.take(products.room))
        if products.shares > 1:
            plan.have_team(first + TEAM)
        plan.place(out)
        plan.point(first + HEAD_WORDS + RESULTS, out.base)
        words = (DATA,) if kernels.sum_words.scales is None else (DATA, SCALES)
        return tuple(first + HEAD_WORDS + word for word in words)

    def tensors(self, keys: Any, values: Any, mask: Any, more: More) -> Tensors:  # noqa: ARG002 - for others
        """As of `ToKeys`."""
        return keys, keys, mask, None, values


Way = ToKeys | ToLatents
