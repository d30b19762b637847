"""Threads that compute the shares of a kernel: whoever is free takes the next one.

A parallel region of OpenMP, as torch's are, gives every thread one share and ends when the last thread has come. Where
another program has a core, or cores differ in speed, all wait for the slowest, hundreds of times a token. Here there
are more shares than threads, and a share that nobody has begun is anybody's: a thread that does not come in time has
just done less. Who waits for a share that another thread is at sleeps soon, so that the system has a core for that thread.

Threads wait for shares with a futex, which Linux has. Elsewhere torch's OpenMP starts them, and they take shares, too.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

from llm_magic.backends.accelerate.kernels import openmp, team
from llm_magic.backends.accelerate.kernels.compiler import (
    I64,
    POINTER,
    VOID,
    WORK,
    compiled,
    compiled_text,
    known_at,
    word,
)

SHARE = ir.FunctionType(VOID, [POINTER, I64, I64])
"""Of a kernel's argument, the number of a share, and how many there are."""

_SHARE_OUT = "llm_magic_share_out"

_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

_FUTEX = {"x86_64": 202, "aarch64": 98}
"""The number of Linux's system call."""

_PAUSE = {
    "x86_64": """
declare void @llvm.x86.sse2.pause()

define internal void @pause() {
  call void @llvm.x86.sse2.pause()
  ret void
}
""",
    "aarch64": """
declare void @llvm.aarch64.isb(i32)

define internal void @pause() {
  call void @llvm.aarch64.isb(i32 15)
  ret void
}
""",
}

_SHARING = f"""
; The ticket: how many shares have been taken, in 16 bits, and above them how many there are. More may have been taken than
; there are: each thread asks once in vain. A call does not end before the shares that were taken are done, so whoever has
; one reads what belongs to it.
define internal i1 @has_shares(i64 %ticket) {{
  %taken = and i64 %ticket, 65535
  %shares = lshr i64 %ticket, 16
  %has = icmp ult i64 %taken, %shares
  ret i1 %has
}}

define internal void @take_shares(ptr %team) {{
  %at_left = getelementptr i8, ptr %team, i64 {team.LEFT}
  %at_work = getelementptr i8, ptr %team, i64 {team.WORK}
  %at_argument = getelementptr i8, ptr %team, i64 {team.ARGUMENT}
  br label %take
take:
  %ticket = atomicrmw add ptr %team, i64 1 seq_cst
  %has = call i1 @has_shares(i64 %ticket)
  br i1 %has, label %work, label %end
work:
  %share = and i64 %ticket, 65535
  %shares = lshr i64 %ticket, 16
  %function = load ptr, ptr %at_work
  %argument = load ptr, ptr %at_argument
  call void %function(ptr %argument, i64 %share, i64 %shares)
  %before = atomicrmw sub ptr %at_left, i32 1 seq_cst
  %is_last = icmp eq i32 %before, 1
  br i1 %is_last, label %all_done, label %take
all_done:
  call void @wake_caller(ptr %team)
  br label %take
end:
  ret void
}}

; Who calls while another thread of the process does works alone.
define void @share_out(ptr %function, ptr %argument, ptr %team, i64 %most) {{
  %has_team = icmp ne ptr %team, null
  %has_some = icmp ugt i64 %most, 1
  %may_share = and i1 %has_team, %has_some
  br i1 %may_share, label %ask, label %alone
ask:
  %at_busy = getelementptr i8, ptr %team, i64 {team.IS_BUSY}
  %got = cmpxchg ptr %at_busy, i32 0, i32 1 seq_cst seq_cst
  %is_mine = extractvalue {{ i32, i1 }} %got, 1
  br i1 %is_mine, label %together, label %alone
alone:
  call void %function(ptr %argument, i64 0, i64 1)
  ret void
together:
  %at_left = getelementptr i8, ptr %team, i64 {team.LEFT}
  %at_work = getelementptr i8, ptr %team, i64 {team.WORK}
  %at_argument = getelementptr i8, ptr %team, i64 {team.ARGUMENT}
  %at_shares = getelementptr i8, ptr %team, i64 {team.SHARES}
  %of_team = load i64, ptr %at_shares
  %is_less = icmp ult i64 %most, %of_team
  %shares = select i1 %is_less, i64 %most, i64 %of_team
  %left = trunc i64 %shares to i32
  store ptr %function, ptr %at_work
  store ptr %argument, ptr %at_argument
  store atomic i32 %left, ptr %at_left seq_cst, align 4
  %ticket = shl i64 %shares, 16
  store atomic i64 %ticket, ptr %team seq_cst, align 8
  call void @work_together(ptr %team)
  store atomic i32 0, ptr %at_busy release, align 4
  ret void
}}
"""

_WITH_FUTEX = """
declare i64 @syscall(i64, ...)

define internal void @wait_on(ptr %word, i32 %value) {{
  %done = call i64 (i64, ...) @syscall(i64 {futex}, ptr %word, i64 128, i32 %value, ptr null, ptr null, i64 0)
  ret void
}}

define internal void @wake(ptr %word) {{
  %done = call i64 (i64, ...) @syscall(i64 {futex}, ptr %word, i64 129, i64 2147483647, ptr null, ptr null, i64 0)
  ret void
}}

define internal void @wake_caller(ptr %team) {{
  %at_sleeps = getelementptr i8, ptr %team, i64 {caller_sleeps}
  %sleeps = load atomic i32, ptr %at_sleeps seq_cst, align 4
  %does = icmp ne i32 %sleeps, 0
  br i1 %does, label %wake, label %end
wake:
  %at_left = getelementptr i8, ptr %team, i64 {left}
  call void @wake(ptr %at_left)
  br label %end
end:
  ret void
}}

; The caller: rings for those who sleep, works, and waits for what others are at.
define internal void @work_together(ptr %team) {{
  %at_left = getelementptr i8, ptr %team, i64 {left}
  %at_sleeps = getelementptr i8, ptr %team, i64 {caller_sleeps}
  %at_bell = getelementptr i8, ptr %team, i64 {bell}
  %at_asleep = getelementptr i8, ptr %team, i64 {asleep}
  %at_spins = getelementptr i8, ptr %team, i64 {spins_for_others}
  %spins = load i64, ptr %at_spins
  %asleep = load atomic i32, ptr %at_asleep seq_cst, align 4
  %some = icmp ne i32 %asleep, 0
  br i1 %some, label %ring, label %work
ring:
  %rung = atomicrmw add ptr %at_bell, i32 1 seq_cst
  call void @wake(ptr %at_bell)
  br label %work
work:
  call void @take_shares(ptr %team)
  br label %look
look:
  %round = phi i64 [ 0, %work ], [ %next, %turn ]
  %left = load atomic i32, ptr %at_left acquire, align 4
  %is_done = icmp eq i32 %left, 0
  br i1 %is_done, label %end, label %turn
turn:
  call void @pause()
  %next = add i64 %round, 1
  %goes_on = icmp ult i64 %next, %spins
  br i1 %goes_on, label %look, label %bed
bed:
  store atomic i32 1, ptr %at_sleeps seq_cst, align 4
  br label %check
check:
  %last = load atomic i32, ptr %at_left seq_cst, align 4
  %none = icmp eq i32 %last, 0
  br i1 %none, label %up, label %sleep
sleep:
  call void @wait_on(ptr %at_left, i32 %last)
  br label %check
up:
  store atomic i32 0, ptr %at_sleeps monotonic, align 4
  br label %end
end:
  ret void
}}

define void @pause_often(ptr %times) {{
  %most = load i64, ptr %times
  br label %turn
turn:
  %round = phi i64 [ 0, %0 ], [ %next, %turn ]
  call void @pause()
  %next = add i64 %round, 1
  %goes_on = icmp ult i64 %next, %most
  br i1 %goes_on, label %turn, label %end
end:
  ret void
}}

; The others, for ever.
define void @serve(ptr %team) {{
  %at_bell = getelementptr i8, ptr %team, i64 {bell}
  %at_asleep = getelementptr i8, ptr %team, i64 {asleep}
  %at_spins = getelementptr i8, ptr %team, i64 {spins_for_shares}
  %spins = load i64, ptr %at_spins
  br label %begin
begin:
  br label %look
look:
  %round = phi i64 [ 0, %begin ], [ %next, %turn ]
  %ticket = load atomic i64, ptr %team acquire, align 8
  %has = call i1 @has_shares(i64 %ticket)
  br i1 %has, label %work, label %turn
work:
  call void @take_shares(ptr %team)
  br label %begin
turn:
  call void @pause()
  %next = add i64 %round, 1
  %goes_on = icmp ult i64 %next, %spins
  br i1 %goes_on, label %look, label %bed
bed:
  %bell = load atomic i32, ptr %at_bell seq_cst, align 4
  %before = atomicrmw add ptr %at_asleep, i32 1 seq_cst
  %now = load atomic i64, ptr %team seq_cst, align 8
  %has_now = call i1 @has_shares(i64 %now)
  br i1 %has_now, label %up, label %sleep
sleep:
  call void @wait_on(ptr %at_bell, i32 %bell)
  br label %up
up:
  %after = atomicrmw sub ptr %at_asleep, i32 1 seq_cst
  br label %begin
}}
"""


def compiled_for_a_team(
    module: ir.Module,
    work: ir.Function,
    told: tuple[int, int],
    before: Callable[[ir.IRBuilder, Any], None] | None = None,
) -> Callable[[Any], None]:
    """Compile a function that has a team do the shares of ``work``, and does something else before, alone.

    Parameters
    ----------
    work
        A function of type `SHARE`.
    told
        Which of the words that its argument points to is a team's address, or 0, which is the calling thread alone; and
        which says how many shares there are at most.
    before
        Gets a builder and the argument.

    Raises
    ------
    RuntimeError
        When LLVM finds a mistake, or has no such instruction for this processor.
    """
    serving()
    run = ir.Function(module, WORK, "run")
    builder = ir.IRBuilder(run.append_basic_block())
    argument = run.args[0]
    if before is not None:
        before(builder, argument)
    share_out = ir.Function(module, ir.FunctionType(VOID, [POINTER, POINTER, POINTER, I64]), _SHARE_OUT)
    some, most = word(builder, argument, told[0], POINTER), word(builder, argument, told[1])
    builder.call(share_out, [work, argument, some, most])
    builder.ret_void()
    return compiled(module, run.name)


def share_of(builder: ir.IRBuilder, count: Any) -> tuple[Any, Any]:
    """First and last (exclusive) of ``count`` things that are the share which the function being built is called for."""
    _, share, shares = builder.function.args
    first = builder.udiv(builder.mul(share, count), shares)
    last = builder.udiv(builder.mul(builder.add(share, I64(1)), count), shares)
    return first, last


def _is_bound() -> bool:
    """Whether somebody has said which cores OpenMP's threads are for."""
    said = [os.environ.get(name, "").strip().lower() for name in _BINDING]
    return any(each not in ("", "false", "none", "disabled") for each in said)


class Serving(NamedTuple):
    """What a team's threads run: functions of an address."""

    serve: Callable[[Any], None]
    pause_often: Callable[[Any], None]


@cache
def serving() -> Serving | None:
    """Compile what shares out, for kernels to call; gives what a team's threads run, where they are not OpenMP's.

    Who binds OpenMP's threads to cores has said where to compute: they take the shares then.
    """
    kind = platform.machine()
    has_threads = sys.platform == "linux" and kind in _FUTEX and not _is_bound()
    if has_threads:
        text = _PAUSE[kind] + _WITH_FUTEX.format(
            futex=_FUTEX[kind],
            spins_for_shares=team.SPINS_FOR_SHARES,
            spins_for_others=team.SPINS_FOR_OTHERS,
            left=team.LEFT,
            caller_sleeps=team.CALLER_SLEEPS,
            bell=team.BELL,
            asleep=team.ASLEEP,
        )
    else:
        text = openmp.together()
    names = ("share_out", *(Serving._fields if has_threads else ()))
    share_out, *others = compiled_text(_SHARING + text, *names)
    # Threads run it until the process ends, when nothing refers to it any more.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(share_out.engine))
    known_at(_SHARE_OUT, ctypes.cast(share_out, ctypes.c_void_p).value or 0)
    return Serving(*others) if others else None
