"""What a model is like, beside its blocks: what its configuration and files say, and what its code can do."""

from __future__ import annotations

import re
from typing import Any

from llm_magic.backends.accelerate.architecture import auto_class
from llm_magic.backends.accelerate.decoding import step_by_step
from llm_magic.backends.accelerate.decoding.capturable import has_plain_cache, model_reason, packing_reason
from llm_magic.backends.accelerate.decoding.kv_cache import can_take_back
from llm_magic.backends.accelerate.source.config_values import whole_number
from llm_magic.backends.accelerate.source.convert import MARK, most_common_type
from llm_magic.backends.accelerate.source.sources import ModelFiles, processor_template, read_json
from llm_magic.harmless.words import plain_words
from llm_magic.headers import GgufHeader, read_gguf_header


def context_length(config: Any) -> int:
    """Longest context in tokens; 0 when the architecture has no limit or does not say."""
    return whole_number(
        config,
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "max_sequence_length",
        "n_ctx",
    )


def intermediate_size(config: Any) -> int:
    """Width between the matrices of a feed-forward layer; 4 times that of its input where none is named."""
    found = whole_number(
        config, "intermediate_size", "d_ff", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"
    )
    return found or 4 * whole_number(config, "hidden_size", "d_model", "n_embd")


def has_chat_template(files: ModelFiles, header: GgufHeader | None) -> bool:
    """Whether its files say how a conversation is written for it."""
    if header is not None:
        return "tokenizer.chat_template" in header.metadata
    folder = files.folder
    if (folder / "chat_template.jinja").is_file() or processor_template(folder):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def license_of(files: ModelFiles, header: GgufHeader | None) -> str:
    """Its license, as its GGUF file or its model card names it; empty where neither does."""
    if header is not None:
        return plain_words(header.metadata.get("general.license", ""))
    if (mark := files.folder / MARK).is_file():
        return plain_words(read_json(mark).get("license", ""))
    card = files.folder / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(65_536)
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license(?:_name)?:[ \t]*([^\n#]+)", front[1], re.MULTILINE) if front else None
    return plain_words(found[1].strip().strip("'\"")) if found else ""


def details_of(config: Any, files: ModelFiles, header: GgufHeader | None) -> dict[str, Any]:
    """What its configuration and files say that has no field of its own in a layout; what is 0 or empty is left out."""
    details: dict[str, Any] = {
        "model_type": config.model_type,
        "layers": whole_number(config, "num_hidden_layers", "n_layer"),
    }
    details["attention_heads"] = whole_number(config, "num_attention_heads", "n_head", "num_heads")
    details["kv_heads"] = (
        whole_number(config, "num_key_value_heads", "num_kv_heads") or details["attention_heads"]
    )
    details["head_dim"] = whole_number(config, "head_dim", "d_kv")
    details["experts"] = whole_number(config, "num_experts", "num_local_experts", "n_routed_experts")
    details["sliding_window"] = whole_number(config, "sliding_window")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raw = quantization if isinstance(quantization, dict) else quantization.to_dict()
        details["quantization"] = plain_words(str(raw.get("quant_method", "unknown")))
    if files.gguf is not None:
        found = header or read_gguf_header(files.gguf)
        details["gguf"] = most_common_type(found)
    return {key: value for key, value in details.items() if value}


def code_details(model: Any, config: Any, method: str) -> dict[str, Any]:
    """By which code it is loaded and attends, and what can be done with that code.

    Parameters
    ----------
    model
        Built of ``config``, not packed yet.
    method
        By which its layers will be packed; empty for none.
    """
    details: dict[str, Any] = {
        "attention": model.config._attn_implementation or "",
        "auto_class": auto_class(config).__name__,
    }
    if not can_take_back(model):
        details |= {"one_by_one": True}
    if reason := model_reason(model) or packing_reason(method):
        details |= {"eager": reason}
    elif not has_plain_cache(model):
        details |= {"keeps_states": True}
    if step_by_step.serves(model):
        details |= {"attends_in_parts": True}
    return details
