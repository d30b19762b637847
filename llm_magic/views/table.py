"""A small table: aligned text for a terminal, plain HTML for a notebook."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections.abc import Sequence

from llm_magic.harmless.terminal import sanitize
from llm_magic.text.safe_html import escape_text
from llm_magic.views.report import Report

_NARROWEST = 24  # a column narrower than this reads worse than a long line
_CELL = "text-align:left;padding:.25em .9em .25em 0;vertical-align:top"


def table_report(headers: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Report:
    """Rows under headers, and a line under the table."""
    rows = [[sanitize(cell).replace("\n", " ") for cell in row] for row in rows]
    return Report(_table_text(headers, rows, note), _table_html(headers, rows, note))


def stack(*reports: Report) -> Report:
    """Reports one below the other."""
    shown = [
        report if report.html else line_report(report.text)
        for report in reports
        if report.text or report.html
    ]
    return Report(
        "\n".join(report.text for report in shown).rstrip("\n"),
        "".join(report.html for report in shown),
        parts=tuple(part for report in shown for part in report.parts or (report,)),
    )


def line_report(text: str) -> Report:
    """Lines of text as a report."""
    lines = escape_text(text).replace("\n", "<br>")
    return Report(
        text, f'<div style="font-family:var(--jp-ui-font-family,sans-serif)">{lines}</div>' if text else ""
    )


def _table_text(headers: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    lines = [list(headers), *map(list, rows)]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(headers))]
    lines = [part for line in lines for part in _wrapped(line, sum(widths[:-1]) + 2 * len(widths[:-1]))]
    widths[-1] = 0
    text = [
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, note] if note else text)


def _wrapped(line: list[str], indent: int) -> list[list[str]]:
    """A row with its last cell broken into lines that a terminal shows whole."""
    room = shutil.get_terminal_size().columns - indent
    if room < _NARROWEST or _width(line[-1]) <= room:
        return [line]
    first, *more = textwrap.wrap(line[-1], room)
    return [[*line[:-1], first], *([""] * (len(line) - 1) + [part] for part in more)]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _table_html(headers: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    head = "".join(
        f'<th style="{_CELL};color:var(--jp-ui-font-color2,#757575)">{escape_text(h)}</th>' for h in headers
    )
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape_text(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    foot = (
        f'<div style="color:var(--jp-ui-font-color2,#757575);font-size:90%">{escape_text(note)}</div>'
        if note
        else ""
    )
    return (
        '<div style="font-family:var(--jp-ui-font-family,sans-serif)">'
        f'<table style="border-collapse:collapse;margin:0"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{foot}</div>"
    )
