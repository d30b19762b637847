"""The memory map and its editor, in a real browser with the starter model: watch, drag, apply, ask again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.ui.conftest import OpenNotebook
from tests.ui.jupyter import App
from tests.ui.live import drag, live, picture, serious_findings

pytestmark = pytest.mark.browser
HALF = "%load_ext llm_magic\n%llm load starter --max-memory cpu=190MiB -c 1024"
ASK = "%%llm -t 0 -n 24 --no-history\nWhat is the capital of France, and what is it known for?"
KEEP = "before = str(_llm)"
SAME = "print('same answer:', before == str(_llm), 'tokens:', len(_llm) > 20)"


@pytest.mark.parametrize(("app", "dark"), [("lab", False), ("notebook", True)], ids=["lab", "notebook-dark"])
def test_a_block_is_dragged_applied_and_the_answer_is_the_same(
    open_notebook: OpenNotebook, starter_folder: Path, screenshots: Path, app: App, dark: bool
) -> None:
    notebook = open_notebook([HALF, ASK, KEEP, "%llm map", ASK, SAME, "%llm machine"], app, dark=dark)
    for cell in (0, 1, 2, 3):
        notebook.run_cell(cell)
    view = live(notebook, 3)
    ram, disk = view.get_by_role("listbox", name="RAM"), view.get_by_role("listbox", name="Disk")
    on_disk = disk.get_by_role("option").count()
    assert on_disk > 10
    drag(disk.get_by_role("option", name=re.compile(r"^layers\.\d+")).last, ram)
    expect(disk.get_by_role("option")).to_have_count(on_disk - 1)
    apply = view.get_by_role("button", name="Apply")
    expect(view).to_contain_text("does not fit")  # the RAM was full: nothing can be applied
    expect(apply).to_be_disabled()
    view.get_by_role("button", name="Undo").click()
    expect(disk.get_by_role("option")).to_have_count(on_disk)
    drag(ram.get_by_role("option", name=re.compile(r"^layers\.\d+")).first, disk)
    expect(disk.get_by_role("option")).to_have_count(on_disk + 1)
    picture(view, screenshots / f"map-proposal-{app}.png")
    expect(apply).to_be_enabled()
    apply.click()
    expect(view.get_by_role("status")).to_contain_text(re.compile("1 block"), timeout=20_000)
    notebook.run_cell(4)
    picture(view, screenshots / f"map-{app}.png")
    expect(view).to_contain_text("Last sweep")  # where the time of the blocks went
    notebook.run_cell(5)
    expect(notebook.output(5)).to_contain_text("same answer: True tokens: True")
    notebook.run_cell(6)
    machine = live(notebook, 6)
    expect(machine).to_contain_text("Path of one token")
    picture(machine, screenshots / f"machine-{app}.png")
    assert serious_findings(notebook) == []
    kept = notebook.save().cells[3].outputs[0].data["text/plain"]  # it follows what was applied
    strip = next(line for line in kept.splitlines() if re.fullmatch(r"  [RD]+", line))
    assert strip.count("D") == on_disk + 1
    assert (notebook.traffic.foreign_requests, notebook.scripts_ran()) == ([], [])


def test_blocks_move_by_keyboard_alone(open_notebook: OpenNotebook, starter_folder: Path) -> None:
    notebook = open_notebook([HALF, "%llm map"])
    notebook.run_cell(0)
    notebook.run_cell(1)
    view = live(notebook, 1)
    ram, disk = view.get_by_role("listbox", name="RAM"), view.get_by_role("listbox", name="Disk")
    in_ram, on_disk = ram.get_by_role("option").count(), disk.get_by_role("option").count()
    ram.get_by_role("option", name=re.compile(r"^layers\.\d+")).first.focus()
    page = notebook.page
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    page.keyboard.press("Space")
    page.keyboard.press("Alt+ArrowDown")
    expect(disk.get_by_role("option")).to_have_count(on_disk + 1)
    expect(ram.get_by_role("option")).to_have_count(in_ram - 1)
    for key in ("a", "b", "d", "d", "x", "j", "k"):  # the notebook's own shortcuts
        page.keyboard.press(key)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells
    page.keyboard.press("Control+z")
    expect(disk.get_by_role("option")).to_have_count(on_disk)


def test_a_plan_is_edited_before_it_is_loaded(open_notebook: OpenNotebook, starter_folder: Path) -> None:
    notebook = open_notebook(["%load_ext llm_magic\n%llm plan starter -c 1024", "%llm ps", ASK])
    notebook.run_cell(0)
    view = live(notebook, 0)
    ram, disk = view.get_by_role("listbox", name="RAM"), view.get_by_role("listbox", name="Disk")
    expect(disk.get_by_role("option")).to_have_count(0)
    drag(ram.get_by_role("option", name=re.compile(r"^layers\.3\b")), disk)
    expect(disk.get_by_role("option")).to_have_count(1)
    load = view.get_by_role("button", name="Load")
    expect(load).to_be_enabled()
    load.click()
    expect(view.get_by_role("button", name="Apply")).to_be_visible(timeout=60_000)
    notebook.run_cell(1)
    expect(notebook.output(1)).to_contain_text("starter")
    notebook.run_cell(2)
    expect(notebook.output(2)).to_contain_text("Paris")
