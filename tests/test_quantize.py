"""Packed block by block, a model has the bits that transformers gives it in one go."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.packed.packing import parameters, parts, template
from llm_magic.backends.accelerate.quantizing.libraries import import_library
from llm_magic.backends.accelerate.quantizing.methods import METHODS, find_method, refuse_devices
from llm_magic.backends.accelerate.quantizing.pack import pack_block
from llm_magic.backends.accelerate.quantizing.prepare import prepare
from llm_magic.backends.accelerate.quantizing.sizes import packed_bytes
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.backends.accelerate.source.skeleton import build_skeleton, load_config
from llm_magic.backends.accelerate.source.sources import resolve
from llm_magic.errors import OptionError, PlanError
from llm_magic.model import ModelSpec
from tests.packed import extension_was_loaded, without_extension

QUANTO = [name for name, method in METHODS.items() if method.library == "optimum.quanto"]
BITSANDBYTES = [name for name in METHODS if name not in QUANTO]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for quanto's groups of 128, and for torch's 4-bit kernel."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide") / "wide"
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_compiler() -> Iterator[None]:
    """Quanto's own unpacking would compile an extension: nothing here may ask for it."""
    import_library("optimum.quanto")
    yield
    assert not extension_was_loaded()


def skeleton(folder: Path, dtype: Any) -> Any:
    spec = ModelSpec(str(folder))
    return build_skeleton(load_config(resolve(spec, lambda _event: None)), dtype)


def full_precision(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if folder.name == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def by_transformers(folder: Path, name: str, dtype: Any) -> Any:
    """transformers' own quantized loading, everything on the CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig

    import_library(METHODS[name].library)
    if name in QUANTO:
        config: Any = QuantoConfig(weights=name.removeprefix("quanto-"))
    elif name == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config, device_map="cpu", local_files_only=True
        )
    return model.eval()


def block_by_block(folder: Path, name: str, dtype: Any) -> Any:
    full, model = full_precision(folder, dtype), skeleton(folder, dtype)
    prepare(model, name, dtype)
    for path, block in model.named_children():
        weights = {n: p.detach() for n, p in full.get_submodule(path).named_parameters()}
        pack_block(block, weights, "cpu")
    model.tie_weights()
    for path, buffer in full.named_buffers():
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    return model


def packed_modules(model: Any) -> dict[str, Any]:
    return {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt", "QLinear")
    }


def logits(model: Any) -> Any:
    import torch

    tokens = torch.arange(6, 18)[None]
    inputs = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


# ------------------------------------------------------------------------------------- the bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_the_bits_are_those_of_transformers(wide: Path, name: str, dtype: str) -> None:
    import torch

    torch_dtype = getattr(torch, dtype)
    theirs = packed_modules(by_transformers(wide, name, torch_dtype))
    mine = packed_modules(block_by_block(wide, name, torch_dtype))
    assert list(mine) == list(theirs)
    assert len(mine) == 14
    for path in mine:
        same_parts(parts(mine[path], "weight"), parts(theirs[path], "weight"))
        assert mine[path].bias is None or torch.equal(mine[path].bias, theirs[path].bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_the_logits_are_those_of_transformers(
    wide: Path, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, where the libraries compute."""
    import torch

    monkeypatch.setattr(cpu_products, "multiplied", lambda _tokens, _weights: None)
    torch_dtype = getattr(torch, dtype)
    model = without_extension(by_transformers(wide, name, torch_dtype))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds the scales
    theirs = logits(model)
    assert torch.equal(logits(block_by_block(wide, name, torch_dtype)), theirs)


def same_parts(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    import torch

    assert mine.keys() == theirs.keys()
    for part, tensor in mine.items():
        assert (tensor.shape, tensor.dtype) == (theirs[part].shape, theirs[part].dtype)
        assert torch.equal(tensor.view(torch.uint8), theirs[part].view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (name, model)
        for name in ("nf4", "int8", "quanto-int8")
        for model in ("llama", "qwen3-moe", "gpt2", "gemma", "mamba", "t5")
        if (name, model) != ("quanto-int8", "gpt2")  # finds no linear layers there: refused, see below
    ],
)
def test_other_architectures_compute_what_their_packed_weights_say(
    tiny_model: Callable[[str], Path], name: str, model: str
) -> None:
    """Every packed layer is called, and answers as a plain one with its unpacked weight would."""
    import torch

    packed = block_by_block(tiny_model(model), name, torch.float32)
    called = {}
    for path, module in packed_modules(packed).items():
        module.register_forward_hook(lambda _m, args, y, path=path: called.update({path: (args[0], y)}))
    assert logits(packed).isfinite().all()
    assert called.keys() == packed_modules(packed).keys()
    for path, (x, y) in called.items():
        module = packed.get_submodule(path)
        expected = torch.nn.functional.linear(x, unpacked_weight(module), module.bias)
        assert torch.nn.functional.cosine_similarity(y.flatten(), expected.flatten(), dim=0) > 0.999


def unpacked_weight(module: Any) -> Any:
    from llm_magic.backends.accelerate.packed.packing import arrange

    functional = import_library("bitsandbytes").functional
    if type(module).__name__ == "QLinear":
        return module.weight.dequantize()
    if type(module).__name__ == "Linear8bitLt":
        found = parts(module, "weight")
        return functional.int8_vectorwise_dequant(found[""], found["SCB"])
    arrange(module, "cuda")
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


# ------------------------------------------------------------------------------ what is packed


def test_what_is_packed_and_what_is_not(tiny_model: Callable[[str], Path]) -> None:
    import torch

    def leaves(model: str, name: str = "nf4") -> set[str]:
        packed = prepare(skeleton(tiny_model(model), torch.float32), name, torch.float32)
        return {path.split(".")[-2] for path in packed}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves("llama") == leaves("gemma") == attention | {"gate_proj", "up_proj", "down_proj"}
    assert leaves("qwen3-moe") == attention | {"experts"}  # stacks; the router is its own kind
    assert leaves("gpt2") == {"c_attn", "c_proj", "c_fc"}
    assert leaves("mamba") == {
        "in_proj"
    }  # the weights of x_proj, dt_proj and out_proj are read without a call
    assert leaves("t5") == {"q", "k", "v", "o", "wi"}  # wo stays in float32


def test_stacks_that_are_computed_with_as_a_whole_stay() -> None:
    import torch
    from transformers import Llama4TextConfig

    own = {"head_dim": 8, "intermediate_size": 16, "intermediate_size_mlp": 32, "num_local_experts": 4}
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, interleave_moe_layer_step=1, **own
    )
    packed = prepare(build_skeleton(config, torch.float32), "nf4", torch.float32)
    assert packed
    assert not any("experts" in path for path in packed)


def falcon(_folder: Path) -> Any:
    """Its linear layers are of a class of their own."""
    import torch
    from transformers import FalconConfig

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    return build_skeleton(config, torch.float32)


def gpt2(folder: Path) -> Any:
    import torch

    return skeleton(folder, torch.float32)


@pytest.mark.parametrize(
    ("make", "finds_nothing", "others"), [(gpt2, QUANTO, BITSANDBYTES), (falcon, BITSANDBYTES, QUANTO)]
)
def test_a_method_that_finds_nothing_is_refused_with_those_that_do(
    tiny_model: Callable[[str], Path],
    make: Callable[[Path], Any],
    finds_nothing: list[str],
    others: list[str],
) -> None:
    import torch

    for name in finds_nothing:
        with pytest.raises(OptionError, match=f"{name} finds no linear layer to pack in") as caught:
            prepare(make(tiny_model("gpt2")), name, torch.float32)
        assert caught.value.next_step == f"Use --quantize {' or '.join(others)}."
    assert prepare(make(tiny_model("gpt2")), others[0], torch.float32)


@pytest.mark.parametrize("name", METHODS)
def test_a_prepared_model_has_no_bytes_and_leaves_torch_alone(wide: Path, name: str) -> None:
    import torch

    model = skeleton(wide, torch.bfloat16)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    packed = prepare(model, name, torch.bfloat16)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert set(packed) == {f"{path}.weight" for path in packed_modules(model)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_are_known_before(wide: Path, name: str, dtype: str) -> None:
    """Also of widths that no group or byte divides."""
    import torch

    torch_dtype = getattr(torch, dtype)
    model = skeleton(wide, torch_dtype)
    odd = ((160, 33), (1, 2), (131, 5), (384, 1), (192, 130), (64, 1), (129, 1), (128, 1))
    for width, height in odd:
        path = f"model.layers.0.mlp.odd_{width}"
        with torch.device("meta"):
            model.set_submodule(path, torch.nn.Linear(width, height, bias=False, dtype=torch_dtype))
    names = prepare(model, name, torch_dtype)
    assert len(names) == 14 + len(odd)
    for path in names:
        module = model.get_submodule(path.removesuffix(".weight"))
        expected = packed_bytes(module, torch_dtype)
        weight = torch.randn(module.out_features, module.in_features)
        pack_block(module, {"weight": weight}, "cpu")
        assert sum(part.nbytes for part in parts(module, "weight").values()) == expected
        assert template(module, "weight").bytes == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_block_holds_nothing_on_the_meta_device(wide: Path, name: str) -> None:
    import torch

    block = block_by_block(wide, name, torch.bfloat16).model.layers[0]
    tensors = [part for _, module, leaf in parameters(block) for part in parts(module, leaf).values()]
    assert all(tensor.device.type == "cpu" for tensor in [*tensors, *block.buffers()])


# ------------------------------------------------------------------------------------- refusals


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'int3'") as caught:
        find_method("int3")
    assert all(name in caught.value.next_step for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_library_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("bitsandbytes", "optimum.quanto"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OptionError, match=f"--quantize {name} needs {METHODS[name].library}") as caught:
        find_method(name)
    package = "bitsandbytes>=0.50" if name in BITSANDBYTES else "optimum-quanto>=0.2.7"
    assert caught.value.next_step == f"Install it: pip install '{package}'"


def test_int8_is_quantos_where_only_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_method("int8").library == "bitsandbytes"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert find_method("int8") is METHODS["quanto-int8"]


def test_devices_that_cannot_compute_a_method_are_refused_before_loading() -> None:
    for name in METHODS:
        refuse_devices(name, {"cpu", "cuda:0", "cuda:1"})
    with pytest.raises(PlanError, match="float8 weights cannot be computed on mps") as caught:
        refuse_devices("float8", {"cpu", "mps"})
    assert "int4" in caught.value.next_step
    assert "float8" not in caught.value.next_step
    with pytest.raises(PlanError, match="tpu:0") as caught:
        refuse_devices("nf4", {"tpu:0"})
    assert caught.value.next_step == "Leave out --quantize."


# -------------------------------------------------------------------------------- noise, network


@pytest.mark.parametrize("name", METHODS)
def test_packing_and_computing_say_nothing(wide: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    with caplog.at_level(logging.WARNING):
        logits(block_by_block(wide, name, torch.bfloat16))
    assert [record.getMessage() for record in caplog.records] == []


FETCHES = """
import sys
def get_kernel(*_args, **_options):
    sys.exit("code was fetched")
"""
IMPORTS = """
import sys
from llm_magic.backends.accelerate.quantizing.libraries import import_library
for name in ("bitsandbytes", "optimum.quanto"):
    import_library(name)
assert "kernels" not in sys.modules
import kernels
print(kernels.__name__)
"""


def test_importing_the_libraries_fetches_no_code_and_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(FETCHES)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "kernels\n", "")
