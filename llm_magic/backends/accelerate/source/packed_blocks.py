"""What packing makes of the bytes of blocks: which of their weights get smaller, and which stay as they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llm_magic.backends.accelerate.quantizing.methods import Method
from llm_magic.backends.accelerate.quantizing.prepare import Choice, prepare
from llm_magic.backends.accelerate.quantizing.sizes import packed_bytes
from llm_magic.backends.accelerate.source.expert_bytes import with_experts
from llm_magic.model import Block, TensorInfo

_OF_A_MATRIX = 2
"""Its dimensions; a stack of experts has more."""


def with_packed(
    model: Any, blocks: tuple[Block, ...], method: Method, dtype: Any, choice: Choice
) -> tuple[Block, ...]:
    """The blocks with the bytes that they will have once ``model`` is packed."""
    head = f"{choice.head}.weight"
    sizes = {
        name: packed_bytes(model.get_submodule(name.removesuffix(".weight")), dtype)
        for name in prepare(model, method.name, dtype, choice)
    }
    modules = dict(model.named_modules())

    def of_layers(tensor: TensorInfo) -> str:
        return choice.experts if choice.experts and len(tensor.shape) > _OF_A_MATRIX else method.name

    def repacked(block: Block) -> Block:
        tensors = tuple(
            replace(
                tensor,
                dtype=choice.head_method if tensor.name == head else of_layers(tensor),
                bytes=sizes[tensor.name],
            )
            if tensor.name in sizes
            else tensor
            for tensor in block.tensors
        )
        buffers = sum(buffer.nbytes for buffer in modules[block.name].buffers())
        changed = replace(block, tensors=tensors, buffer_bytes=buffers)
        return with_experts(changed, model.config) if block.experts else changed

    return tuple(
        repacked(block) if any(tensor.name in sizes for tensor in block.tensors) else block
        for block in blocks
    )


def unpacked_bytes(blocks: tuple[Block, ...], methods: Collection[str]) -> int:
    """Bytes of the layers' matrices that stay as they are: stacked experts above all."""
    layers = [block for block in blocks if block.kind in ("encoder", "decoder")]
    tensors = [tensor for block in layers for tensor in block.tensors if len(tensor.shape) > 1]
    return sum(tensor.bytes for tensor in tensors if tensor.dtype not in methods)
