"""The whole plugin surface, on one screen. Built-ins enter by the same hooks (entry-point group ``llm_magic``)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pluggy

from llm_magic.events import Emit, Finish, Progress, RenderedPrompt, Request, StopFlag, SweepSpeed
from llm_magic.machine import Device, Link, Machine
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.plan import MemoryBudget, Plan, Workload

if TYPE_CHECKING:
    from llm_magic.result import Generation
    from llm_magic.session import Session

hookspec = pluggy.HookspecMarker("llm_magic")
hookimpl = pluggy.HookimplMarker("llm_magic")


class Engine(Protocol):
    """A loaded model.

    One that has ``warm_up(progress)``, too, is asked for that once it is loaded: to do what else the first answer
    would wait for.
    """

    model: Any  # what ``llm.model`` hands out: the torch module, where there is one

    @property
    def plan(self) -> Plan:
        """Where everything is now."""

    def render(self, request: Request) -> RenderedPrompt:
        """The final prompt, without running the model."""

    def generate(self, request: Request, emit: Emit, stop: StopFlag) -> Finish:
        """Answer, on the calling thread; look at ``stop`` before every block and token."""

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Device -> purpose (``"weights"``, ``"kv_cache"``, …) -> bytes, as it is now."""

    def status(self) -> tuple[str, ...]:
        """How it runs, in a few words each, for ``%llm ps`` (``"captured decode"``)."""

    def apply(self, plan: Plan, progress: Progress) -> Mapping[tuple[str, str], int]:
        """Move the blocks that the plan places elsewhere; chats stay, the next tokens are the same.

        Returns (source, target) -> bytes moved. Everything is back in its place when it raises.
        """

    def measure(self, progress: Progress) -> SweepSpeed:
        """Time some sweeps of the loaded model, within a few seconds; chats stay."""

    def forget(self, chat: str) -> None:
        """Drop the KV cache kept under this chat's key."""

    def close(self) -> None:
        """Give everything back: memory, hooks, files. Safe to call twice."""


class Backend(Protocol):
    """Loads models of some kind."""

    name: str

    def accepts(self, spec: ModelSpec) -> float:
        """0 (cannot load it) to 1 (made for it); cheap, without imports or network."""

    def layout(self, spec: ModelSpec, progress: Progress) -> ModelLayout:
        """What is in the model, read from config and headers only."""

    def load(self, spec: ModelSpec, plan: Plan, progress: Progress) -> Engine:
        """Load it as planned. An exception raised by ``progress`` cancels the load cleanly."""


@runtime_checkable
class FindsAccelerators(Protocol):
    """What a backend may have beside: it knows devices that the machine probe cannot see without it."""

    def accelerators(self, measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
        """GPUs this backend can use, with their links; ``measure`` times them anew."""


@runtime_checkable
class ExpressesPlacement(Protocol):
    """What a backend has beside that does not place block by block: its own words for a placement."""

    def express(self, plan: Plan) -> str:
        """The backend's options for the nearest that it can do (``"-ngl 20 --tensor-split 3,1"``)."""


@dataclass(frozen=True)
class Planner:
    """A placement policy: ``--device-map NAME``.

    ``place`` returns block name -> device name. Bytes, forecast and checks are made from its
    answer by one code for all planners, so no planner can promise what does not fit.
    """

    name: str
    help: str
    place: Callable[[ModelLayout, MemoryBudget, Machine, Workload], Mapping[str, str]]


@dataclass(frozen=True)
class Command:
    """``%llm NAME``. What ``run`` returns is displayed; ``None`` shows nothing.

    ``add_arguments`` fills an argparse parser. An argument completes from its ``choices``, or
    from the kind named in its attribute ``completes``: ``"model"`` (loaded), ``"source"``,
    ``"device"``, ``"block"``, ``"chat"``, ``"file"``, ``"command"``, ``"setting"``, ``"planner"``,
    ``"backend"``, ``"format"``.
    """

    name: str
    help: str
    run: Callable[[Session, argparse.Namespace], object]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """``-f NAME``: a finished answer -> a MIME bundle that is safe to save in a notebook."""

    name: str
    help: str
    bundle: Callable[[Generation], Mapping[str, Any]]


class Hooks:
    """Implement any of these in a module and name it under the entry-point group ``llm_magic``."""

    @hookspec
    def register_backends(self, register: Callable[[Backend], None]) -> None:
        """Call ``register`` with each backend."""

    @hookspec
    def register_planners(self, register: Callable[[Planner], None]) -> None:
        """Call ``register`` with each placement policy."""

    @hookspec
    def register_commands(self, register: Callable[[Command], None]) -> None:
        """Call ``register`` with each ``%llm`` command."""

    @hookspec
    def register_formats(self, register: Callable[[Format], None]) -> None:
        """Call ``register`` with each ``-f`` format."""

    @hookspec
    def session_event(self, session: Session, event: object) -> None:
        """Observe what the session does; what is returned or raised changes nothing.

        ``event`` is a ``LoadedModel`` or an ``Unloaded`` (both of ``llm_magic.session``), a
        ``llm_magic.placing.Moved``, the ``llm_magic.answer.Answer`` that is coming (about 20 times
        a second), or the ``Generation`` of an answer that ended, however it did. More kinds may
        come: test with ``isinstance`` for those you know.
        """
