"""The example notebooks run from a fresh kernel, and what is saved in them reads well without one."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parent.parent / "examples"
FIRST = EXAMPLES / "01_first_prompt.ipynb"
MOVES = EXAMPLES / "02_move_layers.ipynb"
# A path of somebody's computer, whatever its system; /s and the like in prose are none.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w/.~:<])/(?:home|root|tmp|Users|var|private|usr|opt|work|mnt)/|[A-Z]:\\\\?\w"
)


@pytest.fixture(scope="module")
def execute(starter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], NotebookNode]:
    """Runs a notebook in a real kernel, in a folder of its own, once."""

    @cache
    def run(path: Path) -> NotebookNode:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        folder = tmp_path_factory.mktemp("canary-folder")
        nbclient.NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
        return notebook

    return run


@pytest.fixture(params=["saved", "executed"])
def version(request: pytest.FixtureRequest, execute: Callable[[Path], NotebookNode]) -> Any:
    """A notebook as it is in the repository, or as a fresh run leaves it."""
    return execute if request.param == "executed" else lambda path: nbformat.read(path, as_version=4)


@pytest.fixture(params=[FIRST, MOVES], ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest, version: Any) -> NotebookNode:
    """Each notebook in each version."""
    found: NotebookNode = version(request.param)
    return found


def test_the_model_knows_its_geography_wherever_its_layers_are(version: Any) -> None:
    notebook = version(FIRST)
    answers = [text_of(c) for c in notebook.cells if c.source.endswith("capital of France?")]
    assert len(answers) == 2
    assert all("Paris" in answer for answer in answers)
    first_lines = [answer.strip().splitlines()[0] for answer in answers]
    assert first_lines[0] == first_lines[1]
    assert "disk" in answers[1]
    assert "disk" not in answers[0]


def test_every_cell_has_run_without_an_error(notebook: NotebookNode) -> None:
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]


def test_every_display_reads_as_text_and_is_no_widget(notebook: NotebookNode) -> None:
    displays = [o for o in outputs(notebook) if o.output_type in {"display_data", "execute_result"}]
    assert displays
    for output in displays:
        assert output.data["text/plain"].strip()
        assert set(output.data) <= {"text/plain", "text/html"}
    assert "widgets" not in notebook.metadata


def test_layers_move_in_the_middle_of_a_conversation(version: Any) -> None:
    notebook = version(MOVES)
    said = {c.source: text_of(c) for c in notebook.cells if c.cell_type == "code"}
    answers = [text_of(c) for c in notebook.cells if c.source.endswith("capital of France?")]
    assert len({answer.strip().splitlines()[0] for answer in answers}) == 1
    assert "layers.15–29" in said["%llm move layers.15-29 disk"]
    followed_up = next(text for source, text in said.items() if "famous for" in source)
    assert "prompt tokens reused" in followed_up
    assert "disk" in followed_up
    assert "disk → RAM" in said["%llm undo"]
    assert "FORECAST NOW" in said["%llm bench"]


def test_prompts_and_reports_say_what_they_should(version: Any) -> None:
    notebook = version(FIRST)
    said = {c.source: text_of(c) for c in notebook.cells if c.cell_type == "code"}
    for source, text in said.items():
        if source.startswith("%%llm"):
            assert "tok/s" in text, source
        elif source.startswith("%llm"):
            assert text.strip(), source
    assert "small" in said["%llm ps"]
    assert "disk" in said["%llm plan starter --max-memory cpu=150MiB"]
    followed_up = next(text for source, text in said.items() if "famous for" in source)
    assert "Eiffel" in followed_up
    assert "prompt tokens reused" in followed_up
    listed = next(text for source, text in said.items() if "{trips}" in source)
    assert all(city in listed for city in ("Lisbon", "Oslo", "Rome"))


def test_outputs_hold_nothing_of_the_computer_they_were_made_on(notebook: NotebookNode) -> None:
    written = nbformat.writes(NotebookNode(notebook | {"cells": [without_source(c) for c in notebook.cells]}))
    assert not ABSOLUTE_PATH.search(written)
    assert "canary-folder" not in written
    names = {getpass.getuser(), socket.gethostname(), Path.home().name} - {""}
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", written)]


@pytest.mark.parametrize("tool", ["papermill", "nbconvert"])
def test_other_runners(tool: str, starter_folder: Path, tmp_path: Path) -> None:
    """The first cells only: what differs between runners is how they start and stop a kernel."""
    short = nbformat.read(FIRST, as_version=4)
    short.cells = [c for c in short.cells if c.cell_type == "code"][:3]
    source, target = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    nbformat.write(short, source)
    command = {
        "papermill": ["papermill", "--no-progress-bar", "-k", "python3", str(source), str(target)],
        "nbconvert": ["nbconvert", "--execute", "--to", "notebook", "--output", str(target), str(source)],
    }[tool]
    environment = os.environ | {"JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    subprocess.run(
        [sys.executable, "-m", *command], check=True, capture_output=True, env=environment, cwd=tmp_path
    )
    done = nbformat.read(target, as_version=4)
    assert "Paris" in text_of(done.cells[2])


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def text_of(cell: NotebookNode) -> str:
    """What a cell says in plain text."""
    parts = [o["text"] if "text" in o else o["data"]["text/plain"] for o in cell.get("outputs", [])]
    return "\n".join(parts)


def without_source(cell: NotebookNode) -> NotebookNode:
    return NotebookNode(cell | {"source": ""})
