"""Modules of a layer that are not looked into: which they are, and what they seem to do while it is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.current import NotesParts, current
from llm_magic.backends.accelerate.decoding.running import running
from llm_magic.backends.accelerate.experts.packed_experts import computes_packed
from llm_magic.backends.accelerate.experts.plain_experts import is_served_experts
from llm_magic.backends.accelerate.experts.stacks import find_stacks
from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.served.cpu_linear import is_served_linear


@dataclass(frozen=True)
class Outputs:
    """What a module returns: states like those that it was given.

    Attributes
    ----------
    beside
        How often ``None`` is beside them; ``None``: they are not in a tuple.
    by_need
        Whether it takes something beside tensors, a KV cache for one, and is to be looked into where that can be.
    """

    beside: int | None = None
    by_need: bool = False


def leaves_of(layer: Any) -> Iterator[Any]:
    """Modules of a layer that are not looked into."""
    import torch

    experts = {stack.module_name for stack in find_stacks(layer)}
    for path, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear) or path in experts:
            yield module


def can_open(module: Any) -> bool:
    """Whether all that a module of experts does for a few tokens can be seen, but for products that it has noted."""
    is_ours = computes_packed(module) or is_served_experts(module)
    return is_ours and "forward" not in vars(module)


class WholeModules:
    """Those of one layer.

    Parameters
    ----------
    whole
        By path: those beside `leaves_of`, and what these and modules of experts return.
    opens_experts
        Whether those are looked into that `can_open`.
    recorder
        Where this is `current`, modules are noted.
    """

    def __init__(
        self,
        layer: Any,
        whole: Mapping[str, Outputs],
        notes: Notes,
        recorder: NotesParts,
        *,
        opens_experts: bool,
    ) -> None:
        modules = {id(module): module for module in leaves_of(layer)}
        modules |= {id(module): module for module in map(layer.get_submodule, whole)}
        self._modules = [each for each in modules.values() if not (opens_experts and can_open(each))]
        self._returned = {id(layer.get_submodule(path)): outputs for path, outputs in whole.items()}
        self._notes, self._recorder = notes, recorder

    @contextmanager
    def noted(self) -> Iterator[None]:
        """While it lasts, calls are written down, and give made-up numbers."""
        import torch

        with ExitStack() as stack:
            for module in self._modules:
                forward = self._linear if isinstance(module, torch.nn.Linear) else self._other
                stack.enter_context(running(module, forward(module)))
            yield

    def _linear(self, module: Any) -> Callable[..., Any]:
        import torch

        usual, is_usual = module.forward, type(module) is torch.nn.Linear or is_served_linear(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if current() is not self._recorder:  # another thread's
                return usual(*args, **kwargs)
            is_plain = is_usual and len(args) == 1 and not kwargs
            with unseen():
                # A subclass may do anything: what it returns is seen by that.
                like = None if is_plain else usual(*args, **kwargs)
                shape = (*args[0].shape[:-1], _rows(module)) if like is None else like.shape
                dtype = args[0].dtype if like is None else like.dtype
                kind = "linear" if is_plain else "module"
                (out,) = self._notes.module(kind, module, (args, kwargs), [tuple(shape)], dtype)
            return out

        return forward

    def _other(self, module: Any) -> Callable[..., Any]:
        usual, returned = module.forward, self._returned.get(id(module))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if current() is not self._recorder:  # another thread's
                return usual(*args, **kwargs)
            if returned is None:
                raise CannotRecordError(f"nobody knows what {type(module).__name__} returns")
            states = args[0] if args else kwargs["hidden_states"]
            with unseen():
                shape, call = tuple(states.shape), (args, kwargs)
                (out,) = self._notes.module("module", module, call, [shape], states.dtype)
            return out if returned.beside is None else (out, *[None] * returned.beside)

        return forward


def _rows(linear: Any) -> int:
    """What a linear layer gives, even where somebody has pruned its weights."""
    import torch

    weight = linear._parameters.get("weight")
    return int(weight.shape[0] if type(weight) is torch.nn.Parameter else linear.out_features)
