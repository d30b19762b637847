"""Kernels between heads and the latents that they attend to; see `latent_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.kernels import cpu_products, words
from llm_magic.backends.accelerate.kernels.cpu_products import Layout, Products
from llm_magic.backends.accelerate.kernels.words import HEAD_WORDS

_OF_A_SHARE = 1 << 16
"""Weights of a share at least: some microseconds, for which it is worth to have another thread take it."""


class Sizes(NamedTuple):
    """Of what is between heads and latents.

    Attributes
    ----------
    heads, tokens
        How many.
    own, values
        Widths of a head: of a key without the part that all heads share, and of a value.
    shared
        The width of that part.
    """

    heads: int
    tokens: int
    own: int
    values: int
    shared: int


class SumWords(NamedTuple):
    """Which words of a kernel of sums are addresses: of queries, the matrix and its scales, and results; and its team."""

    queries: int
    data: int
    scales: int | None
    results: int
    team: int


_OF_NUMBERS = SumWords(0, 1, None, 2, 11)
_OF_PACKED = SumWords(
    words.TOKENS, HEAD_WORDS + words.DATA, HEAD_WORDS + words.SCALES, HEAD_WORDS + words.RESULTS, words.TEAM
)
"""See `kernels.row_sums`."""


@dataclass(frozen=True, eq=False)
class BetweenKernels:
    """Kernels for some tokens of one sequence, and weights that lie in one way.

    Attributes
    ----------
    layout, sizes
        What they are for.
    sums
        Makes of queries what attends to latents.
    sum_words
        Which of its words are addresses.
    products
        Makes values of what they have found, in ``[tokens, heads, values]``; ``None``: torch does.
    numbers
        Of its matrices, of which each head has several (int64).
    """

    layout: Layout
    sizes: Sizes
    sums: Callable[[Any], None]
    sum_words: SumWords
    products: Products | None
    numbers: Any

    @property
    def shares(self) -> int:
        """For how many threads the sums are worth it."""
        return self.sizes.heads * self.sizes.own * self.layout.columns // _OF_A_SHARE

    @property
    def width(self) -> int:
        """Of what attends to latents."""
        return self.layout.columns + self.sizes.shared

    def words(self, strides: Sequence[int]) -> list[int]:
        """Of the sums, for queries whose heads and tokens are so far from each other: all but addresses and the team."""
        heads, tokens, own, values, _ = self.sizes
        rows, columns = own + values, self.layout.columns
        of_results = tokens * self.width, self.width
        if self.sum_words is _OF_NUMBERS:
            return [0, 0, 0, heads, tokens, own, *strides, rows * columns, *of_results, 0, self.shares]
        head = [0] * HEAD_WORDS
        head[words.COLUMNS], head[words.PARTS], head[words.SHARES] = columns, 1, self.shares
        return [*head, *[0] * words.ADDRESSES, rows, heads, tokens, own, *strides, *of_results]


@lru_cache(maxsize=64)
def kernels_between(layout: Layout, sizes: Sizes, dtype: str) -> BetweenKernels | None:
    """Those for weights ``[heads * (own + values), latent]`` that lie so; ``None`` where there are none."""
    import torch

    sums = cpu_products.summed_rows(layout, dtype)
    if sums is None:
        return None
    heads, tokens, own, values, _ = sizes
    rows = gcd(own, values)
    is_quick = layout.kind not in cpu_products.PLAIN or cpu_products.few_plain_tokens(getattr(torch, dtype))
    products = (
        cpu_products.prepared_each(layout, rows, dtype, heads * tokens, values // rows) if is_quick else None
    )
    numbers = _numbers(heads, (own + values) // rows, own // rows, tokens)
    is_packed = layout.kind not in cpu_products.PLAIN
    return BetweenKernels(layout, sizes, sums, _OF_PACKED if is_packed else _OF_NUMBERS, products, numbers)


def _numbers(heads: int, of_head: int, first: int, tokens: int) -> Any:
    """Which matrices of a stack make the values, where a head has so many: for each token and head those from ``first`` on."""
    import torch

    with torch.inference_mode(False):
        of_all = torch.arange(heads * of_head, device="cpu").view(heads, of_head)
        # A view of every second one would be what ``reshape`` makes, where each head has two of them.
        return of_all[:, first:].expand(tokens, -1, -1).reshape(-1).contiguous()
