"""The screen of a notebook whose front end can run our module: live views over static HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from llm_magic.display import NotebookDisplay, NotebookScreen
from llm_magic.hookspecs import Format
from llm_magic.plan import Plan
from llm_magic.screen import AnswerView, ProgressView
from llm_magic.session import Session
from llm_magic.views.report import LiveMachine, LiveMap, Report
from llm_magic.widgets.answer import AnswerScreen
from llm_magic.widgets.hub import Hub, quietly
from llm_magic.widgets.job import JobScreen
from llm_magic.widgets.machine import MachineScreen
from llm_magic.widgets.map import MapScreen
from llm_magic.widgets.place import placed

Picture = MapScreen | MachineScreen


class RichScreen(NotebookScreen):
    """As ``NotebookScreen``, with live views where a front end says hello."""

    def __init__(self, formats: Mapping[str, Format], session: Session, hub: Hub | None = None) -> None:
        super().__init__(formats)
        self._session = session
        self.hub = hub or Hub()
        self._unobserve = session.plugins.observe(self._observe)

    def begin(self) -> None:
        """A new cell begins: what an interrupt left of an earlier one is over."""
        super().begin()
        for screen in self.hub.screens:
            if isinstance(screen, JobScreen | AnswerScreen):
                self.hub.drop(screen.view)

    def progress(self, title: str, cancel: Callable[[], None]) -> ProgressView:
        """A live view of a job, which makes way for what is shown next."""
        self._bar = NotebookDisplay()
        return JobScreen(title, self.hub, self._bar, cancel)

    def answer(self, output_format: str, model: str = "", plan: Plan | None = None) -> AnswerView:
        """A live view of an answer; the format's bundle when it is done."""
        return AnswerScreen(
            self._formats[output_format],
            self.hub,
            NotebookDisplay(),
            model=model,
            plan=plan,
        )

    def show(self, shown: object) -> None:
        """Show it; pictures in it come alive."""
        if not isinstance(shown, Report) or not any(part.live for part in shown.parts or (shown,)):
            super().show(shown)
            return
        output = _Output(self._bar or NotebookDisplay(), self.hub.key, shown)
        self._bar = None
        screens = list(output.enliven(self._picture))
        output.draw()
        for screen in screens:
            self.hub.add(screen)

    def close(self) -> None:
        """End every live view."""
        self._unobserve()
        self.hub.close()

    def _picture(self, live: LiveMap | LiveMachine, output: _Output) -> Picture:
        if isinstance(live, LiveMachine):
            return MachineScreen(live, self.hub)
        return MapScreen(live, self._session, self.hub, output.draw)

    def _observe(self, event: object) -> None:
        for screen in self.hub.screens:
            if isinstance(screen, MapScreen | MachineScreen):
                quietly(partial(screen.observe, event))


class _Output:
    """One output of a cell: reports, some of them the places of pictures."""

    def __init__(self, display: NotebookDisplay, key: str, report: Report) -> None:
        self._display, self._key = display, key
        self._parts: Sequence[Report] = report.parts or (report,)
        self._pictures: dict[int, Picture] = {}

    def enliven(self, make: Callable[[LiveMap | LiveMachine, _Output], Picture]) -> Iterator[Picture]:
        """Make a picture of every part that may come alive."""
        for index, part in enumerate(self._parts):
            if part.live is not None:
                self._pictures[index] = make(part.live, self)
                yield self._pictures[index]

    def draw(self) -> None:
        """Show everything as it is now, in place of what was shown."""
        texts, html = [], ""
        for index, part in enumerate(self._parts):
            picture = self._pictures.get(index)
            report = part if picture is None else picture.report()
            texts.append(report.text)
            html += report.html if picture is None else placed(self._key, picture.view, report.html)
        self._display.show({"text/plain": "\n".join(texts), "text/html": html})
