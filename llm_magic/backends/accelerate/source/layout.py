"""What is in a model: its blocks, bytes, ties and caches, read from its configuration alone.

The model is built on the meta device (`skeleton`), where a parameter has a shape and no bytes. Its module tree is cut
into the parts that are placed as a whole (`model_parts`), which become blocks (`model_blocks`, `packed_blocks`).
"""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.architecture import path_of_head
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.quantizing.kept_layers import reads_head
from llm_magic.backends.accelerate.quantizing.methods import Method, find_method, has_gpu_kernel, method_of
from llm_magic.backends.accelerate.quantizing.packed_head import untie_head
from llm_magic.backends.accelerate.quantizing.prepare import Choice
from llm_magic.backends.accelerate.source import gguf_model
from llm_magic.backends.accelerate.source.config_values import whole_number
from llm_magic.backends.accelerate.source.expert_bytes import are_apart
from llm_magic.backends.accelerate.source.model_blocks import read_blocks
from llm_magic.backends.accelerate.source.model_details import (
    code_details,
    context_length,
    details_of,
    has_chat_template,
    intermediate_size,
    license_of,
)
from llm_magic.backends.accelerate.source.packed_blocks import unpacked_bytes, with_packed
from llm_magic.backends.accelerate.source.packed_checkpoint import PackedCheckpoint, find_packed
from llm_magic.backends.accelerate.source.packed_model import PackedModel, choice_for
from llm_magic.backends.accelerate.source.skeleton import build_skeleton, dtype_of, load_config
from llm_magic.backends.accelerate.source.sources import ModelFiles
from llm_magic.errors import OptionError
from llm_magic.headers import read_gguf_header
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.options import AS_NUMBERS


def read_layout(spec: ModelSpec, files: ModelFiles) -> ModelLayout:
    """The layout of a resolved model; no weight is read, and nothing is converted.

    Raises
    ------
    SourceError
        When transformers does not support the architecture, or the configuration is invalid.
    OptionError
        When ``spec.quantize`` is no method, its library is missing, or it finds nothing to pack; or when the head
        cannot be packed.
    """
    header = read_gguf_header(files.gguf) if files.gguf and not files.weight_files else None
    packed = find_packed(files)
    config = gguf_model.gguf_config(files.gguf, header) if files.gguf and header else load_config(files)
    quantize = _quantize(spec, packed)
    dtype = dtype_of(spec, files, config, header)
    if spec.dtype == "auto" and packed and quantize == packed.format.method:
        dtype = packed.quick_dtype(dtype)
    method = _method(quantize, packed)
    head = _head_method(spec, method)
    model = build_skeleton(config, dtype)
    choice = Choice()
    if method is not None:
        choice = choice_for(model, PackedModel(packed, model) if packed else None, method.name, head)
    if head:
        untie_head(model, choice.head)
    keeps_head = method is not None and not _can_pack_head(model)
    blocks = read_blocks(model, dtype)
    details = (
        details_of(config, files, header)
        | _unpacking(packed, method)
        | code_details(model, config, method.name if method else "")
    )
    if are_apart(model, blocks):
        details |= {"routed_experts": True}
    if method is not None:
        blocks = with_packed(model, blocks, method, dtype, choice)
        details |= {"keeps_head": True} if keeps_head else {}
        details |= _packing(packed, method, choice) | {
            "unpacked_bytes": unpacked_bytes(blocks, (method.name, choice.experts))
        }
    return ModelLayout(
        name=files.name,
        architecture=type(model).__name__,
        blocks=blocks,
        dtype=str(dtype).removeprefix("torch."),
        context_length=context_length(config),
        hidden_size=whole_number(config, "hidden_size", "d_model", "n_embd"),
        intermediate_size=intermediate_size(config),
        vocab_size=whole_number(config, "vocab_size"),
        is_encoder_decoder=bool(config.is_encoder_decoder),
        has_chat_template=has_chat_template(files, header),
        license=license_of(files, header),
        quantization=method.name if method else "",
        head_quantization=head,
        expert_quantization=choice.experts,
        details=details,
    )


def _quantize(spec: ModelSpec, packed: PackedCheckpoint | None) -> str:
    """The name of the method by which layers are packed, or were before; empty for none."""
    if spec.quantize == AS_NUMBERS:
        if packed:
            packed.check_files()
        return ""
    return packed.check(spec.quantize) if packed else spec.quantize


def _method(name: str, packed: PackedCheckpoint | None) -> Method | None:
    if not name:
        return None
    return method_of(name) if packed and packed.is_kept(name) else find_method(name)


def _head_method(spec: ModelSpec, method: Method | None) -> str:
    """The method that packs the head; empty where it stays as it is."""
    if not spec.quantize_head:
        return ""
    if method is None:
        raise OptionError(
            "--quantize-head packs the head of a model whose layers are packed.", "Add --quantize METHOD."
        )
    return find_method(spec.quantize_head, "--quantize-head").name


def _can_pack_head(model: Any) -> bool:
    try:
        return not reads_head(model, path_of_head(model))
    except OptionError:
        return False


def _packing(packed: PackedCheckpoint | None, method: Method, choice: Choice) -> dict[str, Any]:
    """What a plan should know of packed weights beside their method."""
    details: dict[str, Any] = {} if cpu_products.is_there() else {"no_cpu_kernels": True}
    if choice.group is not None:
        details |= {"group": choice.group}
    if not has_gpu_kernel(choice.experts or method.name):
        details |= {"no_gpu_kernel": True}
    if packed is None:
        return details
    if packed.is_kept(method.name):
        return details | {"is_packed": True, "packed_by": packed.format.library}
    return details | {"quantization": packed.format.library}


def _unpacking(packed: PackedCheckpoint | None, method: Method | None) -> dict[str, Any]:
    return {"unpacked_from": packed.format.library} if packed and method is None else {}
