"""The build of the views: Node.js is asked for only where there is something to build."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
BUILD = runpy.run_path(str(REPOSITORY / "hatch_build.py"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose sources are older than anything that is built now."""
    folder = tmp_path / "labextension"
    (folder / "src").mkdir(parents=True)
    for name in ("src/widget.ts", "package.json", "package-lock.json", "build.mjs"):
        (folder / name).touch()
        os.utime(folder / name, (1, 1))
    return tmp_path


def asked_for(root: Path) -> list[str]:
    hook: Any = BUILD["ViewsBuildHook"](str(root), {}, None, None, "", "wheel")
    found: list[str] = hook.dependencies()
    return found


def build(root: Path) -> None:
    module = root / "llm_magic" / "static" / "views.js"
    module.parent.mkdir(parents=True)
    module.touch()


def test_a_clean_checkout_asks_pip_for_node(checkout: Path) -> None:
    assert asked_for(checkout) == [BUILD["NODE"]]


def test_what_is_built_asks_for_nothing_until_a_source_is_newer(checkout: Path) -> None:
    build(checkout)
    assert asked_for(checkout) == []
    os.utime(checkout / "labextension" / "src" / "widget.ts", (2**32, 2**32))
    assert asked_for(checkout) == [BUILD["NODE"]]


def test_a_source_distribution_needs_no_node(checkout: Path) -> None:
    build(checkout)
    (checkout / "PKG-INFO").touch()
    os.utime(checkout / "labextension" / "src" / "widget.ts", (2**32, 2**32))  # unpacked in any order
    assert asked_for(checkout) == []


def test_the_package_in_this_environment_has_its_views() -> None:
    from llm_magic.folders import VIEWS

    assert "llm-magic" in VIEWS.read_text(encoding="utf-8")
