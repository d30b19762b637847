"""``%llm load``: place a model and load it."""

from __future__ import annotations

import argparse

from llm_magic.commands.chat import count_turns
from llm_magic.commands.plan import planned_report
from llm_magic.commands.source_options import add_source_options, read_source_options
from llm_magic.hookspecs import Command
from llm_magic.model import ModelLayout
from llm_magic.session import Session
from llm_magic.units import format_bytes, format_count, format_seconds
from llm_magic.views.map import map_report
from llm_magic.views.plan import warnings_report
from llm_magic.views.report import LiveMap, Report
from llm_magic.views.table import line_report, stack
from llm_magic.views.words import wrapped


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    parser.add_argument("--as", dest="name", default="", metavar="NAME", help="name to load it under")
    parser.add_argument("--dry-run", action="store_true", help="show the plan only")


def _run(session: Session, found: argparse.Namespace) -> Report:
    spec, options = read_source_options(found)
    if found.dry_run:
        return planned_report(session, spec, options, found.name)
    known = [id(model) for model in session.models.values()]
    model = session.load(spec, options, found.name)
    layout = model.plan.layout
    since = "was loaded before" if id(model) in known else f"is loaded ({format_seconds(model.load_s)})"
    headline = (
        f"{model.name} {since}: {layout.name}, "
        f"{format_count(layout.parameters)} parameters, {format_bytes(layout.bytes)} in {_kinds(layout)}."
        f"{f' {layout.draft.name} proposes tokens.' if layout.draft else ''}"
    )
    return stack(
        _line(headline),
        _chat_report(session),
        warnings_report(model.plan),
        map_report(model.plan, model.engine.memory(), LiveMap(model.plan, model.name)),
    )


def _chat_report(session: Session) -> Report:
    """Say that the next question continues a chat, of which a model that is new has answered nothing."""
    chat = session.chats.current
    if not (chat.turns and session.settings.history):
        return Report("")
    return _line(f"The chat {chat.name} goes on ({count_turns(chat)} so far); %llm reset begins anew.")


def _line(text: str) -> Report:
    """A sentence, broken where a terminal would."""
    return Report(wrapped(text), line_report(text).html)


def _kinds(layout: ModelLayout) -> str:
    """``"bfloat16"``, or ``"nf4 and bfloat16"``."""
    return f"{layout.packing} and {layout.dtype}" if layout.packing else layout.dtype


LOAD = Command(
    "load",
    "load a model, placed over VRAM, RAM and disk",
    _run,
    _add_arguments,
    (
        "%llm load starter",
        "%llm load Qwen/Qwen3-8B --max-memory 0=6GiB,cpu=24GiB --as qwen",
        "%llm load ./my-model --device-map balanced -c 16384",
        "%llm load Qwen/Qwen3-32B --quantize nf4 --draft Qwen/Qwen3-0.6B",
        "%llm load model.gguf --dry-run",
    ),
)
