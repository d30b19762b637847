"""Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5, OLMo hybrid) on the CPU, one token at a time.

Their modules call functions of transformers that have no kernels for CPUs. In those modules a kernel of ours is asked
first; it changes the state where it is, which the module would copy there.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.served_class import serve, served_by, usual_class_of
from llm_magic.backends.accelerate.preparation import preparing

_RULE, _CONVOLUTION = "torch_recurrent_gated_delta_rule", "causal_conv1d_update"
"""What the modules of transformers call these."""
_IS_SERVED = "_asks_kernels"
_HERE = threading.local()
_CHANNELS_AT_A_TIME = 16
"""Of the kernel for convolutions, which is imported when it is needed."""
_HEADS_FOR_A_THREAD, _GROUPS_FOR_A_THREAD = 4, 256
"""Of a share at least: some microseconds."""


def serve_linear_attention(module: Any) -> None:
    """Let a module of linear attention compute by our kernels on the CPU, where it calls functions that have one."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or _RULE not in code.co_names or served_by(module) is not None:
        return
    if not cpu_products.is_there():
        return
    names = vars(sys.modules[type(module).__module__])
    for name, ours in ((_RULE, _by_the_rule), (_CONVOLUTION, _convolved)):
        if callable(names.get(name)) and name in code.co_names:
            _let_ask(names, name, ours)
    serve(module, _by_kernels)


def is_served_linear_attention(module: Any) -> bool:
    """Whether kernels are asked in a module."""
    return served_by(module) is _by_kernels


def _let_ask(names: dict[str, Any], name: str, ours: Any) -> None:
    """Put a function in the place of one of a module's, which asks ``ours`` where a served module calls it."""
    usual = names[name]
    if hasattr(usual, _IS_SERVED):
        return

    @wraps(usual)
    def asking(*args: Any, **options: Any) -> Any:
        found = ours(*args, **options) if getattr(_HERE, "is_served", False) else None
        return usual(*args, **options) if found is None else found

    setattr(asking, _IS_SERVED, True)
    names[name] = asking


def _by_kernels(module: Any, *args: Any, **options: Any) -> Any:
    import torch

    states = next((each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)), None)
    if states is None or not states.is_cpu or states.shape[:-1] != (1, 1):
        return None
    if torch.is_grad_enabled() or is_looked_at():
        return None
    with _served():
        return usual_class_of(module).forward(module, *args, **options)


@contextmanager
def _served() -> Iterator[None]:
    _HERE.is_served = True
    try:
        yield
    finally:
        _HERE.is_served = False


def _by_the_rule(query: Any, key: Any, value: Any, g: Any, beta: Any, **options: Any) -> Any:
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


def _convolved(
    hidden_states: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None
) -> Any:
    """As transformers' function; ``None`` where no kernel does that."""
    import torch

    channels, width = weight.shape
    parts = (conv_state, hidden_states, weight)
    if bias is not None or activation not in (None, "silu") or channels % _CHANNELS_AT_A_TIME:
        return None
    kept = conv_state.shape[-1]
    if conv_state.shape != (1, channels, kept) or kept + 1 < width or hidden_states.shape != (1, channels, 1):
        return None
    if len({part.dtype for part in parts}) > 1 or not all(part.is_contiguous() for part in parts):
        return None
    kernel = _step_kernel(
        width, kept, str(weight.dtype).removeprefix("torch."), has_silu=activation == "silu"
    )
    if kernel is None:
        return None
    results = torch.empty_like(hidden_states)
    addresses = [part.data_ptr() for part in (*parts, results)]
    groups = channels // _CHANNELS_AT_A_TIME
    _run(kernel, addresses, [groups], groups // _GROUPS_FOR_A_THREAD)
    return results


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
def _step_kernel(width: int, kept: int, dtype: str, *, has_silu: bool) -> Any:
    from llm_magic.backends.accelerate.kernels.causal_step import causal_step

    if dtype not in ("float32", "float16", "bfloat16"):
        return None
    try:
        with preparing():
            return causal_step(width, kept, dtype, has_silu=has_silu)
    except RuntimeError:  # as above
        return None
