"""The plugin manager: entry points load one at a time, and a broken one is named and left out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

import pluggy

from llm_magic.errors import OptionError, PluginError
from llm_magic.harmless.paths import without_paths
from llm_magic.hookspecs import Backend, Command, Format, Hooks, Planner, hookimpl
from llm_magic.model import ModelSpec

GROUP = "llm_magic"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


class _Observer:
    """A plugin that only listens."""

    def __init__(self, callback: Callable[[object], None]) -> None:
        self._callback = callback

    @hookimpl
    def session_event(self, event: object) -> None:
        """Pass it on."""
        self._callback(event)


@dataclass(frozen=True)
class PluginStatus:
    """One plugin as ``%llm plugins`` shows it; ``error`` is empty when it works."""

    name: str
    package: str
    provides: tuple[str, ...] = ()
    error: str = ""


class Plugins:
    """Backends, planners, commands and formats of every plugin that works.

    Parameters
    ----------
    points
        Entry points to load; by default those installed under the group ``llm_magic``.
    """

    def __init__(self, points: tuple[EntryPoint, ...] | None = None) -> None:
        self.backends: dict[str, Backend] = {}
        self.planners: dict[str, Planner] = {}
        self.commands: dict[str, Command] = {}
        self.formats: dict[str, Format] = {}
        self.status: list[PluginStatus] = []
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(Hooks)
        for point in _built_ins_first(tuple(entry_points(group=GROUP)) if points is None else points):
            self._load(point)

    def backend_for(self, spec: ModelSpec) -> Backend:
        """The backend named by the spec, or the one that accepts it best.

        Raises
        ------
        OptionError
            When the named backend does not exist, or none accepts the source.
        """
        if spec.backend != "auto":
            return pick(self.backends, spec.backend, "backend")
        best = max(self.backends.values(), key=lambda backend: backend.accepts(spec), default=None)
        if best is None or best.accepts(spec) <= 0:
            raise OptionError(
                f"No backend can load {spec.source!r}.",
                "Give a hub id (owner/name), a model folder, a .gguf file, or: %llm load starter",
            )
        return best

    def observe(self, callback: Callable[[object], None]) -> Callable[[], None]:
        """Call back with every event of the session, by the hook that plugins use.

        Returns
        -------
        unobserve
            Ends it.
        """
        observer = _Observer(callback)
        self._manager.register(observer, name=f"observer {id(observer)}")

        def unobserve() -> None:
            if self._manager.is_registered(observer):
                self._manager.unregister(observer)

        return unobserve

    def notify(self, session: Any, event: object) -> None:
        """Tell every observer; one that raises is dropped and named, never heard by the session."""
        for implementation in self._manager.hook.session_event.get_hookimpls():
            try:
                implementation.function(
                    **{name: {"session": session, "event": event}[name] for name in implementation.argnames}
                )
            except Exception as error:  # an observer must never change what it observes
                self._manager.unregister(implementation.plugin)
                self.status.append(PluginStatus(implementation.plugin_name, "", error=_blame(error)))

    def _load(self, point: EntryPoint) -> None:
        package = point.dist.name if point.dist else ""
        tables = self._tables()
        before = {key: dict(table) for key, table in tables.items()}
        try:
            plugin = point.load()
            self._manager.register(plugin, name=point.name)
            self._call_registrations(plugin)
        except Exception as error:  # whatever a plugin raises, it must not stop the rest
            for key, table in tables.items():
                table.clear()
                table.update(before[key])
            if self._manager.has_plugin(point.name):
                self._manager.unregister(name=point.name)
            self.status.append(PluginStatus(point.name, package, error=_blame(error)))
        else:
            provides = tuple(
                f"{key[:-1]} {n}" for key, t in tables.items() for n in t if n not in before[key]
            )
            self.status.append(PluginStatus(point.name, package, provides))

    def _call_registrations(self, plugin: object) -> None:
        for key, table in self._tables().items():
            hook = getattr(self._manager.hook, f"register_{key}")
            for implementation in hook.get_hookimpls():
                if implementation.plugin is plugin:
                    implementation.function(_registrar(table, key))

    def _tables(self) -> dict[str, dict[str, Any]]:
        return {
            "backends": self.backends,
            "planners": self.planners,
            "commands": self.commands,
            "formats": self.formats,
        }


def pick(table: Mapping[str, Item], name: str, kind: str) -> Item:
    """The item with this name.

    Raises
    ------
    OptionError
        When there is none; it names the closest one.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1, cutoff=0.65)
    known = ", ".join(sorted(table)) or "none"
    raise OptionError(
        f"There is no {kind} {name!r}.", f"Did you mean {close[0]}?" if close else f"Known: {known}."
    )


def _registrar(table: dict[str, Any], key: str) -> Callable[[Any], None]:
    def register(item: _Named) -> None:
        if item.name in table:
            raise PluginError(f"The {key[:-1]} {item.name!r} is registered already.", "Give it another name.")
        table[item.name] = item

    return register


def _built_ins_first(points: tuple[EntryPoint, ...]) -> Iterator[EntryPoint]:
    # So that a third-party plugin that reuses a built-in's name is the one that is refused.
    yield from sorted(points, key=lambda p: (not p.value.startswith("llm_magic."), p.name))


def _blame(error: BaseException) -> str:
    # An ImportError says where the module lies, which is nothing for a saved notebook.
    return without_paths(f"{type(error).__name__}: {error}").splitlines()[0]
