"""One server and one browser for all browser tests; a notebook of its own for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.ui.jupyter import CHROMIUM_FLAGS, App, Notebook, Server, chromium_path, write_notebook

OpenNotebook = Callable[..., Notebook]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("jupyter"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium_path()
    if path is None and os.environ.get("CI"):
        pytest.fail("Continuous integration needs Chromium: make browser")
    if path is None:
        pytest.skip("no Chromium here: make browser")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield running
        running.close()


@pytest.fixture
def open_notebook(server: Server, browser: Browser, request: pytest.FixtureRequest) -> Iterator[OpenNotebook]:
    """``open_notebook(cells, app="lab")``: a new notebook, open and connected."""
    opened: list[Notebook] = []

    def open_(
        cells: Sequence[str] | Path, app: App = "lab", *, dark: bool = False, kernel: str = "python3"
    ) -> Notebook:
        name = f"{request.node.name.split('[')[0]}-{len(list(server.notebooks.iterdir()))}.ipynb"
        target = server.notebooks / name
        if isinstance(cells, Path):
            target.write_bytes(cells.read_bytes())
        else:
            write_notebook(target, cells, kernel)
        opened.append(Notebook(server, browser, app, name, dark=dark))
        return opened[-1]

    yield open_
    for notebook in opened:
        notebook.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures go: kept in the folder named by LLM_MAGIC_SCREENSHOTS, if any."""
    return Path(os.environ.get("LLM_MAGIC_SCREENSHOTS") or tmp_path)
