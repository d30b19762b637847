"""The process of one contender: makes its subject, then measures it whenever it is asked to.

A subject is an object with ``measure(**case) -> dict``. The first line on stdin names it; every line
after that is a case. Each is answered by one line on stdout, ``{"error": …}`` when it failed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
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
                found = subject.measure(**message)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    close = getattr(subject, "close", None)
    if close is not None:
        close()
    return 0


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
