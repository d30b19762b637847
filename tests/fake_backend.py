"""A backend whose answers are scripted: for the session, the magics and the displays, where no model is the point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

from llm_magic.errors import PromptError, SourceError
from llm_magic.events import Emit, Finish, PhaseEvent, Progress, RenderedPrompt, Request, StopFlag, TokenEvent
from llm_magic.model import Block, ModelLayout, ModelSpec, TensorInfo
from llm_magic.plan import Plan
from llm_magic.plugins import Plugins

MIB = 1 << 20


@dataclass
class Reply:
    """One scripted answer: pieces of text, and what happens before a piece.

    ``before[i](stop)`` runs on the worker thread before piece ``i``; it may wait for the stop flag or raise.
    """

    pieces: tuple[str, ...]
    before: Mapping[int, Callable[[StopFlag], object]] = field(default_factory=dict)


class FakeEngine:
    def __init__(self, replies: list[Reply]) -> None:
        self.model = object()
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
        return Finish(reason, tokens, 0, count, 0.5, 1.0)

    def memory(self) -> dict[str, dict[str, int]]:
        return {"cpu": {"weights": 3 * MIB, "kv_cache": 0}}

    def forget(self, chat: str) -> None:
        self.forgotten.append(chat)

    def close(self) -> None:
        self.is_closed = True


class FakeBackend:
    """Accepts ``fake:NAME``; ``enqueue`` scripts the next answer of every engine it loads."""

    name = "fake"

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.engines: list[FakeEngine] = []
        self.while_loading: Callable[[], object] = lambda: None

    def enqueue(self, *pieces: str, before: Mapping[int, Callable[[StopFlag], object]] | None = None) -> None:
        self.replies.append(Reply(pieces, before or {}))

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
        self.engines.append(FakeEngine(self.replies))
        return self.engines[-1]


def _mebibyte(name: str) -> TensorInfo:
    return TensorInfo(name, (MIB // 2,), "bfloat16", MIB)


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


def plugins_with(backend: FakeBackend) -> Plugins:
    """The built-in planners, commands and formats, and this backend alone."""
    return Plugins((*built_in_points(), *plugin_points(_backend_plugin(backend))))


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
