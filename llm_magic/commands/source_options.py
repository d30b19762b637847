"""The source and the options that ``load`` and ``plan`` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from llm_magic.arguments import Parser, add_max_memory, completes, number
from llm_magic.errors import OptionError
from llm_magic.model import ModelSpec
from llm_magic.options import AS_NUMBERS, PUBLISHED, QUANTIZE, LoadOptions

DTYPES = ("auto", "bfloat16", "float16", "float32", "bf16", "fp16", "fp32")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    add = parser.add_argument
    completes(add("source", metavar="SOURCE", help="hub id, folder, .gguf file, or starter"), "source")
    completes(add("--backend", default="auto", metavar="NAME", help="backend to load it with"), "backend")
    add(
        "--dtype",
        default="auto",
        choices=DTYPES,
        metavar="TYPE",
        help="auto (the checkpoint's), bf16, fp16, fp32",
    )
    add(
        "--quantize",
        default="",
        type=str.lower,
        choices=(*QUANTIZE, *PUBLISHED, AS_NUMBERS),
        metavar="METHOD",
        help=f"pack the linear layers and experts: {', '.join(QUANTIZE)}; "
        f"{AS_NUMBERS}: what comes packed is unpacked",
    )
    add(
        "--quantize-head",
        default="",
        type=str.lower,
        choices=QUANTIZE,
        metavar="METHOD",
        help="pack the head, too, which is large where the vocabulary is: int8 costs next to nothing",
    )
    completes(
        add(
            "--draft",
            default="",
            metavar="MODEL",
            help="a small model of the same family that proposes tokens",
        ),
        "source",
    )
    completes(
        add("--device-map", default="auto", metavar="POLICY", help="placement policy, or a .json file"),
        "planner",
    )
    add_max_memory(parser, "such as 0=10GiB,cpu=30GiB", {})
    add("-c", "--ctx-size", type=number(1, 2**31, int), metavar="N", help="tokens of context to plan for")
    add(
        "-ub",
        "--ubatch-size",
        type=number(1, 2**31, int),
        metavar="N",
        help="tokens of a prompt that one pass has room for; more of them fetch what is offloaded less often",
    )
    completes(
        add("--offload-folder", default="", metavar="DIR", help="where blocks on disk may be written"), "file"
    )
    completes(
        add("--machine", default="", metavar="FILE", help="plan for a described machine (.json)"), "file"
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--allow-pickle", action="store_true", help="read .bin checkpoints (weights only)")


def options_from_python(
    source: str | PathLike[str], options: Mapping[str, Any]
) -> tuple[ModelSpec, LoadOptions]:
    """What keywords say that are named as the options, with underscores.

    They are read as if they were typed, so both take the same. A device map may be a map, and limits of
    memory a map of devices to sizes or bytes.

    Raises
    ------
    OptionError
        When there is no such option, or it has a value that it cannot take.
    """
    parser = Parser("%llm load")
    add_source_options(parser)
    if not isinstance(source, str | PathLike):
        raise OptionError(f"{source!r} is no source of a model.", "Give a hub id, a folder or a .gguf file.")
    device_map = options.get("device_map")
    typed = {name: value for name, value in options.items() if value not in (None, {})}
    if isinstance(device_map, Mapping):
        typed.pop("device_map", None)
    words = [word for name, value in typed.items() for word in _typed(parser, name, value)]
    spec, chosen = read_source_options(parser.parse([*words, "--", str(source)]))
    return spec, replace(chosen, device_map=device_map) if device_map and isinstance(
        device_map, Mapping
    ) else chosen


def _typed(parser: Parser, name: str, value: Any) -> Iterator[str]:
    """An option as a person types it."""
    option = f"--{name.replace('_', '-')}"
    action = parser.action_of(option)
    is_flag = action is not None and action.nargs == 0
    if name == "max_memory" and isinstance(value, Mapping):
        value = ",".join(f"{device}={size}" for device, size in value.items())
    if not isinstance(value, bool if is_flag else str | int | PathLike):
        takes = "True or False" if is_flag else "a text or a number"
        raise OptionError(f"{name} cannot be {value!r}.", f"Give {takes}.")
    if not is_flag:
        yield f"{option}={value}"
    elif value:
        yield option


def read_source_options(found: argparse.Namespace) -> tuple[ModelSpec, LoadOptions]:
    """What they say."""
    spec = ModelSpec(
        source=found.source,
        revision=found.revision,
        dtype=_SHORT.get(found.dtype, found.dtype),
        backend=found.backend,
        allow_pickle=found.allow_pickle,
        quantize=found.quantize,
        quantize_head=found.quantize_head,
        draft=found.draft,
    )
    options = LoadOptions(
        device_map=found.device_map,
        max_memory=found.max_memory,
        ctx_size=found.ctx_size,
        ubatch_size=found.ubatch_size,
        offload_folder=found.offload_folder,
        machine=found.machine,
    )
    return spec, options
