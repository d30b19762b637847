"""``%llm pull``: get a model from the hub."""

from __future__ import annotations

import argparse

from llm_magic.harmless.paths import without_paths
from llm_magic.hookspecs import Command
from llm_magic.library import pull
from llm_magic.model import ModelSpec
from llm_magic.session import Session
from llm_magic.units import format_bytes
from llm_magic.views.report import Report
from llm_magic.views.table import line_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="OWNER/NAME", help="a hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    parser.add_argument("--allow-pickle", action="store_true", help="also .bin checkpoints")


def _run(session: Session, found: argparse.Namespace) -> Report:
    spec = ModelSpec(found.source, found.revision, allow_pickle=found.allow_pickle)
    model = session.run(f"Pulling {without_paths(found.source)}", lambda progress: pull(spec, progress))
    return line_report(f"{model.name}: {format_bytes(model.bytes)} are here now. %llm load {model.source}")


PULL = Command("pull", "get a model from the hub", _run, _add_arguments, ("%llm pull Qwen/Qwen3-8B",))
