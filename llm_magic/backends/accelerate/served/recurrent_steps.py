"""Recurrent layers on the CPU, whose tokens come one after the other: the gated delta rule (Qwen3-Next, Qwen3.5, OLMo
hybrid; Kimi Linear), Mamba 2 (Nemotron-H, Granite 4, Falcon-H1, Bamba, Zamba 2), and convolutions (LFM2).

Their modules call functions of transformers that have no kernels for CPUs. In those modules a kernel of ours is asked
first; it changes the state where it is, which the module would copy there.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from llm_magic.backends.accelerate.current import current
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.served.served_class import serve, served_by, usual_class_of
from llm_magic.backends.accelerate.served.step_kernels import (
    by_the_rule,
    by_the_rule_in_turn,
    convolved,
    scanned_in_turn,
    updated_states,
)

_ASKED = {
    "torch_recurrent_gated_delta_rule": by_the_rule,
    "torch_chunk_gated_delta_rule": by_the_rule_in_turn,
    "recurrent_kimi_delta_attention": by_the_rule,
    "chunk_kimi_delta_attention": by_the_rule_in_turn,
    "mamba2_selective_state_update": updated_states,
    "mamba2_chunk_scan": scanned_in_turn,
    "causal_conv1d_update": convolved,
}
"""What the modules of transformers call, and what is asked first."""
_IS_SERVED = "_asks_kernels"
_HERE = threading.local()


def serve_recurrent_steps(module: Any) -> None:
    """Let a recurrent module compute by our kernels on the CPU, where it calls functions that have one."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or _ASKED.keys().isdisjoint(code.co_names) or served_by(module) is not None:
        return
    if not cpu_products.is_there():
        return
    names = vars(sys.modules[type(module).__module__])
    for name, ours in _ASKED.items():
        if callable(names.get(name)) and name in code.co_names:
            _let_ask(names, name, ours)
    serve(module, _by_kernels)


def has_recurrent_steps(module: Any) -> bool:
    """Whether kernels are asked in a module."""
    return served_by(module) is _by_kernels


def _let_ask(names: dict[str, Any], name: str, ours: Any) -> None:
    """Put a function in the place of one of a module's, which asks ``ours`` where a served module calls it."""
    usual = names[name]
    if hasattr(usual, _IS_SERVED):
        return

    @wraps(usual)
    def asking(*args: Any, **options: Any) -> Any:
        is_asked = getattr(_HERE, "is_served", False) or current() is not None
        found = ours(*args, **options) if is_asked else None
        return usual(*args, **options) if found is None else found

    setattr(asking, _IS_SERVED, True)
    names[name] = asking


def _by_kernels(module: Any, *args: Any, **options: Any) -> Any:
    import torch

    states = next((each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)), None)
    if states is None or not states.is_cpu or len(states) != 1:
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
