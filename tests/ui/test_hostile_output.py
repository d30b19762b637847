"""Hostile answers in a page that trusts its outputs: nothing runs, nothing is fetched, no link acts.

Every payload is shown in every format, as a finished answer shows itself in a cell that was executed
(JupyterLab trusts those), and again while it streams.
"""

from __future__ import annotations

import pytest

from tests.payloads import PAYLOADS
from tests.ui.conftest import OpenNotebook
from tests.ui.jupyter import App

pytestmark = pytest.mark.browser

SHOW_FINISHED = """
from IPython.display import display
from llm_magic.plugins import Plugins
from llm_magic.result import Footprint, Generation, Turn
from tests.payloads import PAYLOADS
for payload in PAYLOADS:
    # The names in a footprint come from files and from people: they are hostile as well.
    footprint = Footprint(model=payload, generated_tokens=1, placement=payload, bound_by=payload)
    for output_format in Plugins().formats:
        display(Generation(payload, "length", footprint, Turn(payload), output_format))
"""
SHOW_STREAMING = """
from llm_magic.answer import Answer
from llm_magic.display import NotebookScreen
from llm_magic.events import PhaseEvent, TokenEvent
from llm_magic.plugins import Plugins
from llm_magic.harmless.terminal import sanitize
from tests.payloads import PAYLOADS
screen = NotebookScreen(Plugins().formats)
for payload in map(sanitize, PAYLOADS):  # as the worker sends them on
    answer, view = Answer(), screen.answer("markdown")
    answer.take(PhaseEvent("generating", 1, 2, payload, payload))
    answer.take(TokenEvent(payload))
    view.update(answer)
    progress = screen.progress(payload, lambda: None)
    progress.update(PhaseEvent("loading", 1, 2, payload, payload))
    progress.close(payload)
"""
SHOW_VIEWS = """
from IPython.display import display
from tests.payloads import PAYLOADS
from tests.test_hostile_names import VIEWS
for payload in PAYLOADS:
    for view in VIEWS.values():  # what the commands show, with names that a stranger chose
        display(view(payload))
"""

# What the outputs of a cell hold that could act, in words.
FIND_DANGER = """(outputs) => outputs.flatMap(output => {
    const found = [];
    const tags = 'script, iframe, object, embed, form, input, button, link, meta, base, style, img, image, '
        + 'video, audio, source, foreignObject, use, animate, set, template, dialog, portal';
    for (const element of output.querySelectorAll(tags)) {
        if (!element.closest('mjx-container')) found.push(element.outerHTML.slice(0, 200));
    }
    for (const element of output.querySelectorAll('*')) {
        for (const { name, value } of element.attributes) {
            const isHandler = /^on/i.test(name);
            const isCommand = /commandlinker|^data-(command|jp-|args)/i.test(name);
            const isLink = /^(href|src|srcset|action|formaction|xlink:href|poster|background|ping)$/i.test(name);
            const acts = isLink && !/^(https?:|mailto:|#)/i.test(value.trim());
            const local = isLink && element.href && new URL(element.href, location).host === location.host
                && !value.startsWith('#');
            if (isHandler || isCommand || acts || local) found.push(`${element.tagName} ${name}=${value}`);
        }
    }
    return found;
})"""


@pytest.mark.parametrize("app", ["lab", "notebook"])
@pytest.mark.parametrize(
    "cell", [SHOW_FINISHED, SHOW_STREAMING, SHOW_VIEWS], ids=["finished", "streaming", "views"]
)
def test_nothing_in_an_answer_acts(open_notebook: OpenNotebook, app: App, cell: str) -> None:
    notebook = open_notebook([cell], app)
    title, address = notebook.page.title(), notebook.page.url
    notebook.traffic.clear()
    notebook.run_all()
    rendered = notebook.page.locator(".jp-OutputArea-output")
    assert rendered.count() >= len(PAYLOADS)
    assert not notebook.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()
    assert rendered.evaluate_all(FIND_DANGER) == []
    traffic = notebook.traffic
    assert (notebook.scripts_ran(), traffic.foreign_requests, traffic.images, traffic.popups) == (
        [],
        [],
        [],
        [],
    )
    assert (notebook.page.title(), notebook.page.url) == (title, address)


def test_what_could_act_would_be_found(open_notebook: OpenNotebook) -> None:
    source = """
    from IPython.display import HTML
    HTML('<a href="javascript:1" onclick="2">a</a><p data-commandlinker-command="3">b</p><iframe></iframe>')
    """
    notebook = open_notebook([source])
    notebook.run_all()
    found = notebook.page.locator(".jp-OutputArea-output").evaluate_all(FIND_DANGER)
    assert {"A href=javascript:1", "A onclick=2", "P data-commandlinker-command=3"} < set(found)
    assert any(item.startswith("<iframe") for item in found)
