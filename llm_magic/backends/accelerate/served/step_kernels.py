"""What kernels make in the place of functions of transformers, for tokens of a recurrent layer on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from llm_magic.backends.accelerate.current import current
from llm_magic.backends.accelerate.kernels.cpu_products import address
from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.preparation import preparing

_CHANNELS_AT_A_TIME = 16
"""Of the kernel for convolutions, which is imported when it is needed."""
_HEADS_FOR_A_THREAD, _GROUPS_FOR_A_THREAD = 4, 256
"""Of a share at least: some microseconds."""
_OF_SEVERAL_TEXTS = ("cu_seqlens", "seq_idx")
"""Arguments with which there are several in one sequence."""


@dataclass(frozen=True)
class StateKernel:
    """A kernel that changes a state where it is.

    Attributes
    ----------
    run
        Of the address of 64-bit words: addresses, that of the state first and that of the results last, then `counts`,
        the address of a team, and `shares`.
    counts
        What it is told of sizes.
    shares
        For how many threads it is worth.
    """

    run: Callable[[Any], None] = field(hash=False)
    counts: tuple[int, ...]
    shares: int

    def changed(self, parts: Sequence[Any], shape: Sequence[int], dtype: Any) -> Any:
        """What it makes of a state, which is the first of ``parts``, and of what else it reads, all of it contiguous."""
        import torch

        results = torch.empty(shape, dtype=dtype, device="cpu")
        words = [*map(address, parts), results.data_ptr(), *self.counts, self.team, self.shares]
        self.run((ctypes.c_int64 * len(words))(*words))
        return results

    @property
    def team(self) -> int:
        """Who computes with the calling thread: the word for it."""
        return team() if self.shares > 1 else 0


def by_the_rule(query: Any, key: Any, value: Any, g: Any, beta: Any, **options: Any) -> Any:
    """As transformers' function for one token, but the state is changed where it is; ``None`` where no kernel does that."""
    if key.shape[1] != 1 or options.get("initial_state") is None or not options.get("output_final_state"):
        return None
    return _ruled((query, key, value), g, beta, options)


def by_the_rule_in_turn(query: Any, key: Any, value: Any, g: Any, beta: Any, **options: Any) -> Any:
    """As transformers' function for the tokens of a prompt, which are one after the other here; else ``None``."""
    import torch

    before = options.get("initial_state")
    shape = (*value.shape[:1], value.shape[2], key.shape[-1], value.shape[-1])
    state = torch.zeros(shape, dtype=torch.float32, device="cpu") if before is None else before.clone()
    found = _ruled((query, key, value), g, beta, {**options, "initial_state": state})
    return found if found is None or options.get("output_final_state") else (found[0], None)


def _ruled(states: tuple[Any, Any, Any], g: Any, beta: Any, options: dict[str, Any]) -> Any:
    import torch

    (query, key, value), state = states, options["initial_state"]
    is_one = not any(options.get(name) is not None for name in _OF_SEVERAL_TEXTS)
    if not options.get("use_qk_l2norm_in_kernel") or not is_one:
        return None
    tokens, heads = value.shape[1:3]
    sharing = heads // max(1, key.shape[2])
    shape = (1, heads, key.shape[-1], value.shape[-1])
    if state.dtype != torch.float32 or not state.is_contiguous() or tuple(state.shape) != shape:
        return None
    if beta.shape != (1, tokens, heads) or value.shape[0] != 1:
        return None
    if query.shape != key.shape or sharing * key.shape[2] != heads or key.shape[:2] != (1, tokens):
        return None
    decays_rows = g.dim() == key.dim()
    kernel = _rule_kernel(*shape[2:], decays_rows=decays_rows)
    if kernel is None or g.shape != (1, tokens, heads, shape[2])[: g.dim()]:
        return None
    queries, keys, values, taken = (each.float().contiguous() for each in (query, key, value, beta))
    decays = g.float().exp().contiguous()
    step = StateKernel(kernel, (tokens, heads, sharing), _shares(heads, tokens))
    return _changed(step, (state, queries, keys, values, decays, taken), values).to(query.dtype), state


def convolved(
    hidden_states: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None
) -> Any:
    """As transformers' function; ``None`` where no kernel does that."""
    channels, width = weight.shape
    parts = (conv_state, hidden_states, weight, bias)
    if activation not in (None, "silu") or channels % _CHANNELS_AT_A_TIME:
        return None
    kept = conv_state.shape[-1]
    if conv_state.shape != (1, channels, kept) or kept + 1 < width or hidden_states.shape != (1, channels, 1):
        return None
    given = [part for part in parts if part is not None]
    if len({part.dtype for part in given}) > 1 or not all(part.is_contiguous() for part in given):
        return None
    kernel = _step_kernel(
        *(width, kept, str(weight.dtype).removeprefix("torch.")),
        has_silu=activation == "silu",
        has_bias=bias is not None,
    )
    if kernel is None:
        return None
    groups = channels // _CHANNELS_AT_A_TIME
    return _changed(StateKernel(kernel, (groups,), groups // _GROUPS_FOR_A_THREAD), parts, hidden_states)


def updated_states(state: Any, hidden_states: Any, dt: Any, *matrices: Any, **options: Any) -> Any:
    """As transformers' function of Mamba 2 for one token; ``None`` where no kernel does that."""
    of_states, keys, queries, *rest = matrices  # its A, B, C, and D where there is one
    skipping, bias = rest[0] if rest else options.get("D"), options.get("dt_bias")
    if not options.get("dt_softplus") or hidden_states.shape != state.shape[:3]:
        return None
    if dt.stride(2) or of_states.stride()[-2:] != (0, 0):  # else each row of a state has a step of its own
        return None
    steps = _steps(dt[:, None, :, 0], None if bias is None else bias[:, 0])
    results = _scanned(
        state, (hidden_states[:, None], keys[:, None], queries[:, None]), steps, of_states[:, 0, 0]
    )
    if results is None:
        return None
    results = results[:, 0]
    if skipping is not None:
        results += hidden_states.float() * skipping.float()
    if (gate := options.get("z")) is not None:
        results *= _silu(gate.float())
    return results.to(hidden_states.dtype)


def scanned_in_turn(hidden_states: Any, dt: Any, *matrices: Any, **options: Any) -> Any:
    """As transformers' function of Mamba 2 for a prompt, whose tokens are one after the other here; else ``None``."""
    import torch

    of_states, keys, queries = matrices[:3]
    is_one = not any(options.get(name) is not None for name in (*_OF_SEVERAL_TEXTS, "z"))
    if not options.get("dt_softplus") or not is_one:
        return None
    before, skipping = options.get("initial_states"), options.get("D")
    shape = (*hidden_states.shape[:1], *hidden_states.shape[2:], keys.shape[3])
    state = (
        torch.zeros(shape, dtype=torch.float32, device="cpu") if before is None else before.float().clone()
    )
    steps = _steps(dt, options.get("dt_bias")).clamp(*options.get("dt_limit", (0.0, float("inf"))))
    results = _scanned(state, (hidden_states, keys, queries), steps, of_states)
    if results is None:
        return None
    if skipping is not None:
        results += hidden_states.float() * skipping.float()[..., None]
    return (results, state) if options.get("return_final_states") else results


def _steps(dt: Any, bias: Any) -> Any:
    """What a step of time is for each head."""
    import torch

    return torch.nn.functional.softplus(dt.float() if bias is None else dt.float() + bias.float())


def _silu(numbers: Any) -> Any:
    import torch

    return torch.nn.functional.silu(numbers)


def _scanned(state: Any, tokens: tuple[Any, Any, Any], steps: Any, of_states: Any) -> Any:
    """What tokens find in states, which they change: float32 ``[1, tokens, heads, rows]``; ``None`` where no kernel does that.

    ``tokens`` are inputs ``[1, tokens, heads, rows]`` and what groups of heads share ``[1, tokens, groups, columns]``.
    """
    import torch

    hidden, keys, queries = tokens
    (_, count, heads, rows), groups = hidden.shape, keys.shape[2]
    shape = (1, heads, rows, keys.shape[3])
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        return None
    if keys.shape != queries.shape or keys.shape[:2] != (1, count) or heads % groups:
        return None
    kernel = _state_kernel(*shape[2:])
    if kernel is None:
        return None
    inputs = (hidden.float() * steps[..., None]).contiguous()
    keys, queries = (each.float().contiguous() for each in (keys, queries))
    decays = (steps * of_states.float()).exp().contiguous()
    step = StateKernel(kernel, (count, heads, heads // groups), _shares(heads, count))
    return _changed(step, (state, inputs, keys, queries, decays), inputs)


def _shares(heads: int, tokens: int) -> int:
    return min(heads, heads * tokens // _HEADS_FOR_A_THREAD)


def _changed(kernel: StateKernel, parts: Sequence[Any], like: Any) -> Any:
    """As `StateKernel.changed`, in the shape and dtype of another tensor; who records a layer here notes it."""
    recorder = current()
    if recorder is not None:
        return recorder.step_of_a_state(kernel, parts, like)
    return kernel.changed(parts, like.shape, like.dtype)


@cache
def _rule_kernel(keys: int, values: int, *, decays_rows: bool) -> Any:
    from llm_magic.backends.accelerate.kernels.delta_rule import delta_rule

    try:
        with preparing():
            return delta_rule(keys, values, decays_rows=decays_rows)
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
