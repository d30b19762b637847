"""Tiny checkpoints whose files hold packed weights, as their publishers write them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm_magic.backends.accelerate.quantizing.libraries import import_library
from tests import tiny

_LINEAR = re.compile(r"(q|k|v|o|gate|up|down)_proj\.weight$")
_STACK = re.compile(r"experts\.(gate_up|down)_proj$")
_MXFP4_VALUES = torch.tensor([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def save_fp8(
    folder: Path,
    save: Callable[..., Path] = tiny.save_llama,
    *,
    scales: str = "squares",
    stays: str = "",
    **changes: Any,
) -> Path:
    """Linear layers in float8, but for those in whose names ``stays`` is.

    ``scales`` are those of ``"squares"`` of 128 weights, as exponents of 2 for ``"exponents"`` (float8_e8m0fnu) and
    ``"bytes"``; or one for a ``"matrix"``, beside that of its activations.
    """
    save(folder, **changes)
    packed: dict[str, Any] = {}
    for name, weight in _weights(folder).items():
        if not _LINEAR.search(name) or (stays and stays in name):
            packed[name] = weight
        elif scales == "matrix":
            scale = weight.abs().max() / 448
            packed[name] = (weight / scale).to(torch.float8_e4m3fn)
            packed |= {f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.ones(())}
        else:
            packed[name], packed[f"{name}_scale_inv"] = _squares(weight, are_powers=scales != "squares")
            if scales == "bytes":
                packed[f"{name}_scale_inv"] = (packed[f"{name}_scale_inv"].log2() + 127).to(torch.uint8)
            elif scales == "exponents":
                packed[f"{name}_scale_inv"] = packed[f"{name}_scale_inv"].to(torch.float8_e8m0fnu)
    block = None if scales == "matrix" else [128, 128]
    facts = {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3"}
    facts |= {"activation_scheme": "static" if scales == "matrix" else "dynamic"}
    return _written(folder, packed, facts | {"modules_to_not_convert": [stays, "lm_head"] if stays else None})


def save_mxfp4(folder: Path) -> Path:
    """gpt-oss: stacks of experts in 4-bit floats with an exponent for each 32, transposed."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **{
            name: value
            for name, value in tiny._common(2).items()
            if name not in ("intermediate_size", "hidden_size")
        },
        hidden_size=128,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    tiny._save(GptOssForCausalLM, config, folder)
    packed: dict[str, Any] = {}
    for name, weight in _weights(folder).items():
        if _STACK.search(name):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = _groups(weight.transpose(1, 2))
        else:
            packed[name] = weight
    return _written(folder, packed, {"quant_method": "mxfp4"})


def save_bitsandbytes(
    folder: Path,
    method: str,
    save: Callable[..., Path] = tiny.save_llama,
    *,
    is_double: bool = False,
    stays: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """Linear layers, those of experts too, as bitsandbytes saves them; ``is_double``: with packed scales."""
    functional = import_library("bitsandbytes").functional
    save(folder, **changes)
    packed: dict[str, Any] = {}
    for name, weight in _weights(folder).items():
        if not _LINEAR.search(name) or any(part in name for part in stays):
            packed[name] = weight
        elif method == "int8":
            packed[name], scales, _ = functional.int8_vectorwise_quant(weight.half())
            packed[name.replace("weight", "SCB")] = scales
            packed[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
        else:
            packed[name], state = functional.quantize_4bit(
                weight, blocksize=64, quant_type=method, compress_statistics=is_double
            )
            packed |= {f"{name}.{part}": held for part, held in state.as_dict(packed=True).items()}
    facts = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": method == "int8",
        "load_in_4bit": method != "int8",
    }
    facts |= {"bnb_4bit_quant_type": method if method != "int8" else "fp4"}
    if stays:
        facts |= {"llm_int8_skip_modules": [*stays, "lm_head"]}
    return _written(folder, packed, facts)


def save_gptq(
    folder: Path,
    save: Callable[..., Path] = tiny.save_llama,
    *,
    bits: int = 4,
    group: int = 32,
    version: str = "gptq",
    is_ordered: bool = False,
    facts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Linear layers, those of experts too, in GPTQ's words of 32 bits; ``is_ordered``: columns of any group.

    As the others below it makes a folder beside it, ``…-plain``, with the numbers that these stand for.
    """
    save(folder, **changes)
    packed, plain = dict[str, Any](), dict[str, Any]()
    for name, weight in _weights(folder).items():
        if not _LINEAR.search(name):
            packed[name] = plain[name] = weight
            continue
        order = _group_of(weight.shape[1], group, is_ordered=is_ordered)
        entries, scales, zeros = _integers(weight, order, bits)
        less = 1 if version == "gptq" else 0
        packed |= {
            name.replace("weight", "qweight"): _words(entries.T, bits, down=True),
            name.replace("weight", "qzeros"): _words((zeros.T - less) % (1 << bits), bits),
            name.replace("weight", "scales"): scales.T.contiguous().half(),
            name.replace("weight", "g_idx"): order.int(),
        }
        plain[name] = (entries - zeros[:, order]) * scales[:, order]
    _written_plain(folder, plain)
    told = {"bits": bits, "group_size": group, "desc_act": is_ordered, "checkpoint_format": version}
    return _written(folder, packed, {"quant_method": "gptq"} | told | dict(facts or {}))


def save_awq(
    folder: Path,
    save: Callable[..., Path] = tiny.save_llama,
    *,
    group: int = 32,
    stays: str = "",
    **changes: Any,
) -> Path:
    """Linear layers, those of experts too, in AWQ's words of 32 bits, but for those in whose names ``stays`` is."""
    save(folder, **changes)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed, plain = dict[str, Any](), dict[str, Any]()
    for name, weight in _weights(folder).items():
        if not _LINEAR.search(name) or (stays and stays in name):
            packed[name] = plain[name] = weight
            continue
        group_of = _group_of(weight.shape[1], group)
        entries, scales, zeros = _integers(weight, group_of, 4)
        packed |= {
            name.replace("weight", "qweight"): _words(entries.T, 4, order),
            name.replace("weight", "qzeros"): _words(zeros.T, 4, order),
            name.replace("weight", "scales"): scales.T.contiguous().half(),
        }
        plain[name] = (entries - zeros[:, group_of]) * scales[:, group_of]
    _written_plain(folder, plain)
    facts = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return _written(folder, packed, facts | {"modules_to_not_convert": [stays] if stays else None})


def save_compressed(
    folder: Path,
    style: str,
    save: Callable[..., Path] = tiny.save_llama,
    *,
    facts: Mapping[str, Any] | None = None,
    has_activations: bool = False,
    **changes: Any,
) -> Path:
    """Linear layers, those of experts too, by compressed-tensors itself; ``facts`` are of its ``QuantizationArgs``."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    save(folder, **changes)
    weights = QuantizationArgs(**dict(facts or {}))
    inputs = QuantizationArgs(num_bits=8, type=weights.type, strategy="token", dynamic=True, symmetric=True)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=inputs if has_activations else None,
        format=style,
    )
    compressor: Any = BaseCompressor.get_value_from_registry(style)
    packed, plain = dict[str, Any](), dict[str, Any]()
    for name, weight in _weights(folder).items():
        if not _LINEAR.search(name):
            packed[name] = plain[name] = weight
            continue
        low, high = _extremes(weight, weights)
        scale, zero = calculate_qparams(low, high, weights)
        parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        compressed = compressor.compress(parts, scheme)
        packed |= {name.replace("weight", part): held for part, held in compressed.items()}
        plain[name] = compressor.decompress(compressed, scheme)["weight"]
    _written_plain(folder, plain)
    told = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": style,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    return _written(folder, packed, told)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = _weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _extremes(weight: Any, facts: Any) -> tuple[Any, Any]:
    """The smallest and the largest number of what shares a scale."""
    rows, columns = weight.shape
    match str(getattr(facts.strategy, "value", facts.strategy)):
        case "group":
            view = weight.view(rows, -1, facts.group_size)
            return view.amin(-1), view.amax(-1)
        case "channel":
            return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        case "tensor":
            return weight.amin().view(1), weight.amax().view(1)
    down, across = facts.block_structure
    padded = torch.nn.functional.pad(weight, (0, -columns % across, 0, -rows % down))
    view = padded.view(padded.shape[0] // down, down, -1, across)
    return view.amin((1, 3)), view.amax((1, 3))


def _group_of(columns: int, group: int, *, is_ordered: bool = False) -> Any:
    usual = torch.arange(columns) // (columns if group == -1 else group)
    return usual[torch.randperm(columns)] if is_ordered else usual


def _integers(weight: Any, group_of: Any, bits: int) -> tuple[Any, Any, Any]:
    """Entries, and scales and zeros of the groups of columns."""
    count, most = int(group_of.max()) + 1, (1 << bits) - 1
    entries = torch.empty_like(weight)
    scales, zeros = (torch.empty(len(weight), count) for _ in range(2))
    for group in range(count):
        own = group_of == group
        low, high = weight[:, own].amin(1).clamp(max=0), weight[:, own].amax(1).clamp(min=0)
        scales[:, group] = ((high - low) / most).clamp(min=1e-6).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(1, most)
        entries[:, own] = (
            (weight[:, own] / scales[:, group, None] + zeros[:, group, None]).round().clamp(0, most)
        )
    return entries.int(), scales, zeros.int()


def _words(numbers: Any, bits: int, order: Sequence[int] | None = None, *, down: bool = False) -> Any:
    """Several numbers of a row, or with ``down`` of a column, in each word of 32 bits, in this order from the lowest."""
    if down:
        return _words(numbers.T, bits, order).T.contiguous()
    count = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // count, dtype=torch.int64)
    for place, column in enumerate(order or range(count)):
        words |= numbers[:, column::count].long() << (bits * place)
    return (words - ((words >> 31) << 32)).int()


def _weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def _written(folder: Path, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return folder


def _written_plain(folder: Path, tensors: dict[str, Any]) -> None:
    beside = shutil.copytree(folder, folder.with_name(f"{folder.name}-plain"))
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, beside / "model.safetensors", metadata={"format": "pt"})


def _squares(weight: Any, *, are_powers: bool = False) -> tuple[Any, Any]:
    rows, columns = weight.shape
    across, down = -(-rows // 128), -(-columns // 128)
    padded = torch.nn.functional.pad(weight.float(), (0, down * 128 - columns, 0, across * 128 - rows))
    squares = padded.view(across, 128, down, 128)
    scales = squares.abs().amax((1, 3)).clamp(min=1e-12) / 448
    if are_powers:
        scales = scales.log2().ceil().exp2()
    scaled = (squares / scales[:, None, :, None]).view(across * 128, down * 128)
    return scaled[:rows, :columns].contiguous().to(torch.float8_e4m3fn), scales


def _groups(weight: Any) -> tuple[Any, Any]:
    groups = weight.float().unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - _MXFP4_VALUES).abs().argmin(-1).to(torch.uint8)
    return (codes[..., ::2] | codes[..., 1::2] << 4).contiguous(), (exponents + 127).to(torch.uint8)
