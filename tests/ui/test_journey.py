"""The notebooks as a person meets them: opened, run, read; in light and dark, in both front ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.ui.conftest import OpenNotebook
from tests.ui.jupyter import REPOSITORY, App
from tests.ui.live import live

pytestmark = pytest.mark.browser
FIRST = REPOSITORY / "examples" / "01_first_prompt.ipynb"
MOVES = REPOSITORY / "examples" / "02_move_layers.ipynb"
STREAMED = "%%llm --temperature 0 --max-new-tokens 60\nCount from one to fifty in words."


@pytest.mark.parametrize(
    ("path", "app", "dark"),
    [(FIRST, "lab", False), (FIRST, "lab", True), (FIRST, "notebook", False), (MOVES, "lab", True)],
    ids=["first-lab-light", "first-lab-dark", "first-notebook", "moves-lab-dark"],
)
def test_a_notebook_runs_and_reads_well(
    open_notebook: OpenNotebook, starter_folder: Path, screenshots: Path, path: Path, app: App, dark: bool
) -> None:
    notebook = open_notebook(path, app, dark=dark)
    notebook.page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    notebook.run_all()
    saved = notebook.save()
    asked = [i for i, cell in enumerate(saved.cells) if cell.source.endswith("capital of France?")]
    for cell in asked:
        notebook.output(cell).scroll_into_view_if_needed()
        expect(notebook.output(cell)).to_contain_text("Paris")
        expect(notebook.output(cell)).to_contain_text("tok/s")
        theme = "dark" if dark else "light"
        take = screenshots / f"journey-{path.stem[:2]}-{app}-{theme}-{cell}.png"
        notebook.screenshot(take)
        assert take.stat().st_size > 10_000
    assert not [o for cell in saved.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert (notebook.traffic.foreign_requests, notebook.scripts_ran()) == ([], [])


@pytest.mark.parametrize("ui", ["rich", "basic"])
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_text_appears_while_the_model_writes_and_one_static_output_stays(
    open_notebook: OpenNotebook, starter_folder: Path, app: App, ui: str
) -> None:
    notebook = open_notebook(
        [f"%env LLM_MAGIC_UI={ui}\n%load_ext llm_magic\n%llm load starter", STREAMED], app
    )
    notebook.run_cell(0)
    notebook.page.evaluate(WATCH_TEXT)
    notebook.run_cell(1)
    seen = notebook.page.evaluate("() => globalThis.seenTexts")
    growing = [text for text in seen if "generating" in text]
    assert len(growing) >= 3  # states of the answer that the page showed while it came
    (output,) = notebook.save().cells[1].outputs
    assert set(output.data) == {"text/plain", "text/html"}
    assert "generating" not in output.data["text/html"]
    assert "tok/s" in output.data["text/plain"]


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_interrupt_keeps_the_text_and_stops_the_queue(
    open_notebook: OpenNotebook, starter_folder: Path, app: App
) -> None:
    endless = (
        "%%llm --temperature 0 --no-history --max-new-tokens 2000\nCount from one to a thousand in words."
    )
    after = "%%llm --temperature 0 --no-history\nWhat is the capital of France?"
    notebook = open_notebook(
        [
            "%load_ext llm_magic\n%llm load starter",
            endless,
            "never = 1",
            "print(len(_llm) > 0, _llm.finish_reason)",
            after,
        ],
        app,
    )
    notebook.run_cell(0)
    notebook.start_cells(1, 2)
    notebook.output(1).get_by_text("tokens ·").or_(live(notebook, 1).get_by_text("tokens")).first.wait_for()
    notebook.interrupt()
    expect(notebook.output(1)).to_contain_text("interrupted")
    notebook.run_cell(3)
    expect(notebook.output(3)).to_contain_text("True interrupted")
    notebook.run_cell(4)
    expect(notebook.output(4)).to_contain_text("Paris")
    cells = notebook.save().cells
    assert cells[2].execution_count is None
    assert cells[1].outputs[0].data["text/plain"].strip()


WATCH_TEXT = """() => {
    globalThis.seenTexts = [];
    const look = () => {
        const outputs = document.querySelectorAll('.jp-OutputArea-output');
        const last = outputs[outputs.length - 1];
        const live = last?.querySelector('.llm-magic-live')?.shadowRoot?.querySelector('.llm');
        const text = (live ?? last)?.innerText ?? '';
        if (text && globalThis.seenTexts.at(-1) !== text) globalThis.seenTexts.push(text);
        requestAnimationFrame(look);
    };
    look();
}"""
