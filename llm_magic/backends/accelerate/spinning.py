"""Keeps torch's CPU threads from burning the cores that they wait for."""

from __future__ import annotations

import os
import sys

_SAID_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Rounds that a waiting thread spins before it sleeps. Measured with the starter on 2 cores, tokens per
# second alone and beside a busy process: 42 and 2-4 with the default, 43 and 15 with this; with the
# 1,000 that GNU OpenMP takes where there are more threads than cores, 33 and 22.
_SPINS = "3000"


def import_torch_calmly() -> None:
    """Import torch, its GNU OpenMP set to give cores back soon; whatever the user set stays.

    The library reads its environment once, when it is loaded, so the variable is taken back at once
    and torch that is imported already is left alone.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SAID_BY_USER):
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        import torch  # noqa: F401 - for its side effect
    except ImportError:
        pass  # the functions that need it say so
    finally:
        del os.environ["GOMP_SPINCOUNT"]
