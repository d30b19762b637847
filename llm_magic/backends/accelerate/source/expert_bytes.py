"""Which of a layer's bytes are experts, how many of them a token takes, and whether they can be elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llm_magic.backends.accelerate.experts.stacks import find_stacks
from llm_magic.backends.accelerate.source.config_values import whole_number
from llm_magic.model import Block


def with_experts(block: Block, config: Any) -> Block:
    """The block with what is counted of its experts; unchanged where it has none."""
    tensors = [tensor for tensor in block.tensors if re.search(r"\.experts?\.", tensor.name)]
    if not tensors:
        return block
    numbers = {match[1] for t in tensors if (match := re.search(r"\.experts?\.(\d+)\.", t.name))}
    experts = len(numbers) or tensors[0].shape[0]
    active = whole_number(
        config,
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "num_selected_experts",
    )
    return replace(
        block,
        experts=experts,
        expert_bytes=sum(tensor.bytes for tensor in tensors),
        active_experts=min(active or experts, experts),
    )


def are_apart(model: Any, blocks: Sequence[Block]) -> bool:
    """Whether experts can be elsewhere than the rest of their layers: all that are counted are taken one at a time."""
    alike = {block.likeness: block for block in blocks if block.experts}
    found = (find_stacks(model.get_submodule(block.name)) for block in alike.values())
    sizes = [sum(stack.experts * stack.bytes_per_expert for stack in stacks) for stacks in found]
    return bool(sizes) and sizes == [block.expert_bytes for block in alike.values()]
