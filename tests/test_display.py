from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.answer import Answer
from llm_magic.display import NotebookAnswer, TextScreen, choose_ui, phase_words
from llm_magic.errors import OptionError
from llm_magic.events import PhaseEvent, TokenEvent
from llm_magic.plugins import Plugins
from llm_magic.result import Footprint, Generation
from llm_magic.screen import QuietAnswer
from tests.fake_backend import built_in_points

FORMATS = Plugins(tuple(built_in_points())).formats


class Recorder:
    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def show(self, bundle) -> None:
        self.shown.append(dict(bundle))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answer_of(*pieces: str) -> Answer:
    answer = Answer()
    for piece in pieces:
        answer.take(TokenEvent(piece))
    return answer


def test_the_front_end_decides_and_a_variable_forces(monkeypatch) -> None:
    monkeypatch.delenv("LLM_MAGIC_UI", raising=False)
    assert (choose_ui(True), choose_ui(False)) == ("basic", "text")
    monkeypatch.setenv("LLM_MAGIC_UI", "text")
    assert choose_ui(True) == "text"
    monkeypatch.setenv("LLM_MAGIC_UI", "3d")
    with pytest.raises(OptionError, match="no kind of display"):
        choose_ui(True)


def test_live_views_where_a_server_opened_the_kernel_for_a_notebook(monkeypatch) -> None:
    monkeypatch.delenv("LLM_MAGIC_UI", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    assert (choose_ui(True), choose_ui(False)) == ("rich", "text")
    # A kernel that somebody started from a notebook has the variable from there, and no front end.
    kernel = [sys.executable, "-c", "from llm_magic.display import choose_ui; print(choose_ui(True))"]
    between = [sys.executable, "-c", f"import subprocess; subprocess.run({kernel!r}, check=True)"]
    for command, ui in ((kernel, "rich"), (between, "basic")):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{ui}\n"
    monkeypatch.setattr("llm_magic.display.VIEWS", Path("nowhere"))
    assert choose_ui(True) == "basic"
    monkeypatch.setenv("LLM_MAGIC_UI", "rich")
    assert (choose_ui(True), choose_ui(False)) == ("basic", "text")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (None, "starting"),
        (PhaseEvent("importing"), "importing libraries"),
        (PhaseEvent("prefill", 12, 30, "layers"), "reading the prompt, 12 of 30 layers"),
        (PhaseEvent("loading", 1 << 30, 3 << 30, "bytes"), "loading, 1.0 GiB of 3.0 GiB"),
    ],
)
def test_phases_in_words(event, words) -> None:
    assert phase_words(event) == words


def test_a_terminal_gets_each_piece_once_and_a_footer() -> None:
    out = io.StringIO()
    view = TextScreen(FORMATS, out).answer("markdown")
    answer = answer_of()
    for piece in ("The ", "capital"):
        answer.take(TokenEvent(piece))
        view.update(answer)
        view.update(answer)
    view.close(Generation("The capital.", footprint=Footprint(generated_tokens=3, generation_tps=31.4)))
    assert out.getvalue().startswith("The capital.\n")
    assert "31.4 tok/s" in out.getvalue().splitlines()[1]


def test_tokens_that_come_while_others_are_written_are_not_lost() -> None:
    answer = answer_of("The ")

    class SlowOut(io.StringIO):
        def flush(self) -> None:
            if not self.getvalue().endswith("is Rome."):
                answer.take(TokenEvent("capital "))

    out = SlowOut()
    view = TextScreen(FORMATS, out).answer("markdown")
    view.update(answer)
    answer.take(TokenEvent("is Rome."))
    view.update(answer)
    view.close(Generation(answer.text))
    assert out.getvalue().startswith("The capital is Rome.")


def test_what_is_continued_is_written_again_with_new_text_only() -> None:
    out = io.StringIO()
    view, answer = TextScreen(FORMATS, out).answer("markdown"), Answer("Once")
    view.update(answer)
    assert out.getvalue() == ""
    answer.take(TokenEvent(" upon"))
    view.update(answer)
    assert out.getvalue() == "Once upon"


def test_a_format_that_needs_the_whole_answer_waits_for_it() -> None:
    out = io.StringIO()
    view = TextScreen(FORMATS, out).answer("json")
    view.update(answer_of('{"a":'))
    assert out.getvalue() == ""
    view.close(Generation('{"a": 1}', display_format="json"))
    assert '"a": 1' in out.getvalue()


def test_progress_rewrites_one_line_of_a_terminal_and_is_silent_elsewhere() -> None:
    for out, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        view = TextScreen(FORMATS, out).progress("Loading a", lambda: None)
        view.update(PhaseEvent("loading", 1, 2, "tensors"))
        view.close("done")
        assert ("Loading a" in out.getvalue()) == is_shown
        assert "\n" not in out.getvalue()
        if is_shown:
            assert out.getvalue().endswith(" \r")  # nothing of it is left on the line


def test_a_notebook_shows_the_phase_at_once_then_escaped_text_then_the_bundle() -> None:
    recorder = Recorder()
    view = NotebookAnswer(FORMATS["markdown"], recorder)
    view.update(Answer())
    assert "starting" in recorder.shown[0]["text/html"]
    view.update(answer_of("<script>alert(1)</script>"))
    assert "<script" not in recorder.shown[-1]["text/html"]
    assert "&lt;script&gt;" in recorder.shown[-1]["text/html"]
    generation = Generation("**bold**")
    view.close(generation)
    assert recorder.shown[-1] == dict(FORMATS["markdown"].bundle(generation))
    assert "<strong>bold</strong>" in recorder.shown[-1]["text/html"]


def test_an_unchanged_answer_is_not_sent_again_at_once() -> None:
    recorder = Recorder()
    view = NotebookAnswer(FORMATS["markdown"], recorder)
    answer = answer_of("x")
    for _ in range(20):
        view.update(answer)
    assert len(recorder.shown) < 20


def test_a_very_long_answer_sends_only_its_end_while_it_comes() -> None:
    recorder = Recorder()
    view = NotebookAnswer(FORMATS["markdown"], recorder)
    view.update(answer_of("a" * 50_000, "the end"))
    assert len(recorder.shown[0]["text/html"]) < 25_000
    assert "the end" in recorder.shown[0]["text/html"]


def test_quiet_shows_only_the_end() -> None:
    recorder = Recorder()
    view = QuietAnswer(NotebookAnswer(FORMATS["text"], recorder))
    view.update(answer_of("x"))
    assert recorder.shown == []
    view.close(Generation("x"))
    assert len(recorder.shown) == 1


def test_a_format_that_fails_shows_the_answer_all_the_same() -> None:
    def fail(generation):
        raise KeyError("/home/someone/secret")

    recorder = Recorder()
    broken = replace(FORMATS["text"], name="broken", bundle=fail)
    NotebookAnswer(broken, recorder).close(Generation("<b>kept</b>"))
    assert "<b>kept</b>" in recorder.shown[-1]["text/plain"]
    assert "The format broken failed (KeyError" in recorder.shown[-1]["text/plain"]
    assert "&lt;b&gt;kept" in recorder.shown[-1]["text/html"]
    assert "someone" not in str(recorder.shown)
