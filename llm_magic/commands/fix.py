"""``%llm fix``: let the model explain or mend an error of the notebook."""

from __future__ import annotations

import argparse
from dataclasses import replace

from llm_magic.errors import SessionError
from llm_magic.formats import extract_code
from llm_magic.hookspecs import Command
from llm_magic.options import AskOptions
from llm_magic.session import Session
from llm_magic.views.report import Report
from llm_magic.views.table import line_report

_QUESTION = """A cell of my Jupyter notebook raised an error. Say in one or two sentences what is wrong, \
then give the corrected cell in one fenced code block.

The cell:
```python
{source}
```

The error:
```
{error}
```"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", nargs="?", type=int, metavar="N", help="number of the cell, as in In[N]")


def _run(session: Session, found: argparse.Namespace) -> Report | None:
    errors = session.notebook.errors
    number = errors.latest() if found.cell is None else found.cell
    if number is None or not len(errors):
        raise SessionError(
            "No cell of this notebook has raised an error yet.", "Run the cell that fails first."
        )
    if number not in errors:
        raise SessionError(f"In[{number}] raised no error.", f"Cells that did: {errors.cells()}.")
    question = _QUESTION.format(source=errors.source(number), error=errors[number])
    answer = session.ask(question, AskOptions(history=False, output_format="markdown"))
    code = extract_code(answer.text)
    if code and session.notebook.set_next_input(code):
        return line_report("The code of the answer is below; read it before you run it.")
    return None


FIX = Command(
    "fix", "explain or mend the last error of the notebook", _run, _add_arguments, ("%llm fix", "%llm fix 12")
)
ERROR = replace(FIX, name="error", help="the same as fix")
