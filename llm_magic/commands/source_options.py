"""The source and the options that ``load`` and ``plan`` share."""

from __future__ import annotations

import argparse

from llm_magic.arguments import add_max_memory, completes, number
from llm_magic.model import ModelSpec
from llm_magic.options import QUANTIZE, LoadOptions

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
        choices=QUANTIZE,
        metavar="METHOD",
        help=f"pack the linear layers and experts: {', '.join(QUANTIZE)}",
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


def read_source_options(found: argparse.Namespace) -> tuple[ModelSpec, LoadOptions]:
    """What they say."""
    spec = ModelSpec(
        source=found.source,
        revision=found.revision,
        dtype=_SHORT.get(found.dtype, found.dtype),
        backend=found.backend,
        allow_pickle=found.allow_pickle,
        quantize=found.quantize,
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
