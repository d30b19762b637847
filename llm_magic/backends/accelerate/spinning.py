"""Keeps torch's CPU threads from burning the cores that they wait for."""

from __future__ import annotations

import importlib
import os
import sys

_SAID_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Rounds that a waiting thread spins before it sleeps. Kernels of ours have threads of their own (see `kernels.team`); it
# matters for what torch computes: prompts, and tokens where there are no kernels. Measured with the starter's tokens before
# there were such threads, on 2 cores, per second alone / beside a busy process. A virtual machine on an AMD EPYC: default
# 42 / 2-4; 3,000: 43 / 15; 1,000, which GNU OpenMP takes where there are more threads than cores: 33 / 22. One on an Intel
# Xeon, where waking takes longer: default 26.6 / 0.9; 20,000: 26.1 / 6.1; 10,000: 24.0 / 8.6; 3,000: 21.3 / 12.6. Prompts
# of a Llama of 0.8 billion weights on the EPYC: 20,000: 240 / 100; 3,000: 226 / 120; 300: 208 / 117.
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
