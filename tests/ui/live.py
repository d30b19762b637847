"""What the tests of live views share: the view of a cell, axe-core, and drags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Locator

from tests.ui.jupyter import REPOSITORY, Notebook

AXE = REPOSITORY / "labextension" / "node_modules" / "axe-core" / "axe.min.js"


def live(notebook: Notebook, cell: int) -> Locator:
    """The live view of a cell's output."""
    return notebook.output(cell).locator(".llm-magic-live")


def serious_findings(notebook: Notebook) -> list[Any]:
    """What axe-core finds serious or critical in the live views of a page."""
    if not notebook.page.evaluate("() => 'axe' in globalThis"):
        notebook.page.add_script_tag(content=AXE.read_text())
    found = notebook.page.evaluate(
        """async () => (await axe.run({ include: ['.llm-magic-live'] })).violations
            .filter(v => ['serious', 'critical'].includes(v.impact))
            .map(v => [v.id, v.help, v.nodes.slice(0, 3).map(n => [n.target, n.failureSummary])])"""
    )
    return list(found)


def drag(block: Locator, target: Locator) -> None:
    """Press on a block, move to the middle of the target, let go."""
    mouse = block.page.mouse
    block.hover()  # waits until it stands still
    mouse.down()
    box = target.bounding_box()
    assert box is not None
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=6)
    mouse.up()


def picture(view: Locator, path: Path) -> None:
    """A picture of one live view."""
    path.parent.mkdir(parents=True, exist_ok=True)
    view.screenshot(path=path)
