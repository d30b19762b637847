"""Which bytes of the model's own files are a parameter of the loaded model, unchanged.

Such a parameter can go to the disk without being written: it is there. Others (converted while
loading, or in another dtype) cannot, and are written once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.files.extents import Extent, file_extents


class Checkpoint:
    """The safetensors files that a model was loaded from.

    Parameters
    ----------
    model
        The loaded model.
    files
        Its weight files; other kinds than safetensors hold no usable bytes.
    known
        Bytes of parameters that go by other names in the files.
    """

    def __init__(self, model: Any, files: Sequence[Path], known: Mapping[str, Extent] | None = None) -> None:
        self._model, self._known = model, dict(known or {})
        self._files = tuple(path for path in files if path.suffix == ".safetensors")
        self._found: dict[str, Extent] | None = None

    @cached_property
    def dtypes(self) -> frozenset[Any]:
        """The torch dtypes of what the files hold."""
        import torch

        found = {dtype for path in self._files for _, dtype, _ in file_extents(path).values()}
        return frozenset(getattr(torch, name, None) for name in found)

    def extents(self, index: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Extent]:
        """Parameter name -> its bytes, for every parameter whose bytes in the files may be its own.

        Parameters
        ----------
        index
            Accelerate's offload index, when the caller has one; otherwise transformers makes it anew.

        Notes
        -----
        Name, dtype and shape agree. A weight that was converted into one of the same name, dtype and
        shape is not told apart: compare the bytes before the ones in memory are given up.
        """
        if index is not None:
            return self._known | dict(_matching(self._model, index))
        if self._found is None:
            self._found = self._known | dict(_matching(self._model, self._index() if self._files else {}))
        return self._found

    def _index(self) -> dict[str, dict[str, Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.integrations.accelerate import accelerate_disk_offload

        names = {name: path.name for path in self._files for name in file_extents(path)}
        found: dict[str, dict[str, Any]] = accelerate_disk_offload(
            self._model,
            None,
            [str(path) for path in self._files],
            {"": "disk"},
            {"weight_map": names},
            get_model_conversion_mapping(self._model),
        )
        return found


def _matching(model: Any, index: Mapping[str, Mapping[str, Any]]) -> Any:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    headers: dict[str, Any] = {}
    for name, entry in index.items():
        file = str(entry.get("safetensors_file", ""))
        if name not in parameters or not file:
            continue
        if file not in headers:
            headers[file] = file_extents(Path(file))
        found = headers[file].get(entry.get("weight_name", name))
        if found and _is_same(parameters[name], *found):
            yield name, found[0]


def _is_same(parameter: Any, extent: Extent, dtype: str, shape: tuple[int, ...]) -> bool:
    same = str(parameter.dtype) == f"torch.{dtype}" and tuple(parameter.shape) == tuple(shape)
    return same and extent.offset % parameter.dtype.itemsize == 0
