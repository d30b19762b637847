"""Small helpers of the tests that load real models: a machine to plan for, maps, one-line asking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.backend import TransformersBackend
from llm_magic.events import Finish, Message, PhaseEvent, Request, Sampling, SweepEvent, TokenEvent
from llm_magic.hookspecs import Planner
from llm_magic.machine import Device, Machine
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from llm_magic.units import GIB, MIB

MACHINE = Machine(
    "laptop",
    (
        Device("cpu", "cpu", "RAM", 4 * GIB, 3 * GIB, read_bytes_per_s=10e9),
        Device("disk", "disk", "SSD", 100 * GIB, 50 * GIB, read_bytes_per_s=1e9),
    ),
)
POLICY = {planner.name: planner for planner in POLICIES}
Progress = Callable[[PhaseEvent], None]
BACKEND = TransformersBackend()


def all_in_ram(layout: ModelLayout) -> dict[str, str]:
    return {block.name: "cpu" for block in layout.blocks}


def half_on_disk(layout: ModelLayout) -> dict[str, str]:
    """Every second layer on disk."""
    return all_in_ram(layout) | {block.name: "disk" for block in layout.layers[::2]}


def all_but_first_on_disk(layout: ModelLayout) -> dict[str, str]:
    """Only the first block in RAM, and what is tied to it."""
    first = layout.blocks[0]
    stay = {first.name, *first.tied_to}
    return {block.name: "cpu" if block.name in stay else "disk" for block in layout.blocks}


MAPS: dict[str, Callable[[ModelLayout], dict[str, str]]] = {
    "ram": all_in_ram,
    "half": half_on_disk,
    "disk": all_but_first_on_disk,
    "mapped": half_on_disk,
}
"""``half`` and ``disk`` read blocks into slots, ``mapped`` uses them in the page cache."""


def plan_for(
    source: Path | str,
    placement: str = "ram",
    *,
    context: int = 256,
    prefill_tokens: int = 64,
    max_memory: Mapping[str, int] | None = None,
    options: Mapping[str, str] | None = None,
    spec: ModelSpec | None = None,
) -> tuple[ModelSpec, Plan]:
    """A plan by the name of a map above or of a policy."""
    spec = spec or ModelSpec(str(source))
    layout = BACKEND.layout(spec, lambda _event: None)
    chosen: Planner | dict[str, str] = POLICY[placement] if placement in POLICY else MAPS[placement](layout)
    plan = make_plan(
        layout,
        MACHINE,
        Workload(context, prefill_tokens=min(prefill_tokens, context)),
        placement=chosen,
        policy=placement,
        max_memory=max_memory or {},
        source=Path(str(source)).name,
        options=options or {},
    )
    return spec, replace(plan, mapped=placement == "mapped") if placement in MAPS else plan


def load(
    source: Path | str, placement: str = "ram", progress: Progress = lambda _event: None, **options: Any
) -> Any:
    """A loaded engine."""
    spec, plan = plan_for(source, placement, **options)
    return BACKEND.load(spec, plan, progress)


@dataclass
class Answer:
    """What came out of one ``generate``."""

    finish: Finish
    events: list[PhaseEvent | TokenEvent | SweepEvent] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TokenEvent))

    @property
    def phases(self) -> list[PhaseEvent]:
        return [event for event in self.events if isinstance(event, PhaseEvent)]

    @property
    def sweeps(self) -> list[SweepEvent]:
        return [event for event in self.events if isinstance(event, SweepEvent)]


def request(*contents: str, chat: str = "", use_template: bool = False, **sampling: Any) -> Request:
    """A greedy request; contents alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], content) for i, content in enumerate(contents))
    settings = {"temperature": 0, "max_new_tokens": 12} | sampling
    return Request(messages, Sampling(**settings), use_template=use_template, chat=chat)


def ask(engine: Any, asked: Request | str, on_event: Callable[[Any], None] = lambda _event: None) -> Answer:
    """Generate and gather; ``on_event`` may raise."""
    stop = threading.Event()
    return ask_with(engine, asked, stop, on_event)


def ask_with(
    engine: Any,
    asked: Request | str,
    stop: threading.Event,
    on_event: Callable[[Any], None] = lambda _event: None,
) -> Answer:
    """As ``ask``, with a stop flag that ``on_event`` may set."""
    events: list[Any] = []

    def emit(event: Any) -> None:
        events.append(event)
        on_event(event)

    finish = engine.generate(asked if isinstance(asked, Request) else request(asked), emit, stop)
    return Answer(finish, events)


__all__ = ["MACHINE", "MAPS", "MIB", "POLICY", "Answer", "ask", "ask_with", "load", "plan_for", "request"]
