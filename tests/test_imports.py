"""Imports point down, and heavy libraries wait until a model is asked for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "accelerate", "huggingface_hub", "pandas", "matplotlib", "gguf", "numpy")

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

LOAD_EXTENSION = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(history_manager=None)
import sys
before = set(sys.modules)
assert shell.run_cell("%load_ext llm_magic").success
"""


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter has after running the code."""
    script = code + "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import llm_magic",
        "from llm_magic import llm",
        LOAD_EXTENSION,
        LOAD_EXTENSION + "shell.run_line_magic('llm', 'help'); shell.run_line_magic('llm', 'plugins')",
        LOAD_EXTENSION + "shell.run_line_magic('llm', 'doctor'); shell.run_line_magic('llm', '')",
    ],
    ids=["package", "python-door", "extension", "help", "doctor"],
)
def test_nothing_heavy_is_imported_before_a_model_is_asked_for(code: str) -> None:
    assert not modules_after(code) & set(HEAVY)


def test_unloading_the_extension_leaves_no_magic_behind() -> None:
    code = LOAD_EXTENSION + (
        "assert 'llm' in shell.magics_manager.magics['line']\n"
        "assert shell.run_cell('%unload_ext llm_magic').success\n"
        "assert 'llm' not in shell.magics_manager.magics['line']\n"
        "assert 'llm' not in shell.magics_manager.magics['cell']"
    )
    modules_after(code)


def test_imports_point_down() -> None:
    """The layers contract in ``pyproject.toml``."""
    script = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "KEPT" in run.stdout


def test_backend_libraries_are_imported_inside_functions_of_backends_only() -> None:
    """No module of llm_magic names one at its top level, and none outside ``backends`` names one at all.

    Only subclasses of Accelerate's hook and torch's modules cannot wait: their modules are imported by those that
    need them.
    """
    found: list[str] = []
    subclassing = ("hooks.py", "visits.py", "packed_experts.py", "packed_stack.py", "scaled_floats.py")
    for path in sorted((REPOSITORY / "llm_magic").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, _FUNCTIONS) for n in ast.walk(f)}
        guarded = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) for n in ast.walk(i)}
        for node in ast.walk(tree):
            names = _imported(node) & {"torch", "transformers", "accelerate", "huggingface_hub"}
            is_late = id(node) in inside or id(node) in guarded or path.name in subclassing
            if names and not (is_late and "backends" in path.parts):
                found.append(f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)} {sorted(names)}")
    assert not found


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module.partition(".")[0]}
    return set()
