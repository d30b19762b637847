"""What ``quantization_config`` says of packed weights: who packed them, how, and as what they can be taken here.

A format is taken as it is where one of ``--quantize``'s methods means the same numbers. Where none does, its numbers
are unpacked, matrix by matrix, and packed anew by a method that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llm_magic.backends.accelerate.packed.prepacked_groups import (
    WORDS,
    Reader,
    read_awq,
    read_compressed,
    read_fp8,
    read_gptq,
)
from llm_magic.backends.accelerate.packed.prepacked_stacks import BLOCKS, MXFP4_GROUP, SCALES

_AUTO_ROUND = {
    "auto": ("gptq", "gptq"),
    "auto_round:gptq": ("gptq", "gptq"),
    "auto_round:auto_gptq": ("gptq", "gptq"),
    "auto_round": ("gptq", "gptq_v2"),
    "auto_round:gptqmodel": ("gptq", "gptq_v2"),
    "auto_round:awq": ("awq", "gemm"),
    "auto_round:auto_awq": ("awq", "gemm"),
}
"""Whose layout AutoRound's ``packing_format`` is, and which version of it."""
AUTO_FP8 = "AutoFP8"
_LARGEST_GROUP = 1 << 20
_BLOCK = (128, 128)
"""Rows and columns that share a scale of transformers' floats of 8 bits, where nobody says otherwise."""
_PLAIN_BITS = 16
"""Layers of so many bits are not packed."""


@dataclass(frozen=True)
class PackedFormat:
    """How weights were packed.

    Attributes
    ----------
    library
        Who packed them, as people call it: ``"bitsandbytes"``, ``"GPTQ"``, ``"AWQ"``, ``"AutoRound"``,
        ``"compressed-tensors"``, ``"AutoFP8"``; ``"fp8"`` and ``"mxfp4"``, where nobody says so.
    method
        The one of ``--quantize`` that means the same numbers; nothing where none does.
    what
        What they are, in a few words.
    skipped
        Names of modules that were not packed, or parts of names; ``None``: what transformers leaves as it is.
    marks
        Ends of the names of a layer's tensors, any of which says that its weight is packed.
    parts
        Ends of the names of all of them; those without a question mark are in every packed layer.
    group
        Columns that share a scale, 0 for all of a row; ``None`` where ``method`` has its own rule.
    read
        Reads a weight; ``None`` for those of bitsandbytes, and for stacks.
    end
        What the name of a plain weight ends with; nothing for stacks of experts, which are parameters of their owner.
    """

    library: str
    method: str
    what: str
    skipped: Sequence[str] | None = None
    marks: Sequence[str] = ()
    parts: Sequence[str] = ()
    group: int | None = None
    read: Reader | None = None
    end: str = ".weight"

    @property
    def is_stacked(self) -> bool:
        """Whether stacks of experts are packed as such, and nothing else is."""
        return bool(self.marks) and not self.end

    def part(self, weight: str, part: str) -> str:
        """The name in the files of one of ``parts``, for the weight of a name."""
        return f"{weight.removesuffix(self.end)}.{part}" if self.end else f"{weight}{part}"


def find_format(facts: Mapping[str, Any]) -> PackedFormat | None:
    """The format that a ``quantization_config`` describes; ``None`` for one that nothing here reads."""
    reads = _FORMATS.get(str(facts.get("quant_method")))
    return reads(facts) if reads else None


def _mxfp4(_facts: Mapping[str, Any]) -> PackedFormat:
    """As gpt-oss comes."""
    parts = (BLOCKS, SCALES)
    return PackedFormat("mxfp4", "mxfp4", "floats of 4 bits", None, (BLOCKS,), parts, MXFP4_GROUP, end="")


def _fp8(facts: Mapping[str, Any]) -> PackedFormat:
    """As transformers writes it, and those who trained the model."""
    block = _block(facts.get("weight_block_size", list(_BLOCK)))
    what = f"floats of 8 bits{' in blocks' if block else ''}"
    parts = ("weight", "weight_scale_inv", "activation_scale?")
    skipped = _names(facts.get("modules_to_not_convert") or facts.get("ignored_layers"))
    read = partial(read_fp8, block=block)
    return PackedFormat(
        "fp8", "fp8", what, skipped, (".weight_scale_inv",), parts, block[1] if block else 0, read
    )


def as_auto_fp8(facts: Mapping[str, Any]) -> PackedFormat:
    """As AutoFP8 writes it, where the files have its scales: transformers knows others by the same name.

    Its scales are factors, in ``weight_scale``; transformers looks for ``weight_scale_inv``, and would take the
    weights without any.
    """
    block = _block(facts.get("weight_block_size"))
    read = partial(read_compressed, bits=8, is_symmetric=True, block=block)
    parts = ("weight", "weight_scale", "input_scale?")
    what, group = f"floats of 8 bits{' in blocks' if block else ''}", block[1] if block else 0
    return PackedFormat(AUTO_FP8, "fp8", what, None, (".weight_scale",), parts, group, read)


def _auto_round(facts: Mapping[str, Any]) -> PackedFormat | None:
    method, version = _AUTO_ROUND.get(str(facts.get("packing_format")), ("", ""))
    if not method or facts.get("rotation_config"):  # activations are multiplied between the layers
        return None
    found = find_format({**facts, "quant_method": method, "checkpoint_format": version})
    return found and replace(found, library="AutoRound")


def _names(value: object) -> list[str] | None:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else None


def _bitsandbytes(facts: Mapping[str, Any]) -> PackedFormat | None:
    skipped = _names(facts.get("llm_int8_skip_modules"))
    if facts.get("load_in_8bit") or facts.get("_load_in_8bit"):
        return PackedFormat("bitsandbytes", "int8", "int8", skipped)
    is_four = facts.get("load_in_4bit") or facts.get("_load_in_4bit")
    kind = facts.get("bnb_4bit_quant_type", "fp4")
    return PackedFormat("bitsandbytes", kind, kind, skipped) if is_four and kind in ("nf4", "fp4") else None


def _gptq(facts: Mapping[str, Any]) -> PackedFormat | None:
    bits, group = facts.get("bits"), _group(facts.get("group_size", 128))
    version = facts.get("checkpoint_format") or facts.get("format") or "gptq"
    others = _others(facts)
    if (
        bits not in (4, 8)
        or group is None
        or version not in ("gptq", "gptq_v2")
        or facts.get("is_marlin_format")
        or facts.get("pack_dtype") not in (None, "int32")
        or any(own.get("bits", bits) not in (4, 8) for own in others)
    ):
        return None
    has_order = group > 0 and any(_is_in_order({**facts, **own}) for own in ({}, *others))
    is_uniform = _is_uniform(others, bits, facts.get("group_size", 128))
    what = f"{bits} bits{_of(group)}{_in_order(has_order)}{_but(is_uniform)}"
    # Its 8 bits have zeros, and groups.
    method = "int4" if bits == 4 and not has_order and is_uniform else ""
    same = {"bits": bits, "group": group} if is_uniform else {}
    read = partial(read_gptq, is_first_version=version == "gptq", **same)
    return PackedFormat("GPTQ", method, what, None, (".qweight",), (*WORDS, "g_idx?"), group, read)


def _awq(facts: Mapping[str, Any]) -> PackedFormat | None:
    bits = facts.get("bits", facts.get("w_bit"))
    group = _group(facts.get("group_size", facts.get("q_group_size", 128)))
    versions = (facts.get(name) for name in ("version", "format", "checkpoint_format"))
    is_gemm = all(version is None or str(version).lower() == "gemm" for version in versions)
    others = _others(facts)
    if bits != 4 or group is None or not is_gemm or facts.get("backend") == "llm-awq":
        return None
    if any(own.get("bits", bits) != bits for own in others):
        return None
    is_uniform = _is_uniform(others, bits, facts.get("group_size", group))
    skipped, what = _names(facts.get("modules_to_not_convert")), f"4 bits{_of(group)}{_but(is_uniform)}"
    method = "int4" if is_uniform else ""
    read = partial(read_awq, group=group if is_uniform else 0)
    return PackedFormat("AWQ", method, what, skipped, (".qweight",), WORDS, group, read)


def _is_in_order(facts: Mapping[str, Any]) -> bool:
    """Whether columns that share a scale need not be neighbours, because GPTQ took them by their activations.

    Groups that are static were chosen before that, of neighbours, and so they are stored. AutoGPTQ says so itself,
    GPTQModel in ``meta``.
    """
    meta = facts.get("meta")
    is_static = facts.get("static_groups", meta.get("static_groups") if isinstance(meta, dict) else False)
    return bool(facts.get("desc_act")) and is_static is not True


def _others(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What GPTQModel and AutoRound say of packed layers that are not as the rest."""
    found: list[Mapping[str, Any]] = []
    for name in ("dynamic", "extra_config"):
        held = facts.get(name)
        for layers, own in held.items() if isinstance(held, dict) else ():
            if isinstance(own, dict) and not layers.startswith("-:") and not _is_plain(own.get("bits")):
                found.append(own)
    return found


def _is_plain(bits: object) -> bool:
    return type(bits) is int and bits >= _PLAIN_BITS


def _is_uniform(others: Sequence[Mapping[str, Any]], bits: object, group: object) -> bool:
    return all(own.get("bits", bits) == bits and own.get("group_size", group) == group for own in others)


def _but(is_uniform: bool) -> str:
    return "" if is_uniform else ", some layers otherwise"


def _compressed(facts: Mapping[str, Any]) -> PackedFormat | None:
    sparsity = facts.get("sparsity_config") or {}
    is_dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    # Files that were packed before that word was known are "frozen", too.
    is_compressed = facts.get("quantization_status", "compressed") in ("compressed", "frozen")
    schemes = _schemes(facts)
    # Transforms are products between the layers.
    if not (is_dense and is_compressed and schemes) or facts.get("transform_config"):
        return None
    first = schemes[0]
    if not first.is_read or any(scheme != first for scheme in schemes):
        return None
    weight = ("weight_packed", "weight_shape") if first.is_in_words else ("weight",)
    zero = "weight_zero_point?" if first.is_symmetric else "weight_zero_point"
    beside = ("weight_scale", zero, "weight_g_idx?", "input_scale?", "input_zero_point?")
    mark = ".weight_packed" if first.is_in_words else ".weight_scale"
    read = partial(read_compressed, bits=first.bits, is_symmetric=first.is_symmetric, block=first.block)
    names = _ignored(facts)
    return PackedFormat(
        "compressed-tensors", first.method, first.what, names, (mark,), (*weight, *beside), first.group, read
    )


@dataclass(frozen=True)
class _Scheme:
    """How compressed-tensors has packed weights, as far as that decides how to read them.

    Attributes
    ----------
    style
        Its ``format``.
    strategy
        What shares a scale: ``"group"`` of columns, ``"channel"`` (a row), ``"tensor"`` or ``"block"``.
    group
        Columns of a group, 0 for all; ``None`` for what is no size.
    """

    style: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    is_float: bool
    is_symmetric: bool
    has_order: bool

    @property
    def is_in_words(self) -> bool:
        return self.style == "pack-quantized"

    @property
    def is_read(self) -> bool:
        if self.group is None or self.strategy not in ("group", "channel", "tensor", "block"):
            return False
        if (self.strategy == "block") != (self.block is not None):
            return False
        if self.is_in_words:
            return self.bits in (4, 8) and not self.is_float
        return self.bits == 8 and self.style in (
            "naive-quantized",
            f"{'float' if self.is_float else 'int'}-quantized",
        )

    @property
    def method(self) -> str:
        """As what its numbers can be taken; nothing where no method means the same."""
        if self.block is not None:
            return "fp8" if self.is_float else ""
        if self.has_order:
            return ""
        if self.bits == 4:
            return "int4"
        is_by_row = self.is_symmetric and not self.group
        return ("fp8" if self.is_float else "int8") if is_by_row else ""

    @property
    def what(self) -> str:
        kind = "floats of 8 bits" if self.is_float else f"{self.bits} bits"
        return kind + (" in blocks" if self.block else _of(self.group or 0)) + _in_order(self.has_order)


def _schemes(facts: Mapping[str, Any]) -> list[_Scheme]:
    """How each group of layers is packed; nothing where one of them is not described."""
    groups = facts.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    found = [group for group in found if not _is_of_activations(group)]
    if not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in found):
        return []
    return [_scheme(group["weights"], group.get("format") or facts.get("format")) for group in found]


def _is_of_activations(group: object) -> bool:
    """Whether its layers have no packed weights, as attention has none."""
    return isinstance(group, dict) and "weights" in group and group["weights"] is None


def _scheme(weights: Mapping[str, Any], style: object) -> _Scheme:
    bits, strategy = weights.get("num_bits"), str(weights.get("strategy"))
    return _Scheme(
        style=str(style),
        bits=bits if type(bits) is int else 0,
        strategy=strategy,
        group=_columns_together(weights, strategy),
        block=_block(weights.get("block_structure")) if strategy == "block" else None,
        is_float=weights.get("type") == "float",
        is_symmetric=weights.get("symmetric", True) is True,
        has_order=weights.get("actorder") in (True, "group", "dynamic"),
    )


def _columns_together(weights: Mapping[str, Any], strategy: str) -> int | None:
    if strategy == "block":
        block = _block(weights.get("block_structure"))
        return block[1] if block else None
    return _group(weights.get("group_size")) if strategy == "group" else 0


def _block(extents: object) -> tuple[int, int] | None:
    if isinstance(extents, str):  # "128x128"
        extents = [int(extent) if extent.isdecimal() else 0 for extent in extents[:20].split("x")]
    if not isinstance(extents, list) or len(extents) != 2:
        return None
    rows, columns = extents
    return (rows, columns) if type(rows) is int and type(columns) is int and min(rows, columns) > 0 else None


def _group(size: object) -> int | None:
    """Columns of a group, 0 for a whole row; ``None`` for what is no size."""
    if type(size) is not int or not -1 <= size <= _LARGEST_GROUP or size == 0:
        return None
    return max(size, 0)


def _of(group: int) -> str:
    return f" in groups of {group}" if group else ""


def _in_order(has_order: bool) -> str:
    return ", columns in the order of their activations" if has_order else ""


def _ignored(facts: Mapping[str, Any]) -> list[str] | None:
    """Layers that compressed-tensors left as they are; ``None`` where only patterns would tell.

    Patterns come from strangers, and some would run for ages: those that are a plain name with anything before it
    are known, the others make it transformers' choice.
    """
    names = []
    for entry in _names(facts.get("ignore")) or []:
        if entry.startswith("re:"):
            plain = entry.removeprefix("re:").removeprefix(".*").removesuffix("$").removesuffix(".*")
            plain = plain.replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", plain):
                return None
            names.append(plain.strip("."))
        else:
            names.append(entry)
    return names


_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], PackedFormat | None]] = {
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}
"""By what ``quant_method`` says."""
