"""The line of a ``%%llm`` cell: its options, once, for parsing, help and completion."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

from llm_magic.arguments import HELP_FLAGS, Parser, completes, literal, number, split_words, unescape
from llm_magic.errors import OptionError
from llm_magic.events import SAMPLING_LIMITS, Sampling
from llm_magic.options import AskOptions

_BINDING = re.compile(r"\s*(\S+)\s*<<(?:\s+|$)(.*)", re.DOTALL)


@dataclass(frozen=True)
class CellLine:
    """A parsed ``%%llm`` line.

    ``out`` is the variable that gets the answer; ``raw`` leaves braces alone; ``help`` asks for
    the option list instead of an answer.
    """

    ask: AskOptions
    out: str = ""
    raw: bool = False
    dry_run: bool = False
    help: bool = False


def cell_parser() -> Parser:
    """The options of a prompt cell."""
    parser = Parser(
        "%%llm",
        "Ask a loaded model. The cell is the prompt; {expr} is replaced by its value.",
        stray="The prompt goes on the next line; %%llm --help lists the options.",
    )
    add = parser.add_argument
    add(
        "-o", "--out", metavar="NAME", default="", help="variable that gets the answer; also: %%%%llm NAME <<"
    )
    completes(
        add("-f", "--format", metavar="FORMAT", default="", help="markdown, text, code, json, html or math"),
        "format",
    )
    completes(add("-m", "--model", metavar="NAME", default="", help="one of the loaded models"), "model")
    add("-s", "--system", metavar="TEXT", help="system prompt")
    kinds = {name: number(*limits) for name, limits in SAMPLING_LIMITS.items()}
    add("-t", "--temperature", metavar="T", type=kinds["temperature"], help="0 is greedy")
    add("--top-p", metavar="P", type=kinds["top_p"], help="keep the likeliest tokens up to this probability")
    add("--top-k", metavar="K", type=kinds["top_k"], help="sample among this many tokens")
    add("--min-p", metavar="P", type=kinds["min_p"], help="drop tokens below this share of the likeliest one")
    add("--seed", metavar="N", type=kinds["seed"], help="repeat an answer")
    add("-n", "--max-new-tokens", metavar="N", type=kinds["max_new_tokens"], help="longest answer in tokens")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        type=unescape,
        default=[],
        help="end the answer here; may be repeated",
    )
    completes(add("--chat", metavar="NAME", default="", help="ask in this conversation"), "chat")
    add("--new", action="store_true", help="start a new conversation")
    add("--no-history", action="store_true", help="ask on its own, outside any conversation")
    add("-c", "--continue", dest="continue_last", action="store_true", help="go on with the last answer")
    add("--raw", action="store_true", help="replace no {expr}")
    add("--no-template", action="store_true", help="use no chat template")
    add("--no-stream", action="store_true", help="show the answer when it is done")
    add("--dry-run", action="store_true", help="show the final prompt and its token count")
    add(
        "--param",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="anything else the backend takes",
    )
    return parser


def parse_cell_line(line: str, expand: Callable[[str], str] = str) -> CellLine:
    """Parse what follows ``%%llm``; ``expand`` replaces ``{expr}`` in each option's value.

    Raises
    ------
    OptionError
        On an unknown option, a malformed value, or a name that cannot be assigned to.
    """
    line, bound = _binding(line)
    words = split_words(line)
    if any(flag in words for flag in HELP_FLAGS):
        return CellLine(AskOptions(), help=True)
    found = cell_parser().parse([expand(word) for word in words])
    if bound and found.out:
        raise OptionError("The answer is bound twice.", f"Use either {bound} << or --out {found.out}.")
    return CellLine(
        ask=_ask_options(found),
        out=_check_variable(bound or found.out),
        raw=found.raw,
        dry_run=found.dry_run,
    )


def _binding(line: str) -> tuple[str, str]:
    match = _BINDING.fullmatch(line)
    return (match[2], match[1]) if match else (line, "")


def _check_variable(name: str) -> str:
    import keyword

    if name and (not name.isidentifier() or keyword.iskeyword(name)):
        raise OptionError(f"{name!r} cannot name a variable.", "Write: %%llm answer <<")
    return name


def _ask_options(found: argparse.Namespace) -> AskOptions:
    sampling = {name: getattr(found, name) for name in SAMPLING_LIMITS if getattr(found, name) is not None}
    sampling |= {"stop": tuple(found.stop)} if found.stop else {}
    sampling |= {"extra": _extra(found.param)} if found.param else {}
    return AskOptions(
        model=found.model,
        system=found.system,
        chat=found.chat,
        new=found.new,
        history=False if found.no_history else None,
        continue_last=found.continue_last,
        use_template=not found.no_template,
        stream=not found.no_stream,
        output_format=found.format,
        sampling=sampling,
    )


def _extra(pairs: list[list[str]]) -> dict[str, object]:
    known = Sampling.__dataclass_fields__.keys() - {"extra", "stop"}
    for key, _ in pairs:
        if key in known:
            raise OptionError(f"--param {key} has an option of its own.", f"Use --{key.replace('_', '-')}.")
    return {key: literal(value) for key, value in pairs}
