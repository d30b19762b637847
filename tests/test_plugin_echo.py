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

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "llm-magic-{name}"
version = "0.1.0"
[project.entry-points.llm_magic]
{name} = "llm_magic_{name}"
[tool.hatch.build.targets.wheel]
only-include = ["llm_magic_{name}.py"]
"""

MORE_HOOKS = """
from llm_magic.hookspecs import Format, Planner, hookimpl

@hookimpl
def register_planners(register):
    register(Planner("nowhere", "Everything on a device that is not there.", lambda *_: {"": "tape"}))
    register(Planner("here", "Everything in RAM.", lambda *_: {"": "cpu"}))

@hookimpl
def register_formats(register):
    register(Format("loud", "In capitals.", lambda answer: {"text/plain": answer.upper()}))

@hookimpl
def session_event(session, event):
    print("seen:", type(event).__name__, len(session.models))
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
    """A folder of installed packages: the example, one that fails when it is imported, the other hooks."""
    target = tmp_path_factory.mktemp("plugins") / "site"
    install(ECHO, target)
    for name, code in {"broken": "raise RuntimeError('not my day')\n", "more": MORE_HOOKS}.items():
        source = tmp_path_factory.mktemp(name)
        (source / "pyproject.toml").write_text(PYPROJECT.format(name=name))
        (source / f"llm_magic_{name}.py").write_text(code)
        install(source, target)
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
            "%llm move layers.0 disk",
            "%llm bench",
            "%llm unload",
        ],
    )
    assert "['Polly wants a cracker', 'stop', 4]" in output
    assert "['Polly wants', 'length']" in output
    assert "by heart" in output.split(">>> %llm ps")[1]
    assert "layers.0 (4 B) RAM → disk" in output
    assert "RAM, read" in output.split(">>> %llm bench")[1]


def test_the_example_command_runs_and_is_in_the_help_and_completes(site: Path) -> None:
    complete = (
        "from IPython.core.completer import provisionalcompleter\n"
        "with provisionalcompleter():\n"
        "    print([found.text for found in get_ipython().Completer.completions('%llm sho', 8)])"
    )
    output = run_cells(site, ["%load_ext llm_magic", "%llm shout it works", "%llm help", complete])
    assert "IT WORKS!" in output
    assert "Say it louder." in output
    assert "['shout']" in output


def test_policies_formats_and_observers_of_plugins(site: Path) -> None:
    cells = [
        "%load_ext llm_magic",
        "%llm plan echo:parrot --device-map here",
        "%llm load echo:parrot --device-map here",
        "%%llm -f loud\nPolly wants a cracker",
        "%llm unload",
        "%llm plugins",
        "from llm_magic import llm, errors\nfrom llm_magic.model import ModelSpec\n"
        "from llm_magic.options import LoadOptions\n"
        "try: llm.session.plan(ModelSpec('echo:a'), LoadOptions(device_map='nowhere'))\n"
        "except errors.PlanError as error: print(error.message)",
    ]
    output = run_cells(site, cells)
    assert "placed by here" in output
    assert "POLLY WANTS A CRACKER" in output
    seen = dict.fromkeys(line for line in output.splitlines() if line.startswith("seen:"))
    assert list(seen) == [
        "seen: LoadedModel 1",
        "seen: Answer 1",
        "seen: Generation 1",
        "seen: Unloaded 0",
    ]
    assert "The policy nowhere gave an invalid map: There is no device 'tape'" in output
    for provided in ("nowhere, here", "loud"):
        assert provided in output.split(">>> %llm plugins")[1]


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
