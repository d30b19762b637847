"""What to load (``ModelSpec``) and what is in it (``ModelLayout``), without reading a weight.

The nouns only. A backend fills a layout from configuration files and file headers; the planner,
the views and the commands read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

BlockKind = Literal["embedding", "encoder", "decoder", "norm", "head", "tower", "other"]
"""``"tower"``: what a model sees or hears with, and what joins it to the text; no pass over text visits it."""


@dataclass(frozen=True)
class ModelSpec:
    """What the user asked to load.

    Attributes
    ----------
    source
        A hub id, a folder, a ``.gguf`` file, or ``"starter"``.
    revision
        Branch, tag or commit of a hub source.
    dtype
        ``"auto"`` (as the checkpoint says), ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    backend
        Name of a registered backend, or ``"auto"``.
    allow_pickle
        Whether ``.bin`` checkpoints may be read (with ``weights_only=True``).
    quantize
        Method by which linear layers and experts are packed while loading (``"nf4"``, ``"int8"``, …); empty:
        as the checkpoint is. ``"none"``: unpacked, where the checkpoint is packed.
    quantize_head
        Method for the head, which stays as it is otherwise.
    draft
        Source of a small model that proposes tokens; empty: none.
    """

    source: str
    revision: str | None = None
    dtype: str = "auto"
    backend: str = "auto"
    allow_pickle: bool = False
    quantize: str = ""
    quantize_head: str = ""
    draft: str = ""


@dataclass(frozen=True)
class TensorInfo:
    """One parameter as the model will hold it.

    ``dtype`` is torch's name without the prefix (``"bfloat16"``); ``bytes`` is what it takes in
    memory in that dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class CacheCost:
    """What one block keeps between tokens, for one sequence.

    ``bytes_per_token`` grows with the context up to ``window`` tokens (0: no limit);
    ``fixed_bytes`` is the state of a recurrent or convolution layer.
    """

    bytes_per_token: int = 0
    fixed_bytes: int = 0
    window: int = 0

    def bytes_for(self, context_length: int) -> int:
        """Bytes at ``context_length`` tokens of one sequence."""
        tokens = min(context_length, self.window) if self.window else context_length
        return self.bytes_per_token * tokens + self.fixed_bytes


@dataclass(frozen=True)
class Block:
    """A part of the model that is placed as a whole: one decoder layer, the embedding, the head.

    Attributes
    ----------
    name
        Module path, a key of ``device_map`` (``"model.layers.3"``).
    label
        What a person types and reads (``"layers.3"``, ``"embed"``, ``"norm"``, ``"head"``).
    tensors
        Parameters that count here. A tied tensor counts in the first block that holds it.
    buffer_bytes
        Non-parameter tensors, which always stay where the block computes.
    tied_to
        Names of the blocks that share a tensor with this one; all of them live on one device.
    cache
        KV cache or recurrent state of the block.
    experts, expert_bytes, active_experts
        Of a mixture-of-experts layer: how many experts, bytes of all of them, how many work on
        one token.
    looks_up
        Whether it is a table of which a pass needs the rows of its tokens, by their ids, and no more.
    """

    name: str
    label: str
    kind: BlockKind
    tensors: tuple[TensorInfo, ...] = ()
    buffer_bytes: int = 0
    tied_to: tuple[str, ...] = ()
    cache: CacheCost = CacheCost()
    experts: int = 0
    expert_bytes: int = 0
    active_experts: int = 0
    looks_up: bool = False

    @cached_property
    def bytes(self) -> int:
        """Bytes of the block's parameters."""
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(_product(tensor.shape) for tensor in self.tensors)

    @cached_property
    def likeness(self) -> tuple[object, ...]:
        """What two blocks share that cost the same in every sweep: layers of a model mostly do."""
        experts = (self.experts, self.expert_bytes, self.active_experts)
        return self.kind, self.bytes, self.parameters, self.tied_to, self.cache, experts, self.looks_up

    @property
    def is_idle(self) -> bool:
        """Whether no pass visits it, so that it needs a place and nothing else."""
        return self.kind == "tower"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: experts that are not routed to stay."""
        if not self.experts:
            return self.bytes
        return self.bytes - self.expert_bytes + self.expert_bytes * self.active_experts // self.experts


@dataclass(frozen=True)
class ModelLayout:
    """Everything about a model that planning and showing it needs.

    Attributes
    ----------
    name
        Short display name, never a path (``"Qwen3-32B"``).
    architecture
        Class name in the config (``"LlamaForCausalLM"``).
    blocks
        In the order in which a forward pass runs them, towers last; together they hold every parameter.
    dtype
        The dtype in which the model will be loaded.
    context_length
        Longest context the model was made for, in tokens; 0 when its config does not say.
    hidden_size, intermediate_size, vocab_size
        Widths, for the activation and logits peaks.
    quantization
        Method by which linear layers and experts are packed (``"nf4"``, …); the blocks' tensors then have the
        packed bytes. Empty: none.
    head_quantization
        Method by which the head is packed, of such a model. Empty: it is not.
    expert_quantization
        What the experts stay in of such a model, if they are not packed by that method: that of its checkpoint.
    draft
        A small model beside this one that proposes tokens; it stays whole where this one computes.
    """

    name: str
    architecture: str
    blocks: tuple[Block, ...]
    dtype: str
    context_length: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    is_encoder_decoder: bool = False
    has_chat_template: bool = False
    license: str = ""
    quantization: str = ""
    head_quantization: str = ""
    expert_quantization: str = ""
    draft: ModelLayout | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def packing(self) -> str:
        """How its weights are packed, in words: ``"nf4"``, ``"nf4 (head int8)"``; empty where they are not."""
        others = {"experts": self.expert_quantization, "head": self.head_quantization}
        beside = ", ".join(f"{part} {method}" for part, method in others.items() if method)
        return f"{self.quantization} ({beside})" if beside else self.quantization

    @cached_property
    def bytes(self) -> int:
        """Bytes of all parameters, tied ones once."""
        return sum(block.bytes for block in self.blocks)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(block.parameters for block in self.blocks)

    @property
    def layers(self) -> tuple[Block, ...]:
        """The encoder and decoder layers."""
        return tuple(b for b in self.blocks if b.kind in ("encoder", "decoder"))

    @property
    def is_mixture_of_experts(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return any(block.experts for block in self.blocks)

    @cached_property
    def active_experts(self) -> int:
        """Most experts that work on one token in any layer; 0 without experts."""
        return max((block.active_experts for block in self.blocks), default=0)

    @cached_property
    def cache_costs(self) -> frozenset[CacheCost]:
        """What blocks keep between tokens, every kind of it once: layers are mostly alike."""
        return frozenset(block.cache for block in self.blocks)

    @cached_property
    def module_names(self) -> frozenset[str]:
        """Every module that holds a parameter: blocks, their parents, what is in them; ``""`` for all."""
        names = {""}
        for block in self.blocks:
            for inner in (block.name, *(tensor.name for tensor in block.tensors)):
                name = inner
                while name and name not in names:
                    names.add(name)
                    name = name.rpartition(".")[0]
        return frozenset(names)

    @property
    def size_class(self) -> str:
        """Size class by parameters: under 1B, 1–3B, 3–9B, 9–27B or 27B+."""
        billions = self.parameters / 1e9
        for limit, label in ((1, "<1B"), (3, "1–3B"), (9, "3–9B"), (27, "9–27B")):
            if billions < limit:
                return label
        return "27B+"

    def block(self, name: str) -> Block:
        """The block with this name or label.

        Raises
        ------
        KeyError
            When there is none.
        """
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {b.label: b for b in self.blocks} | {b.name: b for b in self.blocks}


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
