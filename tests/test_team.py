"""How kernels are shared out over threads: by a team of ours, by GNU's OpenMP, by LLVM's and Intel's, by none."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")
llvm = pytest.importorskip("llvmlite.binding")

from llm_magic.backends.accelerate.kernels import (  # noqa: E402
    cpu_products,
    openmp,
    shares,
    team,
)
from tests.kernel_caches import forget_kernels  # noqa: E402
from tests.test_cpu_products import packed, tokens  # noqa: E402

THREADS, FUTEX = 3, dict(shares._FUTEX)
WAIT_S = 60.0
SHARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

has_threads = pytest.mark.skipif(shares.serving() is None, reason="OpenMP's threads take the shares here")


def share_out(work: Callable[[int, int], None], address: int, most: int = 1000) -> None:
    """As a kernel does, with work in Python."""
    function = SHARE(lambda _argument, share, count: work(share, count))
    caller = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    caller(llvm.address_of_symbol("llm_magic_share_out"))(
        ctypes.cast(function, ctypes.c_void_p), None, address, most
    )


def until(condition: Callable[[], object]) -> None:
    """Look again and again."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def word_of(some: team.Team, place: int) -> int:
    return ctypes.c_int32.from_address(some.address + place).value


def started(threads: int = THREADS) -> team.Team:
    some = team.Team(threads)
    some.start(threads - 1)
    return some


@has_threads
def test_every_share_is_done_once() -> None:
    some, before = started(), team.SHARES_OF_A_THREAD * THREADS
    for _ in range(300):
        done: list[tuple[int, int]] = []
        share_out(lambda share, count, done=done: done.append((share, count)), some.address)
        assert sorted(done) == [(share, before) for share in range(before)]
    assert some.shares == before


def test_without_a_team_the_caller_does_everything() -> None:
    done: list[tuple[int, int]] = []
    share_out(lambda share, count: done.append((share, count)), 0)
    assert done == [(0, 1)]


@has_threads
def test_there_are_no_more_shares_than_it_is_worth() -> None:
    some, done = team.Team(THREADS), []
    for most, expected in ((5, 5), (1, 1), (0, 1)):
        done.clear()
        share_out(lambda *of: done.append(of), some.address, most)
        assert done == [(share, expected) for share in range(expected)]


@has_threads
def test_nobody_waits_for_threads_that_do_not_come() -> None:
    some, done = team.Team(THREADS), []
    share_out(lambda share, _count: done.append((share, threading.get_ident())), some.address)
    assert done == [(share, threading.get_ident()) for share in range(some.shares)]


@has_threads
def test_a_thread_that_is_held_up_keeps_nobody_from_the_other_shares() -> None:
    """And the caller is there until it is done."""
    some, caller, done, held = started(), threading.get_ident(), [], []

    def work(share: int, _count: int) -> None:
        if threading.get_ident() != caller and not held:
            held.append(share)
            until(lambda: len(done) == some.shares - 1)
        elif not held:
            until(lambda: held)  # one of the others has come
        done.append(share)

    share_out(work, some.address)
    assert done[-1:] == held
    assert sorted(done) == list(range(some.shares))


@has_threads
def test_threads_that_sleep_are_woken() -> None:
    some, caller = started(), threading.get_ident()
    for _ in range(20):
        until(lambda: word_of(some, team.ASLEEP) == THREADS - 1)
        found: set[int] = set()

        def work(_share: int, _count: int, found: set[int] = found) -> None:
            found.add(threading.get_ident())
            until(lambda: len(found) == THREADS)

        share_out(work, some.address)
        assert caller in found


@has_threads
def test_a_caller_that_sleeps_is_woken() -> None:
    some, caller = started(2), threading.get_ident()
    for _ in range(20):
        others: list[int] = []

        def work(share: int, _count: int, others: list[int] = others) -> None:
            if threading.get_ident() != caller:
                others.append(share)
                until(lambda: word_of(some, team.CALLER_SLEEPS))
            else:
                until(lambda: others)

        share_out(work, some.address)
        assert len(others) == 1
        assert word_of(some, team.LEFT) == 0


@has_threads
def test_who_calls_meanwhile_works_alone() -> None:
    some, inner, outer = started(), [], []

    def work(share: int, count: int) -> None:
        if not inner:
            share_out(lambda *of: inner.append(of), some.address)
        outer.append((share, count))

    share_out(work, some.address)
    assert set(inner) == {(0, 1)}
    assert len(outer) == some.shares


@has_threads
def test_where_no_thread_can_be_started_the_caller_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(team, "_teams", {})
    monkeypatch.setattr(threading.Thread, "start", refused)
    some, done = team.team_of(THREADS), []
    share_out(lambda share, _count: done.append(share), some.address)
    assert done == list(range(some.shares))
    assert team.team_of(THREADS) is some


@has_threads
def test_a_team_whose_start_was_interrupted_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(team, "_teams", {})
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            team.team_of(THREADS)
    some = team.team_of(THREADS)
    until(lambda: word_of(some, team.ASLEEP) == THREADS - 1)


@has_threads
@pytest.mark.parametrize(
    ("name", "value", "is_bound"),
    [
        ("OMP_PROC_BIND", "true", True),
        ("OMP_PROC_BIND", "FALSE", False),
        ("OMP_PLACES", "cores", True),
        ("GOMP_CPU_AFFINITY", "0-1", True),
        ("KMP_AFFINITY", "compact", True),
        ("KMP_AFFINITY", "none", False),
    ],
)
@pytest.mark.usefixtures("_elsewhere")
def test_who_binds_openmps_threads_has_them_compute(
    name: str, value: str, is_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "_FUTEX", FUTEX)
    monkeypatch.setenv(name, value)
    assert (shares.serving() is None) == is_bound
    assert products_are_right()


@has_threads
def test_a_team_of_as_many_threads_as_torch_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    assert team.team() == team.team() == team.team_of(THREADS).address
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert team.team() == 0


OF_A_PROCESS = """
import os, sys, torch
from llm_magic.backends.accelerate.kernels import team
from llm_magic.backends.accelerate.kernels import cpu_products
torch.set_num_threads(3)
cpu_products._OF_A_SHARE = 1
from tests.test_cpu_products import packed, tokens
weights, _ = packed("nf4", (37, 256), "float32")
x = tokens(2, 256, "float32")
found = cpu_products.multiplied(x, weights)
is_same = lambda: torch.equal(cpu_products.multiplied(x, weights), found)
assert is_same()
"""


@has_threads
@pytest.mark.parametrize(
    "then",
    [
        "",
        "pid = os.fork()\nif not pid: os._exit(0 if is_same() else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    ],
    ids=["ends", "is forked"],
)
def test_a_process_that_has_computed(then: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", OF_A_PROCESS + then], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# --- Threads of OpenMP


class LlvmsOpenMP:
    """A team in which one thread does the work of all, one part after the other."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self._fork = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
            self.fork
        )
        llvm.add_symbol("__kmpc_fork_call", ctypes.cast(self._fork, ctypes.c_void_p).value)

    def fork(self, place: int, arguments: int, task: int, argument: int) -> None:
        assert arguments == 1
        text = ctypes.string_at(ctypes.c_void_p.from_address(place + 16).value or 0)
        assert text == b";unknown;unknown;0;0;;"
        for thread in range(THREADS):
            number = ctypes.c_int(thread)
            TASK(task)(ctypes.addressof(number), ctypes.addressof(number), argument)
            self.done.append(thread)


def products_are_right() -> bool:
    weights, values = packed("nf4", (37, 256), "float32")
    return all(
        torch.allclose(cpu_products.multiplied(x, weights).double(), x.double() @ values.T, atol=1e-3)
        for x in (tokens(2, 256, "float32"), tokens(20, 256, "float32"))
    )


@pytest.fixture
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that are compiled for the test alone, on a system without futex, and several threads for any size."""
    monkeypatch.setattr(cpu_products, "_OF_A_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    monkeypatch.setattr(shares, "_FUTEX", {})
    monkeypatch.setattr(team, "_teams", {})
    forget_kernels(monkeypatch)
    shares.serving.cache_clear()
    yield
    monkeypatch.undo()
    shares.serving.cache_clear()
    shares.serving()


@pytest.mark.usefixtures("_elsewhere")
def test_torchs_library_runs_the_shares() -> None:
    assert openmp._forks()
    assert shares.serving() is None
    assert products_are_right()


@pytest.mark.usefixtures("_elsewhere")
def test_llvms_and_intels_library_runs_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = LlvmsOpenMP()
    monkeypatch.setattr(openmp, "_forks", lambda: frozenset({"__kmpc_fork_call"}))
    assert products_are_right()
    assert fake.done == [0, 1, 2] * 2


@pytest.mark.usefixtures("_elsewhere")
def test_without_openmp_one_thread_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_forks", frozenset)
    assert products_are_right()


def test_a_library_without_teams_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "libraries", lambda: [ctypes.CDLL(None)])
    monkeypatch.setattr(openmp, "_FORKS", ("no_fork",))
    assert openmp._forks.__wrapped__() == frozenset()
