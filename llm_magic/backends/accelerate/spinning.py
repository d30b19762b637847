"""Keeps torch's CPU threads from burning the cores that they wait for."""

from __future__ import annotations

import os
import sys

_SAID_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Rounds that a waiting thread spins before it sleeps: what GNU OpenMP itself takes when it knows
# that there are more threads than cores. Measured with the starter on 2 cores: 42 tok/s alone with
# this as with the default; beside another busy process 32 tok/s, where the default falls to 2-4.
_SPINS = "1000"


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
