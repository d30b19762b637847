"""The pictures of the README: ``python -m tests.ui.pictures`` takes them anew.

Everything in them is real: the starter model on this computer, and the plan of a model of 32 B parameters,
of which a folder has the configuration and the headers, for a described desktop.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright

from tests.ui.jupyter import CHROMIUM_FLAGS, REPOSITORY, Notebook, Server, chromium_path, write_notebook
from tests.ui.live import drag, live, picture

DOCS = REPOSITORY / "docs"
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
STARTER = [
    "%load_ext llm_magic\n%llm load starter --max-memory cpu=190MiB -c 2048",
    "%%llm -t 0 -n 300\nTell me about the sea.",
    "%llm map",
]


def headers_only(folder: Path) -> None:
    """A folder that looks like the model's, with holes where its weights would be."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_32B))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)


def open_with(server: Server, browser: Browser, name: str, cells: list[str], *, dark: bool) -> Notebook:
    write_notebook(server.notebooks / name, cells)
    return Notebook(server, browser, "lab", name, dark=dark)


def take_plan(server: Server, browser: Browser, *, dark: bool) -> None:
    """The map of a model that does not fit the GPU; in the dark with blocks about to move."""
    model = server.notebooks / "Qwen3-32B"
    if not model.exists():
        headers_only(model)
    machine = REPOSITORY / "examples" / "machines" / "rtx4090.json"
    plan = f"%llm plan ./{model.name} --machine {machine} --max-memory cpu=40GiB -c 8192"
    notebook = open_with(server, browser, f"plan-{dark}.ipynb", ["%load_ext llm_magic", plan], dark=dark)
    notebook.run_cell(0)
    notebook.run_cell(1)
    view = live(notebook, 1)
    if dark:
        blocks = view.get_by_role("listbox", name="RAM").get_by_role("option")
        blocks.nth(3).click()
        blocks.nth(8).click(modifiers=["Shift"])
        drag(blocks.nth(8), view.get_by_role("listbox", name="Disk"))
        expect(view).to_contain_text(re.compile("6 blocks"))
        expect(view.locator(".results")).to_be_visible()
        notebook.page.mouse.move(0, 0)
    picture(view, DOCS / ("editor-dark.png" if dark else "memory-map.png"))
    notebook.close()


def take_answer(server: Server, browser: Browser) -> None:
    """An answer that is coming, over a map that shows where the time of each layer goes."""
    notebook = open_with(server, browser, "answer.ipynb", STARTER, dark=False)
    notebook.page.set_viewport_size({"width": 1180, "height": 1180})
    notebook.run_cell(0)
    notebook.start_cells(1, 1)
    expect(live(notebook, 1).get_by_role("log")).to_have_text(re.compile(r"(\S+ ){40}"), timeout=90_000)
    notebook.screenshot(DOCS / "live.png")
    notebook.interrupt()
    notebook.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(CHROMIUM_FLAGS))
        try:
            take_plan(server, browser, dark=False)
            take_plan(server, browser, dark=True)
            take_answer(server, browser)
        finally:
            browser.close()
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
