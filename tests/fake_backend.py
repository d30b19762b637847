"""A backend whose answers are scripted: for the session, the magics and the displays, where no model is the point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

from llm_magic.errors import PromptError, SourceError
from llm_magic.events import (
    Emit,
    Finish,
    Limit,
    PhaseEvent,
    Progress,
    RenderedPrompt,
    Request,
    StopFlag,
    SweepSpeed,
    TokenEvent,
)
from llm_magic.machine import Device, Link
from llm_magic.model import Block, ModelLayout, ModelSpec, TensorInfo
from llm_magic.plan import Plan
from llm_magic.plugins import Plugins

MIB = 1 << 20


@dataclass
class Reply:
    """One scripted answer: pieces of text, and what happens before a piece.

    ``before[i](stop)`` runs on the worker thread before piece ``i``; it may wait for the stop flag or raise.
    ``sweeps`` and ``notes`` are those of its ``Finish``, and so is ``limit`` where one cuts the answer.
    """

    pieces: tuple[str, ...]
    before: Mapping[int, Callable[[StopFlag], object]] = field(default_factory=dict)
    sweeps: int = 0
    notes: tuple[str, ...] = ()
    limit: Limit | None = None


class FakeEngine:
    """``while_moving`` runs before each block that ``apply`` moves; ``speed`` is what ``measure`` finds."""

    def __init__(self, replies: list[Reply], plan: Plan) -> None:
        self.model = object()
        self.plan = plan
        self.while_moving: Callable[[], object] = lambda: None
        self.while_measuring: Callable[[], object] = lambda: None
        self.speed = SweepSpeed(0.04, 0.5, 512, {1: 0.04, 4: 0.05})
        self.requests: list[Request] = []
        self.forgotten: list[str] = []
        self.is_closed = False
        self._replies = replies

    def render(self, request: Request) -> RenderedPrompt:
        text = "\n".join(f"<{m.role}>{m.content}" for m in request.messages)
        return RenderedPrompt(text, len(text.split()))

    def generate(self, request: Request, emit: Emit, stop: StopFlag) -> Finish:
        self.requests.append(request)
        reply = self._replies.pop(0)
        emit(PhaseEvent("prefill", 1, 1, "layers"))
        count, reason = 0, "stop"
        for index, piece in enumerate(reply.pieces):
            if index in reply.before:
                reply.before[index](stop)
            if stop.is_set():
                reason = "stopped"
                break
            emit(TokenEvent(piece))
            count += 1
        tokens = self.render(request).tokens
        if tokens > 1000:
            raise PromptError("The prompt is too long.", "Shorten it.")
        if reply.limit is None or reason == "stopped":
            return Finish(reason, tokens, 0, count, 0.5, 1.0, reply.sweeps, reply.notes)
        return Finish("length", tokens, 0, count, 0.5, 1.0, reply.sweeps, reply.notes, reply.limit)

    def memory(self) -> dict[str, dict[str, int]]:
        held = Counter[str]()
        for place in self.plan.placements:
            held[place.home] += place.block.bytes
        return {device: {"weights": size, "kv_cache": 0} for device, size in held.items()}

    def status(self) -> tuple[str, ...]:
        return ("scripted", "no draft")

    def apply(self, plan: Plan, progress: Progress) -> dict[tuple[str, str], int]:
        moves = [
            (old.home, new.home, new.block.bytes)
            for old, new in zip(self.plan.placements, plan.placements, strict=True)
            if old.home != new.home
        ]
        moved = Counter[tuple[str, str]]()
        for done, (source, target, size) in enumerate(moves):
            progress(PhaseEvent("moving", done + 1, len(moves), "blocks"))
            self.while_moving()
            moved[source, target] += size
        self.plan = plan
        return dict(moved)

    def measure(self, progress: Progress) -> SweepSpeed:
        progress(PhaseEvent("measuring", 1, 1, "sweeps"))
        self.while_measuring()
        return self.speed

    def forget(self, chat: str) -> None:
        self.forgotten.append(chat)

    def close(self) -> None:
        self.is_closed = True


class FakeBackend:
    """Accepts ``fake:NAME``; ``enqueue`` scripts the next answer of every engine it loads.

    ``gpu_bytes`` is the memory of a GPU that it finds, 0 for none.
    """

    name = "fake"

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.engines: list[FakeEngine] = []
        self.while_loading: Callable[[], object] = lambda: None
        self.gpu_bytes = 0

    def accelerators(self, measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
        if not self.gpu_bytes:
            return (), ()
        held = sum(e.memory().get("cuda:0", {}).get("weights", 0) for e in self.engines if not e.is_closed)
        gpu = Device("cuda:0", "gpu", "Fake GPU", self.gpu_bytes, self.gpu_bytes - held, 1e12, 1e14)
        ways = (("cpu", "cuda:0"), ("cuda:0", "cpu"))
        return (gpu,), tuple(Link(source, target, 25e9, "fake bus") for source, target in ways)

    def enqueue(
        self,
        *pieces: str,
        before: Mapping[int, Callable[[StopFlag], object]] | None = None,
        sweeps: int = 0,
        notes: tuple[str, ...] = (),
        limit: Limit | None = None,
    ) -> None:
        self.replies.append(Reply(pieces, before or {}, sweeps, notes, limit))

    def accepts(self, spec: ModelSpec) -> float:
        return 1.0 if spec.source.startswith("fake:") else 0.0

    def layout(self, spec: ModelSpec, progress: Progress) -> ModelLayout:
        if spec.source == "fake:missing":
            raise SourceError("There is no model fake:missing.", "Give another.")
        blocks = tuple(
            Block(f"model.layers.{i}", f"layers.{i}", "decoder", (_mebibyte(f"model.layers.{i}.w"),))
            for i in range(3)
        )
        return ModelLayout("Fake-3M", "FakeForCausalLM", blocks, "bfloat16", 2048, 64, 128, 1000)

    def load(self, spec: ModelSpec, plan: Plan, progress: Progress) -> FakeEngine:
        for done in range(3):
            progress(PhaseEvent("loading", done + 1, 3, "tensors"))
            self.while_loading()
        self.engines.append(FakeEngine(self.replies, plan))
        return self.engines[-1]


def _mebibyte(name: str) -> TensorInfo:
    return TensorInfo(name, (1024, 512), "bfloat16", MIB)


class _Point:
    """An entry point to an object that is here already."""

    dist = None

    def __init__(self, name: str, plugin: object, value: str = "tests:plugin") -> None:
        self.name, self.value, self._plugin = name, value, plugin

    def load(self) -> object:
        if isinstance(self._plugin, Exception):
            raise self._plugin
        return self._plugin


def plugin_points(*plugins: object) -> tuple[EntryPoint, ...]:
    """Entry points of these plugin objects; an exception stands for a plugin that fails on import."""
    return tuple(_Point(f"plugin{n}", plugin) for n, plugin in enumerate(plugins))  # type: ignore[misc]


def plugins_with(backend: FakeBackend, *others: object) -> Plugins:
    """The built-in planners, commands and formats, this backend alone, and other plugin objects."""
    return Plugins((*built_in_points(), *plugin_points(_backend_plugin(backend), *others)))


def built_in_points() -> Iterator[EntryPoint]:
    from importlib.metadata import entry_points

    return (
        point
        for point in entry_points(group="llm_magic")
        if point.name in ("planners", "commands", "formats")
    )


def _backend_plugin(backend: FakeBackend) -> object:
    from types import SimpleNamespace

    from llm_magic.hookspecs import hookimpl

    def register_backends(register: Callable[[object], None]) -> None:
        register(backend)

    return SimpleNamespace(register_backends=hookimpl(register_backends))
