"""A row of an embedding that a model reads by itself, beside calling it: Gemma 4's, for padding.

Where the weight is elsewhere between two calls, the model would find a tensor without bytes, or one on
another device. While it runs it is shown the row that it reads, in the place of all others.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

_PADDING = re.compile(r"self\.([\w.]+)\.weight\[self\.config\.text_config\.pad_token_id\b")


def read_rows(model: Any) -> Iterator[tuple[str, Any, int]]:
    """``(name of the embedding, module that reads a row of it, which)`` for all that are read so."""
    for path, module in model.named_modules():
        kind: Any = type(module)
        for inner in _read_in_code(kind):
            yield f"{path}.{inner}" if path else inner, module, int(module.config.text_config.pad_token_id)


@cache
def _read_in_code(kind: Any) -> frozenset[str]:
    try:
        return frozenset(_PADDING.findall(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()


class ShownRow:
    """Shows a row of an embedding's weight to the module that reads it.

    Parameters
    ----------
    reader, embedding
        The modules.
    row
        ``[1, width]``, on any device.
    device
        Where ``reader`` computes before it has called the embedding; afterwards it is where that one's output is.
    """

    def __init__(self, reader: Any, embedding: Any, row: Any, device: Any) -> None:
        self._embedding, self._device = embedding, device
        self._rows = {row.device: row}
        self._is_read = False
        self._handles = [
            reader.register_forward_pre_hook(lambda *_: self._begin()),
            reader.register_forward_hook(lambda *_: self._end(), always_call=True),
            embedding.register_forward_pre_hook(lambda *_: self._hide()),
            embedding.register_forward_hook(lambda _module, _inputs, output: self._show(output.device)),
        ]

    def detach(self) -> None:
        """Leave both modules as they were."""
        for handle in self._handles:
            handle.remove()
        self._end()

    def _begin(self) -> None:
        import torch

        self._is_read = True
        self._show(torch.device(self._device))

    def _end(self) -> None:
        self._is_read = False
        self._hide()

    def _show(self, device: Any) -> None:
        if not self._is_read:
            return
        if device not in self._rows:
            self._rows[device] = next(iter(self._rows.values())).to(device)
        rows = self._embedding._parameters["weight"].shape[0]
        # Attributes of the object are found before parameters.
        self._embedding.__dict__["weight"] = self._rows[device].expand(rows, -1)

    def _hide(self) -> None:
        self._embedding.__dict__.pop("weight", None)
