"""Third-party plugins, installed by pip and found through their entry points in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ECHO = Path(__file__).parent.parent / "examples" / "plugin_echo"

BROKEN_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "llm-magic-broken"
version = "0.1.0"
[project.entry-points.llm_magic]
broken = "llm_magic_broken"
[tool.hatch.build.targets.wheel]
only-include = ["llm_magic_broken.py"]
"""

RUN_CELLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(history_manager=None)
for cell in json.loads(sys.argv[1]):
    print(">>>", cell)
    if not shell.run_cell(cell, store_history=True).success:
        sys.exit(f"failed: {cell}")
"""


def install(source: Path, target: Path) -> None:
    """Install a package from its folder as pip does, without the network."""
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-warn-script-location", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def run_cells(site: Path, cells: Sequence[str]) -> str:
    """What IPython prints when it runs the cells with the packages of ``site`` beside ours."""
    environment = os.environ | {"PYTHONPATH": str(site), "IPYTHONDIR": str(site.parent / "ipython")}
    command = [sys.executable, "-W", "error", "-c", RUN_CELLS, json.dumps(cells)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: the example plugin, and one that fails when it is imported."""
    broken = tmp_path_factory.mktemp("broken")
    (broken / "pyproject.toml").write_text(BROKEN_PYPROJECT)
    (broken / "llm_magic_broken.py").write_text("raise RuntimeError('not my day')\n")
    target = tmp_path_factory.mktemp("plugins") / "site"
    install(ECHO, target)
    install(broken, target)
    return target


def test_the_example_plugin_loads_and_answers(site: Path) -> None:
    output = run_cells(
        site,
        [
            "%load_ext llm_magic",
            "%llm load echo:parrot",
            "%%llm heard <<\nPolly wants a cracker",
            "print([heard, heard.finish_reason, heard.footprint.generated_tokens])",
            "%%llm cut << --max-new-tokens 2\nPolly wants a cracker",
            "print([cut, cut.finish_reason])",
            "%llm ps",
            "%llm unload",
        ],
    )
    assert "['Polly wants a cracker', 'stop', 4]" in output
    assert "['Polly wants', 'length']" in output
    assert "parrot" in output.split(">>> %llm ps")[1]


def test_the_example_command_runs_and_is_in_the_help(site: Path) -> None:
    output = run_cells(site, ["%load_ext llm_magic", "%llm shout it works", "%llm help"])
    assert "IT WORKS!" in output
    assert "Say it louder." in output


def test_a_broken_plugin_is_named_and_breaks_nothing(site: Path) -> None:
    cells = [
        "%load_ext llm_magic",
        "%llm plugins",
        "%llm doctor",
        "%llm load echo:parrot",
        "%%llm\nstill here",
    ]
    plugins, rest = run_cells(site, cells).split(">>> %llm plugins")[1].split(">>> %llm doctor")
    doctor, answer = rest.split(">>> %llm load")
    for report in (plugins, doctor):
        assert "broken" in report
        assert "RuntimeError: not my day" in report
    assert "echo" in plugins
    assert "still here" in answer.split(">>> %%llm\nstill here")[1]
    assert "Traceback" not in answer
