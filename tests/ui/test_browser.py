"""The harness itself: it would notice a script that runs, a request, an image, a dialog."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.ui.conftest import OpenNotebook
from tests.ui.jupyter import App

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_cells_run_and_their_outputs_appear(open_notebook: OpenNotebook, app: App) -> None:
    notebook = open_notebook(["6 * 7", "print('done')"], app)
    notebook.run_all()
    expect(notebook.output(0)).to_contain_text("42")
    expect(notebook.output(1)).to_contain_text("done")
    saved = notebook.save()
    assert saved.cells[0].outputs[0].data["text/plain"] == "42"


def test_what_must_not_happen_would_be_seen(open_notebook: OpenNotebook) -> None:
    source = """
    from IPython.display import HTML
    HTML('<script>alert("ran"); window.pwned = 1</script><img src="https://elsewhere.example/x.png"><img src="/files/x.png">')
    """
    notebook = open_notebook([source])
    notebook.run_all()
    notebook.output(0).locator("img").nth(1).wait_for(state="attached")
    assert notebook.scripts_ran() == ["alert(ran)", "pwned"]
    assert set(notebook.traffic.foreign_requests) == {"https://elsewhere.example/x.png"}
    assert {url.rpartition("/")[2] for url in notebook.traffic.images} == {"x.png"}
