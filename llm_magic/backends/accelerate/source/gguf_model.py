"""A GGUF file in transformers' terms: its configuration, its tokenizer, its weights by name.

transformers knows how llama.cpp's keys and tensors become its own; what is here spares it the
slow ways: no vocabulary is walked for a configuration, the table of names is made once, and
weights are unpacked one at a time instead of all together in memory.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.source.capped_scores import have_scores_capped
from llm_magic.errors import SourceError
from llm_magic.headers import GgufHeader, SkippedArray, TensorEntry

_TOKENS = "tokenizer.ggml.tokens"
_FILE = "model.gguf"
_MAX_MODULES = 4096
_LEFT_OUT = {
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
    "gpt2": {"context_length": "n_positions"},
}
_END_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
_SCALED_BY_KEYS = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")


def gguf_config(path: Path, header: GgufHeader) -> Any:
    """Transformers' configuration of the model in ``path``.

    transformers reads it from a copy of the header that leaves the long arrays out; the length
    of the vocabulary is filled in afterwards, by transformers' own rule.

    Raises
    ------
    SourceError
        When transformers does not know the architecture, or the file lacks a key it needs.
    """
    from transformers import AutoConfig

    _refuse_absurd(path, header)
    with tempfile.TemporaryDirectory(prefix="llm-magic-") as folder:
        (Path(folder) / _FILE).write_bytes(_short_header(path, header))
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=_FILE, local_files_only=True)
        except Exception as error:  # a hostile header can fail in any way a constructor can
            raise _unsupported(path, header, error) from None
    tokens = header.count(_TOKENS)
    if tokens and header.metadata.get(f"{header.architecture}.vocab_size") != config.vocab_size:
        config.vocab_size = tokens
    _fill_in(config, path, header)
    have_scores_capped(config)
    config.name_or_path = ""  # transformers puts the file's title there, which is no path
    return config


def _fill_in(config: Any, path: Path, header: GgufHeader) -> None:
    """Set what the file says and transformers leaves at one model's default."""
    for key, name in _LEFT_OUT.get(header.architecture, {}).items():
        if (value := header.metadata.get(f"{header.architecture}.{key}")) is not None:
            setattr(config, name, value)
    if scaling := _rope_scaling(path, header):
        config.rope_parameters = {**(config.rope_parameters or {}), **scaling}


def _rope_scaling(path: Path, header: GgufHeader) -> dict[str, Any]:
    """How rotary positions are stretched for long contexts; empty when they are not.

    llama.cpp writes linear and YaRN scaling as keys, and Llama 3's as a tensor of factors by
    which frequencies are divided. The largest of these is the factor of the formula; the rest of
    it is the same in every Llama 3 model, which the other factors must confirm.

    Raises
    ------
    SourceError
        When the factors follow another formula.
    """
    prefix = f"{header.architecture}.rope.scaling"
    kind = header.metadata.get(f"{prefix}.type")
    if header.architecture in _SCALED_BY_KEYS and kind in ("linear", "yarn"):
        found = {"rope_type": kind, "factor": float(header.metadata.get(f"{prefix}.factor", 1.0))}
        original = header.metadata.get(f"{prefix}.original_context_length")
        if original and kind == "yarn":
            found["original_max_position_embeddings"] = int(original)
        return found
    factors = next((tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    if header.architecture != "llama" or factors is None or factors.dtype != "F32":
        return {}
    return _llama3_scaling(path, header, factors)


def _llama3_scaling(path: Path, header: GgufHeader, factors: TensorEntry) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(factors.offset)
        stored = struct.unpack(f"<{factors.bytes // 4}f", file.read(factors.bytes))
    theta = float(header.metadata.get("llama.rope.freq_base", 10_000.0))
    factor, low, high, original = max(stored), 1.0, 4.0, 8192
    for i, value in enumerate(stored):
        turns = original / (
            2 * math.pi * theta ** (i / len(stored))
        )  # of this pair over the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        if abs(value * ((1 - smooth) / factor + smooth) - 1) > 0.02:
            raise SourceError(
                f"{path.name} scales its positions in a way that transformers does not know.",
                "Get the model's safetensors version.",
            )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _refuse_absurd(path: Path, header: GgufHeader) -> None:
    """Refuse counts of layers or experts that the file's own tensors cannot fill."""
    for key in ("block_count", "expert_count"):
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        if not isinstance(value, int) or value > _MAX_MODULES:
            raise SourceError(f"{path.name} is damaged: its {key} is {value}.", "Download the file again.")


def _unsupported(path: Path, header: GgufHeader, error: Exception) -> SourceError:
    if "not supported" in str(error) or isinstance(error, NotImplementedError):
        return SourceError(
            f"{path.name} holds the architecture {header.architecture!r}, which transformers cannot read from a GGUF.",
            "Get the model's safetensors version, or upgrade transformers.",
        )
    return SourceError(
        f"{path.name} does not say what a {header.architecture!r} model must say ({type(error).__name__}).",
        "Get the file again, or another conversion of the model.",
    )


def _short_header(path: Path, header: GgufHeader) -> bytes:
    """A GGUF file with the short entries of ``path``, and with tensors that have names but no bytes."""
    keys = [key for key, value in header.metadata.items() if not isinstance(value, SkippedArray)]
    parts = []
    with path.open("rb") as file:
        for key in keys:
            begin, end = header.spans[key]
            file.seek(begin)
            parts.append(file.read(end - begin))
    if _TOKENS not in keys and header.architecture in _count_only_architectures():
        # these configurations take the vocabulary's length from the array itself
        parts.append(_string(_TOKENS) + struct.pack("<IIQ", 9, 8, header.count(_TOKENS)))
        parts.append(bytes(8 * header.count(_TOKENS)))
    entries = sum(key != "" for key in keys) + (len(parts) > len(keys))
    preamble = b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), entries)
    tensors = [_string(tensor.name) + struct.pack("<IQIQ", 1, 0, 0, 0) for tensor in header.tensors]
    return b"".join([preamble, *parts, *tensors]) + bytes(64)


def _count_only_architectures() -> frozenset[str]:
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # before transformers 5.2x every architecture was read the older way
        return frozenset()
    return frozenset(GGUF_CONFIG_ARCHS)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def gguf_tokenizer(path: Path, header: GgufHeader) -> Any:
    """The tokenizer that the file describes, with its chat template.

    Raises
    ------
    SourceError
        When the kind of tokenizer is not supported.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust tokenizers raise bare Exception on a bad vocabulary
        raise SourceError(
            f"{path.name} has a tokenizer that transformers cannot build ({type(error).__name__}).",
            "Get the model's safetensors version.",
        ) from None
    # As the file says: some versions of transformers confuse the first token and the last.
    for key, name in _SPECIAL.items():
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    return tokenizer


def end_tokens(header: GgufHeader, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer, as llama.cpp counts them: end of text, of turn, of message.

    A file names one or some of them; of those it leaves out, the usual ones are known by their text.
    """
    keys = ("eos", "eot", "eom")
    ids = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    vocabulary = tokenizer.get_vocab()
    ids += [vocabulary.get(text) for text in _END_TEXTS]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and i < len(tokenizer)))


def gguf_dtype(header: GgufHeader) -> str:
    """The dtype in which the weights are unpacked: as stored, or bfloat16 when they are quantized."""
    stored = {tensor.dtype for tensor in header.tensors}
    if not stored <= {"F32", "F16", "BF16"} or "BF16" in stored:
        return "bfloat16"
    return "float16" if "F16" in stored else "float32"  # norms stay F32 beside F16 weights


def needs_whole_load(header: GgufHeader) -> bool:
    """Whether transformers rearranges this architecture's tensors with conversions of its newer reader."""
    return header.architecture in _count_only_architectures()


def iterate_weights(
    path: Path, header: GgufHeader, skeleton: Any, dtype: Any
) -> Iterator[tuple[str, Any, int]]:
    """Unpack the weights in the order of the file: ``(parameter name, tensor, bytes read)``.

    Peak memory is about three times the largest tensor in float32. A parameter that several
    tensors make together (joined experts) comes when the last of them was read.

    Parameters
    ----------
    skeleton
        The model on the meta device.
    dtype
        torch dtype of the tensors.
    """
    import numpy as np
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=skeleton.config.to_dict())
    names = map_names(header, skeleton, processor)
    targets = {t.name: names.get(t.name) or names.get(t.name.removesuffix(".weight")) for t in header.tensors}
    parts_left = Counter(targets.values())
    joined: dict[str, Any] = {}
    data = np.memmap(path, mode="r", dtype=np.uint8)
    for tensor in header.tensors:
        name = targets[tensor.name]
        if name is None:
            continue
        alone = _process(processor, _unpack(data, tensor), tensor.name, names, joined)
        parts_left[name] -= 1
        if alone is not None:
            yield name, alone.to(dtype), tensor.bytes
        elif not parts_left[name]:
            yield name, joined.pop(name).to(dtype), tensor.bytes


def _unpack(data: Any, tensor: TensorEntry) -> Any:
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.dtype]
    raw = data[tensor.offset : tensor.offset + tensor.bytes]
    rows = tensor.shape[:-1]
    return gguf.dequantize(raw.reshape(*rows, -1) if rows else raw, kind)


def _process(processor: Any, weights: Any, name: str, names: dict[str, str], joined: dict[str, Any]) -> Any:
    """What transformers makes of one tensor; ``None`` when it put it into ``joined`` instead."""
    import numpy as np
    import torch

    result = processor.process(
        weights=weights,
        name=name,
        tensor_key_mapping=names,
        parsed_parameters={"tensors": joined},
    )
    return (
        None if result.name is None else torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
    )


def map_names(header: GgufHeader, skeleton: Any, processor: Any) -> dict[str, str]:
    """llama.cpp's tensor names -> parameter names of ``skeleton``.

    gguf's table knows the names of checkpoints. Some were saved from an inner module, so a name is
    looked up again without its leading modules; the longest form that is known counts.
    """
    import gguf

    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = max((int(n.split(".")[1]) for n in header.tensor_names if n.startswith("blk.")), default=0) + 1
    table = gguf.get_tensor_name_map(architectures[header.architecture], layers)
    tied = skeleton.all_tied_weights_keys
    parameters = [name for name in skeleton.state_dict() if name not in tied]
    names: dict[str, str] = {}
    for depth in range(max(name.count(".") for name in parameters) + 1):
        for parameter in parameters:
            seen = processor.preprocess_name(parameter)
            stem, suffix = _split_suffix(seen)
            inner = ".".join(stem.split(".")[depth:])
            if found := inner and table.get_name(inner):
                names.setdefault(found + suffix, parameter)
            elif depth == 0:
                processor.perform_fallback_tensor_mapping(names, suffix, "", seen)
    return names


def _split_suffix(name: str) -> tuple[str, str]:
    for suffix in (".weight", ".bias"):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""
