"""Keeps torch's CPU threads from burning the cores that they wait for."""

from __future__ import annotations

import importlib
import os
import sys

_SAID_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Rounds that a waiting thread spins before it sleeps. Measured with the starter on 2 cores, tokens per
# second alone / beside a busy process. A virtual machine on an AMD EPYC: default 42 / 2-4; 3,000: 43 / 15;
# 1,000, which GNU OpenMP takes where there are more threads than cores: 33 / 22. One on an Intel Xeon, where
# waking takes longer: default 26.6 / 0.9; 20,000: 26.1 / 6.1; 10,000: 24.0 / 8.6; 3,000: 21.3 / 12.6.
_SPINS = "20000"


def import_torch_calmly() -> None:
    """Import torch, its GNU OpenMP set to give cores back soon; whatever the user set stays.

    The library reads its environment once, when it is loaded, so the variable is taken back at once
    and torch that is imported already is left alone.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SAID_BY_USER):
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        importlib.import_module("torch")
    except ImportError:
        pass  # the functions that need it say so
    finally:
        del os.environ["GOMP_SPINCOUNT"]
