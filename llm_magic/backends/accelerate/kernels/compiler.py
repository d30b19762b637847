"""From LLVM's intermediate representation to a function of this processor, which torch's threads run."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

VOID, POINTER = ir.VoidType(), ir.PointerType()
I32, I64 = ir.IntType(32), ir.IntType(64)
WORK = ir.FunctionType(VOID, [POINTER])

_THREAD, _THREADS = "llm_magic_thread", "llm_magic_threads"


def compiled_for_a_team(
    module: ir.Module,
    work: ir.Function,
    threads: int,
    before: Callable[[ir.IRBuilder, Any], None] | None = None,
) -> Callable[[Any], None]:
    """Compile a function that does ``work`` with a team of threads, and something else before, alone.

    Parameters
    ----------
    threads
        Which of the words that its argument points to says how many: one, or all of torch's.
    before
        Gets a builder and the argument.

    Raises
    ------
    RuntimeError
        When LLVM finds a mistake, or has no such instruction for this processor.
    """
    run = ir.Function(module, WORK, "run")
    builder = ir.IRBuilder(run.append_basic_block())
    argument = run.args[0]
    if before is not None:
        before(builder, argument)
    _run_by_a_team(module, builder, work, argument, word(builder, argument, threads))
    builder.ret_void()
    return compiled(module, run.name)


def word(builder: ir.IRBuilder, words: Any, index: int, kind: Any = I64) -> Any:
    """One of the 64-bit words that ``words`` points to, the argument of ``WORK``, as a number or a pointer."""
    return builder.load(builder.gep(words, [I64(index)], source_etype=I64), typ=kind)


@cache
def instructions() -> frozenset[str]:
    """What LLVM knows of this processor, such as ``"avx2"``; on ARM ``"neon"``."""
    _initialize()
    found = frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)
    return found | {"neon"} if _triple().startswith(("aarch64", "arm64")) else found


def share_of_a_thread(module: ir.Module, builder: ir.IRBuilder, count: Any) -> tuple[Any, Any]:
    """First and last (exclusive) of ``count`` things that the thread is to do which runs this."""
    if not _openmp():
        return I64(0), count
    kind = ir.FunctionType(I32, [])
    number, all_of_them = (
        builder.zext(builder.call(ir.Function(module, kind, name), []), I64) for name in (_THREAD, _THREADS)
    )
    first = builder.udiv(builder.mul(number, count), all_of_them)
    last = builder.udiv(builder.mul(builder.add(number, I64(1)), count), all_of_them)
    return first, last


def compiled(module: ir.Module, name: str, effort: int = 3) -> Callable[[Any], None]:
    """Compile a module, and return its function ``name``, of one pointer.

    The module needs no library, but for what `_run_by_a_team` refers to.

    Parameters
    ----------
    effort
        From 0 to 3: how long LLVM looks for a quicker way.

    Raises
    ------
    RuntimeError
        When LLVM finds a mistake, or has no such instruction for this processor.
    """
    machine = _machine()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=effort))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address(name))
    function.engine = engine  # type: ignore[attr-defined]  # whose end would be that of the function
    return function


def _run_by_a_team(
    module: ir.Module, builder: ir.IRBuilder, work: ir.Function, argument: Any, threads: Any
) -> None:
    """Have every thread that torch computes with call ``work(argument)``, and wait for all of them.

    As a parallel region of C does. Where ``threads`` is one, or without OpenMP, the calling thread works alone.
    """
    with builder.if_else(builder.icmp_signed("<", threads, I64(2))) as (alone, together):
        with alone:
            builder.call(work, [argument])
        with together:
            _fork(module, builder, work, argument)


def _fork(module: ir.Module, builder: ir.IRBuilder, work: ir.Function, argument: Any) -> None:
    openmp = _openmp()
    if "GOMP_parallel" in openmp:
        fork = ir.Function(module, ir.FunctionType(VOID, [POINTER, POINTER, I32, I32]), "GOMP_parallel")
        builder.call(fork, [work, argument, I32(0), I32(0)])
    elif "__kmpc_fork_call" in openmp:
        kind = ir.FunctionType(VOID, [POINTER, I32, POINTER], var_arg=True)
        fork = ir.Function(module, kind, "__kmpc_fork_call")
        builder.call(fork, [_place(module), I32(1), _task(module, work), argument])
    else:
        builder.call(work, [argument])


def _task(module: ir.Module, work: ir.Function) -> ir.Function:
    """``work`` as LLVM's and Intel's libraries call it: with numbers of the thread before its argument."""
    task = ir.Function(module, ir.FunctionType(VOID, [POINTER] * 3), "task")
    builder = ir.IRBuilder(task.append_basic_block())
    builder.call(work, [task.args[2]])
    builder.ret_void()
    return task


def _place(module: ir.Module) -> ir.GlobalVariable:
    """Where in the source a region stands, which those libraries want to be told."""
    text = bytearray(b";unknown;unknown;0;0;;\0")
    words = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), len(text)), "nowhere")
    words.initializer = ir.Constant(words.value_type, text)
    kind = ir.LiteralStructType([I32, I32, I32, I32, POINTER])
    place = ir.GlobalVariable(module, kind, "place")
    place.initializer = ir.Constant(kind, [I32(0), I32(2), I32(0), I32(0), words])
    for variable in (words, place):
        variable.global_constant, variable.linkage = True, "internal"
    return place


@cache
def _openmp() -> frozenset[str]:
    """Names of the functions that torch's OpenMP library has, for compiled modules to call."""
    _initialize()
    for library in _libraries():
        known = {
            name: ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
            for name, symbol in _SYMBOLS.items()
            if hasattr(library, symbol)
        }
        if {_THREAD, _THREADS} < known.keys():
            for name, address in known.items():
                llvm.add_symbol(name, address)
            return frozenset(known)
    return frozenset()


_SYMBOLS = {
    _THREAD: "omp_get_thread_num",
    _THREADS: "omp_get_num_threads",
    "GOMP_parallel": "GOMP_parallel",
    "__kmpc_fork_call": "__kmpc_fork_call",
}


def _libraries() -> Iterator[ctypes.CDLL]:
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


def _machine() -> Any:
    """The processor, for one module: what runs that owns it then."""
    _initialize()
    target = llvm.Target.from_triple(_triple())
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)


def _triple() -> str:
    return str(llvm.get_process_triple())


@cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
