"""The process of one contender: makes its subject, then measures it whenever it is asked to.

A subject is an object with ``measure(**case) -> dict``. The first line on stdin names it; every line
after that is a case. Each is answered by one line on stdout, ``{"error": …}`` when it failed.

What a case says of ``beside`` is for the process itself: so many others compute meanwhile.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

SUBJECTS = {
    "engine": "benchmarks.engine:EngineSubject",
    "accelerate": "benchmarks.peers:StockAccelerate",
    "llama.cpp": "benchmarks.peers:LlamaCpp",
    "diffusers": "benchmarks.peers:DiffusersOffload",
    "airllm": "benchmarks.peers:AirLLM",
    "session": "benchmarks.doors:SessionSubject",
    "models": "benchmarks.models:Models",
    "disk": "benchmarks.ceilings:DiskCeiling",
    "cpu": "benchmarks.ceilings:CpuCeiling",
    "gpu": "benchmarks.ceilings:GpuCeiling",
    "cuda": "benchmarks.ceilings:Cuda",
    "llama.cpp check": "benchmarks.peers:LlamaCppOnGpu",
}


def main() -> int:
    """Serve until stdin ends."""
    answers = _private_stdout()
    subject: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if subject is None:
                subject, found = _made(message), {}
            else:
                with busy_processes(message.pop("beside", 0)):
                    found = subject.measure(**message)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    close = getattr(subject, "close", None)
    if close is not None:
        close()
    return 0


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other programs that each want a core all the time."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def _private_stdout() -> TextIO:
    """The pipe that answers go to; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _made(message: dict[str, Any]) -> Any:
    module, _, name = SUBJECTS[message["subject"]].partition(":")
    return getattr(importlib.import_module(module), name)(**message["options"])


if __name__ == "__main__":
    sys.exit(main())
