"""Saving a model that bitsandbytes' methods have packed, wherever its blocks are.

The files are those that transformers writes of such a model; it reads them again, and so do we. Experts
that were packed are saved one by one, in the names that the architecture's checkpoints have for them: these we
read again, and transformers does not. A part of the model at a time is copied.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakMethod, ref

from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.prepacked import STATE
from llm_magic.backends.accelerate.quantizing.library_layers import is_packed
from llm_magic.backends.accelerate.quantizing.methods import BLOCK
from llm_magic.errors import OptionError
from llm_magic.options import PUBLISHED
from llm_magic.units import GIB

_BY_BITSANDBYTES = ("nf4", "fp4", "int8")
_SHARD_BYTES = 2 * GIB

WeightsShown = Callable[[], AbstractContextManager[None]]


def let_save(model: Any, methods: Sequence[str], weights_shown: WeakMethod[WeightsShown]) -> None:
    """Let ``model.save_pretrained`` save packed weights, where there is a form for them.

    Parameters
    ----------
    methods
        Those of its layers, its experts if they are of another one, and its head if it is packed; empty where not.
    weights_shown
        A context in which the modules have their weights.
    """
    method, expert_method, head_method = methods
    held = ref(model)  # no cycle, which would keep the model's memory

    def save_pretrained(save_directory: Any, **options: Any) -> Any:
        found: Any = held()
        if getattr(found, "_hf_peft_config_loaded", False):  # of adapters nothing is packed
            return type(found).save_pretrained(found, save_directory, **options)
        shown = weights_shown()
        if method not in _BY_BITSANDBYTES or expert_method or shown is None:
            raise OptionError(
                f"There is no form in which a model that {expert_method or method} packed is saved.",
                "Load it with --quantize none, or keep the files it was loaded from."
                if expert_method or method in PUBLISHED
                else f"Load it with --quantize {' or '.join(_BY_BITSANDBYTES)}, or keep the files it was loaded from.",
            )
        if head_method:
            raise OptionError(
                "There is no form in which a model is saved whose head is packed.",
                "Load it without --quantize-head, or keep the files it was loaded from.",
            )
        if options:
            raise OptionError(
                f"save_pretrained of a packed model takes no {', '.join(options)}.", "Give it a folder alone."
            )
        with shown():
            _save(found, method, Path(save_directory))
        return None

    model.save_pretrained = save_pretrained


def _save(model: Any, method: str, folder: Path) -> None:
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, PackedStack)}
    if stacks and method == "int8":  # transformers would read the integers as if they were weights
        raise OptionError(
            "There is no form in which experts that int8 packed are saved.",
            "Load it with --quantize nf4 or fp4, or keep the files it was loaded from.",
        )
    names = {path: _names(model, path) for path in stacks}  # first: they may be refused
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise OptionError("The folder has weights of a model already.", "Name a new folder.")
    tied = set(model.all_tied_weights_keys or ()) | set(model._keys_to_ignore_on_save or ())
    state = ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)
    shards = _Shards(folder)
    try:
        for _, group in groupby(state, key=lambda entry: _part_of(entry[0])):
            shards.add(_saved(model, method, dict(group), names))
        shards.close()
    except BaseException:
        shards.give_up()
        raise
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.quantization_config = _config(model, method)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _part_of(name: str) -> str:
    """The layer of a tensor, or what else it belongs to: weights that a checkpoint holds otherwise are of one."""
    layer = re.match(r".*?\.\d+\.", name)
    return layer[0] if layer else name.rpartition(".")[0]


def _saved(
    model: Any, method: str, state: Mapping[str, Any], names: Mapping[str, list[str]]
) -> dict[str, Any]:
    """The tensors of a part of the model, in the names that its checkpoints have for them."""
    from transformers.core_model_loading import revert_weight_conversion

    stacks = {owner for name in state if (owner := name.rpartition(".")[0]) in names}
    packed = {name: tensor for name, tensor in state.items() if _is_packed(name, state)}
    for path in stacks:
        stack = model.get_submodule(path)
        for expert in range(stack.experts):
            packed |= _of_expert(
                stack, expert, [name.replace("*", str(expert)) for name in names[path]], method
            )
    others = {n: t for n, t in state.items() if n not in packed and n.rpartition(".")[0] not in stacks}
    found: dict[str, Any] = dict(revert_weight_conversion(model, others))
    return found | {_in_files(model, name): tensor for name, tensor in packed.items()}


def _in_files(model: Any, name: str) -> str:
    """The name that checkpoints have for a weight which is stored as it is."""
    from transformers.core_model_loading import WeightRenaming

    for entry in reversed(model._weight_conversions or ()):
        if isinstance(entry, WeightRenaming):
            name = entry.reverse_transform().rename_source_key(name)[0]
    return name


def _is_packed(name: str, state: Mapping[str, Any]) -> bool:
    """Whether it is a packed weight of a linear layer, or a part of one."""
    owner = (
        f"{name.partition('.weight')[0]}.weight" if ".weight" in name else f"{name.rpartition('.')[0]}.weight"
    )
    return f"{owner}.absmax" in state or (
        f"{owner.removesuffix('weight')}SCB" in state and not name.endswith(".bias")
    )


class _Shards:
    """Files with some GB of tensors each, and what says in which of them one is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Any] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._bytes = self._total = 0

    def add(self, tensors: Mapping[str, Any]) -> None:
        """Write them with the next file."""
        for name, tensor in tensors.items():
            if self._bytes + tensor.nbytes > _SHARD_BYTES and self._held:
                self._write()
            # Its own memory: the library refuses tensors that share any.
            self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._bytes += tensor.nbytes

    def close(self) -> None:
        """Write the rest, and give the files their names."""
        self._write()
        count, total = len(self._written), self._total
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, 1):
            end = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
            target = self._folder / f"model{end}.safetensors"
            path.replace(target)
            weight_map |= dict.fromkeys(names, target.name)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self._folder / "model.safetensors.index.json").write_text(f"{text}\n", encoding="utf-8")

    def give_up(self) -> None:
        """Delete what was written."""
        for path in self._folder.glob("*.safetensors*"):
            path.unlink()

    def _write(self) -> None:
        from safetensors.torch import save_file

        path = self._folder / f"part-{len(self._written)}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        self._written.append((path, list(self._held)))
        self._total += self._bytes
        self._held, self._bytes = {}, 0


def _config(model: Any, method: str) -> dict[str, Any]:
    """What transformers needs to know to read the files again: the linear layers that are not packed, too."""
    from torch.nn import Linear
    from transformers import BitsAndBytesConfig

    linear = ((path, module) for path, module in model.named_modules() if isinstance(module, Linear))
    plain = [path for path, module in linear if not is_packed(module)]
    how = (
        {"load_in_8bit": True}
        if method == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": method,
            "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        }
    )
    config: dict[str, Any] = BitsAndBytesConfig(**how, llm_int8_skip_modules=plain).to_dict()
    return config


def _names(model: Any, path: str) -> list[str]:
    """Names of the weights that a stack is made of, ``*`` for the number of an expert; their rows follow each other.

    Raises
    ------
    OptionError
        When checkpoints of the architecture hold stacks themselves.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = dict.fromkeys((*model.state_dict(), path), True)

    def leads_back(name: str) -> bool:
        found = rename_source_key(
            _in_files(model, name.replace("*", "0")), renamings, converters, model.base_model_prefix, known
        )
        return bool(found[0] == path)

    for entry in converters:
        operations = [type(operation).__name__ for operation in entry.operations]
        target = entry.target_patterns[0].replace("\\", "")  # they are patterns
        if path.endswith(target) and operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            owner = path.removesuffix(target)
            names = [f"{owner}{source.replace(chr(92), '')}" for source in entry.source_patterns]
            if all(leads_back(name) for name in names):
                return names
    raise OptionError(
        f"Packed experts of {type(model).__name__} cannot be saved: its checkpoints hold them in another way.",
        "Keep the files that it was loaded from.",
    )


def _of_expert(stack: PackedStack, expert: int, names: list[str], method: str) -> dict[str, Any]:
    """The weights that one matrix consists of."""
    found: dict[str, Any] = {}
    data, scales = stack.parts_of(expert)[:2]
    rows, columns = stack.linear.out_features // len(names), stack.linear.in_features
    if rows * columns % BLOCK:
        raise OptionError("Packed experts that are so small cannot be saved one by one.", "Keep the files.")
    for name, packed, own in zip(names, data.chunk(len(names)), scales.chunk(len(names)), strict=True):
        found[name] = packed
        found |= dict(_state_of(name, own, stack.dtype, (rows, columns), method))
    return found


def _state_of(
    name: str, scales: Any, dtype: Any, shape: tuple[int, int], method: str
) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.functional import get_4bit_type
    from bitsandbytes.utils import pack_dict_to_tensor

    facts = {
        "quant_type": method,
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
    }
    yield f"{name}.absmax", scales
    yield f"{name}.quant_map", get_4bit_type(method, device="cpu")
    yield f"{name}{STATE}{method}", pack_dict_to_tensor(facts)
