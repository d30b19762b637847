"""The session as a person uses it: what the screen costs, and how long moving blocks takes."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.engine import on_a_thread
from llm_magic.display import NotebookScreen, TextScreen
from llm_magic.events import Message, Request, Sampling
from llm_magic.model import ModelSpec
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.session import Session
from llm_magic.views.map import map_report
from llm_magic.views.report import LiveMap
from llm_magic.widgets.hub import Hub
from llm_magic.widgets.screen import RichScreen
from llm_magic.wire import Event, Hello, encode


class SessionSubject:
    """A session with one loaded model."""

    def __init__(self, source: str) -> None:
        self._session = Session()
        self._session.load(ModelSpec(source), LoadOptions(device_map="cpu"), "bench")
        self._engine = self._session.model().engine
        self._nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed with the subject
        self._shell: Any = None
        self._live: Any = None

    def measure(self, case: str, **options: Any) -> dict[str, float]:
        """``"bare"``, ``"text"``, ``"notebook"`` and ``"live"`` answer; ``"move"`` applies a device map."""
        if case == "move":
            return self._moved(**options)
        return self._answered(case, **options)

    def close(self) -> None:
        """Unload."""
        self._session.close()
        self._nowhere.close()

    def _answered(self, case: str, prompt: str, tokens: int) -> dict[str, float]:
        sampling: dict[str, Any] = {
            "temperature": 0.0,
            "max_new_tokens": tokens,
            "extra": {"prompt_lookup_num_tokens": 0},
        }
        if case == "bare":
            request = Request((Message("user", prompt),), Sampling(**sampling), use_template=False)
            start = time.perf_counter()
            on_a_thread(lambda: self._engine.generate(request, lambda _event: None, threading.Event()))
        else:
            asked = AskOptions(history=False, use_template=False, sampling=sampling)
            start = time.perf_counter()
            self._session.ask(prompt, asked, self._screen(case).answer("markdown"))
        return {"total_s": time.perf_counter() - start}

    def _screen(self, case: str) -> Any:
        formats = self._session.plugins.formats
        if case == "text":
            return TextScreen(formats, self._nowhere)
        if self._shell is None:
            self._shell = _shell()
        self._shell.display_pub.outputs.clear()
        return self._live_screen() if case == "live" else NotebookScreen(formats)

    def _live_screen(self) -> Any:
        """Live views, a map among them, whose messages are made as for a browser that said hello."""
        if self._live is None:
            self._live = RichScreen(self._session.plugins.formats, self._session, _Wire())
            plan = self._session.model().plan
            self._live.show(map_report(plan, live=LiveMap(plan, "bench")))
            for screen in self._live.hub.screens:
                screen.hear(Hello(screen.view))
        self._live.hub.is_heard = True
        return self._live

    def _moved(self, device_map: Mapping[str, str]) -> dict[str, float]:
        names = {block.name for block in self._engine.plan.layout.blocks}
        moved = self._session.apply({name: home for name, home in device_map.items() if name in names})
        return {
            "seconds": moved.seconds,
            "blocks": moved.count,
            "copied_bytes": sum(moved.bytes.values()),
            "load_s": self._session.model().load_s,
        }


class _Wire(Hub):
    """A hub whose messages go to JSON, and no further."""

    def post(self, event: Event) -> None:
        super().post(event)
        json.dumps(encode(event))


def _shell() -> Any:
    """IPython, with what is displayed kept instead of sent: rendering counts, the browser does not."""
    os.environ.setdefault("IPYTHONDIR", tempfile.mkdtemp(prefix="llm-magic-ipython-"))
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.display_pub = CapturingDisplayPublisher()
    return shell
