"""Tables that stay in RAM or in a file, of which only the rows of a pass go to the device that computes.

An embedding of a large vocabulary is a gigabyte, and a pass needs a row of it for each token. So the rows
are looked up where the table is, and the embedding runs on its device with these rows as its weight: the
values, and whatever else it does with them, are the same as if the whole table were there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llm_magic.backends.accelerate.placement import hooks
from llm_magic.plan import Placement


class Tables:
    """The tables of a placed model, and what makes those work that are not where they compute.

    Attributes
    ----------
    lookups
        What looks up rows of them.
    """

    def __init__(self) -> None:
        self.lookups: list[Lookup] = []
        self._adapted: list[Any] = []

    @property
    def has_adapters(self) -> bool:
        """Whether an adapter is on a table, and works where that is."""
        return bool(self._adapted)

    def attach(self, model: Any, blocks: Iterable[tuple[Placement, Any]], skip_keys: Any) -> None:
        """Begin with these, every one with its module; others end."""
        self.detach()
        for place, module in blocks:
            if not place.block.looks_up:
                continue
            outer = model.get_submodule(place.block.name)
            is_away = place.is_looked_up and place.compute != "cpu"
            if outer is not module:  # an adapter, which reads the table itself
                _move_added(outer, module, "cpu" if place.is_looked_up else place.compute)
                if is_away:
                    hooks.align_both_ways(outer, "cpu", skip_keys)
                    self._adapted.append(outer)
            elif is_away:
                self.lookups.append(Lookup(module, place.compute))

    def detach(self) -> None:
        """Leave all modules as they were."""
        while self.lookups:
            self.lookups.pop().detach()
        while self._adapted:
            hooks.detach(self._adapted.pop())


def _move_added(outer: Any, table: Any, device: str) -> None:
    """Take what is around a table to a device, and the buffers of both."""
    own = {id(parameter) for parameter in table.parameters()}
    for parameter in outer.parameters():
        if id(parameter) not in own and str(parameter.device) != device:
            parameter.data = parameter.data.to(device)
    for module in outer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


class Lookup:
    """The ``forward`` of an ``nn.Embedding`` that holds its weight in RAM.

    A captured sweep cannot ask for its tokens: `fill` looks their rows up before it, and inside of `filled`
    they are at a fixed address. Threads may share the embedding; captured sweeps are one thread's.

    Parameters
    ----------
    module
        The embedding.
    device
        Where it runs.
    """

    def __init__(self, module: Any, device: Any) -> None:
        self._module, self._device = module, device
        self._filled: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._filled_ids: Any = None
        self._thread = 0  # the one that captures
        self._checked: set[tuple[int, ...]] = set()
        module.forward = self

    def detach(self) -> None:
        """Leave the embedding its own ``forward``."""
        self._module.__dict__.pop("forward", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the embedding makes of its input, ``ids`` of any shape on any device."""
        ids, rest = (args[0], args[1:]) if args else (kwargs.popitem()[1], ())
        is_captured = self._thread == threading.get_ident()
        places, rows = self._of_sweep(ids) if is_captured else self._looked_up(ids)
        return type(self._module).forward(self._with(rows), places, *rest, **kwargs)

    def fill(self, ids: Any) -> None:
        """Look up the rows for a sweep over ``ids``, int64 ``[batch, tokens]`` in RAM, at the address of this shape."""
        shape = tuple(ids.shape)
        if shape in self._filled:
            self._filled[shape][1].copy_(self._rows(self._within(ids)))
        else:
            self._filled[shape] = self._looked_up(self._within(ids))
        self._filled_ids = ids

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Around a sweep: it is over the tokens of the last `fill`."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = 0

    def _of_sweep(self, ids: Any) -> tuple[Any, Any]:
        """Rows that are there already.

        Raises
        ------
        RuntimeError
            When the first sweep of a shape, which is not captured, wants others.
        """
        import torch

        shape = tuple(ids.shape)
        if shape not in self._checked:
            if not torch.equal(self._within(ids.cpu()), self._within(self._filled_ids)):
                raise RuntimeError("an embedding looks up other rows than those of the tokens")
            self._checked.add(shape)
        return self._filled[shape]

    def _looked_up(self, ids: Any) -> tuple[Any, Any]:
        """Numbers of the rows, shaped as ``ids``, and the rows ``[tokens, width]``, on the device."""
        import torch

        places = torch.arange(ids.numel(), device=self._device).view(ids.shape)
        return places, self._rows(ids).to(self._device)

    def _rows(self, ids: Any) -> Any:
        weight = self._module.weight.detach()
        return weight.index_select(0, ids.to(weight.device).flatten())

    def _within(self, ids: Any) -> Any:
        """A token that the table lacks has row 0: so Gemma 3n asks for it."""
        return ids.where(ids < len(self._module.weight), 0)

    def _with(self, rows: Any) -> Any:
        """The embedding with another weight. Padding matters to training alone, and need not be one of the rows."""
        embedding = object.__new__(type(self._module))
        own = {"_parameters": {"weight": rows}, "padding_idx": None}
        embedding.__dict__.update(self._module.__dict__ | own)
        return embedding
