"""Threads of torch's OpenMP, where a team has none of its own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llm_magic.backends.accelerate.kernels.compiler import known_at

_FORKS = ("GOMP_parallel", "__kmpc_fork_call")

_BY_GNU = """
declare void @GOMP_parallel(ptr, ptr, i32, i32)

define internal void @work_together(ptr %team) {
  call void @GOMP_parallel(ptr @take_shares, ptr %team, i32 0, i32 0)
  ret void
}
"""

# LLVM's and Intel's want to be told where in the source a region stands, and give numbers of the thread before its argument.
_BY_LLVM = """
declare void @__kmpc_fork_call(ptr, i32, ptr, ...)

@nowhere = internal constant [23 x i8] c";unknown;unknown;0;0;;\\00"
@place = internal constant { i32, i32, i32, i32, ptr } { i32 0, i32 2, i32 0, i32 0, ptr @nowhere }

define internal void @task(ptr %number, ptr %bound, ptr %team) {
  call void @take_shares(ptr %team)
  ret void
}

define internal void @work_together(ptr %team) {
  call void (ptr, i32, ptr, ...) @__kmpc_fork_call(ptr @place, i32 1, ptr @task, ptr %team)
  ret void
}
"""

_BY_NOBODY = """
define internal void @work_together(ptr %team) {
  call void @take_shares(ptr %team)
  ret void
}
"""

_NOBODY_SLEEPS = """
define internal void @wake_caller(ptr %team) {
  ret void
}
"""


def together() -> str:
    """LLVM's text of ``@work_together``: all threads that torch computes with take shares, until there are none."""
    forks = _forks()
    if "GOMP_parallel" in forks:
        return _NOBODY_SLEEPS + _BY_GNU
    return _NOBODY_SLEEPS + (_BY_LLVM if forks else _BY_NOBODY)


@cache
def _forks() -> frozenset[str]:
    """Which of `_FORKS` torch's library has, for compiled modules to call."""
    for library in libraries():
        found = [name for name in _FORKS if hasattr(library, name)]
        for name in found:
            known_at(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)
        if found:
            return frozenset(found)
    return frozenset()


def libraries() -> Iterator[ctypes.CDLL]:
    """Libraries that may have what torch's threads are started by: its own, whose dependencies are searched as well.

    On Windows they are not, and the OpenMP library is one of those that are loaded.
    """
    import torch

    names = {"win32": ("libiomp5md.dll", "vcomp140.dll"), "darwin": ("libtorch_cpu.dylib",)}
    folder = Path(torch.__file__).parent / "lib"
    for name in names.get(sys.platform, ("libtorch_cpu.so",)):
        try:
            yield ctypes.CDLL(str(folder / name) if (folder / name).exists() else name)
        except OSError:
            continue
