"""What tests of packed weights share: runs of a packed checkpoint, and quanto's integers without its extension."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.sources import resolve
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited
from tests.engines import ask, load

PROMPT = "The capital of France"
WIDE = {"hidden_size": 128, "intermediate_size": 256}
WIDE_EXPERTS = {"hidden_size": 128, "moe_intermediate_size": 128}


def silent(_event: Any) -> None:
    """Progress that nobody wants to see."""


def texts_wherever_blocks_are(folder: Path, offload_folder: Path) -> set[str]:
    """The answers of a model in each placement, whose bytes are those of its plan and which leaves no file."""
    texts = set()
    for placement in ("ram", "half", "disk", "mapped"):
        engine = load(folder, placement, options={"offload_folder": str(offload_folder)})
        try:
            texts.add(ask(engine, PROMPT).text)
            assert held_weights(engine) == engine.plan.layout.bytes
        finally:
            engine.close()
        assert list(offload_folder.iterdir()) == []
    return texts


def texts_after_moves(folder: Path) -> list[str]:
    """The answers of a model with every second layer on the disk, then with all of them there, then with none."""
    engine = load(folder, "half")
    try:
        texts = [ask(engine, PROMPT).text]
        for device in ("disk", "cpu"):
            plan = engine.plan
            homes = edited(plan, {block.name: device for block in plan.layout.layers})
            moved = make_plan(plan.layout, plan.machine, plan.workload, placement=homes, policy="moved")
            engine.apply(moved, silent)
            texts.append(ask(engine, PROMPT).text)
    finally:
        engine.close()
    return texts


def layouts_with_and_without_weights(folder: Path) -> tuple[ModelLayout, ModelLayout]:
    """What is planned for with the files of the weights, and before their download."""
    spec = ModelSpec(str(folder))
    files = resolve(spec, silent)
    return read_layout(spec, files), read_layout(spec, replace(files, weight_files=()))


def held_weights(engine: Any) -> int:
    """Bytes of the weights of a model, on all of its devices."""
    return sum(held.get("weights", 0) for held in engine.memory().values())


def unpacked(packed: Any) -> Any:
    """The integers of a quanto ``PackedTensor``, one at a time, as its documentation says."""
    import torch

    bits, rows = packed.bits, packed.shape[0]
    stored = packed._data.tolist()
    lines = [
        [value >> bits * place & (1 << bits) - 1 for value in line]
        for place in range(8 // bits)
        for line in stored
    ]
    return torch.tensor(lines[:rows], dtype=torch.uint8)


def without_extension(network: Any) -> Any:
    """The same model, its packed integers as plain bytes, which quanto takes as well."""
    for module in network.modules():
        weight = module._parameters.get("weight")
        if type(getattr(weight, "_data", None)).__name__ == "PackedTensor":
            weight._data = unpacked(weight._data)
    return network


def extension_was_loaded() -> bool:
    """Whether quanto compiled its extension for CPUs, or loaded it."""
    from optimum.quanto.library.extensions import get_extension

    return get_extension("quanto_cpp")._lib is not None
