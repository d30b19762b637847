"""The model that proposes tokens to a larger one: what to load of it, and its layout beside that of the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.packed_checkpoint import find_packed
from llm_magic.backends.accelerate.source.skeleton import load_config
from llm_magic.backends.accelerate.source.sources import ModelFiles, resolve
from llm_magic.errors import OptionError
from llm_magic.events import Progress
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.options import AS_NUMBERS, PUBLISHED


def with_draft(layout: ModelLayout, spec: ModelSpec, progress: Progress) -> ModelLayout:
    """The layout with that of the model that ``spec.draft`` names, if it names one.

    Raises
    ------
    SourceError
        When the draft model cannot be found or read.
    OptionError
        When the model cannot verify what a draft proposes, or that is packed in a way that transformers does not read.
    """
    if not spec.draft:
        return layout
    if layout.details.get("one_by_one"):
        raise OptionError(
            f"{layout.name} cannot take tokens back once it has read them, so it cannot verify what a draft proposes.",
            "Leave --draft out.",
        )
    draft = draft_spec(spec)
    files = resolve(draft, progress)
    packed = find_packed(files)
    if packed and packed.format.library in PUBLISHED:
        draft = replace(draft, quantize=AS_NUMBERS)
    elif packed and packed.format.library != "bitsandbytes":
        raise OptionError(
            f"A draft model is loaded by transformers, which does not read what {packed.format.library} has packed.",
            f"Name the model that {files.name} was made of.",
        )
    small = read_layout(draft, files)
    if small.is_encoder_decoder:
        raise OptionError(
            f"{small.name} does not go on with a text, and cannot propose what comes next in one.",
            "Take a smaller model of the same family for --draft, or leave it out.",
        )
    return replace(layout, draft=small)


def draft_spec(spec: ModelSpec) -> ModelSpec:
    """What to load as the draft model: the newest revision, unpacked, under the same permissions."""
    return ModelSpec(spec.draft, dtype=spec.dtype, backend=spec.backend, allow_pickle=spec.allow_pickle)


def draft_config(files: ModelFiles) -> Any:
    """Transformers' configuration of a draft model, with which it unpacks what it can unpack."""
    packed = find_packed(files)
    return load_config(files, unpacks=packed is not None and packed.format.library in PUBLISHED)
