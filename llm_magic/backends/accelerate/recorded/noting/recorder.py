"""What a decoder layer does with the tokens of a sweep, as a list of torch's operations.

The layer's own code runs once, on stand-ins: its large parts (linear layers, experts, attention, the KV cache) are
not computed, but give numbers at random, and every other operation is written down as it reaches torch's
dispatcher. Code that looks at numbers, or changes them where they are, is not for this; nor is what writes down
something else when numbers, positions and the length of the KV cache are others, so that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llm_magic.backends.accelerate.current import recording_by
from llm_magic.backends.accelerate.recorded.noting.arguments import unflattened
from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError, as_it_was
from llm_magic.backends.accelerate.recorded.noting.caches import Caches
from llm_magic.backends.accelerate.recorded.noting.dispatch import seen_by
from llm_magic.backends.accelerate.recorded.noting.known_numbers import KnownNumbers
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors
from llm_magic.backends.accelerate.recorded.noting.made_up import MadeUp
from llm_magic.backends.accelerate.recorded.noting.noted_parts import NotedParts
from llm_magic.backends.accelerate.recorded.noting.noted_states import NotedStates
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.recorded.noting.operations import Operations
from llm_magic.backends.accelerate.recorded.noting.routers import RouterMatrices
from llm_magic.backends.accelerate.recorded.noting.shared_keys import SharedKeys
from llm_magic.backends.accelerate.recorded.noting.stand_ins import StandIns
from llm_magic.backends.accelerate.recorded.noting.whole_modules import Outputs, WholeModules
from llm_magic.backends.accelerate.recorded.recording import Recording, Rehearsal, needed


def record(
    layer: Any,
    usual: Callable[..., Any],
    call: tuple[Sequence[Any], Mapping[str, Any]],
    whole: Mapping[str, Outputs] = MappingProxyType({}),
    *,
    opens_experts: bool = False,
) -> tuple[Recording, Rehearsal]:
    """Write down what ``usual(*args, **kwargs)``, a layer's forward, does; the KV cache among its arguments stays as it is.

    Parameters
    ----------
    call
        ``args`` and ``kwargs``.
    whole
        Modules of the layer that are not looked into, and what they return.
    opens_experts
        Whether modules of experts are looked into, where only their products are ours: see `can_open`.

    Raises
    ------
    CannotRecordError
        When that would not be the whole of it.
    """
    first, rehearsal = record_once(layer, usual, call, whole, opens_experts=opens_experts)
    second, _ = record_once(layer, usual, call, whole, opens_experts=opens_experts, is_other=True)
    if first != second:
        raise CannotRecordError("what the layer does depends on numbers or on the length of the text")
    return first, rehearsal


def record_once(
    layer: Any,
    usual: Callable[..., Any],
    call: tuple[Sequence[Any], Mapping[str, Any]],
    whole: Mapping[str, Outputs],
    *,
    opens_experts: bool,
    is_other: bool = False,
) -> tuple[Recording, Rehearsal]:
    """As `record`, without a look at what other numbers do, or with those."""
    import torch

    # In inference mode operations would come before they are taken apart.
    with as_it_was(layer), torch.inference_mode(False), torch.no_grad():
        recorder = Recorder(layer, whole, opens_experts=opens_experts, is_other=is_other)
        return recorder.record(usual, *call)


class Recorder:
    """One run of a layer's code, and what notes it.

    Parameters
    ----------
    whole, opens_experts
        As in `WholeModules`.
    is_other
        As in `MadeUp`.
    """

    def __init__(
        self, layer: Any, whole: Mapping[str, Outputs], *, opens_experts: bool, is_other: bool
    ) -> None:
        made_up, numbers = MadeUp(is_other=is_other), KnownNumbers()
        self._tensors = tensors = KnownTensors(layer)
        self._notes = notes = Notes(layer, tensors, made_up)
        self._states = NotedStates(layer, tensors, notes)
        self._stand_ins = StandIns(
            tensors,
            made_up,
            Caches(layer, notes, made_up, self._states),
            SharedKeys(layer, tensors, notes, made_up),
        )
        self._operations = Operations(tensors, notes, numbers, RouterMatrices(layer, tensors.weights))
        self._parts = NotedParts(tensors, notes, numbers, self._states)
        self._modules = WholeModules(layer, whole, notes, self._parts, opens_experts=opens_experts)

    def record(
        self, usual: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Recording, Rehearsal]:
        """Run the layer's forward once."""
        import torch

        stands = self._stand_ins.of(args, kwargs)
        arguments = tuple(
            (number, self._tensors.view(each))
            for number, each in enumerate(stands)
            if isinstance(each, torch.Tensor)
        )
        args, kwargs = unflattened(stands, args, kwargs)
        with self._modules.noted(), recording_by(self._parts), seen_by(self._operations.compute):
            result = usual(*args, **kwargs)
        _check_result(result)
        returned = self._tensors.shown(result)
        recording = Recording(
            arguments,
            tuple(self._tensors.weights.values()),
            tuple(self._tensors.constants),
            self._states.used,
            tuple(needed(self._notes.nodes, returned)),
            returned,
        )
        return recording, Rehearsal(stands, self._notes.leaves, result)


def _check_result(value: Any) -> None:
    if type(value) is tuple:
        for each in value:
            _check_result(each)
    elif isinstance(value, (tuple, list)):  # which would be tuples afterwards
        raise CannotRecordError(f"it returns a {type(value).__name__}")
