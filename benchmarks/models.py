"""Models to measure: the starter, converted, and random ones of real shapes that need no download."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MIXTURE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
WIDE_MIXTURE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""Layers as those of Qwen3-30B-A3B, but with half of the experts."""

WIDE_VOCABULARY = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_Q4_0 = ".q4_0.gguf"

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8b": ("Llama", LLAMA_8B),
    "llama-1b": ("Llama", LLAMA_1B),
    "mixture": ("Qwen3Moe", MIXTURE),
    "wide-mixture": ("Qwen3Moe", WIDE_MIXTURE),
    "wide-vocabulary": ("Llama", WIDE_VOCABULARY),
}


class Models:
    """A subject that makes what others load."""

    def measure(self, what: str, folder: str, **changes: Any) -> dict[str, str]:
        """Make it, unless it is there; gives its path.

        ``what`` is ``"starter"``, ``"starter.bf16.gguf"`` or a name of `SHAPES`, which ``changes``
        may change; with ``.gguf`` behind it, the model of that name in ``folder`` is written for llama.cpp, and
        with ``.q4_0.gguf`` that file is packed by it.
        """
        if what == "starter":
            return {"path": str(starter_folder())}
        target = Path(folder) / what
        done, made = target.with_name(f"{what}.done"), repr((SHAPES.get(what.partition(".")[0]), changes))
        if not done.exists() or done.read_text(encoding="utf-8") != made:
            _maker(what, changes)(target)
            os.sync()  # pages that wait to be written cannot be dropped
            done.write_text(made, encoding="utf-8")
        return {"path": str(target)}


def placement(folder: str | Path, base: str, offload: str = "", share: float = 0.0) -> dict[str, str]:
    """A device map: everything on ``base``, and a share of the layers, evenly spread, on ``offload``."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    layers = int(config["num_hidden_layers"])
    count = round(layers * share)
    away = {(2 * k + 1) * layers // (2 * count) for k in range(count)}
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    found = dict.fromkeys(names, base)
    return found | {f"model.layers.{i}": offload if i in away else base for i in range(layers)}


def words(count: int, vocabulary: int, seed: int = 1) -> str:
    """A prompt of exactly so many tokens for the tokenizer of a random model."""
    import random

    numbers = random.Random(seed)
    return " ".join(f"w{numbers.randrange(5, vocabulary)}" for _ in range(count))


def starter_folder() -> Path:
    """The starter model as safetensors; converted when that was not done before."""
    from llm_magic.backends.accelerate.source.sources import fetch_weights, resolve
    from llm_magic.model import ModelSpec

    spec = ModelSpec("starter")
    return fetch_weights(spec, resolve(spec, _ignore), _ignore).folder


def _maker(what: str, changes: Mapping[str, Any]) -> Callable[[Path], None]:
    if what == "starter.bf16.gguf":
        return starter_in_bf16
    if what.endswith(_Q4_0):
        return lambda target: packed_gguf(target.with_name(what.removesuffix(_Q4_0) + ".gguf"), target)
    if what.endswith(".gguf"):
        return lambda target: llama_as_gguf(target.with_suffix(""), target)
    kind, shape = SHAPES[what]
    return lambda target: save_random(kind, shape | dict(changes), target)


def save_random(kind: str, shape: Mapping[str, Any], folder: Path) -> None:
    """A random bf16 model with a tokenizer of numbered words; made on a GPU where there is one."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    config = getattr(transformers, f"{kind}Config")(**shape, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), no_init_weights():
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0, 0.02)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # answers have the length that is asked for
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, max_shard_size="2GB")
    save_tokenizer(folder, int(shape["vocab_size"]))


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """One token for each of the words ``w0 w1 …``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(
        folder
    )


# --- For llama.cpp


def starter_in_bf16(target: Path) -> None:
    """The starter's GGUF with its matrices in bf16, which is what it is converted to for transformers."""
    import gguf
    from gguf.quants import dequantize, quantize

    from llm_magic.backends.accelerate.source.sources import find_starter

    reader = gguf.GGUFReader(find_starter())
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, *sub = field.types
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub[-1] if sub else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        if plain.ndim > 1:
            writer.add_tensor(tensor.name, quantize(plain, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(tensor.name, plain)
    _write(writer)


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_as_gguf(folder: Path, target: Path) -> None:
    """A random Llama's weights for llama.cpp: same shapes and bytes, so equal work, not equal answers.

    (llama.cpp wants the rows of two projections in another order; for random ones that is the same.)
    """
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.ndim == 1:  # norms, which llama.cpp has in float32
                    writer.add_tensor(gguf_name(name), tensor.float().numpy())
                    continue
                raw = tensor.view(torch.uint8).numpy()
                writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    _write(writer)


def packed_gguf(source: Path, target: Path) -> None:
    """A GGUF of llama.cpp in its Q4_0: 4 bits, 32 weights to a scale."""
    import ctypes

    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    if failed:
        raise RuntimeError(f"llama.cpp could not pack {source.name}")


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Llama tensor of transformers."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    number, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_NAMES[part.removesuffix('.weight')]}.weight"


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ignore(_event: object) -> None:
    """Progress that nobody looks at."""
