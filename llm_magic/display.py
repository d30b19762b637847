"""Live views: deltas in a terminal, one display that updates itself in a notebook.

A live view is never what stays: when an answer is done it is replaced by a static, safe bundle,
which reads the same in a notebook that is opened without a kernel.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TextIO

import psutil
from IPython.display import DisplayHandle, display

from llm_magic.answer import Answer
from llm_magic.errors import OptionError
from llm_magic.events import PhaseEvent
from llm_magic.folders import VIEWS
from llm_magic.formats import bundle, footer_text
from llm_magic.harmless.paths import without_paths
from llm_magic.harmless.terminal import sanitize
from llm_magic.hookspecs import Format
from llm_magic.plan import Plan
from llm_magic.result import Generation
from llm_magic.screen import AnswerView, ProgressView, Screen
from llm_magic.text.safe_html import escape_text
from llm_magic.units import format_bytes, format_rate, format_seconds
from llm_magic.views.report import Report

UI = Literal["text", "basic", "rich"]
STREAMED = ("markdown", "text", "code", "math")  # formats whose text can be read while it comes
_LIVE_CHARACTERS = 20_000  # of a longer answer only the end is sent while it comes
_QUIET_S = 0.5  # how often a clock moves when nothing else does
_PHASES = {
    "importing": "importing libraries",
    "reading": "reading the model's files",
    "planning": "planning",
    "downloading": "downloading",
    "loading": "loading",
    "converting": "converting (once)",
    "quantizing": "packing the weights",
    "warming up": "warming up",
    "moving": "moving",
    "measuring": "measuring",
    "prefill": "reading the prompt",
    "generating": "generating",
}


def choose_ui(is_notebook: bool) -> UI:
    """``LLM_MAGIC_UI`` when it is set, otherwise the best that the front end can show.

    Live views need a front end that runs their module. A Jupyter server that opens a notebook's
    kernel names the notebook; where none does (nbconvert, papermill), there is no front end.

    Raises
    ------
    OptionError
        When ``LLM_MAGIC_UI`` names no kind of display.
    """
    forced = os.environ.get("LLM_MAGIC_UI", "")
    if forced not in ("", "text", "basic", "rich"):
        raise OptionError(f"LLM_MAGIC_UI={forced!r} is no kind of display.", "Set it to text, basic or rich.")
    if forced in ("text", "basic"):
        return "text" if forced == "text" else "basic"
    if not is_notebook:
        return "text"
    return "rich" if (forced or _is_opened_by_a_server()) and _has_views() else "basic"


def _is_opened_by_a_server() -> bool:
    """Whether a Jupyter server named the notebook for this kernel, and not for one that started us."""
    name = os.environ.get("JPY_SESSION_NAME")
    if name is None:
        return False
    try:
        parent = psutil.Process().parent()
        return parent is None or parent.environ().get("JPY_SESSION_NAME") != name
    except (psutil.Error, OSError):  # one that we may not look at
        return True


def _has_views() -> bool:
    """Whether the views' host is installed and the views are built."""
    return find_spec("anywidget") is not None and VIEWS.exists()


def phase_words(event: PhaseEvent | None) -> str:
    """A phase as people read it: ``reading the prompt, 12 of 30 layers``."""
    if event is None:
        return "starting"
    words = _PHASES[event.phase]
    if event.total:
        amount = format_bytes if event.unit == "bytes" else str
        unit = "" if event.unit == "bytes" else f" {event.unit}"
        words += f", {amount(event.done)} of {amount(event.total)}{unit}"
    return words


class TextScreen(Screen):
    """Terminal: deltas to the output as they come; progress on one line, and only on a TTY."""

    def __init__(self, formats: Mapping[str, Format], out: TextIO | None = None) -> None:
        self._formats = formats
        self._out = out

    def progress(self, title: str, cancel: Callable[[], None]) -> ProgressView:  # noqa: ARG002
        """A line that rewrites itself."""
        return _TextProgress(title, _StatusLine(self._out or sys.stdout))

    def answer(self, output_format: str, model: str = "", plan: Plan | None = None) -> AnswerView:  # noqa: ARG002
        """Streams text; a format that needs the whole answer is printed at the end."""
        return _TextAnswer(self._formats[output_format], self._out or sys.stdout)

    def begin(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """What was written stays."""

    def show(self, shown: object) -> None:
        """Print a report; leave anything else to IPython."""
        if isinstance(shown, Report):
            (self._out or sys.stdout).write(f"{shown.text}\n")
        else:
            display(shown)


class _StatusLine:
    """One line of a terminal that is overwritten; silent when the output is no TTY."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_tty = out.isatty()
        self._shown = 0
        self._last_s = 0.0

    def show(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if not self._is_tty or (not force and now - self._last_s < 0.1):
            return
        self._last_s = now
        self.clear()
        text = sanitize(text).replace("\n", " ")[: _terminal_width() - 1]
        self._out.write(text)
        self._out.flush()
        self._shown = len(text)

    def clear(self) -> None:
        if self._shown:
            self._out.write("\r" + " " * self._shown + "\r")
            self._out.flush()
            self._shown = 0


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


class _TextProgress:
    def __init__(self, title: str, line: _StatusLine) -> None:
        self._title, self._line = title, line
        self._event: PhaseEvent | None = None
        self._started = time.monotonic()
        self._line.show(f"{title} …", force=True)

    def update(self, event: PhaseEvent | None) -> None:
        self._event = event or self._event
        bar = _text_bar(self._event)
        clock = format_seconds(time.monotonic() - self._started)
        self._line.show(f"{self._title} {bar}{phase_words(self._event)} · {clock}")

    def close(self, summary: str) -> None:  # noqa: ARG002 - the report that follows says it
        self._line.clear()


def _text_bar(event: PhaseEvent | None, width: int = 20) -> str:
    if event is None or not event.total:
        return ""
    full = round(width * min(1.0, event.done / event.total))
    return "█" * full + "░" * (width - full) + " "


class _TextAnswer:
    def __init__(self, output_format: Format, out: TextIO) -> None:
        self._format, self._out = output_format, out
        self._streams = output_format.name in STREAMED
        self._line = _StatusLine(out)
        self._written = 0

    def update(self, answer: Answer) -> None:
        text = answer.text  # once: the engine's thread goes on writing
        # What is continued stands above already: it comes again with the first new text, not before an error.
        if not self._streams or len(text) == self._written or text == answer.beginning:
            if not self._written:
                self._line.show(f"{phase_words(answer.phase)} · {format_seconds(answer.elapsed_s)}")
            return
        self._line.clear()
        self._out.write(text[self._written :])
        self._out.flush()
        self._written = len(text)

    def close(self, generation: Generation) -> None:
        self._line.clear()
        if _is_nothing(generation):
            return
        if self._streams:
            self._out.write(
                generation.text[self._written :].rstrip("\n") + "\n" + footer_text(generation) + "\n"
            )
        else:
            self._out.write(_bundle(self._format, generation)["text/plain"] + "\n")
        self._out.flush()


class Display(Protocol):
    """Shows a MIME bundle, and replaces it: ``IPython.display`` behind one ``display_id``."""

    def show(self, bundle: Mapping[str, Any]) -> None:
        """Show the first time, replace after that."""


class NotebookDisplay:
    """A display that replaces itself."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, bundle: Mapping[str, Any]) -> None:
        """Show the first time, replace after that."""
        self._put(dict(bundle), raw=True)

    def show_object(self, shown: object) -> None:
        """The same for an object that knows how it looks."""
        self._put(shown)

    def _put(self, shown: object, **options: Any) -> None:
        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(shown, **options)
        else:
            self._handle.update(shown, **options)


class NotebookScreen(Screen):
    """Notebook: static HTML that is replaced about 20 times a second, and a safe bundle at the end."""

    def __init__(self, formats: Mapping[str, Format]) -> None:
        self._formats = formats
        self._bar: NotebookDisplay | None = None

    def close(self) -> None:
        """What is shown stays."""

    def begin(self) -> None:
        """Forget the bar of an earlier cell: what is shown next belongs to this one."""
        self._bar = None

    def progress(self, title: str, cancel: Callable[[], None]) -> ProgressView:  # noqa: ARG002
        """A bar that ends as one line, or makes way for what is shown next."""
        self._bar = NotebookDisplay()
        return NotebookProgress(title, self._bar)

    def show(self, shown: object) -> None:
        """Show it, in place of the bar of the work that led to it."""
        (self._bar or NotebookDisplay()).show_object(shown)
        self._bar = None

    def answer(self, output_format: str, model: str = "", plan: Plan | None = None) -> AnswerView:  # noqa: ARG002
        """Escaped text while it comes; the format's bundle when it is done."""
        return NotebookAnswer(self._formats[output_format], NotebookDisplay())


class NotebookProgress:
    """A ``ProgressView`` of static HTML: a bar that ends as one line."""

    def __init__(self, title: str, display: Display) -> None:
        self._title, self._display = title, display
        self._event: PhaseEvent | None = None
        self._started = time.monotonic()
        self._shown_s = 0.0
        self._show()

    def update(self, event: PhaseEvent | None) -> None:
        changed = event is not None and (self._event is None or event.phase != self._event.phase)
        self._event = event or self._event
        if changed or time.monotonic() - self._shown_s > 0.1:
            self._show()

    def close(self, summary: str) -> None:
        self._display.show({"text/plain": summary, "text/html": f"<div>{escape_text(summary)}</div>"})

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        words = f"{self._title}: {phase_words(self._event)} · {format_seconds(self._shown_s - self._started)}"
        done = self._event.done / self._event.total if self._event and self._event.total else 0.0
        self._display.show({"text/plain": words, "text/html": _bar_html(words, done)})


def _bar_html(words: str, done: float) -> str:
    return (
        f'<div style="font-family:var(--jp-ui-font-family,sans-serif);max-width:40em">{escape_text(words)}'
        '<div style="height:6px;border-radius:3px;overflow:hidden;margin-top:4px;'
        'background:var(--jp-layout-color3,#bdbdbd)">'
        f'<div style="height:6px;width:{min(1.0, done):.1%};background:var(--jp-brand-color1,#1976d2)"></div>'
        "</div></div>"
    )


class NotebookAnswer:
    """An ``AnswerView`` of static HTML: escaped text while it comes, the format's bundle at the end."""

    def __init__(self, output_format: Format, display: Display) -> None:
        self._format, self._display = output_format, display
        self._seen: tuple[int, PhaseEvent | None] = (-1, None)
        self._shown_s = 0.0

    def update(self, answer: Answer) -> None:
        seen = (answer.tokens, answer.phase)
        now = time.monotonic()
        if seen == self._seen and now - self._shown_s < _QUIET_S:
            return
        self._seen, self._shown_s = seen, now
        text = answer.text[-_LIVE_CHARACTERS:]
        self._display.show({"text/plain": text, "text/html": _live_html(answer, text)})

    def close(self, generation: Generation) -> None:
        nothing = {"text/plain": "", "text/html": ""}
        self._display.show(nothing if _is_nothing(generation) else _bundle(self._format, generation))


def _is_nothing(generation: Generation) -> bool:
    """Whether an error came before any text: the error says it all."""
    return generation.finish_reason == "error" and not generation.text


def _bundle(output_format: Format, generation: Generation) -> Mapping[str, Any]:
    """The format's bundle; the plain one where a plugin's format fails, for no answer is lost to its looks."""
    try:
        return output_format.bundle(generation)
    except Exception as error:
        note = (
            f"The format {output_format.name} failed ({without_paths(f'{type(error).__name__}: {error}')})."
        )
        plain = bundle(generation)
        return {
            kind: f"{text}\n{escape_text(note) if 'html' in kind else note}" for kind, text in plain.items()
        }


def _live_html(answer: Answer, text: str) -> str:
    status = f"{phase_words(answer.phase)} · {format_seconds(answer.elapsed_s)}"
    if answer.generation_tps:
        status = f"generating · {answer.tokens} tokens · {format_rate(answer.generation_tps)}"
    cut = "… " if len(text) < len(answer.text) else ""
    return (
        f'<div role="log" style="white-space:pre-wrap">{cut}{escape_text(text)}</div>'
        '<div style="color:var(--jp-ui-font-color2,#757575);font-size:85%;margin-top:.4em">'
        f"{escape_text(status)}</div>"
    )
