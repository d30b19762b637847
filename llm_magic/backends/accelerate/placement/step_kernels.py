"""What kernels make in the place of functions of transformers, for one token of a recurrent layer on the CPU."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.preparation import preparing

_CHANNELS_AT_A_TIME = 16
"""Of the kernel for convolutions, which is imported when it is needed."""
_HEADS_FOR_A_THREAD, _GROUPS_FOR_A_THREAD = 4, 256
"""Of a share at least: some microseconds."""


def by_the_rule(query: Any, key: Any, value: Any, g: Any, beta: Any, **options: Any) -> Any:
    """As transformers' function; ``None`` where no kernel does that."""
    import torch

    state = options.get("initial_state")
    is_usual = options.get("output_final_state") and options.get("use_qk_l2norm_in_kernel")
    if state is None or not is_usual or options.get("cu_seqlens") is not None:
        return None
    heads, sharing = value.shape[2], value.shape[2] // max(1, key.shape[2])
    shape = (1, heads, key.shape[-1], value.shape[-1])
    if state.dtype != torch.float32 or not state.is_contiguous() or tuple(state.shape) != shape:
        return None
    if query.shape != key.shape or sharing * key.shape[2] != heads or key.shape[:2] != (1, 1):
        return None
    kernel = _rule_kernel(*shape[2:])
    if kernel is None:
        return None
    queries, keys, values, taken = (each.float().contiguous() for each in (query, key, value, beta))
    decays, results = g.float().exp().contiguous(), torch.empty_like(values)
    parts = (state, queries, keys, values, decays, taken, results)
    _run(kernel, [part.data_ptr() for part in parts], [heads, sharing], heads // _HEADS_FOR_A_THREAD)
    return results.to(query.dtype), state


def convolved(
    hidden_states: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None
) -> Any:
    """As transformers' function; ``None`` where no kernel does that."""
    import torch

    channels, width = weight.shape
    biases = () if bias is None else (bias,)
    parts = (conv_state, hidden_states, weight, *biases)
    if activation not in (None, "silu") or channels % _CHANNELS_AT_A_TIME:
        return None
    kept = conv_state.shape[-1]
    if conv_state.shape != (1, channels, kept) or kept + 1 < width or hidden_states.shape != (1, channels, 1):
        return None
    if len({part.dtype for part in parts}) > 1 or not all(part.is_contiguous() for part in parts):
        return None
    kernel = _step_kernel(
        *(width, kept, str(weight.dtype).removeprefix("torch.")),
        has_silu=activation == "silu",
        has_bias=bias is not None,
    )
    if kernel is None:
        return None
    results = torch.empty_like(hidden_states)
    addresses = [part.data_ptr() for part in (*parts[:3], results)] + [0 if bias is None else bias.data_ptr()]
    groups = channels // _CHANNELS_AT_A_TIME
    _run(kernel, addresses, [groups], groups // _GROUPS_FOR_A_THREAD)
    return results


def updated_states(state: Any, hidden_states: Any, dt: Any, *matrices: Any, **options: Any) -> Any:
    """As transformers' function of Mamba 2; ``None`` where no kernel does that."""
    import torch

    of_states, keys, queries, *rest = matrices  # its A, B, C, and D where there is one
    skipping = rest[0] if rest else options.get("D")
    shape, groups = state.shape, keys.shape[1]
    heads = shape[1]
    if (
        not options.get("dt_softplus")
        or shape[0] != 1
        or hidden_states.shape != shape[:3]
        or keys.shape != queries.shape
    ):
        return None
    if (
        state.dtype != torch.float32
        or not state.is_contiguous()
        or heads % groups
        or keys.shape[2] != shape[3]
    ):
        return None
    if dt.stride(2) or of_states.stride()[-2:] != (0, 0):  # else each row of a state has a step of its own
        return None
    kernel = _state_kernel(*shape[2:])
    if kernel is None:
        return None
    steps, bias = dt[0, :, 0].float(), options.get("dt_bias")
    steps = torch.nn.functional.softplus(steps if bias is None else steps + bias[:, 0].float())
    inputs = (hidden_states[0].float() * steps[:, None]).contiguous()
    keys, queries = (each[0].float().contiguous() for each in (keys, queries))
    decays = (steps * of_states[:, 0, 0].float()).exp()
    results = torch.empty_like(inputs)
    parts = (state, inputs, keys, queries, decays, results)
    _run(kernel, [part.data_ptr() for part in parts], [heads, heads // groups], heads // _HEADS_FOR_A_THREAD)
    if skipping is not None:
        results += hidden_states[0] * skipping
    if (gate := options.get("z")) is not None:
        results *= torch.nn.functional.silu(gate[0].float())
    return results.to(hidden_states.dtype)[None]


def _run(kernel: Any, addresses: list[int], counts: list[int], shares: int) -> None:
    words = [*addresses, *counts, team() if shares > 1 else 0, shares]
    kernel((ctypes.c_int64 * len(words))(*words))


@cache
def _rule_kernel(keys: int, values: int) -> Any:
    from llm_magic.backends.accelerate.kernels.delta_rule import delta_rule

    try:
        with preparing():
            return delta_rule(keys, values)
    except RuntimeError:  # LLVM's: it has no such instruction after all
        return None


@cache
def _step_kernel(width: int, kept: int, dtype: str, *, has_silu: bool, has_bias: bool) -> Any:
    from llm_magic.backends.accelerate.kernels.causal_step import causal_step

    if dtype not in ("float32", "float16", "bfloat16"):
        return None
    try:
        with preparing():
            return causal_step(width, kept, dtype, has_silu=has_silu, has_bias=has_bias)
    except RuntimeError:  # as above
        return None


@cache
def _state_kernel(rows: int, columns: int) -> Any:
    from llm_magic.backends.accelerate.kernels.state_space import state_space

    try:
        with preparing():
            return state_space(rows, columns)
    except RuntimeError:  # as above
        return None
