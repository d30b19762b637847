"""Contenders in processes of their own, which take turns."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "benchmarks-cache"
TIMEOUT_S = 150.0
_CLOSING_S = 30.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """What is measured, and how.

    Attributes
    ----------
    name
        As the table shows it.
    subject
        Key of `benchmarks.worker.SUBJECTS`.
    options
        What the subject is made with. Contenders with equal subject and options share a process.
    case
        What is asked of it in each round.
    """

    name: str
    subject: str
    options: Mapping[str, Any] = field(default_factory=dict)
    case: Mapping[str, Any] = field(default_factory=dict)

    @property
    def process(self) -> str:
        """Equal for contenders that share a process."""
        return json.dumps([self.subject, self.options], sort_keys=True)


@dataclass
class Series:
    """What one contender gave, round by round; ``error`` says why there is nothing (more)."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def all(self, what: str) -> list[float]:
        """One figure of every round that counts."""
        return [found[what] for found in self.rounds if what in found]

    def median(self, what: str) -> float | None:
        """The median of a figure; ``None`` when there is none."""
        values = self.all(what)
        return statistics.median(values) if values else None

    def last(self, what: str) -> Any:
        """What the last round said; ``None`` when it said nothing."""
        return self.rounds[-1].get(what) if self.rounds else None


@dataclass
class Group:
    """What a group of contenders gave, and how busy the machine was."""

    name: str
    series: dict[str, Series] = field(default_factory=dict)
    load_before: float = 0.0
    load_after: float = 0.0

    def median(self, contender: str, what: str = "decode_tps") -> float | None:
        """A contender's median; ``None`` when it has none."""
        return self.series[contender].median(what) if contender in self.series else None

    def ratio(self, one: str, other: str, what: str = "decode_tps") -> float | None:
        """A median of one by that of another."""
        mine, theirs = self.median(one, what), self.median(other, what)
        return mine / theirs if mine and theirs else None

    def paired(self, one: str, other: str, what: str) -> float | None:
        """The median of the ratios of the same rounds: what slows the machine for a while is in both."""
        if one not in self.series or other not in self.series:
            return None
        pairs = zip(self.series[one].all(what), self.series[other].all(what), strict=False)
        ratios = [mine / theirs for mine, theirs in pairs if theirs]
        return statistics.median(ratios) if ratios else None


def run_group(
    name: str,
    contenders: Sequence[Contender],
    repeats: int,
    say: Say = print,
    *,
    timeout_s: float = TIMEOUT_S,
    keep: Callable[[Group], None] | None = None,
) -> Group:
    """Measure contenders in turn; one that fails is out, and the others go on.

    Parameters
    ----------
    timeout_s
        How long one of them may take to load, and for an answer.
    keep
        Is given the group whenever there is more in it: who ends the run loses nothing.
    """
    group = Group(name, {each.name: Series() for each in contenders}, load_before=load())
    processes: dict[str, Process] = {}
    try:
        for each in contenders:
            if each.process in processes:
                continue
            processes[each.process] = Process(each, timeout_s)
            processes[each.process].start()  # what goes wrong here is said in the first round
        for turn in range(1 + repeats):
            for each in contenders:
                _measure(each, processes[each.process], group.series[each.name], counts=turn > 0, say=say)
                group.load_after = load()
                if keep is not None:
                    keep(group)
    finally:
        for process in processes.values():
            process.close()
    return group


def once(
    subject: str, options: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S, **case: Any
) -> dict[str, Any]:
    """Have a process of its own do one thing, and give its answer.

    Raises
    ------
    RuntimeError
        When it fails.
    """
    process = Process(Contender(subject, subject, options), timeout_s)
    try:
        error = process.start()
        if error:
            raise RuntimeError(error)
        return process.measure(case)
    finally:
        process.close()


def load() -> float:
    """Processes that want a core, over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _measure(each: Contender, process: Process, series: Series, *, counts: bool, say: Say) -> None:
    if series.error:
        return
    try:
        found = process.measure(each.case)
    except RuntimeError as error:
        series.error = str(error)
        say(f"  {each.name}: {error}")
        return
    if counts:
        series.rounds.append(found)


class Process:
    """A worker process: one JSON object a line, in and out. Its noise goes to a file."""

    def __init__(self, contender: Contender, timeout_s: float = TIMEOUT_S) -> None:
        self._contender = contender
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._noise: TextIO | None = None
        self._error = ""

    def start(self) -> str:
        """Load the subject; returns what went wrong, empty when nothing did."""
        self._noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            cwd=ROOT,
            env=offline_environment(),
        )
        threading.Thread(target=self._listen, args=(self._child.stdout,), daemon=True).start()
        made = {"subject": self._contender.subject, "options": self._contender.options}
        try:
            self._ask(made)
        except RuntimeError as error:
            self._error = str(error)
        return self._error

    def measure(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """One round."""
        if self._error:
            raise RuntimeError(self._error)
        return self._ask(case)

    def close(self) -> None:
        """End the process."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(OSError):  # it went away with something unsent
            self._child.stdin.close()
        try:
            self._child.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        assert self._noise is not None
        self._noise.close()
        self._child = None

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            self._child.kill()
            raise RuntimeError(f"no answer in {self._timeout_s:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            raise RuntimeError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def _listen(self, out: TextIO) -> None:
        with suppress(ValueError):  # closed while it was read
            for line in out:
                self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        assert self._noise is not None
        self._noise.seek(0)
        lines = [line.strip() for line in self._noise if line.strip()]
        return f"the process ended: {lines[-1][:200] if lines else 'without a word'}"


def offline_environment() -> dict[str, str]:
    """No hub, no bars, this checkout of llm_magic, and a cache for it that asks no other package for its place."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"LLM_MAGIC_CACHE": str(CACHE), **os.environ} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }
