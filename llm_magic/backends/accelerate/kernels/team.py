"""Threads of our own that compute the shares of kernels; see `shares`. It needs no LLVM before the first of them starts."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

SHARES_OF_A_THREAD = 4  # twice as many cost a few percent, half as many gain less beside other programs

# How long a thread looks out for a call before it sleeps, and a caller for the last shares before it does: somewhat longer
# than Python takes between kernels, and than a share takes. Measured on two cores of an AMD EPYC with a Llama of 0.8
# billion weights in nf4, tokens per second alone / beside a busy process: with these 37.6 / 27.6; where threads look out
# for 37 us, 34.5 / 29; for 500 us, 36.9 / 20.7; where the caller waits for 15 us, 34 / 26.
_AWAKE_S, _WAITING_S = 150e-6, 75e-6
_TRIED, _TRIES = 1000, 5  # pauses that are timed, and how often

# Where a team keeps what, in bytes. Whoever writes to a line of the cache takes it from those who read there.
TICKET, LEFT, CALLER_SLEEPS, WORK, ARGUMENT, BELL, ASLEEP, IS_BUSY = 0, 64, 68, 128, 136, 192, 196, 256
SHARES, SPINS_FOR_SHARES, SPINS_FOR_OTHERS = 320, 328, 336  # which stay as they are
_BYTES, _LINE = 384, 64


def team() -> int:
    """The address of a team of as many threads as torch computes with, the calling one being one; 0 if it is the only one."""
    import torch

    # Ask always: that is when a new thread learns of torch's setting.
    threads = torch.get_num_threads()
    return team_of(threads).address if threads > 1 else 0


class Team:
    """Memory that some threads share, and the threads but for the one that calls.

    Parameters
    ----------
    threads
        All of them.
    """

    def __init__(self, threads: int) -> None:
        memory = ctypes.create_string_buffer(_BYTES + _LINE)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # its threads run to the end of the process
        start = ctypes.addressof(memory)
        self.address = start + -start % _LINE
        self.shares = threads * SHARES_OF_A_THREAD
        self._keep(SHARES, self.shares)

    def start(self, threads: int) -> None:
        """Have so many threads serve, as long as the process lives; none, where OpenMP's do."""
        from llm_magic.backends.accelerate.kernels.shares import serving

        run = serving()
        if run is None:
            return
        pause_s = _seconds_of_a_pause(run.pause_often)
        self._keep(SPINS_FOR_SHARES, max(1, round(_AWAKE_S / pause_s)))
        self._keep(SPINS_FOR_OTHERS, max(1, round(_WAITING_S / pause_s)))
        for number in range(threads):
            name = f"llm_magic computes {number + 1}"
            try:
                threading.Thread(target=run.serve, args=(self.address,), name=name, daemon=True).start()
            except RuntimeError:  # as many as the system allows: nobody waits for the others
                break

    def _keep(self, place: int, value: int) -> None:
        ctypes.c_int64.from_address(self.address + place).value = value


def _seconds_of_a_pause(pause_often: Callable[[Any], None]) -> float:
    """How long a round of waiting takes: 10 to 140 cycles, as the processor likes."""
    times = ctypes.c_int64(_TRIED)
    found = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        pause_often(ctypes.addressof(times))
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9) / _TRIED


_lock = threading.RLock()  # a handler of signals may compute, too
_teams: dict[int, Team] = {}


def team_of(threads: int) -> Team:
    """A team of so many threads, which is made once."""
    found = _teams.get(threads)
    if found is not None:
        return found
    with _lock:
        if threads not in _teams:
            _teams[threads] = some = Team(threads)  # a handler of signals may want it, too
            try:
                some.start(threads - 1)
            except BaseException:  # an interrupt: the next one tries again
                _teams.pop(threads, None)
                raise
        return _teams[threads]


def _begin_anew() -> None:
    """A process that was forked has none of the threads."""
    global _lock  # noqa: PLW0603 - another thread of the parent may have had it
    _lock = threading.RLock()
    _teams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
