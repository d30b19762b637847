"""Threads that compute the shares of a kernel: whoever is free takes the next one.

A parallel region of OpenMP, as torch's are, gives every thread one share and ends when the last thread has come. Where
another program has a core, or cores differ in speed, all wait for the slowest, hundreds of times a token. Here there
are more shares than threads, and a share that nobody has begun is anybody's: a thread that does not come in time has
just done less. Who waits for a share that another thread is at sleeps soon, so that the system has a core for that thread.

Threads wait for shares with a futex, which Linux has. Elsewhere torch's OpenMP starts them, and they take shares, too.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

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

# Rounds that a thread looks out for a call before it sleeps, and that a caller waits for the last shares before it does:
# somewhat longer than Python takes between kernels, and than a share takes. Measured on two cores of an AMD EPYC with a
# Llama of 0.8 billion weights in nf4, tokens per second alone / beside a busy process: 6,000 and 3,000: 37.6 / 27.6;
# 1,500 and 3,000: 34.5 / 29; 20,000 and 3,000: 36.9 / 20.7.
_SPINS_FOR_SHARES, _SPINS_FOR_OTHERS = 6000, 3000

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
declare void @llvm.aarch64.hint(i32)

define internal void @pause() {
  call void @llvm.aarch64.hint(i32 1)
  ret void
}
""",
}

_SHARING = f"""
; The ticket: 32 bits that count calls, 16 with the number of shares, and 16 with how many of them have been taken, which
; may be more than there are: each thread asks once in vain. A call does not end before the shares that were taken are
; done, so whoever has one reads what belongs to it.
define internal i1 @has_shares(i64 %ticket) {{
  %taken = and i64 %ticket, 65535
  %above = lshr i64 %ticket, 16
  %shares = and i64 %above, 65535
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
  %above = lshr i64 %ticket, 16
  %shares = and i64 %above, 65535
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
define void @share_out(ptr %function, ptr %argument, ptr %team) {{
  %has_team = icmp ne ptr %team, null
  br i1 %has_team, label %ask, label %alone
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
  %shares = load i64, ptr %at_shares
  %left = trunc i64 %shares to i32
  store ptr %function, ptr %at_work
  store ptr %argument, ptr %at_argument
  store atomic i32 %left, ptr %at_left seq_cst, align 4
  %last = load atomic i64, ptr %team monotonic, align 8
  %calls = lshr i64 %last, 32
  %call = add i64 %calls, 1
  %high = shl i64 %call, 32
  %middle = shl i64 %shares, 16
  %ticket = or i64 %high, %middle
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
  %goes_on = icmp ult i64 %next, {spins_for_others}
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

; The others, for ever.
define void @serve(ptr %team) {{
  %at_bell = getelementptr i8, ptr %team, i64 {bell}
  %at_asleep = getelementptr i8, ptr %team, i64 {asleep}
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
  %goes_on = icmp ult i64 %next, {spins_for_shares}
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
    team_word: int,
    before: Callable[[ir.IRBuilder, Any], None] | None = None,
) -> Callable[[Any], None]:
    """Compile a function that has a team do the shares of ``work``, and does something else before, alone.

    Parameters
    ----------
    work
        A function of type `SHARE`.
    team_word
        Which of the words that its argument points to is a team's address, or 0: the calling thread alone.
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
    share_out = ir.Function(module, ir.FunctionType(VOID, [POINTER] * 3), _SHARE_OUT)
    builder.call(share_out, [work, argument, word(builder, argument, team_word, POINTER)])
    builder.ret_void()
    return compiled(module, run.name)


def share_of(builder: ir.IRBuilder, count: Any) -> tuple[Any, Any]:
    """First and last (exclusive) of ``count`` things that are the share which the function being built is called for."""
    _, share, shares = builder.function.args
    first = builder.udiv(builder.mul(share, count), shares)
    last = builder.udiv(builder.mul(builder.add(share, I64(1)), count), shares)
    return first, last


@cache
def serving() -> Callable[[Any], None] | None:
    """Compile what shares out, for kernels to call; gives what a thread of a team runs, where it is not OpenMP's."""
    kind = platform.machine()
    has_futex = sys.platform == "linux" and kind in _FUTEX
    if has_futex:
        text = _PAUSE[kind] + _WITH_FUTEX.format(
            futex=_FUTEX[kind],
            spins_for_shares=_SPINS_FOR_SHARES,
            spins_for_others=_SPINS_FOR_OTHERS,
            left=team.LEFT,
            caller_sleeps=team.CALLER_SLEEPS,
            bell=team.BELL,
            asleep=team.ASLEEP,
        )
    else:
        text = openmp.together()
    names = ("share_out", "serve") if has_futex else ("share_out",)
    share_out, *serve = compiled_text(_SHARING + text, *names)
    # Threads run it until the process ends, when nothing refers to it any more.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(share_out.engine))
    known_at(_SHARE_OUT, ctypes.cast(share_out, ctypes.c_void_p).value or 0)
    return serve[0] if serve else None
