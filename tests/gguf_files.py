"""GGUF files made by hand, byte by byte, so that a test can make them lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...], int, int]
"""Name, dimensions (fastest first, as in the file), ggml type, offset in the data."""


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def gguf_bytes(
    entries: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    data: int = 0,
    version: int = 3,
    architecture: str | None = "llama",
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    keys = list(entries)
    if architecture is not None:
        keys.append(entry("general.architecture", 8, string(architecture)))
    keys_said = len(keys) if key_count is None else key_count
    tensors_said = len(tensors) if tensor_count is None else tensor_count
    raw = b"GGUF" + struct.pack("<IQQ", version, tensors_said, keys_said) + b"".join(keys)
    for name, dims, kind, offset in tensors:
        raw += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(data)


def save_gguf(
    path: Path,
    model: Any,
    architecture: str,
    keys: dict[str, Any],
    tokenizer: Any,
    kind: str = "Q8_0",
    *,
    end_of_turn: int | None = None,
    renamed: dict[str, str] | None = None,
) -> Path:
    """A GGUF file of a tiny model: real names, real tensors, a real tokenizer.

    Matrices are quantized to ``kind`` where their rows allow it. Tensors are stored as they are in
    the model, without llama.cpp's rearrangements, which no test here depends on. ``renamed`` gives
    tokens another text.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("mit")
    for key, value in keys.items():
        _add(writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer, tokenizer, renamed or {}, scored=architecture.startswith("gemma"))
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    for name, weights in gguf_tensors(model, architecture).items():
        stored = gguf.GGMLQuantizationType[kind]
        if kind in ("F16", "F32"):
            data = weights.astype("float16" if kind == "F16" and weights.ndim > 1 else "float32")
            writer.add_tensor(name, data)
        elif weights.ndim > 1 and weights.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(weights, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Any, architecture: str) -> dict[str, Any]:
    """llama.cpp's name -> float32 array, for the parameters of a model."""
    import gguf

    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(number, 8)
    tensors = {}
    for name, parameter in model.named_parameters():
        weights = parameter.detach().float().numpy()
        block = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            half = weights.shape[1] // 2
            tensors[f"blk.{block}.ffn_gate_exps.weight"] = weights[:, :half].copy()
            tensors[f"blk.{block}.ffn_up_exps.weight"] = weights[:, half:].copy()
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{block}.ffn_down_exps.weight"] = weights
        else:
            stem, suffix = name, ""
            for ending in (".weight", ".bias"):
                if name.endswith(ending):
                    stem, suffix = name.removesuffix(ending), ending
            inner = stem.partition(".")[2]
            found = table.get_name(stem) or table.get_name(inner)
            assert found, name
            tensors[found + suffix] = _as_llama_cpp(architecture, found, weights)
    return tensors


def _as_llama_cpp(architecture: str, name: str, weights: Any) -> Any:
    """The layout and the domain that a reader of this architecture takes for granted."""
    import numpy as np

    if architecture == "gpt2" and weights.ndim == 2 and name.startswith("blk."):
        return weights.T.copy()
    if name.endswith("ssm_a"):
        return -np.exp(weights)
    if name.endswith(("conv1d", "shortconv.conv")):
        return weights.squeeze(1) if weights.ndim == 3 else weights
    return weights


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: Any, tokenizer: Any, renamed: dict[str, str], *, scored: bool = False) -> None:
    """As bytes that are merged in turn, or by scores as Gemma's."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("llama" if scored else "gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([renamed.get(token, token) for token in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    if scored:
        writer.add_token_scores([-float(index) for index in range(len(vocabulary))])
    else:
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
