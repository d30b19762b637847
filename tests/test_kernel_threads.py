"""How compiled kernels are shared out over threads: by GNU's OpenMP, by LLVM's and Intel's, by none."""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")
llvm = pytest.importorskip("llvmlite.binding")

from llm_magic.backends.accelerate.kernels import compiler  # noqa: E402
from llm_magic.backends.accelerate.placement import cpu_products  # noqa: E402
from tests.kernel_caches import forget_kernels  # noqa: E402
from tests.test_cpu_products import packed, tokens  # noqa: E402

THREADS = 3
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class LlvmsOpenMP:
    """A team in which one thread does the work of all, one part after the other."""

    def __init__(self) -> None:
        self.number = -1
        self.done: list[int] = []
        self._fork = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
            self.fork
        )
        self._thread = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: self.number)
        self._threads = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: THREADS)
        for name, function in (
            ("__kmpc_fork_call", self._fork),
            ("test_thread", self._thread),
            ("test_threads", self._threads),
        ):
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)

    def fork(self, place: int, arguments: int, task: int, argument: int) -> None:
        assert arguments == 1
        text = ctypes.string_at(ctypes.c_void_p.from_address(place + 16).value or 0)
        assert text == b";unknown;unknown;0;0;;"
        for self.number in range(THREADS):
            number = ctypes.c_int(self.number)
            TASK(task)(ctypes.addressof(number), ctypes.addressof(number), argument)
            self.done.append(self.number)


@pytest.fixture
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are compiled for the test alone, and several threads for any size."""
    monkeypatch.setattr(cpu_products, "_ALONE", 0)
    forget_kernels(monkeypatch)


def products_are_right() -> bool:
    weights, values = packed("nf4", (37, 256), "float32")
    return all(
        torch.allclose(cpu_products.multiplied(x, weights).double(), x.double() @ values.T, atol=1e-3)
        for x in (tokens(2, 256, "float32"), tokens(20, 256, "float32"))
    )


@pytest.mark.usefixtures("_anew")
def test_llvms_and_intels_library_runs_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    team = LlvmsOpenMP()
    monkeypatch.setattr(compiler, "_THREAD", "test_thread")
    monkeypatch.setattr(compiler, "_THREADS", "test_threads")
    monkeypatch.setattr(
        compiler, "_openmp", lambda: frozenset({"__kmpc_fork_call", "test_thread", "test_threads"})
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    assert products_are_right()
    assert team.done == [0, 1, 2] * 2


@pytest.mark.usefixtures("_anew")
def test_without_openmp_one_thread_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_openmp", frozenset)
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    assert products_are_right()


@pytest.mark.usefixtures("_anew")
def test_torchs_library_is_found() -> None:
    known = compiler._openmp()
    assert known & {"GOMP_parallel", "__kmpc_fork_call"}
    assert products_are_right()


def test_a_library_without_teams_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_libraries", lambda: [ctypes.CDLL(None)])
    monkeypatch.setattr(compiler, "_SYMBOLS", {name: f"no_{name}" for name in compiler._SYMBOLS})
    assert compiler._openmp.__wrapped__() == frozenset()
