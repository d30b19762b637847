"""From the module tree of a model to its blocks: their names, tensors, bytes, ties and caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_magic.backends.accelerate.source.block_names import kind_of, labels_of
from llm_magic.backends.accelerate.source.cache_cost import cache_costs
from llm_magic.backends.accelerate.source.config_values import values
from llm_magic.backends.accelerate.source.expert_bytes import with_experts
from llm_magic.backends.accelerate.source.model_parts import parts_of, share_out
from llm_magic.model import Block, TensorInfo


def read_blocks(model: Any, dtype: Any) -> tuple[Block, ...]:
    """The blocks of a model on the meta device, in the order in which they run."""
    parts = parts_of(model)
    own, ties = share_out(parts)
    kinds = [kind_of(model, part) for part in parts]
    labels = labels_of(model, parts, kinds)
    plan = _DtypePlan(model, dtype)
    costs = cache_costs(model, [part.module for part in parts if part.layer is not None], dtype)
    blocks = []
    for part, kind, label in zip(parts, kinds, labels, strict=True):
        tensors = tuple(plan.info(name, parameter) for name, parameter in own[part.name])
        block = Block(
            name=part.name,
            label=label,
            kind=kind,
            tensors=tensors,
            buffer_bytes=part.buffer_bytes,
            tied_to=ties[part.name],
            looks_up=not ties[part.name] and _looks_up(model, part.module),
        )
        if part.layer is not None:
            block = with_experts(replace(block, cache=next(costs)), model.config)
        blocks.append(block)
    return tuple(blocks)


def _looks_up(model: Any, module: Any) -> bool:
    """Whether it is a table of rows for tokens: the input embeddings, or those that layers get beside them (Gemma 3n, 4)."""
    from torch import nn

    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    if len(list(module.parameters())) > 1:  # Inkling's has a norm
        return False
    beside = values(model.config.get_text_config(decoder=True), "vocab_size_per_layer_input")
    return module is model.get_input_embeddings() or module.num_embeddings in beside


class _DtypePlan:
    """In which dtype each parameter will be: transformers keeps some in float32."""

    def __init__(self, model: Any, dtype: Any) -> None:
        self.patterns = model._get_dtype_plan(dtype)

    def info(self, name: str, parameter: Any) -> TensorInfo:
        dtype = parameter.dtype
        if self.patterns and dtype.is_floating_point:
            from transformers.core_model_loading import build_glob_alternation

            found, groups, _ = build_glob_alternation(list(self.patterns))
            if match := found.search(name):
                dtype = self.patterns[groups[match.lastgroup]]
        count = parameter.numel() * dtype.itemsize
        return TensorInfo(name, tuple(parameter.shape), str(dtype).removeprefix("torch."), count)
