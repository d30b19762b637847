"""``Report``: one thing to show, as text for a terminal and as static HTML for a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_magic.harmless.terminal import sanitize
from llm_magic.machine import Machine
from llm_magic.model import ModelSpec
from llm_magic.options import LoadOptions
from llm_magic.plan import Plan


@dataclass(frozen=True)
class LiveMap:
    """A memory map that may come alive.

    Of a loaded model, ``model``; or of a plan that can be loaded from ``spec`` with ``options``, as ``name``.
    """

    plan: Plan
    model: str = ""
    spec: ModelSpec | None = None
    options: LoadOptions = field(default_factory=LoadOptions)
    name: str = ""


@dataclass(frozen=True)
class LiveMachine:
    """A picture of the machine that may come alive, with the path of a token's bytes."""

    machine: Machine
    plan: Plan | None = None
    model: str = ""


class _Printer(Protocol):
    """The part of IPython's pretty printer that is used here."""

    def text(self, text: str) -> None: ...


@dataclass(frozen=True, repr=False)
class Report:
    """What a command shows.

    ``html`` is static: inline styles only, no script, nothing fetched, every value escaped by the
    view that made it. A front end without HTML, and a saved notebook read as text, show ``text``.
    ``live`` is what a front end that can do more may put over ``html``; ``parts`` are the reports
    that this one is stacked of.
    """

    text: str
    html: str = ""
    live: LiveMap | LiveMachine | None = None
    parts: tuple[Report, ...] = ()

    def __post_init__(self) -> None:
        # Names in it come from files, the hub and plugins: none may steer a terminal.
        object.__setattr__(self, "text", sanitize(self.text))
        object.__setattr__(self, "html", sanitize(self.html))

    def __repr__(self) -> str:
        return self.text

    def __str__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: _Printer, _cycle: bool) -> None:
        printer.text(self.text)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:  # noqa: ARG002
        bundle = {"text/plain": self.text}
        return bundle | {"text/html": self.html} if self.html else bundle
