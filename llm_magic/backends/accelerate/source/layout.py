"""What is in a model: its blocks, bytes, ties and caches, read from its configuration alone.

The model is built on the meta device, where a parameter has a shape and no bytes, and its module
tree is cut into the blocks that are placed as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_magic.backends.accelerate.architecture import (
    auto_class,
    beside_the_text,
    decoder_of,
    output_embeddings,
    path_of_head,
)
from llm_magic.backends.accelerate.decoding import step_by_step
from llm_magic.backends.accelerate.decoding.capturable import (
    has_plain_cache,
    model_reason,
    packing_reason,
)
from llm_magic.backends.accelerate.decoding.kv_cache import can_take_back
from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
from llm_magic.backends.accelerate.experts.stacks import find_stacks
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.packed.prepacked import FOUR_BIT_PARTS
from llm_magic.backends.accelerate.quantizing.packed_head import untie_head
from llm_magic.backends.accelerate.quantizing.quantize import (
    Choice,
    Method,
    find_method,
    has_gpu_kernel,
    method_of,
    packed_bytes,
    prepare,
    reads_head,
)
from llm_magic.backends.accelerate.source import gguf_model, hub
from llm_magic.backends.accelerate.source.cache_cost import cache_costs
from llm_magic.backends.accelerate.source.capped_scores import have_scores_capped
from llm_magic.backends.accelerate.source.config_values import values
from llm_magic.backends.accelerate.source.convert import MARK, most_common_type
from llm_magic.backends.accelerate.source.packed_checkpoint import (
    PackedCheckpoint,
    find_packed,
    packing_facts,
)
from llm_magic.backends.accelerate.source.packed_model import PackedModel, choice_for
from llm_magic.backends.accelerate.source.sources import (
    ModelFiles,
    processor_template,
    read_json,
    resolve,
    weight_headers,
)
from llm_magic.errors import OptionError, SourceError
from llm_magic.events import Progress
from llm_magic.headers import GgufHeader, read_gguf_header
from llm_magic.model import Block, BlockKind, ModelLayout, ModelSpec, TensorInfo
from llm_magic.options import AS_NUMBERS, PUBLISHED

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OF_A_MATRIX = 2
"""Its dimensions; a stack of experts has more."""
_LAST = re.compile(r"final|ln_f|norm_f|^norm$", re.IGNORECASE)


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
    dtype = _dtype(spec, files, config, header)
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
    blocks = _read_blocks(model, dtype)
    details = (
        _details(config, files, header)
        | _unpacking(packed, method)
        | {
            "attention": model.config._attn_implementation or "",
            "auto_class": auto_class(config).__name__,
        }
    )
    if not can_take_back(model):
        details |= {"one_by_one": True}
    if reason := model_reason(model) or packing_reason(method.name if method else ""):
        details |= {"eager": reason}
    elif not has_plain_cache(model):
        details |= {"keeps_states": True}
    if step_by_step.serves(model):
        details |= {"attends_in_parts": True}
    if _are_apart(model, blocks):
        details |= {"routed_experts": True}
    if method is not None:
        blocks = _with_packed(model, blocks, method, dtype, choice)
        details |= {"keeps_head": True} if keeps_head else {}
        details |= _packing(packed, method, choice) | {
            "unpacked_bytes": _unpacked_bytes(blocks, (method.name, choice.experts))
        }
    return ModelLayout(
        name=files.name,
        architecture=type(model).__name__,
        blocks=blocks,
        dtype=str(dtype).removeprefix("torch."),
        context_length=context_length(config),
        hidden_size=_number(config, "hidden_size", "d_model", "n_embd"),
        intermediate_size=_intermediate_size(config),
        vocab_size=_number(config, "vocab_size"),
        is_encoder_decoder=bool(config.is_encoder_decoder),
        has_chat_template=_has_chat_template(files, header),
        license=_license(files, header),
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


# ------------------------------------------------------------------------------------ the model


def load_config(files: ModelFiles, *, unpacks: bool = False) -> Any:
    """Transformers' configuration of a folder.

    Parameters
    ----------
    unpacks
        Whether transformers is to unpack weights, although they could be read as they are.

    Raises
    ------
    SourceError
        When transformers does not know its ``model_type``, or a value in it is invalid.
    """
    from transformers import AutoConfig

    _refuse_packed(files)
    model_type = read_json(files.folder / "config.json").get("model_type")
    try:
        config = AutoConfig.from_pretrained(str(files.folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a hostile configuration can fail in any way a constructor can
        if not isinstance(model_type, str):
            raise SourceError(
                "config.json does not say its model_type.", "Name a model that transformers supports."
            ) from None
        if not _is_known(model_type):
            raise _unsupported(model_type) from None
        raise SourceError(
            f"The configuration of {files.name} ({model_type}) is invalid: {_first_line(error)}.",
            "Download its config.json again.",
        ) from None
    parts = (config, config.get_text_config(decoder=True))  # transformers looks in both
    packed = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if isinstance(packed, dict):
        packed["dequantize"] = True  # what is counted, and what every device can compute
        config.quantization_config = packed
    # Unless transformers is to unpack them, packed weights are read here, see `packed_checkpoint`.
    if find_packed(files) is not None and not unpacks:
        for part in parts:
            part.__dict__.pop("quantization_config", None)
    have_scores_capped(config)
    return config


def _refuse_packed(files: ModelFiles) -> None:
    """Refuse packed weights whose bytes and placement nobody here has checked.

    Raises
    ------
    SourceError
        For any ``quant_method`` that is not unpacked while it loads.
    """
    for packed in packing_facts(files):
        method = packed.get("quant_method", "unknown") if isinstance(packed, dict) else packed
        if method and method not in PUBLISHED and find_packed(files) is None:
            raise SourceError(
                f"The weights of {files.name} are quantized ({_plain(str(method)) or 'unknown'}), "
                "which cannot be placed yet.",
                "Load the original model instead, or a .gguf of it.",
            )


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _unsupported(model_type: str) -> SourceError:
    import transformers

    return SourceError(
        f"transformers {transformers.__version__} does not support the architecture {model_type!r}.",
        "Upgrade it (pip install -U transformers), or load a model of another architecture.",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"(/|[A-Za-z]:\\)\S+", "…", text.splitlines()[0])[:160].rstrip(".")


def build_skeleton(config: Any, dtype: Any) -> Any:
    """The model of ``config`` on the meta device, its weights tied.

    Raises
    ------
    SourceError
        When the architecture answers no text or needs a missing package, or the configuration builds no model.
    """
    import torch

    auto = auto_class(config)
    try:
        with default_dtype_kept(), torch.device("meta"):
            return auto.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except ImportError as error:
        raise SourceError(
            f"A model of the kind {config.model_type!r} needs a package that is missing: "
            f"{_first_line(error).partition('. ')[0]}.",
            "Install that package, and load the model again.",
        ) from None
    except Exception as error:  # sizes that do not fit together fail anywhere in a constructor
        raise SourceError(
            f"The configuration of this {config.model_type!r} model builds no model: {_first_line(error)}.",
            "Download its config.json again.",
        ) from None


def _dtype(spec: ModelSpec, files: ModelFiles, config: Any, header: GgufHeader | None) -> Any:
    """As ``from_pretrained(dtype="auto")`` decides: the configuration's, else that of the first weights."""
    import torch

    if spec.dtype != "auto":
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SourceError(
                f"{spec.dtype!r} is not a dtype to load in.", "Use auto, bfloat16, float16 or float32."
            )
        return dtype
    if header is not None:
        return getattr(torch, gguf_model.gguf_dtype(header))
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    if not files.is_local and not files.weight_files and (found := hub.checkpoint_dtype(spec)):
        return getattr(torch, found)
    for weights in weight_headers(files):
        for tensor in sorted(weights.tensors, key=lambda tensor: tensor.name):
            if tensor.dtype in _FLOATS and not tensor.name.endswith((*FOUR_BIT_PARTS, ".SCB")):
                return getattr(torch, _FLOATS[tensor.dtype])
    return torch.float32


# ----------------------------------------------------------------------------------- the blocks


@dataclass
class _Part:
    """A module (or a bare parameter) on its way to become a block."""

    name: str
    module: Any
    layer: int | None = None
    tensors: tuple[tuple[str, Any], ...] = ()
    buffer_bytes: int = 0
    is_idle: bool = False


def _read_blocks(model: Any, dtype: Any) -> tuple[Block, ...]:
    idle = beside_the_text(model)
    text = decoder_of(model) if idle else model
    layers = _layers_of(text, frozenset(model._no_split_modules or ()))
    cut = [replace(part, is_idle=id(part.module) in idle) for part in _cut(model, "", layers)]
    parts = _in_order([part for part in cut if not part.is_idle])
    parts += [part for part in cut if part.is_idle]
    own, ties = _share_out(parts)
    kinds = [_kind(model, part) for part in parts]
    labels = _labels(model, parts, kinds)
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
            block = _with_experts(replace(block, cache=next(costs)), model.config)
        blocks.append(block)
    return tuple(blocks)


def _layers_of(model: Any, classes: frozenset[str]) -> dict[int, int]:
    """``id(module) -> number`` of every encoder or decoder layer, outermost modules only."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stacks = [stack for stack in lists if all(type(layer).__name__ in classes for layer in stack)]
    if not stacks:  # a model that names no layers: its longest list is the stack
        stacks = sorted(lists, key=len)[-1:]
    layers = {id(layer): number for stack in stacks for number, layer in enumerate(stack)}
    inner = {id(m) for stack in stacks for layer in stack for m in layer.modules() if m is not layer}
    return {module: number for module, number in layers.items() if module not in inner}


def _cut(module: Any, name: str, layers: dict[int, int]) -> Iterator[_Part]:
    """The parts of a module in the order of its children: layers and layerless modules stay whole.

    Nobody calls a list of modules: each of them gets its inputs by itself.
    """
    from torch import nn

    is_called = type(module).forward is not nn.Module.forward
    holds_layers = any(id(inner) in layers for inner in module.modules())
    if id(module) in layers or (name and is_called and not holds_layers):
        tensors = tuple((f"{name}.{n}", p) for n, p in module.named_parameters(remove_duplicate=False))
        buffers = sum(buffer.nbytes for buffer in module.buffers())
        if tensors or buffers:
            yield _Part(name, module, layers.get(id(module)), tensors, buffers)
        return
    for key, parameter in module.named_parameters(recurse=False):
        yield _Part(_join(name, key), parameter, None, ((_join(name, key), parameter),))
    for key, buffer in module.named_buffers(recurse=False):
        yield _Part(_join(name, key), buffer, None, (), buffer.nbytes)
    for key, child in module.named_children():
        yield from _cut(child, _join(name, key), layers)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _in_order(parts: list[_Part]) -> list[_Part]:
    """Parts in the order in which they run, where that is not the order of registration.

    Within the module that holds a stack of layers, what has no weights (rotary tables) runs
    before the layers, and the last norm after them.
    """
    for stack in {
        part.name.rpartition(".")[0].rpartition(".")[0] for part in parts if part.layer is not None
    }:
        inside = [i for i, part in enumerate(parts) if not stack or part.name.startswith(f"{stack}.")]
        first = min(i for i in inside if parts[i].layer is not None)
        ranked = sorted(inside, key=lambda i: (_phase(parts[i], before=i < first), i))
        moved = [parts[i] for i in ranked]
        for i, part in zip(inside, moved, strict=True):
            parts[i] = part
    return parts


def _phase(part: _Part, *, before: bool) -> int:
    if part.layer is not None:
        return 1
    if not part.tensors:
        return 0
    last = part.name.rpartition(".")[2]
    return 0 if before and not _LAST.search(last) else 2


def _share_out(parts: list[_Part]) -> tuple[dict[str, list[tuple[str, Any]]], dict[str, tuple[str, ...]]]:
    """Each parameter to the first part that holds it, and for each part the others that share with it."""
    owners: dict[int, list[str]] = {}
    own: dict[str, list[tuple[str, Any]]] = {part.name: [] for part in parts}
    for part in parts:
        for name, parameter in part.tensors:
            holders = owners.setdefault(id(parameter), [])
            if not holders:
                own[part.name].append((name, parameter))
            if part.name not in holders:
                holders.append(part.name)
    ties: dict[str, tuple[str, ...]] = {part.name: () for part in parts}
    for holders in owners.values():
        for name in holders if len(holders) > 1 else ():
            ties[name] = tuple(dict.fromkeys((*ties[name], *(h for h in holders if h != name))))
    return own, ties


# ------------------------------------------------------------------------- what a block is called


def _kind(model: Any, part: _Part) -> BlockKind:
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


def _looks_up(model: Any, module: Any) -> bool:
    """Whether it is a table of rows for tokens: the input embeddings, or those that layers get beside them (Gemma 3n, 4)."""
    from torch import nn

    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    if len(list(module.parameters())) > 1:  # Inkling's has a norm
        return False
    beside = values(model.config.get_text_config(decoder=True), "vocab_size_per_layer_input")
    return module is model.get_input_embeddings() or module.num_embeddings in beside


def _side(name: str) -> str:
    """``"encoder"``, ``"decoder"``, a tower's name, or nothing for a plain decoder."""
    for step in name.split("."):
        if step in ("encoder", "decoder"):
            return step
        if re.search(r"vision|visual|audio|speech", step):
            return step
    return ""


def _labels(model: Any, parts: list[_Part], kinds: list[BlockKind]) -> list[str]:
    labels: list[str] = []
    for part, kind in zip(parts, kinds, strict=True):
        label = _label(model, part, kind)
        labels.append(part.name if label in labels else label)
    return labels


def _label(model: Any, part: _Part, kind: BlockKind) -> str:
    side = _side(part.name) if model.config.is_encoder_decoder or kind == "encoder" else ""
    if part.layer is not None:
        return f"{side or 'layers'}.{part.layer}"
    if kind == "head":
        return "head"
    last = part.name.rpartition(".")[2]
    if part.module is model.get_input_embeddings() or (kind == "embedding" and side):
        last = "embed"
    elif kind == "norm" and _LAST.search(last):
        last = "norm"
    return f"{side}.{last}" if side else last


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


def _with_packed(
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
        return _with_experts(changed, model.config) if block.experts else changed

    return tuple(
        repacked(block) if any(tensor.name in sizes for tensor in block.tensors) else block
        for block in blocks
    )


def _unpacked_bytes(blocks: tuple[Block, ...], methods: Collection[str]) -> int:
    """Bytes of the layers' matrices that stay as they are: stacked experts above all."""
    layers = [block for block in blocks if block.kind in ("encoder", "decoder")]
    tensors = [tensor for block in layers for tensor in block.tensors if len(tensor.shape) > 1]
    return sum(tensor.bytes for tensor in tensors if tensor.dtype not in methods)


def _are_apart(model: Any, blocks: Sequence[Block]) -> bool:
    """Whether experts can be elsewhere than the rest of their layers: all that are counted are taken one at a time."""
    alike = {block.likeness: block for block in blocks if block.experts}
    found = (find_stacks(model.get_submodule(block.name)) for block in alike.values())
    sizes = [sum(stack.experts * stack.bytes_per_expert for stack in stacks) for stacks in found]
    return bool(sizes) and sizes == [block.expert_bytes for block in alike.values()]


def _with_experts(block: Block, config: Any) -> Block:
    tensors = [tensor for tensor in block.tensors if re.search(r"\.experts?\.", tensor.name)]
    if not tensors:
        return block
    numbers = {match[1] for t in tensors if (match := re.search(r"\.experts?\.(\d+)\.", t.name))}
    experts = len(numbers) or tensors[0].shape[0]
    active = _number(
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


# ------------------------------------------------------------------------ what the model is like


def _number(config: Any, *names: str) -> int:
    """The first of these settings that is a whole number, the largest where layers differ; 0 when none is."""
    for part in (config.get_text_config(decoder=True), config):
        for name in names:
            found = [each for value in values(part, name) for each in _items(value) if type(each) is int]
            if found and max(found) > 0:
                return max(found)
    return 0


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def context_length(config: Any) -> int:
    """Longest context in tokens; 0 when the architecture has no limit or does not say."""
    return _number(
        config,
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "max_sequence_length",
        "n_ctx",
    )


def _intermediate_size(config: Any) -> int:
    found = _number(
        config, "intermediate_size", "d_ff", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"
    )
    return found or 4 * _number(config, "hidden_size", "d_model", "n_embd")


def _has_chat_template(files: ModelFiles, header: GgufHeader | None) -> bool:
    if header is not None:
        return "tokenizer.chat_template" in header.metadata
    folder = files.folder
    if (folder / "chat_template.jinja").is_file() or processor_template(folder):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def _license(files: ModelFiles, header: GgufHeader | None) -> str:
    if header is not None:
        return _plain(header.metadata.get("general.license", ""))
    if (mark := files.folder / MARK).is_file():
        return _plain(read_json(mark).get("license", ""))
    card = files.folder / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(65_536)
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license(?:_name)?:[ \t]*([^\n#]+)", front[1], re.MULTILINE) if front else None
    return _plain(found[1].strip().strip("'\"")) if found else ""


def _plain(value: object) -> str:
    """A short text of a model card, fit to be shown."""
    return re.sub(r"[^\w .,:/()+-]", "", str(value))[:60] if isinstance(value, str) else ""


def _details(config: Any, files: ModelFiles, header: GgufHeader | None) -> dict[str, Any]:
    details: dict[str, Any] = {
        "model_type": config.model_type,
        "layers": _number(config, "num_hidden_layers", "n_layer"),
    }
    details["attention_heads"] = _number(config, "num_attention_heads", "n_head", "num_heads")
    details["kv_heads"] = _number(config, "num_key_value_heads", "num_kv_heads") or details["attention_heads"]
    details["head_dim"] = _number(config, "head_dim", "d_kv")
    details["experts"] = _number(config, "num_experts", "num_local_experts", "n_routed_experts")
    details["sliding_window"] = _number(config, "sliding_window")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raw = quantization if isinstance(quantization, dict) else quantization.to_dict()
        details["quantization"] = _plain(str(raw.get("quant_method", "unknown")))
    if files.gguf is not None:
        found = header or read_gguf_header(files.gguf)
        details["gguf"] = most_common_type(found)
    return {key: value for key, value in details.items() if value}
