"""Tiny checkpoints whose files hold packed weights, as their publishers write them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm_magic.backends.accelerate.placement.quantize import import_library
from tests import tiny

_LINEAR = re.compile(r"(q|k|v|o|gate|up|down)_proj\.weight$")
_STACK = re.compile(r"experts\.(gate_up|down)_proj$")
_MXFP4_VALUES = torch.tensor([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def save_fp8(folder: Path, save: Callable[..., Path] = tiny.save_llama, **changes: Any) -> Path:
    """Linear layers in float8 with a scale for each square of 128 weights."""
    save(folder, **changes)
    packed: dict[str, Any] = {}
    for name, weight in _weights(folder).items():
        if _LINEAR.search(name):
            packed[name], packed[f"{name}_scale_inv"] = _squares(weight)
        else:
            packed[name] = weight
    facts = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return _written(folder, packed, facts | {"fmt": "e4m3"})


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


def _weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def _written(folder: Path, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return folder


def _squares(weight: Any) -> tuple[Any, Any]:
    rows, columns = weight.shape
    across, down = -(-rows // 128), -(-columns // 128)
    padded = torch.nn.functional.pad(weight.float(), (0, down * 128 - columns, 0, across * 128 - rows))
    squares = padded.view(across, 128, down, 128)
    scales = squares.abs().amax((1, 3)).clamp(min=1e-12) / 448
    scaled = (squares / scales[:, None, :, None]).view(across * 128, down * 128)
    return scaled[:rows, :columns].contiguous().to(torch.float8_e4m3fn), scales


def _groups(weight: Any) -> tuple[Any, Any]:
    groups = weight.float().unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - _MXFP4_VALUES).abs().argmin(-1).to(torch.uint8)
    return (codes[..., ::2] | codes[..., 1::2] << 4).contiguous(), (exponents + 127).to(torch.uint8)
