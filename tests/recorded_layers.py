"""Synthetic decoder layers for the tests of recorded ones, and what runs one beside a copy that nobody records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from llm_magic.backends.accelerate.recorded.layers import RecordedLayers
from llm_magic.backends.accelerate.recorded.recordings import Recordings

WIDTH = 32
Forward = Callable[..., Any]


class Layer(torch.nn.Module):
    """Two linear layers, a norm's weight, a buffer, and a forward of the test's."""

    def __init__(self, function: Forward, **attributes: Any) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(5)
        self.up, self.down = torch.nn.Linear(WIDTH, 48), torch.nn.Linear(48, WIDTH)
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, generator=chance))
        for parameter in (*self.up.parameters(), *self.down.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=chance) * 0.2)
        self.register_buffer("count", torch.ones(1))
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)
        self.to(torch.bfloat16).eval()

    def forward(self, hidden_states: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return self.function(self, hidden_states, *args, **kwargs)

    def mixed(self, states: Any) -> Any:
        """What most layers do."""
        return states + self.down(torch.nn.functional.silu(self.up(states)))


def states(tokens: int = 1, seed: int = 0, batch: int = 1) -> Any:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, WIDTH, generator=chance).to(torch.bfloat16)


def cache(tokens: int = 3) -> Any:
    """A KV cache that has tokens."""
    made = DynamicCache()
    made.update(torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4), 0)
    return made


class Twins:
    """A layer that may be recorded, and a copy of it that is not.

    Attributes
    ----------
    layer, usual
        These.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.usual = layer, copy.deepcopy(layer)
        self.recorded = RecordedLayers({"layer": layer}, Recordings())
        self.cache = cache()

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What both make, each of tensors of its own."""
        with torch.no_grad():
            mine, theirs = (
                layer(*_copied(args), past_key_values=self.cache, **_copied(kwargs))
                for layer in (self.layer, self.usual)
            )
        return mine, theirs

    def check(self, *args: Any, **kwargs: Any) -> None:
        """That both make the same."""
        mine, theirs = self.run(*args, **kwargs)
        same(mine, theirs)

    def steps(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        for args, kwargs in calls:
            self.check(*args, **kwargs)

    @property
    def programs(self) -> int:
        """For how many kinds of sweeps the layer is recorded."""
        return programs(self.recorded)


def one_by_one(recorded: RecordedLayers) -> RecordedLayers:
    """Layers that are computed when they are called, not before."""
    for layer in recorded._layers:
        layer.line.leave()
    return recorded


def programs(recorded: RecordedLayers) -> int:
    return sum(bound is not None for layer in recorded._layers for bound in layer._bound.values())


def same(mine: Any, theirs: Any) -> None:
    """The same numbers in the same kind of thing."""
    assert type(mine) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7)), (mine - theirs).abs().max()
    elif isinstance(theirs, (tuple, list)):
        for left, right in zip(mine, theirs, strict=True):
            same(left, right)
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        same(list(mine.values()), list(theirs.values()))
    else:
        assert mine == theirs


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.preserve_format) if value.is_contiguous() else value
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {name: _copied(each) for name, each in value.items()} if isinstance(value, dict) else value
