"""What a block is called: its kind, and the short label by which people know it."""

from __future__ import annotations

import re
from typing import Any

from llm_magic.backends.accelerate.architecture import output_embeddings
from llm_magic.backends.accelerate.source.model_parts import LAST_NORM, Part
from llm_magic.model import BlockKind


def kind_of(model: Any, part: Part) -> BlockKind:
    """What a part is in the model; ``"other"`` where nothing tells."""
    from torch import nn

    if part.is_idle:
        return "tower"
    if part.layer is not None:
        return "encoder" if _side(part.name) not in ("", "decoder") else "decoder"
    if part.module is output_embeddings(model):
        return "head"
    if part.module is model.get_input_embeddings() or isinstance(part.module, nn.Embedding):
        return "embedding"
    return "norm" if part.tensors and "norm" in type(part.module).__name__.lower() else "other"


def labels_of(model: Any, parts: list[Part], kinds: list[BlockKind]) -> list[str]:
    """A label for each part, given their kinds; where two would have the same, the second goes by its name."""
    labels: list[str] = []
    for part, kind in zip(parts, kinds, strict=True):
        label = _label(model, part, kind)
        labels.append(part.name if label in labels else label)
    return labels


def _label(model: Any, part: Part, kind: BlockKind) -> str:
    side = _side(part.name) if model.config.is_encoder_decoder or kind == "encoder" else ""
    if part.layer is not None:
        return f"{side or 'layers'}.{part.layer}"
    if kind == "head":
        return "head"
    last = part.name.rpartition(".")[2]
    if part.module is model.get_input_embeddings() or (kind == "embedding" and side):
        last = "embed"
    elif kind == "norm" and LAST_NORM.search(last):
        last = "norm"
    return f"{side}.{last}" if side else last


def _side(name: str) -> str:
    """``"encoder"``, ``"decoder"``, a tower's name, or nothing for a plain decoder."""
    for step in name.split("."):
        if step in ("encoder", "decoder"):
            return step
        if re.search(r"vision|visual|audio|speech", step):
            return step
    return ""
