"""Weight files that are larger than all memory, which safetensors cannot open.

It maps a file as if its pages were to be written to, and Linux refuses that beyond RAM and swap, however few
pages are read. A mapping for reading alone needs no memory. transformers saves up to 50 GB in one file.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.files.extents import StoredTensor, file_extents
from llm_magic.headers import read_safetensors_header


def open_safetensors(path: Any, framework: str = "pt", device: Any = "cpu", **options: Any) -> Any:
    """``safetensors.safe_open``, or what does the same for a file that is too large for it."""
    from safetensors import safe_open

    try:
        return safe_open(path, framework=framework, device=device, **options)
    except (OSError, RuntimeError) as error:
        if "mmap" not in str(error) or framework != "pt":
            raise
        return LargeFile(Path(path), device)


@contextmanager
def large_files_opened() -> Iterator[None]:
    """While transformers and Accelerate load a model: they open weight files by `open_safetensors`."""
    from accelerate.utils import offload
    from transformers import modeling_utils
    from transformers.integrations import accelerate

    users: tuple[Any, ...] = (offload, modeling_utils, accelerate)
    before = [getattr(user, "safe_open", None) for user in users]
    for user in users:
        user.safe_open = open_safetensors
    try:
        yield
    finally:
        for user, usual in zip(users, before, strict=True):
            user.safe_open = usual


class LargeFile:
    """An open weight file, with what callers use of ``safe_open``; every tensor is a copy.

    Raises
    ------
    OSError
        When the system maps it not even for reading.
    SourceError
        When it is no safetensors file.
    """

    def __init__(self, path: Path, device: Any = "cpu") -> None:
        self._device = device
        self._tensors = file_extents(path)
        self._dtypes = {tensor.name: tensor.dtype for tensor in read_safetensors_header(path).tensors}
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> LargeFile:
        return self

    def __exit__(self, *_error: object) -> None:
        """Whoever has it lets it go."""

    def keys(self) -> list[str]:
        """Names of its tensors."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> Any:
        """A tensor."""
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> LargeTensor:
        """What reads a tensor, or a part of it, when it is indexed."""
        stored = self._tensors[name]
        return LargeTensor(lambda: self._read(stored), list(stored.shape), self._dtypes[name])

    def _read(self, stored: StoredTensor) -> Any:
        import numpy
        import torch

        extent, dtype = stored.extent, getattr(torch, stored.dtype)
        if not extent.bytes:
            return torch.empty(stored.shape, dtype=dtype, device=self._device)
        raw = numpy.frombuffer(self._memory, numpy.uint8, extent.bytes, extent.offset)
        tensor: Any = torch.from_numpy(raw.copy())  # its own memory: which may be written to, and is aligned
        return tensor.view(dtype).view(stored.shape).to(self._device)


class LargeTensor:
    """A tensor that is still in its file."""

    def __init__(self, read: Callable[[], Any], shape: list[int], dtype: str) -> None:
        self._read, self._shape, self._dtype = read, shape, dtype

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def get_shape(self) -> list[int]:
        """Its shape."""
        return self._shape

    def get_dtype(self) -> str:
        """Its dtype, by the name that the file has for it."""
        return self._dtype
