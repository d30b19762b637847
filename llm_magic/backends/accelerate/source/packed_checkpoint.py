"""Checkpoints with packed weights: by which method, and which of their weights.

They are read here, without transformers' own loaders for them, which want other libraries, refuse a part on the
disk, or put everything on one GPU first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.files.extents import StoredTensor, file_extents
from llm_magic.backends.accelerate.packed.prepacked import FOUR_BIT_PARTS, STATE
from llm_magic.backends.accelerate.quantizing.libraries import require
from llm_magic.backends.accelerate.source.large_files import open_safetensors
from llm_magic.backends.accelerate.source.packed_formats import PackedFormat, as_auto_fp8, find_format
from llm_magic.backends.accelerate.source.sources import ModelFiles, read_json
from llm_magic.errors import OptionError, SourceError
from llm_magic.headers import TensorEntry, read_safetensors_header
from llm_magic.options import PUBLISHED
from llm_magic.planning.packed import INT4_GROUPS

_PACKED = ("I8", "U8", "I32", "F8_E4M3")
"""dtypes in files that no plain weight has."""
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where those who packed weights said so before ``config.json`` had a place for it."""


def find_packed(files: ModelFiles) -> PackedCheckpoint | None:
    """What a folder says about its packed weights; ``None`` where there are none, or nothing here reads them."""
    if files.gguf is not None:
        return None
    for facts in packing_facts(files):
        if isinstance(facts, dict) and (form := find_format(facts)):
            weights = [path for path in files.weight_files if path.suffix == ".safetensors"]
            if files.weight_files and not weights:
                return None  # pickled ones, which nothing here reads
            found = PackedCheckpoint(files.name, form, tuple(weights))
            return _in_floats(found, facts) if form.library in PUBLISHED else found
    return None


def _in_floats(found: PackedCheckpoint, facts: dict[str, Any]) -> PackedCheckpoint | None:
    """A checkpoint of floats by the names of their scales; ``None`` where transformers alone can read it."""
    if found.files and not found.packed:
        auto = replace(found, format=as_auto_fp8(facts))
        return auto if found.format.library == "fp8" and auto.packed else None
    for name, dtype in found.dtypes.items():
        if found.packed and dtype == "F8_E4M3" and name.endswith(".weight") and name not in found.keys:
            raise SourceError(
                f"{found.name} has {name} in floats of 8 bits, and no scale for it.",
                "Download the model again.",
            )
    others = (dtype for name, dtype in found.dtypes.items() if name not in found.keys)
    is_read = found.format.is_stacked or not any(dtype in _PACKED for dtype in others)
    return found if is_read else None


def packing_facts(files: ModelFiles) -> list[Any]:
    """All that a folder says of packed weights, at best one ``quantization_config``; or whatever it has there."""
    raw = read_json(files.folder / "config.json")
    parts = (raw, *(value for value in raw.values() if isinstance(value, dict)))
    found = [part.get("quantization_config") or part.get("compression_config") for part in parts]
    if any(found):
        return [facts for facts in found if facts]
    beside = [(name, method) for name, method in _BESIDE.items() if (files.folder / name).is_file()]
    if not beside or not _may_be_in_words(files):
        return []
    return [{"quant_method": method} | read_json(files.folder / name) for name, method in beside]


def _may_be_in_words(files: ModelFiles) -> bool:
    """Whether there are words of packed weights in the files, or no files yet."""
    held = [path for path in files.weight_files if path.suffix == ".safetensors"]
    names = (tensor.name for path in held for tensor in read_safetensors_header(path).tensors)
    return not files.weight_files or any(name.endswith(".qweight") for name in names)


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint with packed weights.

    Attributes
    ----------
    name
        Of the model.
    format
        How they are packed.
    files
        Its safetensors files, as far as they are here.
    """

    name: str
    format: PackedFormat
    files: tuple[Path, ...]
    _open: dict[Path, Any] = field(default_factory=dict)

    def check(self, quantize: str) -> str:
        """The method that they are taken as, or packed anew by.

        Raises
        ------
        OptionError
            When a method is needed and none is named, the library is missing, or bitsandbytes' weights would have
            to be packed anew.
        SourceError
            When the files hold none.
        """
        if self.format.library == "bitsandbytes":
            self._check_bitsandbytes(quantize)
        elif not (quantize or self.format.method):
            raise OptionError(
                f"The weights of {self.name} ({self.format.library}: {self.format.what}) cannot stay as they are.",
                "Pack them anew, with --quantize int8, nf4 or another method.",
            )
        elif not quantize and self.format.method not in ("int8", *PUBLISHED):  # which need either, or none
            require(
                "optimum.quanto",
                f"{self.name} is packed by {self.format.library}: that needs optimum-quanto, which",
            )
        self.check_files()
        return quantize or self.format.method

    def check_files(self) -> None:
        """Refuse files that have nothing of what is said of them, or not all that belongs together.

        Raises
        ------
        SourceError
            With what there is to do.
        """
        if self.format.library == "bitsandbytes":
            require("bitsandbytes", f"{self.name} is packed by bitsandbytes, which")
        if self.files and not self.packed:
            raise SourceError(
                f"config.json of {self.name} says that its weights are packed ({self.format.library}: {self.format.what}), and none in its files is.",
                "The files do not belong together: download the model again.",
            )
        self._check_parts()

    def is_kept(self, method: str) -> bool:
        """Whether a model whose layers are packed by this method has the weights as they are in the files."""
        return method == self.format.method or (method, self.format.method) == ("quanto-int8", "int8")

    def quick_dtype(self, dtype: Any) -> Any:
        """The torch dtype to compute in where the user names none, of one that the files name.

        torch's kernel for integers of 4 bits takes bfloat16 alone. Who packs them names float16 for the sake of
        other kernels: their models were made in bfloat16, nearly all.
        """
        import torch

        has_kernel = self.format.method == "int4" and self.format.group in INT4_GROUPS
        return torch.bfloat16 if has_kernel and dtype == torch.float16 else dtype

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all tensors in the files that are a packed weight or a part of one."""
        if self.format.parts:
            parts = [part.removesuffix("?") for part in self.format.parts]
            names = (self.format.part(name, part) for name in self.packed for part in parts)
        elif self.format.method == "int8":
            owners = (name.removesuffix("weight") for name in self.packed)
            names = (f"{owner}{leaf}" for owner in owners for leaf in ("weight", "SCB", "weight_format"))
        else:
            ends = ("", f"{STATE}{self.format.method}", *FOUR_BIT_PARTS)
            names = (f"{name}{end}" for name in self.packed for end in ends)
        return frozenset(names).intersection(self.in_file)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor, by its name, as the files say it."""
        return {tensor.name: tensor.dtype for _, tensor in self._tensors}

    @cached_property
    def in_file(self) -> dict[str, Path]:
        """The file of each tensor, by its name."""
        return {tensor.name: path for path, tensor in self._tensors}

    @cached_property
    def packed(self) -> list[str]:
        """Names of the packed weights in the files, as of plain ones; experts in the order of their numbers."""
        form = self.format
        if form.parts:
            ends, weight = tuple(form.marks), form.end
        elif form.method == "int8":
            ends, weight = (".SCB",), ".weight"
        else:
            ends, weight = (f"{STATE}{form.method}",), ""
        found = {
            name.removesuffix(end) + weight for end in ends for name in self.in_file if name.endswith(end)
        }
        return sorted(found, key=_by_numbers)

    def tensor(self, name: str) -> Any:
        """A tensor of the files; ``None`` where there is no such."""
        file = self._file_of(name)
        return None if file is None else file.get_tensor(name)

    def part(self, name: str, index: int) -> Any:
        """What a tensor has at an index of its first dimension; ``None`` where there is no such."""
        file = self._file_of(name)
        return None if file is None else file.get_slice(name)[index]

    def stored(self, name: str) -> StoredTensor | None:
        """Where a tensor is in the files; ``None`` where there is no such."""
        path = self.in_file.get(name)
        return None if path is None else file_extents(path)[name]

    def needed(self, name: str) -> Any:
        """A tensor of the files.

        Raises
        ------
        SourceError
            When there is no such.
        """
        found = self.tensor(name)
        if found is None:
            raise SourceError(
                f"{self.name} lacks {name}, a part of a packed weight.", "Download the model again."
            )
        return found

    # Inside

    def _check_bitsandbytes(self, quantize: str) -> None:
        method = self.format.method
        if quantize not in ("", method):
            raise OptionError(
                f"{self.name} is packed already, in {method}.",
                f"Leave out --quantize, or load the original model with --quantize {quantize}.",
            )

    def _file_of(self, name: str) -> Any:
        path = self.in_file.get(name)
        if path is None:
            return None
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]

    @cached_property
    def _tensors(self) -> list[tuple[Path, TensorEntry]]:
        return [(path, tensor) for path in self.files for tensor in read_safetensors_header(path).tensors]

    def _check_parts(self) -> None:
        """Refuse a packed weight without its parts, which would be taken for a plain one, and parts without theirs."""
        if self.format.is_stacked:
            self._check_stacks()
            return
        form, dtypes = self.format, self.dtypes
        own = {part.removesuffix("?") for part in form.parts} or {"weight", "absmax", "SCB"}
        for _, tensor in self._tensors:
            owner, _, leaf = tensor.name.rpartition(".")
            is_part = leaf in own and (tensor.dtype in _PACKED or leaf in ("absmax", "SCB"))
            is_marked = bool(form.parts) and f".{leaf}" in form.marks
            needed = [f"{owner}.{part}" for part in form.parts if not part.endswith("?")]
            is_whole = all(n in dtypes for n in needed)
            is_plain = "weight" in form.parts and dtypes.get(f"{owner}.weight") not in _PACKED
            if (is_part and tensor.name not in self.keys) or (is_marked and (is_plain or not is_whole)):
                raise SourceError(
                    f"{self.name} has {tensor.name}, and not all that belongs to a packed weight ({form.library}: {form.what}).",
                    "Download the model again.",
                )
            if tensor.name.endswith(".act.scales"):  # AWQ's for models whose activations have scales
                raise SourceError(
                    f"{self.name} has scales of activations beside its packed weights, which nothing here computes.",
                    "Load the original model, with --quantize.",
                )

    def _check_stacks(self) -> None:
        ends = tuple(self.format.parts)
        for name in self.in_file:
            end = next((end for end in ends if name.endswith(end)), "")
            if end and any(f"{name.removesuffix(end)}{other}" not in self.in_file for other in ends):
                raise SourceError(
                    f"{self.name} has {name}, and not all that belongs to a packed weight ({self.format.what}).",
                    "Download the model again.",
                )


def _by_numbers(name: str) -> list[tuple[int, int | str]]:
    """What sorts names so that the 2nd comes before the 10th."""
    return [(0, int(step)) if step.isdecimal() else (1, step) for step in name.split(".")]
