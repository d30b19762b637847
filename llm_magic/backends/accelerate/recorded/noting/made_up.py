"""What is made up for a layer's code to run on: numbers, and how many tokens there are.

A layer is recorded twice. All that is another in the second run is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TOKENS_BEFORE, _MANY_TOKENS = 7, 1 << 30


class MadeUp:
    """Of one run.

    Parameters
    ----------
    is_other
        With other numbers, and a length of the text beyond all that code may compare it with.

    Attributes
    ----------
    tokens_before
        That the KV cache seems to have.
    """

    def __init__(self, *, is_other: bool = False) -> None:
        import torch

        self.tokens_before = _MANY_TOKENS if is_other else _TOKENS_BEFORE
        self._is_other = is_other
        self._random = torch.Generator("cpu").manual_seed(1 + is_other)

    def tokens_handed_on(self, new: int) -> int:
        """Of how many tokens another layer hands on keys and values, where so many are new."""
        return _MANY_TOKENS if self._is_other else _TOKENS_BEFORE + new

    def drawn(self, shape: Sequence[int]) -> Any:
        """Numbers at random, in float32."""
        import torch

        return torch.randn(shape, generator=self._random, dtype=torch.float32, device="cpu")

    def like(self, tensor: Any) -> Any:
        """Numbers in place of those of a tensor, which is no mask."""
        import torch

        stand = tensor.clone(memory_format=torch.contiguous_format)
        if tensor.dtype.is_floating_point:
            stand.copy_(self.drawn(tensor.shape))
        elif self._is_other and tensor.dtype == torch.bool:
            stand.logical_not_()
        elif self._is_other and not tensor.dtype.is_complex:  # places in some table: the next ones
            stand = torch.where(tensor > 0, tensor - 1, tensor + 1)
        return stand

    def mask(self, mask: Any) -> Any:
        """One in place of a mask, whose last dimension is the length of the text."""
        if not self._is_other:
            return mask.clone()
        return mask.new_zeros(()).expand(*mask.shape[:-1], mask.shape[-1] + _MANY_TOKENS)
