"""From LLVM's intermediate representation to a function of this processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

VOID, POINTER = ir.VoidType(), ir.PointerType()
I32, I64 = ir.IntType(32), ir.IntType(64)
WORK = ir.FunctionType(VOID, [POINTER])


def word(builder: ir.IRBuilder, words: Any, index: int, kind: Any = I64) -> Any:
    """One of the 64-bit words that ``words`` points to, the argument of ``WORK``, as a number or a pointer."""
    return builder.load(builder.gep(words, [I64(index)], source_etype=I64), typ=kind)


@cache
def instructions() -> frozenset[str]:
    """What LLVM knows of this processor, such as ``"avx2"``; on ARM ``"neon"``."""
    _initialize()
    found = frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)
    return found | {"neon"} if _triple().startswith(("aarch64", "arm64")) else found


def compiled(module: ir.Module, name: str, effort: int = 3) -> Callable[[Any], None]:
    """Compile a module, and return its function ``name``, of one pointer.

    The module needs no library, but for what `known_at` was told.

    Parameters
    ----------
    effort
        From 0 to 3: how long LLVM looks for a quicker way.

    Raises
    ------
    RuntimeError
        When LLVM finds a mistake, or has no such instruction for this processor.
    """
    function: Callable[[Any], None] = compiled_text(str(module), name, effort=effort)[0]
    return function


def compiled_text(text: str, *names: str, effort: int = 3) -> list[Any]:
    """As `compiled`, of LLVM's text: functions of a pointer, as ctypes calls them."""
    machine = _machine()
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=effort))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    functions = [kind(engine.get_function_address(name)) for name in names]
    for function in functions:
        function.engine = engine  # type: ignore[attr-defined]  # whose end would be that of the function
    return functions


def known_at(name: str, address: int) -> None:
    """Let modules that are compiled call a function by this name."""
    _initialize()
    llvm.add_symbol(name, address)


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
