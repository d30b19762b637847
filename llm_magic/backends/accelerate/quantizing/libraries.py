"""The libraries that pack weights: whether they are here, and how they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_magic.errors import OptionError

_PACKAGES = {"bitsandbytes": "bitsandbytes>=0.50", "optimum.quanto": "optimum-quanto>=0.2.7"}
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""Warnings about what a user cannot change, by their logger; the second comes with every layer, the third with quanto where
torch could use a GPU, and there is none but CUDA's compiler."""


def installed(library: str) -> bool:
    """Whether a library is here, without importing it."""
    try:
        return importlib.util.find_spec(library) is not None
    except ImportError:  # the package around it is missing, or broken
        return False


def require(library: str, what: str) -> None:
    """Refuse to go on without a library; ``what`` begins the sentence that ends with "is not installed".

    Raises
    ------
    OptionError
        With the command that installs it.
    """
    if not installed(library):
        raise OptionError(f"{what} is not installed.", f"Install it: pip install '{_PACKAGES[library]}'")


def import_library(name: str) -> Any:
    """Import ``bitsandbytes`` or ``optimum.quanto`` without its noise and without the network."""
    for logger, start in _NOISE.items():
        found = logging.getLogger(logger)
        if not any(isinstance(known, _Silenced) for known in found.filters):
            found.addFilter(_Silenced(start))
    with _no_kernels_from_the_hub():
        return importlib.import_module(name)


class _Silenced(logging.Filter):
    """Drops the messages that start so."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._start)


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    # bitsandbytes, where the package "kernels" is installed, downloads code while it is imported.
    modules: dict[str, Any] = sys.modules
    before = modules.get("kernels", _NOISE)  # a module, or the None of somebody else
    modules["kernels"] = None  # how Python spells "not to be imported"
    try:
        yield
    finally:
        del modules["kernels"]
        if before is not _NOISE:
            modules["kernels"] = before
