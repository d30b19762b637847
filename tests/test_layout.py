"""A layout says of a model what the model itself says once it is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.packing import parameters, template
from llm_magic.backends.accelerate.quantizing.pack import pack_block
from llm_magic.backends.accelerate.quantizing.prepare import prepare
from llm_magic.backends.accelerate.source.draft import draft_spec, with_draft
from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.skeleton import build_skeleton
from llm_magic.backends.accelerate.source.sources import resolve
from llm_magic.errors import OptionError, SourceError
from llm_magic.events import PhaseEvent
from llm_magic.model import Block, ModelLayout, ModelSpec
from tests import engines, tiny

TINY = sorted(tiny.MODELS)


def ignore(_event: PhaseEvent) -> None:
    """A progress that nobody watches."""


def layout_of(folder: Path, dtype: str = "auto") -> ModelLayout:
    spec = ModelSpec(str(folder), dtype=dtype)
    return read_layout(spec, resolve(spec, ignore))


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if folder.name == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, local_files_only=True, **options).eval()


def labels(layout: ModelLayout) -> list[str]:
    return [block.label for block in layout.blocks]


# ------------------------------------------------------------------------- every parameter, once


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_bytes_and_dtypes_are_those_of_the_loaded_model(
    tiny_model: Callable[[str], Path], name: str, dtype: str
) -> None:
    folder = tiny_model(name)
    layout, model = layout_of(folder, dtype), load(folder, dtype=dtype)
    expected = {n: (tuple(p.shape), str(p.dtype), p.nbytes) for n, p in model.named_parameters()}
    held = [tensor for block in layout.blocks for tensor in block.tensors]
    assert {t.name: (t.shape, f"torch.{t.dtype}", t.bytes) for t in held} == expected
    assert len(held) == len(expected)
    assert layout.bytes == sum(p.nbytes for p in model.parameters())
    assert layout.parameters == sum(p.numel() for p in model.parameters())
    assert sum(block.buffer_bytes for block in layout.blocks) == sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("name", TINY)
def test_blocks_make_a_device_map_that_accelerate_accepts(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    from accelerate.utils import check_device_map

    folder = tiny_model(name)
    layout = layout_of(folder)
    check_device_map(load(folder), {block.name: "cpu" for block in layout.blocks})
    assert len(set(labels(layout))) == len(layout.blocks)
    for block in layout.blocks:
        assert layout.block(block.label) is layout.block(block.name) is block
        for tied in block.tied_to:
            assert block.name in layout.block(tied).tied_to


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("llama", ["embed", "rotary_emb", "layers.0"], ["layers.3", "norm", "head"]),
        ("qwen3-moe", ["embed", "rotary_emb", "layers.0"], ["layers.3", "norm", "head"]),
        ("gemma", ["embed", "rotary_emb", "layers.0"], ["layers.3", "norm", "head"]),
        ("mamba", ["embed", "layers.0", "layers.1"], ["layers.3", "norm", "head"]),
        ("gpt2", ["embed", "wpe", "layers.0"], ["layers.3", "norm", "head"]),
        (
            "t5",
            ["embed", "encoder.embed", "encoder.0", "encoder.1", "encoder.2", "encoder.3", "encoder.norm"],
            ["decoder.embed", "decoder.0", "decoder.1", "decoder.2", "decoder.3", "decoder.norm", "head"],
        ),
    ],
)
def test_blocks_are_in_the_order_of_a_forward_pass(
    tiny_model: Callable[[str], Path], name: str, first: list[str], last: list[str]
) -> None:
    layout = layout_of(tiny_model(name))
    assert labels(layout)[: len(first)] == first
    assert labels(layout)[-len(last) :] == last
    assert len(layout.layers) == (8 if name == "t5" else 4)
    kinds = {block.label: block.kind for block in layout.blocks}
    assert (kinds["embed"], kinds["head"]) == ("embedding", "head")
    assert kinds["decoder.norm" if name == "t5" else "norm"] == "norm"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "gemma"])
def test_the_order_is_the_one_in_which_modules_run(tiny_model: Callable[[str], Path], name: str) -> None:
    import torch

    folder = tiny_model(name)
    layout, model, ran = layout_of(folder), load(folder), []
    for block in layout.blocks:
        module = model.get_submodule(block.name)
        module.register_forward_pre_hook(lambda _m, _a, label=block.label: ran.append(label))
    model(torch.tensor([[3, 4, 5]]))
    assert list(dict.fromkeys(ran)) == labels(layout)


# ------------------------------------------------------------------------------------------ ties


@pytest.mark.parametrize(
    ("name", "ties"),
    [
        ("llama", {}),
        ("llama-tied", {"embed": {"head"}, "head": {"embed"}}),
        ("gpt2", {"embed": {"head"}, "head": {"embed"}}),
        ("t5", {label: {"embed", "encoder.embed", "decoder.embed", "head"} - {label}
                for label in ("embed", "encoder.embed", "decoder.embed", "head")}),
    ],
)  # fmt: skip
def test_ties_are_the_models(tiny_model: Callable[[str], Path], name: str, ties: dict[str, set[str]]) -> None:
    layout = layout_of(tiny_model(name))
    found = {b.label: {layout.block(t).label for t in b.tied_to} for b in layout.blocks if b.tied_to}
    assert found == ties
    for label in ties:  # the bytes count once, where a pass needs them first
        assert bool(layout.block(label).tensors) == (label == "embed")


# ----------------------------------------------------------------------------------------- cache


def cache_layers(model: Any, tokens: int, **options: Any) -> list[int]:
    """Bytes that each layer of the real cache holds after ``tokens`` tokens of one sequence."""
    import torch

    ids = torch.arange(tokens).reshape(1, -1) % 100 + 3
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            cache = _cache_of(model(input_ids=ids, decoder_input_ids=ids, use_cache=True))
            halves = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
            return [held(one) + held(other) for one, other in halves]
        # one more token, since a window is cut when the next token comes
        first = model(ids[:, :-1], use_cache=True, **options)
        cache = _cache_of(first)
        second = model(ids[:, -1:], use_cache=True, **{_cache_name(first): cache})
        return [held(layer) for layer in _cache_of(second).layers]


def _cache_name(output: Any) -> str:
    names = ("cache", "cache_params", "past_key_values")  # of Mamba before transformers 5.24, and of others
    return next(name for name in names if getattr(output, name, None) is not None)


def _cache_of(output: Any) -> Any:
    return getattr(output, _cache_name(output))


def held(layer: Any) -> int:
    import torch

    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
        found += list(states.values())
    return sum(t.nbytes for t in found if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_cost_is_what_the_real_cache_holds(
    tiny_model: Callable[[str], Path], name: str, tokens: int, dtype: str
) -> None:
    folder = tiny_model(name)
    layout = layout_of(folder, dtype)
    decoders = [block for block in layout.layers if block.kind == "decoder"]
    kept = cache_layers(load(folder, dtype=dtype), tokens)
    kept += [0] * (len(decoders) - len(kept))  # the last ones may have no place in the cache
    assert [block.cache.bytes_for(tokens) for block in decoders] == kept
    assert all(block.cache.bytes_for(9) == 0 for block in layout.blocks if block not in decoders)


def hybrids() -> dict[str, Any]:
    """Configurations of architectures whose layers differ, small enough to run."""
    from transformers import (
        DeepseekV3Config,
        FalconConfig,
        GPTNeoXConfig,
        JambaConfig,
        Lfm2Config,
        Mamba2Config,
        MistralConfig,
        OPTConfig,
        Phi3Config,
        Qwen3NextConfig,
    )

    small = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    rest = {"intermediate_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return {
        "mistral": MistralConfig(**small, **rest, **tokens, sliding_window=16),
        "phi3": Phi3Config(**small, **rest, **tokens),
        "falcon": FalconConfig(**small, **tokens, new_decoder_architecture=True, num_kv_heads=2),
        "falcon-multi-query": FalconConfig(**small, **tokens, multi_query=True),
        "gpt-neox": GPTNeoXConfig(**small, **tokens, intermediate_size=64),
        "opt": OPTConfig(**small, **tokens, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
        "deepseek-v3": DeepseekV3Config(
            **small, **{**rest, "num_key_value_heads": 4}, **tokens, kv_lora_rank=8, q_lora_rank=8,
            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
        ),
        "mamba2": Mamba2Config(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8,
            n_groups=2, expand=2, **tokens,
        ),
        "lfm2": Lfm2Config(**small, **rest, **tokens, layer_types=["conv", "full_attention"]),
        "qwen3-next": Qwen3NextConfig(
            **small, **rest, **tokens, **experts, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        "jamba": JambaConfig(
            **small, intermediate_size=64, num_key_value_heads=2, **tokens, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
            num_experts_per_tok=2, mamba_d_state=8, use_mamba_kernels=False,
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["mistral", "phi3", "falcon", "falcon-multi-query", "gpt-neox", "opt", "deepseek-v3", "mamba2", "lfm2",
     "qwen3-next", "jamba"],
)  # fmt: skip
def test_other_architectures_are_covered_and_their_caches_counted(tmp_path: Path, name: str) -> None:
    import torch
    from accelerate.utils import check_device_map
    from transformers import AutoModelForCausalLM

    config = hybrids()[name]
    config.dtype = "float32"
    config.save_pretrained(tmp_path)
    layout = layout_of(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert layout.bytes == sum(p.nbytes for p in model.parameters())
    check_device_map(model, {block.name: "cpu" for block in layout.blocks})
    assert labels(layout)[0] == "embed"
    assert labels(layout)[-1] == "head"
    assert [b.label for b in layout.layers] == ["layers.0", "layers.1"]
    for tokens in (5, 24):
        assert [block.cache.bytes_for(tokens) for block in layout.layers] == cache_layers(model, tokens)


# --------------------------------------------------------------------------------------- experts


def test_experts_are_counted(tiny_model: Callable[[str], Path]) -> None:
    layout = layout_of(tiny_model("qwen3-moe"))
    assert layout.is_mixture_of_experts
    for block in layout.layers:
        assert (block.experts, block.active_experts) == (4, 2)
        # 4 experts of gate, up (32 x 64) and down (64 x 32) in float32
        assert block.expert_bytes == 4 * 3 * 32 * 64 * 4
        assert block.bytes_per_token == block.bytes - block.expert_bytes // 2
    assert layout.details["routed_experts"]
    dense = layout_of(tiny_model("llama"))
    assert not dense.is_mixture_of_experts
    assert "routed_experts" not in dense.details


# ------------------------------------------------------------------- what the configuration says


@pytest.mark.parametrize(
    ("name", "context", "architecture", "has_template"),
    [
        ("llama", tiny.CONTEXT, "LlamaForCausalLM", True),
        ("gpt2", tiny.CONTEXT, "GPT2LMHeadModel", False),
        ("mamba", 0, "MambaForCausalLM", True),
        ("t5", 0, "T5ForConditionalGeneration", False),
    ],
)
def test_facts_of_the_configuration(
    tiny_model: Callable[[str], Path], name: str, context: int, architecture: str, has_template: bool
) -> None:
    layout = layout_of(tiny_model(name))
    assert layout.context_length == context
    assert layout.architecture == architecture
    assert layout.has_chat_template == has_template
    assert (layout.hidden_size, layout.vocab_size, layout.dtype) == (64, tiny.VOCABULARY, "float32")
    assert layout.intermediate_size == {"gpt2": 256, "llama": 128, "t5": 128, "mamba": 128}[name]
    assert layout.is_encoder_decoder == (name == "t5")
    assert layout.name == name
    assert layout.size_class == "<1B"


def test_the_dtype_comes_from_the_weights_when_the_configuration_has_none(tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "m", layers=1)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    load(folder, dtype="bfloat16").save_pretrained(folder)
    config["dtype"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert (
        layout_of(folder).dtype == "bfloat16" == str(load(folder, dtype="auto").dtype).removeprefix("torch.")
    )


def test_the_license_comes_from_the_model_card(tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "m", layers=1)
    assert layout_of(folder).license == ""
    (folder / "README.md").write_text(
        "---\nlanguage: en\nlicense: apache-2.0  # free\n---\n# Model\nlicense: no\n"
    )
    assert layout_of(folder).license == "apache-2.0"
    (folder / "README.md").write_text("---\nlicense: '<script>x</script>'\n---\n")
    assert "<" not in layout_of(folder).license


def test_the_starter_is_read_without_converting_it(cache_folder: Path) -> None:
    layout = layout_of(Path("starter"))
    assert not cache_folder.exists()
    assert len(layout.layers) == 30
    assert layout.block("head").tied_to == (layout.block("embed").name,)
    assert (layout.context_length, layout.dtype, layout.license) == (8192, "bfloat16", "apache-2.0")
    assert (layout.has_chat_template, layout.vocab_size) == (True, 49152)
    # 134,515,008 parameters of two bytes; 3 KV heads of 64, keys and values, two bytes
    assert (layout.parameters, layout.bytes) == (134_515_008, 269_030_016)
    assert layout.layers[0].cache.bytes_per_token == 3 * 64 * 2 * 2


def test_the_starters_layout_is_the_same_once_it_is_converted(starter_folder: Path) -> None:
    spec = ModelSpec("starter")
    files = resolve(spec, ignore)
    assert files.folder == starter_folder
    converted = read_layout(spec, files)
    assert converted.details["gguf"] == "Q4_1"
    before = read_layout(spec, type(files)(files.folder, files.name, (), gguf=files.gguf))
    assert before == converted


def test_layouts_read_by_many_threads_leave_torchs_default_dtype_alone(tmp_path: Path) -> None:
    import torch

    folder = tiny.save_llama(tmp_path / "llama", layers=1)
    spec = ModelSpec(str(folder), dtype="bfloat16")
    files = resolve(spec, ignore)
    with ThreadPoolExecutor(8) as pool:
        layouts = list(pool.map(lambda _: read_layout(spec, files), range(64)))
    assert {layout.dtype for layout in layouts} == {"bfloat16"}
    assert torch.get_default_dtype() == torch.float32


# ------------------------------------------------------------------------------------ large, bad

LARGE = """
import sys, time, resource
import torch, transformers, accelerate
from transformers import LlamaForCausalLM
from llm_magic.backends.accelerate.source import layout, sources
from llm_magic.model import ModelSpec
def peak():
    try:  # not ru_maxrss: on Linux a child begins with its parent's
        status = open("/proc/self/status").read()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
spec = ModelSpec(sys.argv[1])
started = time.perf_counter()
found = layout.read_layout(spec, sources.resolve(spec, lambda event: None))
seconds = time.perf_counter() - started
after = peak()
print(found.parameters, len(found.layers), found.context_length, after - before, after, seconds)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="reads peak memory from resource")
def test_a_405b_model_is_read_in_little_memory(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "vocab_size": 128256,
        "num_attention_heads": 128, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    parameters, layers, context, grown, peak, _seconds = run.stdout.split()
    # 2 x 128256 x 16384 + 126 x (2 x 16384^2 + 2 x 16384 x 1024 + 3 x 16384 x 53248 + 2 x 16384) + 16384
    assert (int(parameters), int(layers), int(context)) == (405_853_388_800, 126, 131_072)
    assert int(grown) < 100 << 20
    assert int(peak) < 1 << 30


def config_folder(tmp_path: Path, **values: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"model_type": "warpdrive"}, "warpdrive"),
        ({"architectures": ["X"]}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "bert"}, "does not generate text"),
        ({"model_type": "llama", "hidden_size": "many"}, "invalid"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 0}, "llama"),
        ({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": -4}, "llama"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, values: dict[str, Any], fault: str) -> None:
    with pytest.raises(SourceError) as caught:
        layout_of(config_folder(tmp_path, **values))
    assert fault in caught.value.message
    assert caught.value.next_step
    assert str(tmp_path) not in str(caught.value)


def test_an_unknown_dtype_is_refused(tiny_model: Callable[[str], Path]) -> None:
    for dtype in ("int8", "float99", "nn"):
        with pytest.raises(SourceError, match="dtype"):
            layout_of(tiny_model("llama"), dtype)


def test_blocks_know_their_bytes(tiny_model: Callable[[str], Path]) -> None:
    layout = layout_of(tiny_model("llama"))
    layer: Block = layout.block("layers.0")
    # q and o 64 x 64, k and v 32 x 64, three of 128 x 64, two norms of 64, float32
    assert layer.bytes == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64)


# ------------------------------------------------------------------------------ quantized weights


@pytest.mark.parametrize("method", ["aqlm", "hqq", "bitsandbytes", "compressed-tensors", "torchao", None])
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_quantized_weights_are_refused_by_name(
    tiny_model: Callable[[str], Path], tmp_path: Path, method: str | None, place: str
) -> None:
    folder = copy_with(tiny_model("llama"), tmp_path / "model", method, place)
    with pytest.raises(SourceError, match=rf"quantized \({method or 'unknown'}\)") as caught:
        layout_of(folder)
    assert ".gguf" in caught.value.next_step


def copy_with(source: Path, target: Path, method: str | None, place: str = "top") -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    part = config if place == "top" else config.setdefault(place, {})
    part["quantization_config"] = {"bits": 4} | ({"quant_method": method} if method else {})
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("placement", ["ram", "half"])
def test_fp8_weights_are_unpacked_while_they_load(
    tiny_model: Callable[[str], Path], tmp_path: Path, placement: str
) -> None:
    """The same tokens as plain weights of the same values, and the bytes that the layout says."""
    import torch
    from safetensors.torch import load_file, save_file

    plain = tmp_path / "plain"
    shutil.copytree(tiny_model("llama"), plain)
    packed = copy_with(plain, tmp_path / "packed", "fp8")
    weights, as_fp8 = load_file(plain / "model.safetensors"), {}
    for name, weight in weights.items():
        as_fp8[name] = weight
        if "_proj" in name:
            scale = (weight.abs().max() / 448).reshape(1, 1)
            as_fp8[name] = (weight / scale).to(torch.float8_e4m3fn)
            as_fp8[f"{name}_scale_inv"] = scale
            weights[name] = as_fp8[name].float() * scale
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(as_fp8, packed / "model.safetensors", metadata={"format": "pt"})

    texts = []
    for folder in (plain, packed):
        engine = engines.load(folder, placement, spec=ModelSpec(str(folder), quantize="none"))
        texts.append(engines.ask(engine, "The capital of France").text)
        held = sum(purposes.get("weights", 0) for purposes in engine.memory().values())
        assert held == engine.plan.layout.bytes == layout_of(plain).bytes
        assert engine.plan.layout.details.get("unpacked_from", "") == ("fp8" if folder is packed else "")
        engine.close()
    assert texts[0] == texts[1]


# -------------------------------------------------------------------------------- packed while loading


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "int4", "int2", "float8", "quanto-int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt2", "mamba", "t5", "gemma"])
def test_the_bytes_of_packed_blocks_are_those_that_they_will_take(
    tiny_model: Callable[[str], Path], name: str, method: str
) -> None:
    import torch

    if name == "gpt2" and method not in ("nf4", "fp4", "int8"):
        with pytest.raises(OptionError, match="no linear layer"):
            packed_layout(tiny_model(name), method)
        return
    folder = tiny_model(name)
    layout, plain = packed_layout(folder, method), layout_of(folder)
    full, model = load(folder, dtype="auto"), build_skeleton(load(folder).config, torch.float32)
    assert (layout.quantization, layout.dtype, plain.quantization) == (method, "float32", "")
    prepare(model, method, torch.float32)
    for block, before in zip(layout.blocks, plain.blocks, strict=True):
        assert [(t.name, t.shape) for t in block.tensors] == [(t.name, t.shape) for t in before.tensors]
        if block.kind not in ("encoder", "decoder"):
            assert block == before
            continue
        module = model.get_submodule(block.name)
        weights = {n: p.detach() for n, p in full.get_submodule(block.name).named_parameters()}
        pack_block(module, weights, "cpu")
        held: Counter[str] = Counter()
        for path, owner, leaf in parameters(module):
            stack = path.removesuffix(f".{leaf}")  # its parts are parameters
            held[f"{block.name}.{stack if isinstance(owner, PackedStack) else path}"] += template(
                owner, leaf
            ).bytes
        assert {tensor.name: tensor.bytes for tensor in block.tensors} == held
        assert block.cache == before.cache
        assert block.bytes < before.bytes
        assert block.buffer_bytes == sum(buffer.nbytes for buffer in module.buffers())


def packed_layout(folder: Path, method: str) -> ModelLayout:
    spec = ModelSpec(str(folder), quantize=method)
    return read_layout(spec, resolve(spec, ignore))


def test_packed_bytes_by_hand(tiny_model: Callable[[str], Path]) -> None:
    layout = packed_layout(tiny_model("llama"), "nf4")
    # q and o 64 x 64, k and v 32 x 64, three of 128 x 64: 36,864 weights of half a byte, a float32 for
    # each 64 of them; two norms of 64 in float32
    assert layout.block("layers.0").bytes == 36_864 // 2 + 36_864 // 64 * 4 + 2 * 64 * 4
    kinds = {tensor.name.split(".")[-2]: tensor.dtype for tensor in layout.block("layers.0").tensors}
    assert kinds["q_proj"] == "nf4"
    assert kinds["input_layernorm"] == "float32"
    assert "unpacked_bytes" not in layout_of(tiny_model("llama")).details
    assert layout.details["unpacked_bytes"] == 0


def test_stacked_experts_are_counted_packed(tiny_model: Callable[[str], Path]) -> None:
    layout = packed_layout(tiny_model("qwen3-moe"), "nf4")
    for block in layout.layers:
        assert (block.experts, block.active_experts) == (4, 2)
        weights = 4 * 3 * 32 * 64
        assert block.expert_bytes == weights // 2 + weights // 64 * 4
    assert layout.details["unpacked_bytes"] == 4 * (4 * 64) * 4  # of 4 layers, a router of 4 x 64


def test_stacks_that_are_computed_with_as_a_whole_are_counted_as_what_stays_unpacked(tmp_path: Path) -> None:
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=96, hidden_size=64, head_dim=16, intermediate_size=32, intermediate_size_mlp=32,
        num_hidden_layers=2, num_attention_heads=4, num_local_experts=4, interleave_moe_layer_step=1,
        dtype="float32",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    layout = packed_layout(tmp_path, "nf4")
    experts, router = 4 * 3 * 32 * 64, 4 * 64
    assert layout.details["unpacked_bytes"] == 2 * (experts + router) * 4
    assert {block.expert_bytes for block in layout.layers} == {experts * 4}
    assert "routed_experts" not in layout.details  # they are computed all at once


def test_experts_that_are_linear_layers_are_counted_packed(tmp_path: Path) -> None:
    from transformers import SwitchTransformersConfig

    config = SwitchTransformersConfig(
        vocab_size=96, d_model=64, d_kv=16, d_ff=128, expert_capacity=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4, num_experts=4, dtype="float32",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    block = next(block for block in packed_layout(tmp_path, "nf4").layers if block.experts)
    # Four experts: wi of 128 x 64 in half bytes with a float32 for each 64; wo stays in float32
    assert block.expert_bytes == 4 * (128 * 64 // 2 + 128 * 4 + 64 * 128 * 4)
    assert block.bytes > block.expert_bytes


def test_a_checkpoint_that_is_unpacked_while_it_loads_is_packed_again(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_with(tiny_model("llama"), tmp_path / "packed", "fp8")
    assert packed_layout(folder, "nf4").bytes == packed_layout(tiny_model("llama"), "nf4").bytes


def test_a_draft_model_is_part_of_the_layout(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    main, small = tiny_model("llama"), tiny.save_llama(tmp_path / "small", layers=1)
    spec = ModelSpec(str(main), dtype="bfloat16", quantize="nf4", draft=str(small), revision="v2")
    layout = packed_layout(main, "nf4")
    drafted = with_draft(layout, spec, ignore)
    assert drafted.draft == layout_of(small, "bfloat16")
    assert replace(drafted, draft=None) == layout
    assert draft_spec(spec).revision is None
    assert with_draft(layout, ModelSpec(str(main)), ignore) is layout


def test_a_draft_model_that_is_not_there_is_refused(tiny_model: Callable[[str], Path]) -> None:
    spec = ModelSpec(str(tiny_model("llama")), draft="./nowhere")
    with pytest.raises(SourceError, match="nowhere"):
        with_draft(layout_of(tiny_model("llama")), spec, ignore)
