"""Tables and JSON of what was measured."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.protocol import Group, Series
from llm_magic.host.processors import cpu_cores, cpu_name
from llm_magic.units import format_bandwidth, format_bytes, format_rate, format_seconds

PACKAGES = (
    "torch", "transformers", "accelerate", "bitsandbytes", "llm-magic",
    "llama-cpp-python", "diffusers", "airllm",
)  # fmt: skip
_NAME = 44


@dataclass(frozen=True)
class Column:
    """One figure of a table; ``spread`` shows the lowest and the highest too."""

    title: str
    what: str
    shown: Callable[[float], str]
    spread: bool = False


DECODE = Column("decode", "decode_tps", format_rate, spread=True)
PREFILL = Column("prefill", "prefill_tps", format_rate)
FIRST = Column("first token", "first_token_s", format_seconds)
PER_SWEEP = Column("tokens/sweep", "tokens_per_sweep", lambda value: f"{value:.2f}")
TOTAL = Column("whole answer", "total_s", format_seconds, spread=True)
SECONDS = Column("seconds", "seconds", lambda value: f"{value:.2f}", spread=True)
COPIED = Column("copied", "copied_bytes", format_bytes)
BANDWIDTH = Column("rate", "bytes_per_s", format_bandwidth, spread=True)


@dataclass(frozen=True)
class Figure:
    """One line of the last table: what was reached, and what should be at least (or at most)."""

    what: str
    reached: float | None
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; ``None`` when nobody can say."""
        if self.reached is None or self.goal is None:
            return None
        return self.reached <= self.goal if self.at_most else self.reached >= self.goal


@dataclass
class Report:
    """Everything that a run found, printed as it comes.

    ``path`` is the file of all numbers, which is written whenever there is one more; ``None``: nowhere.
    ``broken`` says which groups came to no end, and why.
    """

    groups: list[Group] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def keep(self, group: Group) -> None:
        """Have what a group gave so far among the numbers."""
        if not any(each is group for each in self.groups):
            self.groups.append(group)
        self.write()

    def add(
        self,
        group: Group,
        title: str,
        columns: Sequence[Column],
        reference: str = "",
        same_answers: Iterable[Sequence[str]] = (),
    ) -> None:
        """Show a group as a table; ``reference`` is the contender that ratios are taken to."""
        self.keep(group)
        print(f"\n{title}  (load {group.load_before:.1f} → {group.load_after:.1f})")
        ratio = f"{'ratio':>8}" if reference else ""
        print(" " * _NAME + "".join(f"{column.title:>{_width(column)}}" for column in columns) + ratio)
        for name, series in group.series.items():
            print(f"{name:{_NAME}}{_cells(series, columns)}{_ratio(group, name, reference, columns)}")
        for name, series in group.series.items():
            print(*(f"  {name}: {words}\n" for words in _how(series)), sep="", end="")
        for names in same_answers:
            verdict = _agreement([group.series[name].last("answer") for name in names])
            if verdict:
                print(f"  {verdict}: {', '.join(names)}")

    def note(self, figure: Figure) -> None:
        """Keep a line for the last table."""
        self.figures.append(figure)

    def skip(self, what: str) -> None:
        """Something that is not here."""
        self.skipped.append(what)
        print(f"\nLeft out: {what}")

    def give_up(self, what: str) -> None:
        """A group that came to no end; its numbers so far stay."""
        self.broken.append(what)
        print(f"\nGiven up: {what}")
        self.write()

    def print_figures(self) -> None:
        """The last table."""
        if not self.figures:
            return
        print(f"\n{'Figures':68}{'reached':>10}{'goal':>10}")
        for figure in self.figures:
            reached = "–" if figure.reached is None else f"{figure.reached:.2f}"
            sign = "≤" if figure.at_most else "≥"
            goal = "" if figure.goal is None else f"{sign} {figure.goal:g}"
            verdict = {True: "", False: "  missed", None: ""}[figure.is_met]
            print(
                f"{figure.what:68}{reached:>10}{goal:>10}{verdict}{'  ' + figure.note if figure.note else ''}"
            )

    def write(self) -> None:
        """All numbers, round by round. The file is replaced as a whole: nobody finds half of it."""
        if self.path is None:
            return
        record = {
            "benchmark": "llm_magic",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **machine_facts(),
            **self.facts,
            "skipped": self.skipped,
            "broken": self.broken,
            "figures": [asdict(figure) | {"is_met": figure.is_met} for figure in self.figures],
            "groups": [asdict(group) for group in self.groups],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


@cache
def machine_facts() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": cpu_name(),
        "cores": cpu_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "can_drop_pages": hasattr(os, "posix_fadvise"),
    }


def print_header(repeats: int, gpu: str) -> None:
    """What it runs on, and what a number means."""
    facts = machine_facts()
    print(f"{facts['processor']}, {facts['cores']} cores{', ' + gpu if gpu else ''}, {facts['system']}")
    print(", ".join(f"{name} {found}" for name, found in facts["versions"].items()))
    print(
        f"Numbers are medians of {repeats} rounds (lowest–highest) in which contenders took turns, each in a\n"
        "process of its own, after one round to warm up; ratios are within one table. Decode: tokens per\n"
        "second after the first, greedy, batch 1. Files are warm (in the page cache) unless a table says cold."
    )
    if not facts["can_drop_pages"]:
        print("This system cannot drop pages: what is called cold may be warm.", file=sys.stderr)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _agreement(answers: Sequence[str | None]) -> str:
    """Whether answers are the same, as far as the shorter ones go; empty when there are none to compare."""
    given = [answer for answer in answers if answer is not None]
    if len(given) < 2:
        return ""
    longest = max(given, key=len)
    return "the same tokens" if all(longest.startswith(answer) for answer in given) else "not the same tokens"


def _how(series: Series) -> list[str]:
    """How blocks are treated and sweeps run, where the engine said so."""
    ways = series.last("ways")
    if not ways:
        return []
    counted = ", ".join(f"{count} {way}" for way, count in ways.items())
    return ["; ".join([f"blocks: {counted}", *series.last("status")])]


def _width(column: Column) -> int:
    return 27 if column.spread else 16


def _cells(series: Series, columns: Sequence[Column]) -> str:
    if not series.rounds:
        return f"  {series.error or 'nothing'}"
    return "".join(f"{_cell(series, column):>{_width(column)}}" for column in columns)


def _cell(series: Series, column: Column) -> str:
    values = series.all(column.what)
    median = series.median(column.what)
    if median is None:
        return "–"
    shown = column.shown(median)
    if not column.spread:
        return shown
    unit = shown.rpartition(" ")[2]
    low, high = (column.shown(value).removesuffix(f" {unit}") for value in (min(values), max(values)))
    return f"{shown} ({low}–{high})"


def _ratio(group: Group, name: str, reference: str, columns: Sequence[Column]) -> str:
    found = group.ratio(name, reference, columns[0].what) if reference else None
    return f"{found:8.2f}" if found else ""
