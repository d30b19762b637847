"""Live views in a real browser and a real kernel: text as it comes, Stop, interrupt, restart, reopening."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, WebSocket, expect

from tests.payloads import PAYLOADS
from tests.ui.conftest import OpenNotebook
from tests.ui.jupyter import KERNELS, App, Notebook
from tests.ui.live import live, serious_findings

pytestmark = pytest.mark.browser
LOAD = "%load_ext llm_magic\n%llm load starter"
ENDLESS = (
    "%%llm -t 0 --no-history -n 2000 --param min_new_tokens 1900\nCount from one to a thousand in words."
)
# Scripted tokens, where the model is not the point.
SCRIPTED = """%load_ext llm_magic
from llm_magic import llm
from tests.fake_backend import FakeBackend
backend = FakeBackend()
llm.session.plugins.backends["fake"] = backend
%llm load fake:a"""
HEARS = ["python3", "ipykernel-7.3.0"]  # a button is heard while a cell runs
DEAF = "ipykernel-6.31.0"


def begin(notebook: Notebook, cell: int) -> Locator:
    """Run a prompt cell, and return its live view once there is text."""
    notebook.start_cells(cell, cell)
    view = live(notebook, cell)
    expect(view.get_by_role("log")).to_have_text(re.compile(r"\w+ \w+"), timeout=60_000)
    return view


def needs(kernel: str) -> None:
    version = kernel.removeprefix("ipykernel-")
    assert kernel == "python3" or (KERNELS / version).exists(), "make kernels"


@pytest.mark.parametrize("app", ["lab", "notebook"])
@pytest.mark.parametrize("kernel", HEARS)
def test_stop_ends_the_answer_and_the_next_cell_runs(
    open_notebook: OpenNotebook, starter_folder: Path, app: App, kernel: str
) -> None:
    needs(kernel)
    notebook = open_notebook([LOAD, ENDLESS, "print(_llm.finish_reason, len(_llm) > 0)"], app, kernel=kernel)
    notebook.run_cell(0)
    view = begin(notebook, 1)
    stop = view.get_by_role("button", name="Stop")
    stop.wait_for()
    assert serious_findings(notebook) == []
    stop.click()
    expect(notebook.output(1)).to_contain_text("stopped by you", timeout=20_000)
    expect(live(notebook, 1)).to_have_count(0)
    notebook.run_cell(2)
    expect(notebook.output(2)).to_contain_text("stopped True")


def test_a_kernel_that_hears_nothing_says_how_to_interrupt(
    open_notebook: OpenNotebook, starter_folder: Path
) -> None:
    needs(DEAF)
    notebook = open_notebook([LOAD, ENDLESS, "print(_llm.finish_reason, len(_llm) > 0)"], kernel=DEAF)
    notebook.run_cell(0)
    view = begin(notebook, 1)
    assert "Interrupt" in view.get_by_text("Interrupt").inner_text()
    assert view.get_by_role("button", name="Stop").count() == 0
    notebook.interrupt()
    expect(notebook.output(1)).to_contain_text("interrupted by you", timeout=20_000)
    notebook.run_cell(2)
    expect(notebook.output(2)).to_contain_text("interrupted True")


@pytest.mark.parametrize("kernel", HEARS)
def test_interrupt_ends_the_answer_on_every_kernel(
    open_notebook: OpenNotebook, starter_folder: Path, kernel: str
) -> None:
    needs(kernel)
    notebook = open_notebook([LOAD, ENDLESS], kernel=kernel)
    notebook.run_cell(0)
    begin(notebook, 1)
    notebook.interrupt()
    expect(notebook.output(1)).to_contain_text("interrupted by you", timeout=20_000)


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_a_load_is_cancelled_and_leaves_nothing(open_notebook: OpenNotebook, app: App) -> None:
    slow = SCRIPTED.replace(
        "%llm load", "import time\nbackend.while_loading = lambda: time.sleep(3)\n%llm load"
    )
    notebook = open_notebook([slow, "%llm ps"], app)
    notebook.start_cells(0, 0)
    view = live(notebook, 0)
    expect(view.get_by_role("progressbar")).to_be_visible(timeout=30_000)
    cancel = view.get_by_role("button", name="Cancel")
    cancel.wait_for()
    assert serious_findings(notebook) == []
    cancel.click()
    expect(notebook.output(0)).to_contain_text("Loading fake-a was cancelled", timeout=20_000)
    expect(live(notebook, 0)).to_have_count(0)
    notebook.run_cell(1)
    expect(notebook.output(1)).to_contain_text("No model is loaded")


def test_views_speak_the_language_of_the_page_and_fit_when_zoomed(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook([SCRIPTED, "%llm map", "%llm machine"])
    notebook.page.evaluate("() => { document.documentElement.lang = 'ja' }")
    notebook.page.set_viewport_size({"width": 640, "height": 900})  # as 1280 at 200 %
    for cell in range(3):
        notebook.run_cell(cell)
    for cell, words in ((1, "ディスク"), (2, "ディスク")):
        expect(live(notebook, cell)).to_contain_text(words)
        assert live(notebook, cell).evaluate(
            """host => { const root = host.shadowRoot.querySelector('.llm');
                return root.scrollWidth <= root.clientWidth + 1 }"""
        )


def frames(notebook: Notebook) -> list[dict[str, Any]]:
    """From now on: every answer event that the page gets."""
    events: list[dict[str, Any]] = []

    def watch(socket: WebSocket) -> None:
        socket.on("framereceived", lambda payload: events.extend(_answer_events(payload)))

    notebook.page.on("websocket", watch)
    return events


def _answer_events(payload: str | bytes) -> Iterator[dict[str, Any]]:
    """Answer events in one frame of the kernel's websocket."""
    text = payload if isinstance(payload, str) else payload.decode("utf-8", "ignore")
    for found in re.finditer(r'\{"type":\s*"answer"', text):
        event, _ = json.JSONDecoder().raw_decode(text, found.start())
        if "seq" in event:
            yield event


def test_two_thousand_tokens_come_whole(open_notebook: OpenNotebook) -> None:
    script = """import time
words = [f"word{i} " for i in range(2000)]
backend.enqueue(*words, before={i: lambda stop: time.sleep(.002) for i in range(0, 2000)})"""
    notebook = open_notebook(
        [SCRIPTED, script, "%%llm\nMany.", "print(len(_llm), all(w in _llm for w in words))"]
    )
    events = frames(notebook)
    notebook.page.reload()
    notebook.wait_for_kernel()
    for cell in (0, 1, 2, 3):
        notebook.run_cell(cell)
    text = ""
    for event in events:
        text = event["text"] if event["whole"] else text + event["text"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert text.split() == [f"word{i}" for i in range(2000)]
    assert len(events) < 400  # about 20 a second, whatever the model does
    expect(notebook.output(2)).to_contain_text("word1999")
    expect(notebook.output(3)).to_contain_text("True")


def test_a_restart_says_that_the_model_is_gone(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook([SCRIPTED, "%llm map"])
    notebook.run_cell(0)
    notebook.run_cell(1)
    expect(live(notebook, 1)).to_contain_text("Fake-3M")
    notebook.page.evaluate(
        "() => jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.restart()"
    )
    expect(live(notebook, 1)).to_contain_text("Model unloaded", timeout=30_000)
    assert live(notebook, 1).get_by_role("button", name="Apply").count() == 0 or not (
        live(notebook, 1).get_by_role("button", name="Apply").is_enabled()
    )


def test_a_kernel_that_dies_says_that_the_model_is_gone(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook([SCRIPTED, "%llm map", "import os\nos.kill(os.getpid(), 9)"])
    notebook.run_cell(0)
    notebook.run_cell(1)
    expect(live(notebook, 1)).to_contain_text("Fake-3M")
    notebook.start_cells(2, 2)
    expect(live(notebook, 1)).to_contain_text("Model unloaded", timeout=60_000)


def test_a_connection_that_drops_leaves_no_stale_map_and_no_gap_in_an_answer(
    open_notebook: OpenNotebook,
) -> None:
    """The kernel goes on meanwhile: it writes an answer, and moves blocks."""
    script = """import time
words = [f"word{i} " for i in range(300)]
backend.enqueue(*words, before={i: lambda stop: time.sleep(.02) for i in range(300)})"""
    moves = "time.sleep(2)\nllm.move('layers.1', 'disk')\nprint('moved')"
    notebook = open_notebook([SCRIPTED, script, "%llm map", "%%llm\nMany.", moves])
    for cell in (0, 1, 2):
        notebook.run_cell(cell)
    begin(notebook, 3)
    drop_connection(notebook)
    # Asked until it is so: between the live view and what stays there is a moment without either.
    words = r"\s+".join(f"word{i}" for i in range(300))
    whole = re.compile(rf"^(?!.*\bword0\b.*\bword0\b).*\b{words}\b(?!.*word)", re.DOTALL)
    expect(notebook.output(3)).to_have_text(whole, timeout=30_000, use_inner_text=True)
    disk = live(notebook, 2).get_by_role("listbox", name="Disk")
    assert disk.get_by_role("option").count() == 0
    notebook.start_cells(4, 4)
    drop_connection(notebook)
    expect(disk.get_by_role("option")).to_have_count(1, timeout=30_000)
    assert "Model unloaded" not in live(notebook, 2).inner_text()
    live(notebook, 2).get_by_role("button", name="Reset to auto").click()  # and it is heard again
    expect(disk.get_by_role("option")).to_have_count(0)


def drop_connection(notebook: Notebook) -> None:
    """Close the websocket under JupyterLab, and wait until it has opened another one."""
    notebook.page.evaluate(
        """() => new Promise(resolve => {
            const kernel = jupyterapp.shell.currentWidget.context.sessionContext.session.kernel
            let wasLost = false
            kernel.connectionStatusChanged.connect((_, status) => {
                wasLost = wasLost || status !== 'connected'
                if (wasLost && status === 'connected') resolve()
            })
            kernel._ws.close()
        })"""
    )


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_a_page_that_is_loaded_again_finds_its_live_views(open_notebook: OpenNotebook, app: App) -> None:
    notebook = open_notebook([SCRIPTED, "%llm map", "%llm move layers.1 disk"], app)
    notebook.run_cell(0)
    notebook.run_cell(1)
    expect(live(notebook, 1)).to_contain_text("Fake-3M")
    notebook.save()
    notebook.page.reload()
    notebook.wait_for_kernel()
    expect(live(notebook, 1)).to_contain_text("Fake-3M", timeout=30_000)
    notebook.run_cell(2)
    expect(live(notebook, 1).get_by_role("listbox", name="Disk")).to_contain_text("1")


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_a_saved_notebook_reads_without_its_kernel(open_notebook: OpenNotebook, app: App) -> None:
    notebook = open_notebook([SCRIPTED, "backend.enqueue('Hello')", "%llm map", "%%llm\nHi."], app)
    for cell in range(4):
        notebook.run_cell(cell)
    saved = notebook.save()
    for cell in saved.cells[2:]:
        (output,) = cell.outputs
        assert set(output.data) == {"text/plain", "text/html"}
    assert "widgets" not in saved.metadata
    reopened = open_notebook(notebook.server.notebooks / notebook.name, app)
    expect(reopened.output(2)).to_contain_text("Fake-3M")
    expect(reopened.output(2)).to_contain_text("blocks in model order")
    expect(reopened.output(3)).to_contain_text("Hello")
    assert live(reopened, 2).count() == 0
    assert "model not found" not in reopened.page.inner_text("body")


@pytest.mark.parametrize("ui", ["text", "basic", "rich"])
def test_a_variable_forces_the_kind_of_display(open_notebook: OpenNotebook, ui: str) -> None:
    notebook = open_notebook([f"%env LLM_MAGIC_UI={ui}", SCRIPTED, "%llm map"])
    for cell in range(3):
        notebook.run_cell(cell)
    expect(notebook.output(2)).to_contain_text("Fake-3M")
    assert live(notebook, 2).count() == (ui == "rich")
    assert (notebook.output(2).locator("[data-mime-type='text/html']").count() > 0) == (ui != "text")


def test_a_view_alone_works_as_any_widget(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook([SCRIPTED, "llm.view('map')", "%llm move layers.1 disk"])
    for cell in range(3):
        notebook.run_cell(cell)
    view = live(notebook, 1)
    expect(view.get_by_role("listbox", name="Disk")).to_contain_text("1")


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_hostile_text_in_live_views_is_text(open_notebook: OpenNotebook, app: App) -> None:
    hostile = """from tests.payloads import PAYLOADS
import threading
shown = threading.Event()
backend.enqueue(*PAYLOADS, "the end", before={len(PAYLOADS): lambda stop: shown.wait(60)})
from IPython import get_ipython"""
    notebook = open_notebook([SCRIPTED, hostile, "%%llm\nGo on."], app)
    notebook.run_cell(0)
    notebook.run_cell(1)
    notebook.traffic.clear()
    notebook.start_cells(2, 2)
    log = live(notebook, 2).get_by_role("log")
    expect(log).to_contain_text(PAYLOADS[0].strip().splitlines()[0][:40], timeout=30_000)
    elements = log.evaluate("log => [...log.querySelectorAll('*')].map(e => e.localName)")
    assert set(elements) <= {"div", "span", "p"}
    live(notebook, 2).get_by_role("button", name="Stop").click()
    notebook.page.evaluate(
        "() => jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.interrupt()"
    )
    traffic = notebook.traffic
    assert (notebook.scripts_ran(), traffic.foreign_requests, traffic.images, traffic.popups) == (
        [],
        [],
        [],
        [],
    )
