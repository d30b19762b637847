"""Load a model as its plan says: transformers reads, Accelerate places, we check, take over and report."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_magic.backends.accelerate.decoding.proposers import require_same_vocabulary
from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
from llm_magic.backends.accelerate.default_streams import on_default_streams
from llm_magic.backends.accelerate.files.extents import Extent
from llm_magic.backends.accelerate.files.offload_folder import (
    OffloadFolder,
    check_tensor_names,
    disk_error,
)
from llm_magic.backends.accelerate.left_in_files import left_in_files
from llm_magic.backends.accelerate.memory_errors import (
    is_out_of_memory,
    refuse_overflow,
    release_memory,
)
from llm_magic.backends.accelerate.packed_load import PackedLoad
from llm_magic.backends.accelerate.placement.device_map import accelerate_device_map
from llm_magic.backends.accelerate.placement.hooks import weights_loader
from llm_magic.backends.accelerate.placement.placed import Fill, PlacedModel
from llm_magic.backends.accelerate.quantizing.methods import refuse_devices
from llm_magic.backends.accelerate.quiet import bars_into, quiet
from llm_magic.backends.accelerate.served_model import serve_plain_modules
from llm_magic.backends.accelerate.source.large_files import large_files_opened
from llm_magic.backends.accelerate.source.ties import not_shared, refuse_untied
from llm_magic.errors import EngineError, LLMMagicError, PlanError, SourceError
from llm_magic.events import PhaseEvent, Progress
from llm_magic.harmless.paths import without_paths
from llm_magic.host.memory import host_memory
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.plan import Plan
from llm_magic.planning.planner import refusal
from llm_magic.units import format_bytes

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.source.sources import ModelFiles


_TOKENIZER = re.compile(r".*(token|vocab|merges|spiece|sentencepiece|\.model$|\.tiktoken$).*", re.IGNORECASE)


@dataclass
class LoadedWeights:
    """A placed model, its tokenizer, and a draft model (``None`` without one) with its name."""

    placed: PlacedModel
    tokenizer: Any
    draft: Any = None
    draft_name: str = ""


def load(files: ModelFiles, spec: ModelSpec, plan: Plan, progress: Progress) -> LoadedWeights:
    """Read ``files`` into a model that is placed as ``plan`` says.

    Raises
    ------
    PlanError
        When the plan does not fit, or the offload folder cannot be used.
    SourceError
        When the files are damaged or incomplete, or the architecture is not supported.
    EngineError
        When memory runs out, or the libraries fail for another reason.
    BaseException
        Whatever ``progress`` raises to cancel; everything read so far is given back.
    """
    refuse_what_does_not_fit(plan)
    refuse_overflow(use.device for use in plan.uses)
    # They become names of files when a weight is written again.
    check_tensor_names([tensor.name for block in plan.layout.blocks for tensor in block.tensors])
    parent = plan.options.get("offload_folder", "")
    method = plan.layout.quantization
    folder = OffloadFolder(parent) if _is_packed(plan) or "disk" in plan.device_map.values() else None
    if method:
        refuse_devices(method, {place.compute for place in plan.placements})
    if head_method := plan.layout.head_quantization:
        refuse_devices(
            head_method, {place.compute for place in plan.placements if place.block.kind == "head"}
        )
    try:
        # One load at a time: both replace functions of the libraries, and put back what they found.
        with (
            quiet(),
            default_dtype_kept(),
            large_files_opened(),
            on_default_streams(each for place in plan.placements for each in (place.compute, place.prefill)),
        ):
            tokenizer = _read_tokenizer(files)
            draft_files = _find_draft(spec, tokenizer, progress)
            model, fill, extents = _read_model(files, spec, plan, folder, progress)
            if folder:
                folder.protect()
            own = () if fill else files.weight_files
            placed = PlacedModel(model, plan, own, folder, extents=extents, fill=fill)
            draft = _read_draft(draft_files, plan, progress) if draft_files else None
        return LoadedWeights(placed, tokenizer, draft, draft_files.name if draft_files else "")
    except BaseException as error:
        # Frames of the failed call still hold the tensors that were read.
        traceback.clear_frames(error.__traceback__)
        if folder:
            folder.remove()
        release_memory()
        if isinstance(error, LLMMagicError) or not isinstance(error, Exception):
            raise
        known = _explain(error, files, plan)
        if known is None:
            raise
        raise known from None


def _is_packed(plan: Plan) -> bool:
    """Whether weights are packed while they are loaded, or unpacked."""
    return bool(plan.layout.quantization or plan.layout.details.get("unpacked_from"))


def refuse_what_does_not_fit(plan: Plan) -> None:
    """Refuse, before a weight is read, what would not fit in what is free now.

    Raises
    ------
    PlanError
        With the first problem and what to do about it.
    """
    if plan.machine.described:
        raise PlanError(
            f"The plan is for {plan.machine.name}, not for this machine.", "Plan without --machine."
        )
    if plan.problems:
        raise refusal(plan)
    for use in plan.uses:
        free = _free_bytes(use.device)
        if free is not None and use.planned > free:
            raise PlanError(
                f"{use.device} has {format_bytes(free)} free now, and the plan needs {format_bytes(use.planned)}.",
                "Free some memory (%llm unload, other programs) and try again, which plans anew.",
            )


def _read_tokenizer(files: ModelFiles) -> Any:
    from transformers import AutoTokenizer

    from llm_magic.backends.accelerate.source.sources import processor_template

    if not any(_TOKENIZER.fullmatch(path.name) for path in files.folder.iterdir()):
        raise SourceError(
            f"{files.name} has no tokenizer beside its weights.",
            "Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) of its base model there.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(files.folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = without_paths(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise SourceError(
            f"The tokenizer of {files.name} cannot be read: {reason}",
            "Download the model again, with its tokenizer.",
        ) from None
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(files.folder) or None
    return tokenizer


def _find_draft(spec: ModelSpec, tokenizer: Any, progress: Progress) -> ModelFiles | None:
    """The files of the draft model, if there is one, once it is known that it can propose tokens."""
    if not spec.draft:
        return None
    from llm_magic.backends.accelerate.source.draft import draft_spec
    from llm_magic.backends.accelerate.source.sources import fetch_weights, resolve

    small = draft_spec(spec)
    files = fetch_weights(small, resolve(small, progress), progress)
    require_same_vocabulary(tokenizer, _read_tokenizer(files), files.name)
    return files


def _read_draft(files: ModelFiles, plan: Plan, progress: Progress) -> Any:
    """The draft model, whole where the model computes first."""
    import torch

    from llm_magic.backends.accelerate.architecture import auto_class
    from llm_magic.backends.accelerate.source.draft import draft_config

    config = draft_config(files)
    unpacks = {"config": config} if getattr(config, "quantization_config", None) else {}
    with bars_into(_reporter(progress, lambda _name: "")), default_dtype_kept():
        model = auto_class(config).from_pretrained(
            str(files.folder),
            **unpacks,
            attn_implementation=config._attn_implementation,
            device_map={"": torch.device(plan.placements[0].compute)},
            dtype=getattr(torch, plan.layout.draft.dtype) if plan.layout.draft else "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval().requires_grad_(False)


def block_labels(layout: ModelLayout) -> Callable[[str], str]:
    """What tells of which block a tensor is, by label; empty for one of no block that is known."""
    labels = {block.name: block.label for block in layout.blocks}

    def label(name: str) -> str:
        while name and name not in labels:
            name = name.rpartition(".")[0]
        return labels.get(name, "")

    return label


def _reporter(progress: Progress, label: Callable[[str], str]) -> Callable[[str, int, int, str], None]:
    """What turns transformers' bar over the weights into progress, block by block."""

    def report(title: str, done: int, total: int, name: str) -> None:
        if title == "Loading weights":
            progress(PhaseEvent("loading", done, total, "tensors", label(name)))

    return report


def _read_model(
    files: ModelFiles, spec: ModelSpec, plan: Plan, folder: OffloadFolder | None, progress: Progress
) -> tuple[Any, Fill | None, Mapping[str, Extent]]:
    """The model, what packs its weights where it is to be packed, and what it has of the files all the same."""
    import torch

    from llm_magic.backends.accelerate.architecture import auto_class
    from llm_magic.backends.accelerate.source.skeleton import load_config

    config = load_config(files)
    packed = PackedLoad(config, files, plan, folder.path, progress) if _is_packed(plan) and folder else None
    with (
        packed.packs_what_is_written() if packed else nullcontext(),
        bars_into(_reporter(progress, block_labels(plan.layout))),
        default_dtype_kept(),
        left_in_files(packed.hidden, packed.given) if packed else left_in_files(),
        _memory_for_each_weight(),
        warnings.catch_warnings(),
    ):
        # Accelerate finds parameters and buffers outside of modules in the map, and places them all the same.
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        model, info = auto_class(config).from_pretrained(
            str(files.folder),
            config=config,
            # What is packed is read block by block while it is placed.
            device_map=accelerate_device_map({"": "disk"} if packed else plan.device_map),
            dtype=getattr(torch, plan.layout.dtype),
            offload_folder=str(folder.path) if folder else None,
            use_safetensors=None if spec.allow_pickle else True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _refuse_incomplete(files, info)
    _refuse_untied(files, model, plan)
    _check_coverage(model, plan)
    _place_loose_buffers(model, plan)
    model.eval().requires_grad_(False)
    fill = packed.fill(model) if packed else None
    serve_plain_modules(model)  # the others are packed layers now
    return model, fill, packed.extents if packed else {}


@contextmanager
def _memory_for_each_weight() -> Iterator[None]:
    """Keep transformers from asking a GPU for all of its weights in one piece.

    No part of that goes back to the system as long as any weight is in it: blocks that move away would free nothing,
    and projections that are joined would leave holes.
    """
    from transformers import modeling_utils

    usual = getattr(modeling_utils, "caching_allocator_warmup", None)
    if usual is None:
        yield
        return
    modeling_utils.caching_allocator_warmup = lambda *_args, **_options: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = usual


def _refuse_incomplete(files: ModelFiles, info: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers."""
    wrong = [str(name) for name in sorted(info.get("missing_keys") or ())]
    wrong += [str(entry[0]) for entry in sorted(info.get("mismatched_keys") or ())]
    wrong += [str(entry).splitlines()[0] for entry in info.get("error_msgs") or ()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SourceError(
            f"{files.name} lacks weights that its architecture needs: {', '.join(wrong[:3])}{more}.",
            "The checkpoint and its config.json do not belong together, or files are missing: download it again.",
        )


def _refuse_untied(files: ModelFiles, model: Any, plan: Plan) -> None:
    """Refuse a tie that the files broke: transformers keeps two values, and one was counted.

    Those that stay in their files it does not compare.
    """
    counted = {tensor.name for block in plan.layout.blocks for tensor in block.tensors}
    shared = dict(getattr(model, "all_tied_weights_keys", None) or {})
    refuse_untied(files.name, shared, getattr(weights_loader(model), "index", {}))
    for name, _ in model.named_parameters():
        if name not in counted and name not in shared:
            raise not_shared(files.name, name)


def _check_coverage(model: Any, plan: Plan) -> None:
    """Every parameter must belong to a block of the plan, or it would sit where nobody counted it."""
    names = tuple(plan.device_map)
    for name, _ in model.named_parameters():
        if not any(name == block or name.startswith(f"{block}.") for block in names):
            raise PlanError(f"The placement does not cover {name}.", "Plan again: --device-map auto")
    if getattr(model, "hf_device_map", None) is None:
        model.hf_device_map = accelerate_device_map(plan.device_map)


def _place_loose_buffers(model: Any, plan: Plan) -> None:
    """Put buffers outside all blocks (rotary tables) where the first block computes."""
    import torch

    device = torch.device(plan.placements[0].compute)
    blocks = tuple(plan.device_map)
    for name, buffer in list(model.named_buffers()):
        if any(name == block or name.startswith(f"{block}.") for block in blocks) or buffer.device == device:
            continue
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def _free_bytes(device: str) -> int | None:
    """What a new allocation may take now; ``None`` where nobody can say."""
    if device == "cpu":
        return host_memory().free
    if device.startswith("cuda:"):
        import torch

        free, _total = torch.cuda.mem_get_info(int(device.removeprefix("cuda:")))
        return free
    return None


def _explain(error: Exception, files: ModelFiles, plan: Plan) -> LLMMagicError | None:
    """The typed error for what a library raised; ``None`` for what is no error of a load."""
    text = without_paths(" ".join(str(error).split()))
    full = disk_error(error, plan.options.get("offload_folder", ""))
    if full is not None:
        return full
    if is_out_of_memory(error):
        return EngineError(
            f"Memory ran out while {files.name} was loading.",
            "Leave more of it free: --max-memory (for example cpu=4GiB), a smaller -c N, or --device-map auto.",
        )
    return _explain_files(error, files, text)


def _explain_files(error: Exception, files: ModelFiles, text: str) -> LLMMagicError | None:
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return _damaged(files.name, text)
    if isinstance(error, OSError):
        return SourceError(f"{files.name} cannot be read: {text[:200]}", "Check the model's files.")
    if "size mismatch" in text or "ignore_mismatched_sizes" in text:
        return SourceError(
            f"The weights of {files.name} do not have the shapes that its config.json says.",
            "The files do not belong together: download the model again.",
        )
    if isinstance(error, RuntimeError | ValueError | LookupError | ImportError | AttributeError | TypeError):
        return EngineError(f"{files.name} could not be loaded: {text[:200]}", "See %llm doctor.")
    return None  # what ``progress`` raised to cancel goes through as it is


def _damaged(name: str, detail: str) -> SourceError:
    return SourceError(f"The weights of {name} are damaged: {detail[:160]}", "Download the model again.")
