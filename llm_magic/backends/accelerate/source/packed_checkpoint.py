"""Checkpoints that bitsandbytes has packed: by which method, which of their weights, and where those belong.

They are read here, without transformers' own loader for them, which refuses a part on the disk and puts
everything on one GPU first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.placement.prepacked import FOUR_BIT_PARTS, STATE, Prepacked
from llm_magic.backends.accelerate.placement.quantize import BLOCK, require
from llm_magic.backends.accelerate.source.large_files import open_safetensors
from llm_magic.backends.accelerate.source.sources import ModelFiles, read_json
from llm_magic.errors import OptionError, SourceError
from llm_magic.headers import TensorEntry, read_safetensors_header


def find_packed(files: ModelFiles) -> PackedCheckpoint | None:
    """What a folder says about its packed weights; ``None`` unless bitsandbytes has packed them."""
    if files.gguf is not None:
        return None
    raw = read_json(files.folder / "config.json")
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        facts = part.get("quantization_config")
        if isinstance(facts, dict) and (method := _method(facts)):
            skipped = facts.get("llm_int8_skip_modules")
            names = [name for name in skipped if isinstance(name, str)] if isinstance(skipped, list) else None
            weights = [path for path in files.weight_files if path.suffix == ".safetensors"]
            if files.weight_files and not weights:
                return None  # pickled ones, which nothing here reads
            return PackedCheckpoint(files.name, method, tuple(weights), names)
    return None


def _method(facts: Mapping[str, Any]) -> str:
    """``"nf4"``, ``"fp4"`` or ``"int8"``; nothing for those of other libraries."""
    if facts.get("quant_method") != "bitsandbytes":
        return ""
    if facts.get("load_in_8bit") or facts.get("_load_in_8bit"):
        return "int8"
    is_four = facts.get("load_in_4bit") or facts.get("_load_in_4bit")
    kind = facts.get("bnb_4bit_quant_type", "fp4")
    return kind if is_four and kind in ("nf4", "fp4") else ""


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint with packed weights.

    Attributes
    ----------
    name
        Of the model.
    method
        ``"nf4"``, ``"fp4"`` or ``"int8"``.
    files
        Its safetensors files, as far as they are here.
    skipped
        Names of modules that were not packed, or parts of names; ``None``: what transformers leaves as it is.
    """

    name: str
    method: str
    files: tuple[Path, ...]
    skipped: Sequence[str] | None
    _open: dict[Path, Any] = field(default_factory=dict)

    def check(self, quantize: str) -> str:
        """The method, whatever the user has said, unless that is another one.

        Raises
        ------
        OptionError
            When weights would have to be packed twice, or the library is missing.
        SourceError
            When the files hold none.
        """
        require("bitsandbytes", f"{self.name} is packed by bitsandbytes, which")
        if quantize not in ("", self.method):
            raise OptionError(
                f"{self.name} is packed already, in {self.method}.",
                f"Leave out --quantize, or load the original model with --quantize {quantize}.",
            )
        if self.files and not self._packed:
            raise SourceError(
                f"config.json of {self.name} says that its weights are packed in {self.method}, and none in its files is.",
                "The files do not belong together: download the model again.",
            )
        self._check_parts()
        return self.method

    def stays(self, model: Any) -> list[str] | None:
        """Patterns for the layers of an unpacked model that are not packed in the files.

        Without any files here: what the configuration says. ``None``: as transformers chooses.
        """
        if self.files:
            packed = self._places(model)
            paths = [path for path, names in _layers(model) if packed.keys().isdisjoint(names)]
        elif self.skipped is not None:
            named = [f".{name}." for name in self.skipped]
            paths = [path for path, _ in _layers(model) if any(name in f".{path}." for name in named)]
        else:
            return None
        return [f"{re.escape(path)}$" for path in paths]

    def weights(self, model: Any, dtype: Any) -> dict[str, Prepacked]:
        """The packed parameters of an unpacked model, by name, to be computed in ``dtype``.

        Raises
        ------
        SourceError
            When experts are stored in another way than one by one.
        """
        places = self._places(model).items()
        return {name: Prepacked(self.method, of, self._tensor, BLOCK, dtype) for name, of in places}

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all tensors in the files that are a packed weight or a part of one."""
        if self.method == "int8":
            owners = (name.removesuffix("weight") for name in self._packed)
            names = (f"{owner}{leaf}" for owner in owners for leaf in ("weight", "SCB", "weight_format"))
        else:
            ends = ("", f"{STATE}{self.method}", *FOUR_BIT_PARTS)
            names = (f"{name}{end}" for name in self._packed for end in ends)
        return frozenset(names).intersection(self._in_file)

    # Inside

    @cached_property
    def _in_file(self) -> dict[str, Path]:
        return {tensor.name: path for path, tensor in self._tensors}

    @cached_property
    def _tensors(self) -> list[tuple[Path, TensorEntry]]:
        return [(path, tensor) for path in self.files for tensor in read_safetensors_header(path).tensors]

    def _check_parts(self) -> None:
        """Refuse a packed weight without its parts, which would be taken for a plain one, and parts without theirs."""
        for _, tensor in self._tensors:
            is_packed = tensor.dtype in ("I8", "U8") and tensor.name.endswith(".weight")
            is_part = tensor.name.endswith((".absmax", ".SCB"))
            if (is_packed or is_part) and tensor.name not in self.keys:
                raise SourceError(
                    f"{self.name} has {tensor.name}, and not all that belongs to a weight packed in {self.method}.",
                    "Download the model again.",
                )

    @cached_property
    def _packed(self) -> list[str]:
        """Names of the packed weights in the files; experts in the order of their numbers."""
        if self.method == "int8":
            found = (f"{name.removesuffix('.SCB')}.weight" for name in self._in_file if name.endswith(".SCB"))
        else:
            end = f"{STATE}{self.method}"
            found = (name.removesuffix(end) for name in self._in_file if name.endswith(end))
        return sorted(found, key=_by_numbers)

    def _places(self, model: Any) -> dict[str, list[list[str]]]:
        """For every packed parameter of the model its matrices; see `Prepacked`."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        names = model.state_dict()
        found: dict[str, list[list[str]]] = {}
        made: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in self._packed:
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
            if pattern is not None:
                made[target][pattern].append(key)
            elif target in names:
                found[target] = [[key]]
        for target, keys in made.items():
            found[target] = self._stacked(by_pattern[next(iter(keys))], keys)
        return found

    def _stacked(self, converter: Any, keys: Mapping[str, list[str]]) -> list[list[str]]:
        """The matrices of a stack that transformers makes of single ones."""
        made_by = [type(operation).__name__ for operation in converter.operations]
        counts = {len(keys.get(pattern, ())) for pattern in converter.source_patterns}
        is_known = made_by in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        if not is_known or len(counts) > 1:
            raise SourceError(
                f"The packed weights of {self.name} cannot be put together as transformers does.",
                "Load the original model, with --quantize.",
            )
        return [
            list(of) for of in zip(*(keys[pattern] for pattern in converter.source_patterns), strict=True)
        ]

    def _tensor(self, name: str) -> Any:
        path = self._in_file.get(name)
        if path is None:
            raise SourceError(
                f"{self.name} lacks {name}, a part of a packed weight.", "Download the model again."
            )
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path].get_tensor(name)


def _layers(model: Any) -> Iterator[tuple[str, list[str]]]:
    """Modules that could be packed, and the names of their weights."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if isinstance(module, Linear | Conv1D):
            yield path, [f"{path}.weight"]
        elif hasattr(module, "is_concatenated"):  # experts, in transformers' interface for them
            stacks = (name for name, p in module.named_parameters(recurse=False) if p.dim() == 3)
            yield path, [f"{path}.{name}" for name in stacks]


def _by_numbers(name: str) -> list[tuple[int, int | str]]:
    """What sorts names so that the 2nd comes before the 10th."""
    return [(0, int(step)) if step.isdecimal() else (1, step) for step in name.split(".")]
