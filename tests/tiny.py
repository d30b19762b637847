"""Tiny random models that are saved to a folder, with a tokenizer that is trained here.

Real architectures with real files and no hub: a test gets a folder that ``from_pretrained`` loads.
Weights are random but seeded, and scaled so that greedy answers vary instead of repeating a token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 384
LAYERS = 4
CONTEXT = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CORPUS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A language model reads tokens and predicts the next one.",
    "Layers live in memory, on the GPU, or on the disk: naïve façade, 東京, Ελλάδα, 🙂🚀.",
    "def square(x):\n    return x * x\n\n\nprint(square(12))  # 144",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
)


def save_tokenizer(folder: Path, *, chat_template: bool = True, byte_level: bool = True) -> Any:
    """A BPE tokenizer with ``<s>``, ``</s>`` and ``<pad>`` (ids 0–2), saved to ``folder``.

    ``byte_level`` False gives the sentencepiece style: ``▁`` for spaces and byte fallback.
    It puts ``<s>`` before plain text, so a doubled one would show.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<pad>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
    limit = {} if byte_level else {"limit_alphabet": 40}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **limit
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if not byte_level:
        tokenizer = _as_ordinary_tokens(tokenizer, special[:6])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def _as_ordinary_tokens(tokenizer: Any, special: list[str]) -> Any:
    """Byte tokens belong to the vocabulary but are not special: skipping them would lose characters."""
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


def save_llama(folder: Path, *, tied: bool = False, layers: int = LAYERS, **changes: Any) -> Path:
    """Llama with grouped-query attention; the head shares the embedding when ``tied``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = _common(layers) | {"num_key_value_heads": 2, "tie_word_embeddings": tied} | changes
    config = LlamaConfig(**facts)
    return _save(LlamaForCausalLM, config, folder)


def save_mixture(folder: Path, *, layers: int = LAYERS, **changes: Any) -> Path:
    """Qwen3-MoE: four experts, two at work; its experts are stored one by one and loaded as stacks."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    config = Qwen3MoeConfig(**_common(layers) | own | changes)
    return _save(Qwen3MoeForCausalLM, config, folder)


def save_mamba(folder: Path, *, layers: int = LAYERS) -> Path:
    """Mamba: recurrent, its convolution and state weights are used without a ``forward`` of their own."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        state_size=8,
        num_hidden_layers=layers,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
        residual_in_fp32=False,
    )
    return _save(MambaForCausalLM, config, folder)


def save_gemma(folder: Path, *, layers: int = LAYERS) -> Path:
    """Gemma 2: sliding-window and full attention in turn, tied head, capped logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    widths = _common(layers) | {
        "initializer_range": 0.05
    }  # its embedding is scaled up: less of it, or it repeats
    config = Gemma2Config(**widths, num_key_value_heads=2, head_dim=16, sliding_window=16)
    return _save(Gemma2ForCausalLM, config, folder)


def save_gemma4(folder: Path, *, layers: int = LAYERS) -> Path:
    """Gemma 4: wider heads where all is attended to; the last two layers attend to the keys of others."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **_common(layers) | {"initializer_range": 0.05},
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_types=[("sliding_attention", "full_attention")[number % 2] for number in range(layers)],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    )
    return _save(Gemma4ForCausalLM, config, folder)


def save_gpt2(folder: Path, *, layers: int = LAYERS) -> Path:
    """GPT-2: learned positions, tied head, transposed linears; no chat template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )
    return _save(GPT2LMHeadModel, config, folder, chat_template=False)


def save_t5(folder: Path, *, layers: int = LAYERS) -> Path:
    """T5: encoder and decoder share one embedding; no chat template."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=layers,
        num_heads=4,
        initializer_factor=2.0,
        decoder_start_token_id=2,
        pad_token_id=2,
        eos_token_id=1,
        dtype="float32",
    )
    return _save(T5ForConditionalGeneration, config, folder, chat_template=False)


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": save_llama,
    "llama-tied": lambda folder: save_llama(folder, tied=True),
    "qwen3-moe": save_mixture,
    "mamba": save_mamba,
    "gemma": save_gemma,
    "gemma4": save_gemma4,
    "gpt2": save_gpt2,
    "t5": save_t5,
}
"""Every tiny model by name: ``MODELS["llama"](folder)`` saves it and returns the folder."""


def _common(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "float32",
    }


def _save(model_class: Any, config: Any, folder: Path, *, chat_template: bool = True) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model_class(config).save_pretrained(folder)
    save_tokenizer(folder, chat_template=chat_template)
    return folder


# ------------------------------------------------------------- models of images and text, with towers of two layers


IMAGE_TOKEN = 4
"""Stands for an image: ``<|user|>``, so that every chat prompt has one, and nothing may come of it."""


def save_mistral3(folder: Path) -> Path:
    """Mistral 3: a Mistral beside a Pixtral tower, as Mistral Small 3.1."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = _text("mistral") | {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": None}
    vision = _vision("pixtral") | {"head_dim": 8, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return _save(Mistral3ForConditionalGeneration, config, folder)


def save_llava(folder: Path) -> Path:
    """LLaVA: a Llama beside a CLIP tower."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = _vision("clip_vision_model") | {"image_size": 28, "patch_size": 14, "projection_dim": 32}
    config = LlavaConfig(
        text_config=_text("llama"), vision_config=vision, image_token_index=IMAGE_TOKEN, dtype="float32"
    )
    return _save(LlavaForConditionalGeneration, config, folder)


def save_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: as LLaVA, with a bare parameter that stands for the end of a row of an image."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = _vision("clip_vision_model") | {"image_size": 28, "patch_size": 14, "projection_dim": 32}
    config = LlavaNextConfig(
        text_config=_text("llama"), vision_config=vision, image_token_index=IMAGE_TOKEN, dtype="float32"
    )
    return _save(LlavaNextForConditionalGeneration, config, folder)


def save_qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: positions of three dimensions, which are the same for text."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=_text("qwen2_5_vl_text") | {"num_key_value_heads": 2} | _rotary([2, 3, 3]),
        vision_config=_vision("qwen2_5_vl_vision", "depth", "num_heads")
        | {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 28},
        **_image_tokens("vision_start", "vision_end"),
    )
    return _save(Qwen2_5_VLForConditionalGeneration, config, folder)


def save_qwen3_vl(folder: Path, **changes: Any) -> Path:
    """Qwen3-VL: as before, with what its tower finds added to the first layers of the text."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = _text("qwen3_vl_text") | {"num_key_value_heads": 2, "head_dim": 16} | changes
    config = Qwen3VLConfig(
        text_config=text | _rotary([2, 3, 3]),
        vision_config=_vision("qwen3_vl_vision", "depth", "num_heads")
        | {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_image_tokens("vision_start", "vision_end"),
    )
    return _save(Qwen3VLForConditionalGeneration, config, folder)


def save_glm4v(folder: Path) -> Path:
    """GLM-4.1V: gate and up projection in one matrix, norms on both sides of each sublayer."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    config = Glm4vConfig(
        text_config=_text("glm4v_text") | {"num_key_value_heads": 2} | _rotary([2, 3, 3]),
        vision_config=_vision("glm4v_vision", "depth", "num_heads")
        | {"out_hidden_size": 64, "image_size": 28, "patch_size": 14},
        **_image_tokens("image_start", "image_end", "video_start", "video_end"),
    )
    return _save(Glm4vForConditionalGeneration, config, folder)


def save_smolvlm(folder: Path, **changes: Any) -> Path:
    """SmolVLM: a Llama named ``text_model`` beside a SigLIP tower, head tied."""
    return _save_beside_siglip("SmolVLM", folder, tie=True, **changes)


def save_idefics3(folder: Path) -> Path:
    """Its inner model brings images to where its first parameter is, which is one of the tower."""
    return _save_beside_siglip("Idefics3", folder, tie=False)


def _save_beside_siglip(kind: str, folder: Path, *, tie: bool, **changes: Any) -> Path:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        text_config=_text("llama") | changes,
        vision_config=_vision(f"{kind.lower()}_vision") | {"image_size": 28, "patch_size": 14},
        image_token_id=IMAGE_TOKEN,
        pad_token_id=2,
        scale_factor=1,
        tie_word_embeddings=tie,
        dtype="float32",
    )
    return _save(getattr(transformers, f"{kind}ForConditionalGeneration"), config, folder)


def save_gemma3(folder: Path) -> Path:
    """Gemma 3: a causal language model for transformers, with a SigLIP tower all the same."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = _text("gemma3_text") | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "initializer_range": 0.05,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    vision = _vision("siglip_vision_model") | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=5,
        dtype="float32",
    )
    return _save(Gemma3ForConditionalGeneration, config, folder)


def save_gemma4_vision(folder: Path, *, tied: bool = True) -> Path:
    """Gemma 4 with a tower: its inner model reads a row of the embedding without calling it."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = _text("gemma4_text") | {
        "initializer_range": 0.05,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "tie_word_embeddings": tied,
    }
    vision = _vision("gemma4_vision") | {"num_key_value_heads": 4, "head_dim": 8, "patch_size": 4}
    names = (
        "video_token_id",
        "audio_token_id",
        "boi_token_id",
        "eoi_token_id",
        "boa_token_id",
        "eoa_token_index",
    )
    config = Gemma4Config(
        text_config=text,
        vision_config=vision | {"position_embedding_size": 16},
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=tied,
        dtype="float32",
        **dict.fromkeys(names, 3),
    )
    return _save(Gemma4ForConditionalGeneration, config, folder)


VISION_MODELS: dict[str, Callable[[Path], Path]] = {
    "mistral3": save_mistral3,
    "llava": save_llava,
    "llava-next": save_llava_next,
    "qwen2.5-vl": save_qwen2_5_vl,
    "qwen3-vl": save_qwen3_vl,
    "glm4v": save_glm4v,
    "smolvlm": save_smolvlm,
    "gemma3": save_gemma3,
    "idefics3": save_idefics3,
}
"""Tiny models that also see, by name; here they are asked by text alone."""


def _text(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, "tie_word_embeddings": False} | _common(LAYERS)


def _vision(model_type: str, depth: str = "num_hidden_layers", heads: str = "num_attention_heads") -> Any:
    return {"model_type": model_type, "hidden_size": 32, "intermediate_size": 64, depth: 2, heads: 4}


def _rotary(sections: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}


def _image_tokens(*others: str) -> dict[str, Any]:
    ends = {f"{name}_token_id": 3 for name in others}
    return {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": IMAGE_TOKEN + 1,
        "dtype": "float32",
        "tie_word_embeddings": False,
    } | ends
