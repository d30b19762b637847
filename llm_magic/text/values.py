"""A value of the notebook as text for a prompt: tables as Markdown, code as source, all of it capped."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

MAX_ROWS, MAX_COLUMNS, MAX_CELL = 50, 20, 200
MAX_TEXT = 100_000  # characters of anything but a string
MAX_STRING = 2_000_000  # characters of a string, which somebody chose to send
_MAX_ARRAY = 1000  # elements that numpy writes out before it shortens
_MAX_NESTING = 50

Kinds = frozenset[tuple[str, str]]

_CONVERSIONS: dict[str, Callable[[Any], object]] = {"": lambda value: value, "r": repr, "s": str, "a": ascii}
_PICTURES = frozenset(
    {
        ("IPython", "Image"),
        ("IPython", "SVG"),
        ("PIL", "Image"),
        ("altair", "TopLevelMixin"),
        ("bokeh", "Plot"),
        ("matplotlib", "Artist"),  # figures, axes and everything drawn on them
        ("plotly", "BaseFigure"),
        ("seaborn", "Grid"),
    }
)


@dataclass(frozen=True)
class ValueText:
    """A value as text; ``note`` says what was left out, ``is_block`` that it wants lines of its own."""

    text: str
    note: str = ""
    is_block: bool = False


class NoTextError(ValueError):
    """A value that has no useful text; the message says what it is."""


def to_text(value: object, conversion: str = "", spec: str = "") -> ValueText:
    """The value as a model can read it.

    Parameters
    ----------
    conversion, spec
        As in an f-string: ``"r"``, ``"s"`` or ``"a"``, and what stands after the colon.

    Raises
    ------
    NoTextError
        For pictures, modules and functions without source.
    Exception
        Whatever the value's own formatting raises.
    """
    if conversion or spec:
        converted = _CONVERSIONS[conversion](value)
        return _capped(format(converted, spec), MAX_STRING)
    if isinstance(value, str):
        return _capped(str(value), MAX_STRING)
    kinds = _kinds(value)
    _refuse_textless(value, kinds)
    for write in (_source, _table, _array, _collection):
        written = write(value, kinds)
        if written is not None:
            return written
    return _capped(str(value), MAX_TEXT)


def _refuse_textless(value: object, kinds: Kinds) -> None:
    if kinds & _PICTURES:
        raise NoTextError("it is a picture, and this model reads text only")
    if isinstance(value, ModuleType):
        raise NoTextError("it is a module")


def _kinds(value: object) -> Kinds:
    """(package, class name) of the value's classes: types are told without importing their libraries."""
    return frozenset((kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__)


def _capped(text: str, limit: int) -> ValueText:
    if len(text) <= limit:
        return ValueText(text)
    left_out = f"{len(text) - limit:,} of {len(text):,} characters left out"
    return ValueText(f"{text[:limit]}\n… ({left_out})", left_out)


def _source(value: Any, _kinds: Kinds) -> ValueText | None:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return None
    try:
        source = textwrap.dedent(inspect.getsource(value)).strip("\n")
    except (OSError, TypeError):
        raise NoTextError("its source is not there to be shown") from None
    return _capped(source, MAX_TEXT)


def _array(value: Any, kinds: Kinds) -> ValueText | None:
    if ("numpy", "ndarray") not in kinds:
        return None
    numpy = sys.modules["numpy"]
    text = str(numpy.array2string(value, threshold=_MAX_ARRAY, separator=", "))
    if value.size <= _MAX_ARRAY:
        return _capped(text, MAX_TEXT)
    note = f"shortened; an array of {value.dtype} with shape {tuple(value.shape)}"
    return ValueText(f"{text}\n({note})", note)


# --- Lists and dictionaries -----------------------------------------------------------------------


def _collection(value: Any, _kinds: Kinds) -> ValueText | None:
    if not isinstance(value, list | tuple | dict | set | frozenset):
        return None
    written, size = [], 0
    for piece in _pieces(value, 0):
        written.append(piece)
        size += len(piece)
        if size > MAX_TEXT:
            note = f"cut after {MAX_TEXT:,} characters; {len(value):,} items in all"
            return ValueText(f"{''.join(written)[:MAX_TEXT]}\n… ({note})", note)
    return ValueText("".join(written))


_BRACKETS: dict[type, str] = {list: "[]", dict: "{}", tuple: "()", set: "{}"}


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """``repr(value)``, piece by piece, so that nothing beyond the cap is ever written."""
    kind: type = type(value)
    brackets = _BRACKETS.get(kind)
    if brackets is None or not value or depth > _MAX_NESTING:
        yield repr(value)
        return
    yield brackets[0]
    for position, item in enumerate(value.items() if kind is dict else value):
        if position:
            yield ", "
        if kind is dict:
            yield from _pieces(item[0], depth + 1)
            yield ": "
            yield from _pieces(item[1], depth + 1)
        else:
            yield from _pieces(item, depth + 1)
    yield ",)" if kind is tuple and len(value) == 1 else brackets[1]


# --- Tables ---------------------------------------------------------------------------------------


def _table(value: Any, kinds: Kinds) -> ValueText | None:
    if ("pandas", "Styler") in kinds:
        return _pandas_table(value.data)
    if ("pandas", "DataFrame") in kinds:
        return _pandas_table(value)
    if ("pandas", "Series") in kinds:
        return _pandas_table(value.to_frame(name=value.name if value.name is not None else "value"))
    if ("polars", "DataFrame") in kinds:
        return _polars_table(value)
    if ("polars", "Series") in kinds:
        return _polars_table(value.to_frame())
    return None


def _pandas_table(frame: Any) -> ValueText:
    shown = frame.iloc[:MAX_ROWS, :MAX_COLUMNS]
    names = [_column_name(name) for name in shown.columns]
    rows: Iterable[Sequence[Any]] = shown.itertuples(index=False, name=None)
    if not _is_plain_count(frame.index):
        names = [", ".join(str(name) for name in frame.index.names if name is not None), *names]
        rows = [(_column_name(label), *row) for label, row in zip(shown.index, rows, strict=True)]
    return _markdown_table(names, rows, frame.shape)


def _polars_table(frame: Any) -> ValueText:
    rows = [row[:MAX_COLUMNS] for row in frame.head(MAX_ROWS).rows()]
    return _markdown_table(list(frame.columns[:MAX_COLUMNS]), rows, frame.shape)


def _is_plain_count(index: Any) -> bool:
    """Whether the index only counts the rows: 0, 1, 2 and so on."""
    return (
        type(index).__name__ == "RangeIndex" and index.start == 0 and index.step == 1 and index.name is None
    )


def _column_name(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)


def _markdown_table(names: Sequence[str], rows: Iterable[Sequence[Any]], shape: tuple[int, int]) -> ValueText:
    lines = [_line(names), _line(["---"] * len(names), escape=False)]
    lines += [_line([_cell(value) for value in row]) for row in islice(rows, MAX_ROWS)]
    note = _left_out(shape)
    return ValueText("\n".join([*lines, *([f"\n(… {note})"] if note else [])]), note, is_block=True)


def _left_out(shape: tuple[int, int]) -> str:
    more = [
        f"{count - limit:,} more {what}{'s' if count - limit > 1 else ''}"
        for count, limit, what in ((shape[0], MAX_ROWS, "row"), (shape[1], MAX_COLUMNS, "column"))
        if count > limit
    ]
    return f"{' and '.join(more)}; {shape[0]:,} rows × {shape[1]:,} columns in all" if more else ""


def _line(cells: Sequence[str], escape: bool = True) -> str:
    written = [_escape(cell) for cell in cells] if escape else cells
    return f"| {' | '.join(written)} |"


def _cell(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r\n", "\n").replace("\n", "<br>")
