"""Command lines of magics: argparse that raises our errors, and never prints or exits."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llm_magic.errors import OptionError
from llm_magic.units import parse_bytes

HELP_FLAGS = ("-h", "--help")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ``OptionError`` with a did-you-mean; ``name`` is how it is typed.

    ``stray`` is what to do about a word that stands where only options may.
    """

    def __init__(self, name: str, description: str = "", stray: str = "") -> None:
        self._stray = stray
        super().__init__(prog=name, description=description, add_help=False, allow_abbrev=False)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse words.

        Raises
        ------
        OptionError
            On an unknown option, a missing or malformed value.
        """
        found, rest = self.parse_known_args(list(words))
        if rest:
            self._refuse(rest[0])
        return found

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise OptionError(f"{self.prog}: {message}.", f"{self.prog} --help lists what it takes.")

    def options(self) -> list[str]:
        """Every option string."""
        return [option for action in self._actions for option in action.option_strings]

    def action_of(self, option: str) -> argparse.Action | None:
        """The argument that an option string belongs to."""
        return next((action for action in self._actions if option in action.option_strings), None)

    def positionals(self) -> list[argparse.Action]:
        """Arguments without an option string, in order."""
        return [action for action in self._actions if not action.option_strings]

    def described(self) -> list[argparse.Action]:
        """Every argument, in the order of its definition."""
        return list(self._actions)

    def _refuse(self, word: str) -> NoReturn:
        name = word.split("=", 1)[0]
        if not name.startswith("-"):
            raise OptionError(
                f"{self.prog} does not take {word!r}.",
                self._stray or f"{self.prog} --help lists what it takes.",
            )
        close = [option for option in self.options() if len(name) > 3 and option.startswith(name)]
        close += difflib.get_close_matches(name, self.options(), n=1, cutoff=0.75)
        hint = f"Did you mean {close[0]}?" if close else f"{self.prog} --help lists its options."
        raise OptionError(f"{self.prog} has no option {name}.", hint)


def split_words(line: str) -> list[str]:
    """Words of a magic's line, quotes removed; backslashes survive on Windows, as in IPython.

    Raises
    ------
    OptionError
        When a quote is not closed.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="")
    lexer.whitespace_split = True
    lexer.commenters = ""
    if os.name == "nt":
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError:
        raise OptionError("A quote is not closed.", 'Close it: --system "You are brief."') from None


def number(low: float, high: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """An argparse type: a finite number from ``low`` to ``high``."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or not low <= value <= high:
            is_bounded = high < 10**9 or value > high
            bounds = f"from {_plain(low)} to {_plain(high)}" if is_bounded else f"of at least {_plain(low)}"
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return convert


def _plain(value: float) -> str:
    """Without an exponent, or a point that says nothing."""
    return str(int(value)) if value == int(value) else str(value)


def add_max_memory(parser: argparse.ArgumentParser, words: str, default: dict[str, int] | None) -> None:
    """Add ``--max-memory``: limits by device, as typed, in one option or in several."""
    completes(
        parser.add_argument(
            "--max-memory", default=default, type=_limits, action=_Joined, metavar="LIMITS", help=words
        ),
        "device",
    )


class _Joined(argparse.Action):
    """Joins what an option is given each time."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse's signature
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        joined = dict(getattr(namespace, self.dest) or {})
        for device, limit in values:
            if device in joined:
                raise argparse.ArgumentError(self, f"it names {device} twice")
            joined[device] = limit
        setattr(namespace, self.dest, joined)


def _limits(text: str) -> list[tuple[str, int]]:
    """``0=10GiB,cpu=30GiB`` -> devices and bytes."""
    limits = []
    for part in text.split(","):
        device, equals, size = part.partition("=")
        if not equals or not device.strip():
            raise argparse.ArgumentTypeError(f"{part!r} is not DEVICE=SIZE; write 0=10GiB,cpu=30GiB")
        limits.append((device.strip(), _size(size)))
    return limits


def literal(text: str) -> Any:
    """The value of a ``--param``: JSON where it is, otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def unescape(text: str) -> str:
    r"""A stop string as typed: ``\n``, ``\t`` and ``\\`` mean what they mean in Python."""
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m[1]], text)


def completes(action: argparse.Action, kind: str) -> argparse.Action:
    """Mark what an argument completes from, as ``hookspecs.Command`` lists."""
    action.completes = kind  # type: ignore[attr-defined]  # argparse has no field for it
    return action


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(error.message.rstrip(".")) from None
