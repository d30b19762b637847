"""What a sweep reads besides the cache, at addresses that do not change: its tokens, their positions, what they see.

The device makes places, positions and masks of a few numbers that are set before each sweep. So one graph serves many
lengths of the cache, and fewer tokens than it was recorded for: what is too much is written behind those that are real,
where none of them sees it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.static_cache import places_of


class Shape(NamedTuple):
    """What tells one graph from another: ``visible`` is how much of the cache it attends to."""

    batch: int
    tokens: int
    visible: int


class Inputs:
    """What a sweep reads, at fixed addresses.

    Attributes
    ----------
    device
        Where they are.
    ids
        int64 ``[batch, tokens]``, for each such shape.
    length, count
        int64 ``[]``: tokens in the cache before the sweep, and tokens of the sweep that are real.
    kept
        bool ``[batch, capacity]``: whether a place of the cache may be seen at all (padding may not).
    padding
        int64 ``[batch]``: places of each row that hold padding.
    """

    def __init__(self, batch: int, capacity: int, device: Any) -> None:
        import torch

        self.device = device
        self.ids: dict[tuple[int, int], Any] = {}
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.count = torch.ones((), dtype=torch.int64, device=device)
        self.kept = torch.ones((batch, capacity), dtype=torch.bool, device=device)
        self.padding = torch.zeros(batch, dtype=torch.int64, device=device)

    def pad(self, attention_mask: Any) -> None:
        """Hide the padding of a new answer's prompt."""
        self.kept.fill_(True)
        self.padding.zero_()
        if attention_mask is not None:
            rows, width = attention_mask.shape
            real = attention_mask.to(self.kept.dtype)
            self.kept[:rows, :width].copy_(real)
            self.padding[:rows].copy_(width - real.sum(-1))

    def fill(self, shape: Shape, ids: Any, cache_length: int) -> None:
        """Set the next sweep's tokens; the rest of a rounded sweep is token 0."""
        import torch

        key = (shape.batch, shape.tokens)
        if key not in self.ids:
            self.ids[key] = torch.zeros(key, dtype=torch.int64, device=self.device)
        self.ids[key][:, : ids.shape[1]].copy_(ids)
        self.ids[key][:, ids.shape[1] :].zero_()
        self.length.fill_(cache_length)
        self.count.fill_(ids.shape[1])

    def slots(self, shape: Shape) -> Any:
        """Where the sweep writes: int64 ``[tokens]``."""
        import torch

        return torch.arange(shape.tokens, device=self.device) + self.length

    def positions(self, shape: Shape, slots: Any) -> Any:
        """Position of every token in its own sequence; those that are not real repeat the last.

        A model with learned positions has none behind the end of its context.
        """
        last = self.length + self.count - 1
        return (slots.minimum(last)[None] - self.padding[: shape.batch, None]).clamp_min(0)

    def mask(self, shape: Shape, slots: Any) -> Any:
        """Whether a token (third) may see a place (fourth): bool ``[batch, 1, tokens, visible]``."""
        import torch

        places = torch.arange(shape.visible, device=self.device)
        before = places[None, :] <= slots[:, None]
        return before[None, None] & self.kept[: shape.batch, None, None, : shape.visible]

    def window_mask(self, shape: Shape, slots: Any, window: int) -> Any:
        """As ``mask``, for layers that see a window and hold tokens around a ring (see `static_cache`)."""
        import torch

        ring = places_of(window, self.kept.shape[1])
        places = torch.arange(min(shape.visible, ring), device=self.device)
        held = slots[-1] - (slots[-1] - places) % ring  # the token that lies there once the sweep has written
        is_seen = (held <= slots[:, None]) & (held > slots[:, None] - window) & (held >= 0)
        return is_seen[None, None] & self.kept[: shape.batch, None, None].index_select(3, held.clamp_min(0))
