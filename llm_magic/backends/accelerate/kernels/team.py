"""Threads of our own that compute the shares of kernels; see `shares`. It needs no LLVM before the first of them starts."""

from __future__ import annotations

import ctypes
import os
import threading

SHARES_OF_A_THREAD = 4  # twice as many cost a few percent, half as many gain less beside other programs
MOST_SHARES = 1 << 15

# Where a team keeps what, in bytes. Whoever writes to a line of the cache takes it from those who read there.
TICKET, LEFT, CALLER_SLEEPS, WORK, ARGUMENT, SHARES, BELL, ASLEEP, IS_BUSY = (
    0,
    64,
    68,
    128,
    136,
    144,
    192,
    196,
    256,
)
_BYTES, _LINE = 320, 64


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
        self._memory = ctypes.create_string_buffer(_BYTES + _LINE)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % _LINE
        self.shares = min(threads * SHARES_OF_A_THREAD, MOST_SHARES)
        ctypes.c_int64.from_address(self.address + SHARES).value = self.shares

    def start(self, threads: int) -> None:
        """Have so many threads serve, as long as the process lives; none, where OpenMP's do."""
        from llm_magic.backends.accelerate.kernels.shares import serving

        serve = serving()
        for number in range(threads if serve is not None else 0):
            threading.Thread(
                target=serve, args=(self.address,), name=f"llm_magic computes {number + 1}", daemon=True
            ).start()


_lock = threading.Lock()
_teams: dict[int, Team] = {}


def team_of(threads: int) -> Team:
    """A team of so many threads, which is made once."""
    found = _teams.get(threads)
    if found is None:
        with _lock:
            found = _teams.get(threads)
            if found is None:
                found = Team(threads)
                found.start(threads - 1)
                _teams[threads] = found
    return found


def _begin_anew() -> None:
    """A process that was forked has none of the threads."""
    global _lock  # noqa: PLW0603 - another thread of the parent may have had it
    _lock = threading.Lock()
    _teams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
