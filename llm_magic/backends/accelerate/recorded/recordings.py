"""What is known of a model's layers: it outlives moves, and what holds for a layer holds for those that are like it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.preparation import preparing
from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.recorder import record, record_once
from llm_magic.backends.accelerate.recorded.noting.whole_modules import Outputs, can_open
from llm_magic.backends.accelerate.recorded.program import Program
from llm_magic.backends.accelerate.recorded.recording import Recording
from llm_magic.backends.accelerate.served.served_class import usual_class_of

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""``args`` and ``kwargs``."""

_LOG = logging.getLogger(__name__)
_OF_THIS_LAYER = ("layer_idx", "forward", "training")


class Recordings:
    """Programs of layers for kinds of sweeps.

    A layer is recorded in the first sweep of a kind: twice, and rehearsed, but where one that has the same modules with
    the same settings was, it is only looked whether the same is recorded. Where both were recorded alike in their first
    kind of sweep, one recording is enough for each further kind.

    Attributes
    ----------
    seen
        Layer -> those of its parts that were seen at work, by path, and what they return.
    """

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Outputs]] = {}
        self._programs: dict[Recording, Program] = {}
        self._of_layers: dict[tuple[str, Any], tuple[Any, Program | None]] = {}
        self._first: dict[str, tuple[Any, Any, Program | None]] = {}
        self._alike: dict[tuple[Any, Any], Program | None] = {}
        self._rehearsed: dict[tuple[Any, Any], tuple[Program, _Way]] = {}

    def program(
        self, name: str, layer: Any, usual: Callable[..., Any], call: Call, kind: Any
    ) -> Program | None:
        """That of a layer for a kind of sweep, of which ``call`` is one; ``None``: its own code is to run."""
        looks = getattr(usual, "__func__", usual), signature(layer)
        known = self._of_layers.get((name, kind))
        if known is not None and known[0] == looks:
            return known[1]
        first = self._first.get(name)
        kin = first if first is not None and first[0] == looks and first[1] != kind else None
        if kin is not None and (kin, kind) in self._alike:
            program = self._alike[kin, kind]
        else:
            with preparing():
                program = self._as_rehearsed((looks, kind), layer, usual, call)
                program = program or self._recorded((looks, kind), layer, usual, call, self.seen[name])
        if kin is not None:
            self._alike[kin, kind] = program
        else:
            self._first[name] = looks, kind, program
        self._of_layers[name, kind] = looks, program
        return program

    def _as_rehearsed(
        self, key: tuple[Any, Any], layer: Any, usual: Callable[..., Any], call: Call
    ) -> Program | None:
        """The program of a layer that is like this one, if that is what is recorded here."""
        if key not in self._rehearsed:
            return None
        program, way = self._rehearsed[key]
        try:
            recording, _ = record_once(layer, usual, call, way.whole, opens_experts=way.opens_experts)
        except (Exception, CannotRecordError) as error:
            _LOG.debug("not recorded as another: %s: %s", type(layer).__name__, error)
            return None
        return program if recording == program.recording else None

    def _recorded(
        self,
        key: tuple[Any, Any],
        layer: Any,
        usual: Callable[..., Any],
        call: Call,
        seen: dict[str, Outputs],
    ) -> Program | None:
        """A new program; one that leaves parts as they are which take more than tensors, if there is no other."""
        rest = {path: outputs for path, outputs in seen.items() if not outputs.by_need}
        ways = [_Way(rest, opens_experts=False)]
        if any(map(can_open, layer.modules())):
            ways.insert(0, _Way(rest, opens_experts=True))
        if len(rest) < len(seen):
            ways.append(_Way(seen, opens_experts=False))
        for way in ways:
            program = self._tried(layer, usual, call, way)
            if program is not None:
                self._rehearsed[key] = program, way
                return program
        return None

    def _tried(self, layer: Any, usual: Callable[..., Any], call: Call, way: _Way) -> Program | None:
        try:
            recording, rehearsal = record(layer, usual, call, way.whole, opens_experts=way.opens_experts)
            program = self._programs.get(recording)
            if program is None:
                program = self._programs[recording] = Program(recording)
            return program if program.rehearse(layer, rehearsal) else None
        except (Exception, CannotRecordError) as error:
            # A layer's code may do anything, and it runs as it is without this.
            _LOG.debug("not recorded: %s: %s", type(layer).__name__, error)
            return None


@dataclass(frozen=True)
class _Way:
    """How far a layer is looked into; see `recorder.record`."""

    whole: dict[str, Outputs]
    opens_experts: bool


def signature(layer: Any) -> Any:
    """What two layers share that do the same with other weights: their modules, and all settings of these."""
    return tuple(
        (path, type(module), usual_class_of(module).forward, _tensors(module), _settings(module))
        for path, module in layer.named_modules()
    )


def _tensors(module: Any) -> Any:
    held = (*module._parameters.items(), *module._buffers.items())
    return tuple(
        (name, None if tensor is None else (type(tensor), tuple(tensor.shape), tensor.dtype))
        for name, tensor in held
    )


def _settings(module: Any) -> Any:
    """By value where they are plain, else by identity, but for what torch and others keep there for themselves."""
    return tuple(
        (name, (type(value), value) if _is_plain(value) else id(value))
        for name, value in vars(module).items()
        if name not in _OF_THIS_LAYER and (_is_plain(value) or not name.startswith("_"))
    )


def _is_plain(value: Any) -> bool:
    import torch

    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
