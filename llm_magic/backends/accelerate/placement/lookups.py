"""Tables that stay in RAM or in a file, of which only the rows of a pass go to the device that computes.

An embedding of a large vocabulary is a gigabyte, and a pass needs a row of it for each token. So the rows
are looked up where the table is, and the embedding runs on its device with these rows as its weight: the
values, and whatever else it does with them, are the same as if the whole table were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Lookup:
    """The ``forward`` of an ``nn.Embedding`` that holds its weight in RAM.

    A captured sweep cannot ask for its tokens: `fill` looks their rows up before it, and inside of `filled`
    they are at a fixed address. Threads may share the embedding, but not captured sweeps.

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
        self._is_captured = False
        self._checked: set[tuple[int, ...]] = set()
        module.forward = self

    def detach(self) -> None:
        """Leave the embedding its own ``forward``."""
        self._module.__dict__.pop("forward", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the embedding makes of its input, ``ids`` of any shape on any device."""
        ids, rest = (args[0], args[1:]) if args else (kwargs.popitem()[1], ())
        places, rows = self._of_sweep(ids) if self._is_captured else self._looked_up(ids)
        return type(self._module).forward(self._with(rows), places, *rest, **kwargs)

    def fill(self, ids: Any) -> None:
        """Look up the rows for a sweep over ``ids``, int64 ``[batch, tokens]`` in RAM, at the address of this shape."""
        shape = tuple(ids.shape)
        if shape in self._filled:
            self._filled[shape][1].copy_(self._rows(ids))
        else:
            self._filled[shape] = self._looked_up(ids)
        self._filled_ids = ids

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Around a sweep: it is over the tokens of the last `fill`."""
        self._is_captured = True
        try:
            yield
        finally:
            self._is_captured = False

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
        return places, self._rows(ids.cpu()).to(self._device)

    def _rows(self, ids: Any) -> Any:
        return self._module.weight.detach().index_select(0, self._within(ids).flatten())

    def _within(self, ids: Any) -> Any:
        """Tokens that the table lacks have row 0: so Gemma 3n asks for them."""
        return ids.where(ids < len(self._module.weight), 0)

    def _with(self, rows: Any) -> Any:
        """The embedding with another weight. Padding matters to training alone, and need not be one of the rows."""
        embedding = object.__new__(type(self._module))
        own = {"_parameters": {"weight": rows}, "padding_idx": None}
        embedding.__dict__.update(self._module.__dict__ | own)
        return embedding
