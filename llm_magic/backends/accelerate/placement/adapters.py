"""PEFT adapters on a placed model.

PEFT makes an adapter where the weights of its base layer are. Those of a block that travels are nowhere
between two uses, and so its adapters would be. `let_in` shows them all weights, in RAM or in mapped
files, while transformers' own methods put an adapter on; afterwards it is taken to where its block computes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any
from weakref import WeakMethod, ref

from llm_magic.errors import EngineError

_PUT_ON = ("add_adapter", "load_adapter")

_numbers = count()

Fingerprint = tuple[object, ...]
"""What makes one model with adapters compute otherwise than another."""


WeightsShown = Callable[[], AbstractContextManager[None]]


def let_in(model: Any, weights_shown: WeakMethod[WeightsShown]) -> None:
    """Let a model's own methods that put adapters on find all of its weights.

    Parameters
    ----------
    weights_shown
        What makes a context in which they are there; weak, because the model's methods keep it.
    """
    for name in _PUT_ON:
        if callable(getattr(type(model), name, None)):
            setattr(model, name, _with_weights(type(model), name, model, weights_shown))


def _with_weights(
    kind: type, name: str, model: Any, weights_shown: WeakMethod[WeightsShown]
) -> Callable[..., Any]:
    held = ref(model)  # no cycle, which would keep the model's memory
    usual = getattr(kind, name)

    @functools.wraps(usual)
    def put_on(*args: Any, **options: Any) -> Any:
        shown = weights_shown() or nullcontext  # once unloaded, there are none
        before = set(_configs(held()))
        with shown():
            result = usual(held(), *args, **options)
        _refuse_for_packed_experts(held(), before)
        _refuse_for_floats(held(), before)
        _refuse_for_experts_apart(held(), before)
        return result

    return put_on


def _configs(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


def _refuse_for_packed_experts(model: Any, before: set[str]) -> None:
    """Take a new adapter off again that is for parameters which packed experts do not have: PEFT only warns.

    Raises
    ------
    EngineError
        When that was so.
    """
    from llm_magic.backends.accelerate.packed.packed_stack import PackedStack

    stacks = [f".{name}" for name, module in model.named_modules() if isinstance(module, PackedStack)]
    for name, config in _configs(model).items():
        targets = [f".{target}" for target in getattr(config, "target_parameters", None) or ()]
        if name not in before and any(stack.endswith(tuple(targets)) for stack in stacks):
            model.delete_adapter(name)
            raise EngineError(
                "The adapter changes experts, which are packed here.", "Load the model with --quantize none."
            )


def _refuse_for_floats(model: Any, before: set[str]) -> None:
    """Take a new adapter off again that measures weights which are floats with scales: PEFT takes their bytes for numbers.

    Raises
    ------
    EngineError
        When it is a DoRA on any of them.
    """
    from llm_magic.backends.accelerate.packed.scaled_floats import ScaledLinear

    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), ScaledLinear):
            for adapter in set(getattr(module, "lora_magnitude_vector", None) or ()) - before:
                model.delete_adapter(adapter)
                raise EngineError(
                    "The adapter (DoRA) measures weights that are packed here.",
                    "Load the model with --quantize none, or train a LoRA without DoRA.",
                )


def _apart_error() -> EngineError:
    return EngineError(
        "The adapter changes experts that are computed elsewhere than their layers, or come one by one.",
        "Load the model with --device-map cpu, or where a GPU has room for all of it.",
    )


def _refuse_for_experts_apart(model: Any, before: set[str]) -> None:
    """Take a new adapter off again that changes experts which are not computed as their module would.

    Raises
    ------
    EngineError
        When that was so.
    """
    apart = [name for name, module in model.named_modules() if isinstance(_forward_of(module), _apart())]
    paths = tuple(f"{name.removesuffix('.base_layer')}." for name in apart)
    for adapter in set(_configs(model)) - before if paths else ():
        if any(f".{adapter}" in name and name.startswith(paths) for name, _ in model.named_parameters()):
            model.delete_adapter(adapter)
            raise _apart_error()


def _forward_of(module: Any) -> Any:
    """What has put its own method in the place of a module's."""
    return getattr(vars(module).get("forward"), "__self__", None)


def _apart() -> tuple[type, ...]:
    from llm_magic.backends.accelerate.placement.cpu_experts import CpuExperts
    from llm_magic.backends.accelerate.placement.routed_experts import RoutedExperts

    return CpuExperts, RoutedExperts


def check_not_apart(added: list[Any]) -> None:
    """Refuse to compute experts elsewhere that an adapter changes.

    Raises
    ------
    EngineError
        When there are some.
    """
    if added:
        raise _apart_error()


def fingerprint(model: Any) -> Fingerprint:
    """The adapters of a model and which of them are at work; empty without any, at no cost without PEFT."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return ()
    layers = (module for module in model.modules() if isinstance(module, peft.BaseTunerLayer))
    return tuple(
        (
            tuple(layer.active_adapters),
            layer.disable_adapters,
            tuple(layer.merged_adapters),
            tuple(getattr(layer, "scaling", {}).items()),
            tuple(_state(p) for name, p in layer.named_parameters() if not name.startswith("base_layer.")),
        )
        for layer in layers
    )


def _state(parameter: Any) -> tuple[int, int]:
    """A number of the parameter's own, and one that changes with its values: an ``id`` would be given again."""
    number = parameter.__dict__.setdefault("_llm_magic_number", next(_numbers))
    return number, 0 if parameter.is_inference() else parameter._version


def check_not_lost(added: list[Any]) -> None:
    """Refuse adapters without bytes.

    Raises
    ------
    EngineError
        When some were put on while their layers had none.
    """
    if any(parameter.is_meta for parameter in added):
        raise EngineError(
            "An adapter has no weights: its layers were offloaded when it was put on.",
            "Put it on with llm.model.load_adapter(…) or llm.model.add_adapter(…), after %llm load.",
        )
