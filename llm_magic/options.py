"""What a person may choose for a load and for a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUANTIZE = ("nf4", "fp4", "int8", "int4", "int2", "float8", "quanto-int8")
"""Methods of ``--quantize``; which devices each can be placed on is for the backend to say."""
PUBLISHED = ("mxfp4", "fp8")
"""What checkpoints come in that are kept as they are, and that transformers can unpack; nothing here packs weights so."""
AS_NUMBERS = "none"
"""In the place of a method: weights that come packed in any way are unpacked."""


@dataclass(frozen=True)
class LoadOptions:
    """Options that ``%llm load`` and ``%llm plan`` share.

    ``device_map`` is the name of a planner, a ``.json`` file, or a map; ``max_memory`` bytes by device;
    ``machine`` a file that describes another machine, to plan for. ``ctx_size`` and ``ubatch_size`` are tokens: of
    the context, and of a pass through a prompt.
    """

    device_map: str | Mapping[str, str] = "auto"
    max_memory: Mapping[str, int] = field(default_factory=dict)
    ctx_size: int | None = None
    ubatch_size: int | None = None
    offload_folder: str = ""
    machine: str = ""


@dataclass(frozen=True)
class AskOptions:
    """Options of one prompt. ``None`` and ``""`` stand for the session's default.

    ``sampling`` holds what the user gave: fields of ``Sampling`` by name.
    """

    model: str = ""
    system: str | None = None
    chat: str = ""
    new: bool = False
    history: bool | None = None
    continue_last: bool = False
    use_template: bool = True
    stream: bool = True
    output_format: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
