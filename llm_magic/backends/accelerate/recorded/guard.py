"""Whether a layer's modules are what they were when it was recorded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import attrgetter, contains, itemgetter
from typing import Any

from llm_magic.backends.accelerate.looked_at import ONLY_LOOKS
from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.recorded.noting.whole_modules import can_open, leaves_of
from llm_magic.backends.accelerate.served.served_class import usual_class_of


class Over:
    """The guard of a layer that is not to run as recorded any more."""

    def is_as_it_was(self) -> bool:
        return False


def _modules_of(layer: Any) -> list[Any]:
    """Those in a layer that are looked into."""
    import torch

    apart = {
        id(inner)
        for leaf in leaves_of(layer)
        if not isinstance(leaf, torch.nn.Linear)
        for inner in leaf.modules()
        if isinstance(inner, PackedStack) or not can_open(leaf)
    }
    return [module for module in layer.modules() if module is not layer and id(module) not in apart]


class Guard:
    """Whether somebody has put something on the modules of layers meanwhile: a hook, another forward, another module.

    What is called as a module may be what it wants. Hooks of the layers themselves are seen where that is asked for.
    """

    def __init__(self, *layers: Any, sees_own_hooks: bool = False) -> None:
        import torch

        inner = [module for layer in layers for module in _modules_of(layer)]
        modules = [*layers, *inner]
        everywhere = torch.nn.modules.module
        self._hooks = [
            *(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks),
            *(held for module in inner for held in (module._forward_hooks, module._forward_pre_hooks)),
            *(layer._forward_hooks for layer in layers if sees_own_hooks),
        ]
        self._looks = [layer._forward_pre_hooks for layer in layers if sees_own_hooks]
        self._attributes = [vars(module) for module in inner]
        kinds = [(type(module), usual_class_of(module)) for module in modules]
        self._modules, self._kinds = modules, list(dict.fromkeys(kind for both in kinds for kind in both))
        self._gates = [kind for kind in self._kinds if hasattr(kind, "_apply_gate")]
        self._numbers = [(_numbers_of(vars(module)), vars(module)) for module in modules]
        self._parts = [module._modules for module in modules if module._modules]
        self._configs = list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())
        is_training = any(layer.training for layer in layers)
        self._is_plain = not is_training and not any(hasattr(m, "base_layer") for m in modules)  # PEFT's
        self._before = self._now()

    def is_as_it_was(self) -> bool:
        """Whether nothing is there that was not. It is asked in every sweep, so most of it is done by builtins."""
        try:
            return (
                self._is_plain
                and not any(self._hooks)
                and all(hasattr(hook, ONLY_LOOKS) for hooks in self._looks for hook in hooks.values())
                and not any(map(contains, self._attributes, repeat("forward")))
                and not any(map(contains, self._attributes, repeat("_apply_gate")))
                and self._now() == self._before
            )
        except (AttributeError, KeyError):
            return False

    def _now(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            list(map(_FORWARD, self._kinds)),
            list(map(_GATE, self._gates)),
            [numbers(held) for numbers, held in self._numbers],
            [tuple(held.values()) for held in self._parts],
            list(map(_ways, self._configs)),
        )


_FORWARDS = ("forward", "_old_forward")  # of the layer itself they are another one just then
_FORWARD, _GATE = attrgetter("forward"), attrgetter("_apply_gate")


def _numbers_of(held: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """What finds the plain values and functions of a module: a recording has these as they were."""
    plain = (bool, int, float, str, type(None))
    names = [name for name, value in held.items() if type(value) in plain or callable(value)]
    return itemgetter("training", *(name for name in names if name not in _FORWARDS))


def _ways(config: Any) -> tuple[Any, Any]:
    """Implementations of what an architecture can compute in several ways."""
    return config._attn_implementation, getattr(config, "_experts_implementation", None)
