"""Recorded layers in the order in which a model calls them: which of them are computed before they are called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.recorded.ahead import Ahead, Ready
from llm_magic.backends.accelerate.recorded.bound import Bound
from llm_magic.backends.accelerate.recorded.chain import Room
from llm_magic.planning.constants import AHEAD_BYTES

_FEWEST = 2
"""Layers in one call."""
_TRIES = 4
"""How often a layer computes others that are called with something else then, or finds their weights elsewhere at once."""
_LONG = 64
"""Sweeps after which that is forgotten, and what else kept layers from being computed before they are called."""


class _Group(NamedTuple):
    """Layers in one call; ``ahead`` is ``None`` where there are too few.

    ``is_cut``: there would be more, were all of them as they are at most times. ``since``: its first sweep.
    """

    ahead: Ahead | None
    lines: list[Line]
    is_cut: bool
    since: int

    @property
    def is_hindered(self) -> bool:
        """Whether something keeps it from what it can be."""
        return self.is_cut or (self.ahead is not None and not self.ahead.is_as_it_was)


class Line:
    """A layer, and the one behind it.

    Parameters
    ----------
    module
        The layer.
    bounds
        What it runs in sweeps of each kind.
    may_be_ahead
        Whether it is what it was, and is called as nothing but a layer.
    """

    def __init__(
        self, module: Any, bounds: Mapping[Any, Bound | None], may_be_ahead: Callable[[], bool], room: Room
    ) -> None:
        self._module, self._bounds, self._may_be_ahead, self._room = module, bounds, may_be_ahead, room
        self._before: Line | None = None
        self._next: Line | None = None
        self._ready: Ready | None = None
        self._last: tuple[Any, ...] = ()
        self._follows: set[Any] = set()
        self._groups: dict[Any, _Group] = {}
        self._inside: dict[Any, Line] = {}
        self._tries, self._sweeps = _TRIES, 0
        self._lock = threading.Lock()

    def follow_with(self, line: Line) -> None:
        """Let another layer be the next one."""
        self._next, line._before = line, self

    def leave(self) -> None:
        """Forget what is computed, and the others."""
        self._ready, self._before, self._next = None, None, None
        self._groups.clear()
        self._inside.clear()

    def take(self) -> Ready | None:
        """What was computed before it is called now, for some call; ``None``: nothing was."""
        ready = self._ready
        if ready is None or ready.thread != threading.get_ident():
            return None
        self._ready = None
        return ready

    def rest(self) -> None:
        """Let go of it."""
        self._ready = None

    def miss(self) -> None:
        """Hear that it was computed for another call."""
        self._follows.clear()
        for key, first in list(self._inside.items()):
            first._disband(key)
            first._tries -= 1

    def run(self, key: Any, bound: Bound, leaves: Sequence[Any]) -> Any:
        """What the layer returns in a sweep of a kind; layers behind it may be computed, too."""
        before, following = self._before, self._next
        is_known = before is None or key in self._follows or self._tries <= 0
        if before is not None and not is_known and before._last == (key, *map(id, leaves)):
            self._follows.add(key)
            (before._inside.get(key) or before)._disband(key)  # there is one more for it
        if following is not None and key in following._follows:
            result = self._run_ahead(key, leaves)
            if result is not None:
                return result
        result = bound.run(leaves)
        self._last = key, id(result), *map(id, leaves[1:])
        return result

    def _run_ahead(self, key: Any, leaves: Sequence[Any]) -> Any:
        """What it returns, with those that follow; ``None`` where it is computed alone."""
        if key in self._inside:
            return None
        self._count()
        if self._tries <= 0 or not self._lock.acquire(blocking=False):
            return None  # or another thread does
        try:
            group = self._groups.get(key) or self._gathered(key, leaves)
            if group.ahead is None or not group.ahead.is_as_it_was:
                return None
            if not group.ahead.is_current:
                self._tries -= self._sweeps <= group.since + 1
                self._disband(key)
                return None
            found = group.ahead.run(leaves)
        finally:
            self._lock.release()
        if found is None:
            return None
        for line, ready in zip(group.lines[1:], found[1:], strict=True):
            line._ready = ready
        group.lines[-1]._last = key, id(found[-1].result), *map(id, leaves[1:])
        return found[0].keep()

    def _gathered(self, key: Any, leaves: Sequence[Any]) -> _Group:
        lines = list(self._with_those_that_follow(key, leaves))
        behind = lines[-1]._next if lines else self
        would_be = behind is not None and (behind is self or key in behind._follows)
        is_cut = would_be and behind is not None and not behind._may_be_ahead()
        ahead = None
        if len(lines) >= _FEWEST:
            bounds = [bound for line in lines if (bound := line._bounds[key])]
            ahead = Ahead([line._module for line in lines], bounds, self._room)
            for line in lines[1:]:
                line._inside[key] = self
        group = self._groups[key] = _Group(ahead, lines, is_cut, self._sweeps)
        return group

    def _disband(self, key: Any) -> None:
        """Let every layer be computed when it is called, in sweeps of a kind, until it is tried again."""
        group = self._groups.pop(key, None)
        for line in group.lines[1:] if group else ():
            line._inside.pop(key, None)

    def _count(self) -> None:
        """What has gone wrong, or was in the way, for a while was passing."""
        self._sweeps += 1
        if self._sweeps % _LONG == 0:
            self._tries = _TRIES
            for key in [key for key, group in list(self._groups.items()) if group.is_hindered]:
                self._disband(key)

    def _with_those_that_follow(self, key: Any, leaves: Sequence[Any]) -> Iterator[Line]:
        line: Line | None = self
        first, size = self._bounds[key], 0
        while line is not None and first is not None:
            bound = line._bounds.get(key)
            if bound is None or bound.chain is None or bound.shapes != first.shapes:
                return
            weighed = bound.chain.weighed() if line._may_be_ahead() and bound.takes(leaves) else None
            if weighed is None:
                return
            size += weighed.bytes
            if line is not self and (size > AHEAD_BYTES or key not in line._follows):
                return
            yield line
            line = line._next
