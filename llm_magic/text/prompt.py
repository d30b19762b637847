r"""A cell's text to a prompt: ``{expr}`` becomes the value of an expression of the notebook.

One pass, and a careful one: most braces in prompts are JSON, LaTeX or code, and stay byte for byte.
``{expr}`` is replaced only when

- it is on one line and has no space just inside of the braces;
- it parses as a Python expression, with an f-string's conversion and format if it has any
  (``{x!r}``, ``{price:.2f}``), and reads at least one name: ``{1}``, ``{}``, ``{"a": 1}`` and
  ``{a, b}`` stay;
- the expression gives a value, and the value has a text;
- it is not where braces mean something else: in an f-string or a text with ``.format(``, after a
  LaTeX command, ``^``, ``x_`` or another LaTeX argument, after ``$``, a backslash or ``)``.

Braces are never undoubled: ``{{x}}`` stays ``{{x}}``, so nested JSON, Jinja and escaped f-strings are
safe. What was put in is not read again. A note names what looks like an expression and was left.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm_magic.harmless.paths import without_paths
from llm_magic.harmless.terminal import sanitize
from llm_magic.text.values import NoTextError, ValueText, to_text

Lookup = Callable[[str], object]

_LONGEST_EXPRESSION = 500  # characters
_LONGEST_GROUP = 2000  # characters of a LaTeX argument
_MOST_CLOSERS = 6  # of the closing braces on the line that may end one expression
_MOST_NOTES = 8

# "{a: 1}" and "{a:b}" are a dictionary of some language more often than a format: a space, a bare number
# and the rare single letters are none.
_FORMAT = re.compile(
    r"(?:![rsa])?(?::(?!\d+$|[bcn]$|\s)(?:(?:.?[<>=^])?[-+ ]?z?#?0?\d*[,_]?(?:\.\d+)?[bcdeEfFgGnosxX%]?|[^{}%]*%[^{}]+))?"
)
_FORMATTED_STRINGS = re.compile(
    r"""(?<!\w)(?:[fFtT][rR]?|[rR][fFtT])(?:(["'])\1\1(?s:.*?)\1\1\1|(["'])(?:\\.|(?!\2)[^\\\n])*\2)"""
    r"""|(["'])\3\3(?s:(?:(?!\3\3\3).)*)\3\3\3\s*\.format\(|(["'])(?:\\.|(?!\4)[^\\\n])*\4\s*\.format\("""
)
_LATEX_BEFORE = re.compile(
    r"(?:\\[A-Za-z]+\*?(?:\[[^\]\n]{0,40}\])?|\^|(?:(?<![A-Za-z0-9])[A-Za-z0-9]|\\[A-Za-z]+|[)\]|'])_)$"
)
_REFUSED_NODES = (ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_PLAUSIBLE = (ast.Name, ast.Attribute, ast.Subscript, ast.Call)


@dataclass(frozen=True)
class Interpolated:
    """The prompt, and what the user should know about it: values cut short, braces left alone."""

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Expression:
    """``{source!conversion:spec}`` in a text; ``end`` is the place after its brace."""

    source: str
    conversion: str
    spec: str
    end: int
    tree: ast.expr

    @property
    def shown(self) -> str:
        text = f"{{{self.source}}}"
        return text if len(text) <= 60 else f"{text[:57]}…}}"


def interpolate(text: str, lookup: Lookup) -> Interpolated:
    """Replace every ``{expr}`` that resolves, once.

    Parameters
    ----------
    text
        What the user wrote.
    lookup
        Gives the value of an expression, or raises. Each expression is evaluated once.

    Returns
    -------
    Interpolated
        The prompt; ``notes`` has a line for each value that was cut and for each plausible
        expression that was left as it is.
    """
    return _Pass(text, lookup).run()


class _Pass:
    """One walk over one text."""

    def __init__(self, text: str, lookup: Lookup) -> None:
        self._text = text
        self._lookup = lookup
        self._values: dict[str, ValueText | None] = {}
        self._notes: dict[str, None] = {}  # a set that keeps its order, as those below
        self._left: dict[str, dict[str, None]] = {}
        self._strings = [match.span() for match in _FORMATTED_STRINGS.finditer(text)]
        self._latex_ends: set[int] = set()

    def run(self) -> Interpolated:
        pieces, copied, start = [], 0, self._text.find("{")
        while start >= 0:
            following = start + 1
            replacement = self._replacement(start)
            if replacement is not None:
                new, following = replacement
                pieces += [self._text[copied:start], new]
                copied = following
            start = self._text.find("{", following)
        return Interpolated("".join([*pieces, self._text[copied:]]), self._all_notes())

    def _replacement(self, start: int) -> tuple[str, int] | None:
        """What replaces the brace at ``start``, and where the text goes on."""
        meaning = self._other_meaning(start)
        found = _expression_at(self._text, start)
        if found is None or self._is_doubled(start, found.end):
            return None
        if meaning:
            self._note_left(found, meaning)
            return None
        key = self._text[start : found.end]
        if key not in self._values:
            self._values[key] = self._value(found)
        value = self._values[key]
        return None if value is None else (self._placed(value, start, found.end), found.end)

    def _other_meaning(self, start: int) -> str:
        """What else the brace at ``start`` is; empty when nothing speaks against an expression."""
        before = self._text[max(0, start - 60) : start]
        continues = start in self._latex_ends or (before.endswith("_") and start - 1 in self._latex_ends)
        if continues or _LATEX_BEFORE.search(before):
            self._latex_ends.add(_group_end(self._text, start))
            return "it reads as LaTeX"
        if any(begin <= start < end for begin, end in self._strings):
            return "it is in a formatted string"
        meanings = {
            "\\": "a backslash is before it",
            "$": "it reads as a ${variable}",
            ")": "it reads as code",
        }
        return "it reads as code" if before.endswith("=>") else meanings.get(before[-1:], "")

    def _is_doubled(self, start: int, end: int) -> bool:
        around = self._text[max(0, start - 1) : start] + self._text[end : end + 1]
        return around == "{}" or self._text.startswith("{{", start)

    def _value(self, found: _Expression) -> ValueText | None:
        try:
            value = to_text(self._lookup(found.source), found.conversion, found.spec)
        except NoTextError as error:
            self._note(f"{found.shown} left alone: {error}")
        except Exception as error:  # the user's own expression: anything can come out of it
            if isinstance(found.tree, _PLAUSIBLE):
                self._note(f"{found.shown} left alone: {_reason(error)}")
        else:
            if value.note:
                self._note(f"{found.shown}: {value.note}")
            return value
        return None

    def _placed(self, value: ValueText, start: int, end: int) -> str:
        """The text, on lines of its own when it is a table."""
        if not value.is_block:
            return value.text
        line_before = self._text[self._text.rfind("\n", 0, start) + 1 : start]
        before = "\n\n" if line_before.strip() else ""
        after = "\n\n" if self._text[end : end + 1] not in ("", "\n") else ""
        return f"{before}{value.text}{after}"

    def _note_left(self, found: _Expression, meaning: str) -> None:
        # Only where the notebook has the names: a formula with others is no surprise.
        if isinstance(found.tree, _PLAUSIBLE) and all(self._has(name) for name in _names(found.tree)):
            self._left.setdefault(meaning, {})[found.shown] = None

    def _has(self, name: str) -> bool:
        try:
            value = self._lookup(name)
        except Exception:  # whatever a lookup raises, the name is not there
            return False
        return getattr(value, "__module__", "") != "builtins" and type(value).__name__ != "type"

    def _note(self, note: str) -> None:
        self._notes[note] = None

    def _all_notes(self) -> tuple[str, ...]:
        left = (f"{', '.join(shown)} left alone: {meaning}" for meaning, shown in self._left.items())
        notes = (*self._notes, *(line if len(line) < 300 else f"{line[:300]}…" for line in left))
        more = len(notes) - _MOST_NOTES
        return notes if more <= 0 else (*notes[:_MOST_NOTES], f"… and {more} more")


def _expression_at(text: str, start: int) -> _Expression | None:
    """The expression whose brace opens at ``start``."""
    line_end = text.find("\n", start)
    limit = min(len(text) if line_end < 0 else line_end, start + _LONGEST_EXPRESSION)
    end = start
    for _ in range(_MOST_CLOSERS):
        end = text.find("}", end + 1, limit)
        if end < 0:
            return None
        inside = text[start + 1 : end]
        if not inside or inside[0].isspace() or inside[-1].isspace():
            continue
        for source, rest in _splits(inside):
            tree = _parse(source)
            if tree is not None:
                return _accepted(source, rest, end + 1, tree)
    return None


def _splits(inside: str) -> Iterator[tuple[str, str]]:
    """Ways to read the inside of the braces: an expression, and what a format may be."""
    yield inside, ""
    marks = [match.start() for match in re.finditer(r"[:!]", inside)]
    for mark in marks[:_MOST_CLOSERS]:
        yield inside[:mark], inside[mark:]


def _parse(source: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" in what is no Python at all
            return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _accepted(source: str, rest: str, end: int, tree: ast.expr) -> _Expression | None:
    if source != source.rstrip() or not _FORMAT.fullmatch(rest) or rest in (":", "!"):
        return None
    if isinstance(tree, ast.Tuple) or not _names(tree):
        return None
    if any(isinstance(node, _REFUSED_NODES) for node in ast.walk(tree)):
        return None
    conversion = rest[1] if rest.startswith("!") else ""
    return _Expression(source, conversion, rest.partition(":")[2], end, tree)


def _names(tree: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _group_end(text: str, start: int) -> int:
    """The place after the brace that closes the one at ``start``."""
    depth = 0
    for place in range(start, min(len(text), start + _LONGEST_GROUP)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return start + 1


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        known = str(error.args[0])
        return known if " " in known else f"there is no key {error}"
    line = " ".join(sanitize(without_paths(str(error))).split())[:150]
    return line if isinstance(error, NameError) else f"{type(error).__name__}: {line}".rstrip(": ")
