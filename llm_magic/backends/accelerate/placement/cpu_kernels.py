"""bitsandbytes' kernels for CPUs, also where it has loaded its library for a GPU instead.

It loads one library. Those for GPUs unpack on the CPU with one thread, a number at a time, and have
none of the kernels that compute with what is packed: twenty times as slow and more. The one for CPUs
is in the package all the same. Here it is loaded beside, and the module that binds it is run once more
with it, so that bitsandbytes registers what it had left out.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_NAME = "libbitsandbytes_cpu"


def serve_the_cpu() -> None:
    """Let imported bitsandbytes compute on the CPU with its library for CPUs; nothing where that cannot be."""
    if are_loaded():
        return
    try:
        from bitsandbytes import cextension, consts
        from bitsandbytes.backends.cpu import ops

        loaded = ctypes.CDLL(str(Path(consts.PACKAGE_DIR) / f"{_NAME}{consts.DYNAMIC_LIBRARY_SUFFIX}"))
        library = cextension.BNBNativeLibrary(loaded)
        _bind(ops, library)
        ops.lib = library
    except Exception:  # not packaged, not for this system, or a bitsandbytes that is made otherwise
        return


def are_loaded() -> bool:
    """Whether bitsandbytes computes on the CPU with its library for CPUs."""
    return Path(str(getattr(_library(), "_name", ""))).stem == _NAME


def has_order() -> bool:
    """Whether that library computes with packed weights as they lie, in an order of its own: with AVX-512 bfloat16."""
    ask = getattr(_library(), "has_avx512bf16_cpu", None) if are_loaded() else None
    return bool(ask and ask())


def _library() -> Any:
    """What bitsandbytes computes with on the CPU; ``None`` where it could load none."""
    try:
        from bitsandbytes.backends.cpu import ops
    except ImportError:
        return None
    return vars(ops.lib).get("_lib")


def _bind(ops: Any, library: Any) -> None:
    """Run the module again that registers operators for the CPU, for those that it has not registered yet."""
    from bitsandbytes import _ops, cextension, functional

    spec = importlib.util.find_spec(ops.__name__)
    assert spec is not None
    assert spec.loader is not None
    has_order = getattr(library._lib, "has_avx512bf16_cpu", lambda: 0)
    with ExitStack() as replaced:
        replaced.enter_context(_replaced(cextension, "lib", library))
        replaced.enter_context(_replaced(functional, "has_avx512bf16", lambda: bool(has_order())))
        replaced.enter_context(_replaced(_ops, "register_kernel", _unless_there(_ops.register_kernel)))
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _unless_there(register: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    import torch

    def for_device(operator: str, device: str) -> Callable[[Any], Any]:
        is_there = torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())
        return (lambda kernel: kernel) if is_there else register(operator, device)

    return for_device
