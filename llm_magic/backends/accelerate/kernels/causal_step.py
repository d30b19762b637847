"""A token of a causal convolution of each channel with its last few inputs, and these inputs after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    as_floats,
    from_floats,
    loaded,
    loop,
    multiplied_and_added,
    shuffled,
    stored,
    stored_kind,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, word
from llm_magic.backends.accelerate.kernels.functions import Functions
from llm_magic.backends.accelerate.kernels.numbers import has_float16, has_vectors
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of

_CHANNELS = 16
"""In a vector."""

STATE, INPUTS, WEIGHTS, BIASES, RESULTS, GROUPS, TEAM, SHARES = range(8)
"""Words of the argument of a kernel."""


@cache
def causal_step(
    width: int, kept: int, dtype: str, *, has_silu: bool, has_bias: bool = False
) -> Callable[[Any], None] | None:
    """Compile it; ``None`` where there are no vectors for it.

    Parameters
    ----------
    width
        Inputs that an output is made of, with that of the token.
    kept
        Inputs before that, which are known; at least ``width - 1``.
    dtype
        Of all numbers: ``"float32"``, ``"float16"`` or ``"bfloat16"``. Sums are in float32, and rounded to it.
    has_silu
        Whether the SiLU of what comes out is meant.
    has_bias
        Whether every channel has a number that is added before.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  ==============================================================================
        address   of the inputs before ``[channels, kept]``, which are changed
        address   of the token's inputs ``[channels]``
        address   of the weights ``[channels, width]``
        address   of the biases ``[channels]``, if there are any
        address   of the results ``[channels]``
        groups    of 16 channels
        team      its address; 0: the calling thread alone
        shares    at most
        ========  ==============================================================================
    """
    if not has_vectors() or (dtype == "float16" and not has_float16()):
        return None
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    words, kind = work.args[0], stored_kind(dtype)
    state, inputs, weights, results = (
        word(builder, words, which, POINTER) for which in (STATE, INPUTS, WEIGHTS, RESULTS)
    )
    first, last = share_of(builder, word(builder, words, GROUPS))
    with loop(builder, first, last) as group:
        channel = builder.mul(group, I64(_CHANNELS))
        of_state, of_weights = (builder.mul(channel, I64(count)) for count in (kept, width))
        before = _columns(builder, state, of_state, kind, kept)
        token = loaded(builder, inputs, channel, vector(kind, _CHANNELS))
        seen = [*before, token]
        columns = _columns(builder, weights, of_weights, kind, width)
        pairs = [
            tuple(as_floats(builder, each, dtype) for each in pair)
            for pair in zip(seen[-width:], columns, strict=True)
        ]
        result = builder.fmul(*pairs[0])
        for some, factor in pairs[1:]:
            result = multiplied_and_added(module, builder, some, factor, result)
        if has_bias:
            biases = word(builder, words, BIASES, POINTER)
            bias = loaded(builder, biases, channel, vector(kind, _CHANNELS))
            result = builder.fadd(result, as_floats(builder, bias, dtype))
        rounded = from_floats(builder, result, dtype)
        if has_silu:
            silu = Functions(module, builder).silu(as_floats(builder, rounded, dtype))
            rounded = from_floats(builder, silu, dtype)
        stored(builder, rounded, results, channel)
        for number, some in enumerate(seen[1:]):
            for lane in range(_CHANNELS):
                place = builder.add(of_state, I64(lane * kept + number))
                stored(builder, builder.extract_element(some, I64(lane)), state, place)
    builder.ret_void()
    return compiled_for_a_team(module, work, (TEAM, SHARES))


def _columns(builder: ir.IRBuilder, source: Any, start: Any, kind: Any, count: int) -> list[Any]:
    """What 16 channels have of ``count`` numbers each, a vector for each number."""
    every = loaded(builder, source, start, vector(kind, _CHANNELS * count))
    ends = _CHANNELS * count
    return [shuffled(builder, every, every, range(number, ends, count)) for number in range(count)]
