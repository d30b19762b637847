"""The first minutes with llm_magic in a terminal: `make demo`, or `python examples/demo.py`.

Every cell below runs in a real IPython shell, shown as a person would type it. The exit status is 0
only when the model was loaded and has answered.
"""

from __future__ import annotations

import sys

from IPython.terminal.interactiveshell import TerminalInteractiveShell

CELLS = (
    "%load_ext llm_magic",
    "%llm load starter",
    "%llm plan starter --max-memory cpu=150MiB",
    "%%llm answer << --temperature 0 --max-new-tokens 40\nWhat is the capital of France?",
    "%llm",
)


def main() -> int:
    """Run the cells; 0 when all of them worked and the model knew its geography."""
    shell = TerminalInteractiveShell.instance(colors="nocolor", history_manager=None)
    for cell in CELLS:
        print(f"\nIn [{shell.execution_count}]: " + cell.replace("\n", "\n   ...: "), flush=True)
        if not shell.run_cell(cell, store_history=True).success:
            return 1
    answer = shell.user_ns["answer"]
    if "Paris" in answer and answer.finish_reason == "stop":
        return 0
    print(f"The answer was not the expected one ({answer.finish_reason}).", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
