"""A conversion holds what transformers reads from the GGUF, bit for bit, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.source.convert import converted_folder, is_converted
from llm_magic.backends.accelerate.source.gguf_model import gguf_config
from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.sources import ModelFiles, fetch_weights, find_starter, resolve
from llm_magic.errors import SourceError
from llm_magic.events import PhaseEvent
from llm_magic.headers import read_gguf_header
from llm_magic.model import ModelLayout, ModelSpec
from tests import tiny
from tests.gguf_files import array, entry, gguf_bytes, save_gguf, string

COMMON = {"context_length": 256, "embedding_length": 64, "block_count": 2}
ATTENTION = COMMON | {
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
    "vocab_size": tiny.VOCABULARY,
}


def ignore(_event: PhaseEvent) -> None:
    """A progress that nobody watches."""


def lfm2() -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
        )
    )  # fmt: skip


KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ATTENTION | {"rope.dimension_count": 16}),
    "llama-tied": ("llama", ATTENTION | {"rope.dimension_count": 16}),
    "qwen3-moe": (
        "qwen3moe",
        ATTENTION
        | {
            "attention.key_length": 16,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
        },
    ),
    "gemma": (
        "gemma2",
        ATTENTION
        | {
            "attention.key_length": 16,
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gpt2": (
        "gpt2",
        COMMON
        | {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5, "feed_forward_length": 256},
    ),
    "mamba": (
        "mamba",
        COMMON
        | {
            "ssm.conv_kernel": 4,
            "ssm.state_size": 8,
            "ssm.inner_size": 128,
            "ssm.time_step_rank": 4,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "vocab_size": tiny.VOCABULARY,
        },
    ),
    "lfm2": (
        "lfm2",
        COMMON
        | {
            "feed_forward_length": 128,
            "attention.head_count": 4,
            "attention.head_count_kv": [0, 2],
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 1e6,
            "shortconv.l_cache": 3,
            "vocab_size": tiny.VOCABULARY,
        },
    ),
}


@pytest.fixture(scope="module")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``gguf_of("llama", "Q8_0")``: a GGUF file of a tiny model of two layers, made once."""
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str = "Q8_0") -> Path:
        if (name, kind) not in made:
            folder = tmp_path_factory.mktemp("gguf") / name
            folder.mkdir()
            tokenizer = tiny.save_tokenizer(folder)
            if name == "lfm2":
                model = lfm2()
            else:
                tied = {"tied": True} if name == "llama-tied" else {}
                source = SAVERS[name](folder, layers=2, **tied)
                model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
            architecture, keys = KEYS[name]
            made[name, kind] = save_gguf(
                folder.parent / f"{name}.{kind}.gguf", model, architecture, keys, tokenizer, kind
            )
        return made[name, kind]

    return make


SAVERS: dict[str, Callable[..., Path]] = {
    "llama": tiny.save_llama,
    "llama-tied": tiny.save_llama,
    "qwen3-moe": tiny.save_mixture,
    "gemma": tiny.save_gemma,
    "gpt2": tiny.save_gpt2,
    "mamba": tiny.save_mamba,
}


def convert(path: Path, progress: Callable[[PhaseEvent], None] = ignore) -> ModelFiles:
    spec = ModelSpec(str(path))
    return fetch_weights(spec, resolve(spec, progress), progress)


def lacks_tokenizers_of(name: str) -> bool:
    """Whether transformers has none for a model's files: its older reader knows them by architecture alone."""
    from transformers.integrations import ggml

    known = getattr(ggml, "GGUF_TO_FAST_CONVERTERS", None)  # the newer one goes by what the file says
    return name == "lfm2" and known is not None and name not in known


def refuse_tokenizer(path: Path, cache_folder: Path) -> None:
    with pytest.raises(SourceError, match="tokenizer that transformers cannot build"):
        convert(path)
    assert list((cache_folder / "converted").iterdir()) == []


CONFIG_LEFT_OUT = ("qwen3-moe", "gpt2")
"""Models of which transformers reads a width from nowhere, and takes its default instead."""


def as_transformers_reads(path: Path, dtype: str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
        local_files_only=True,
        **options,
    )


# ------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("name", KEYS)
def test_a_conversion_is_what_transformers_reads(
    gguf_of: Callable[..., Path], cache_folder: Path, name: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = gguf_of(name)
    if lacks_tokenizers_of(name):
        refuse_tokenizer(path, cache_folder)
        return
    folder = convert(path).folder
    options = {"config": AutoConfig.from_pretrained(folder)} if name in CONFIG_LEFT_OUT else {}
    theirs = as_transformers_reads(path, "bfloat16", **options)
    ours, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.dtype == torch.bfloat16
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    wanted, got = theirs.config.to_dict(), ours.config.to_dict()
    for key in ("_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version"):
        wanted.pop(key, None), got.pop(key, None)
    assert got == wanted


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q4_0", "bfloat16")])
def test_the_dtype_is_the_files_own_unless_it_is_quantized(
    gguf_of: Callable[..., Path], cache_folder: Path, kind: str, dtype: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = gguf_of("llama", kind)
    spec = ModelSpec(str(path))
    assert read_layout(spec, resolve(spec, ignore)).dtype == dtype
    ours = AutoModelForCausalLM.from_pretrained(convert(path).folder, local_files_only=True)
    assert ours.dtype == getattr(torch, dtype)
    for key, tensor in as_transformers_reads(path, dtype).state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", KEYS)
def test_the_layout_before_and_after_a_conversion_is_the_same(
    gguf_of: Callable[..., Path], cache_folder: Path, name: str
) -> None:
    spec = ModelSpec(str(gguf_of(name)))
    files = resolve(spec, ignore)
    before = read_layout(spec, files)
    assert files.weight_files == ()
    assert not cache_folder.exists()
    if lacks_tokenizers_of(name):
        refuse_tokenizer(gguf_of(name), cache_folder)
        return
    fetch_weights(spec, files, ignore)
    converted = resolve(spec, ignore)
    assert converted.weight_files
    assert read_layout(spec, converted) == before
    assert before.license == "mit"
    assert before.details["gguf"] == "Q8_0"


def test_widths_that_transformers_leaves_out_are_the_files(
    gguf_of: Callable[..., Path], cache_folder: Path
) -> None:
    mixture = read(gguf_of("qwen3-moe"))
    assert mixture.layers[0].expert_bytes == 4 * 3 * 32 * 64 * 2
    assert read(gguf_of("gpt2")).context_length == 256


def read(path: Path) -> ModelLayout:
    spec = ModelSpec(str(path))
    return read_layout(spec, resolve(spec, ignore))


def test_stretched_positions_of_llama_3_are_kept(tmp_path: Path, cache_folder: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    wide = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131_072, rope_parameters=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](wide, "cpu")
    plain = 1 / 500_000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = (plain / scaled).numpy().astype("<f4")
    keys = ATTENTION | {"embedding_length": 512, "rope.freq_base": 500_000.0, "context_length": 131_072}
    path = tmp_path / "llama3.gguf"
    header = _llama_header(keys, [("rope_freqs.weight", (64,), 0, 0)])
    path.write_bytes(header + factors.tobytes())
    config = gguf_config(path, read_gguf_header(path))
    assert config.rope_parameters == scaling
    config.save_pretrained(tmp_path)
    again, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(tmp_path), "cpu")
    assert torch.allclose(again, scaled)
    path.write_bytes(header + (factors * 1.5 + factors**2).tobytes())
    assert "scales its positions" in refused(path)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_stretched_positions_of_other_kinds_are_kept(tmp_path: Path, kind: str) -> None:
    import struct

    extra = [
        entry("llama.rope.scaling.type", 8, string(kind)),
        entry("llama.rope.scaling.factor", 6, struct.pack("<f", 4.0)),
        entry("llama.rope.scaling.original_context_length", 4, struct.pack("<I", 64)),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(_llama_header(ATTENTION, [], extra=extra))
    found = gguf_config(path, read_gguf_header(path)).rope_parameters
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == (kind, 4.0, 10_000.0)
    assert found.get("original_max_position_embeddings") == (64 if kind == "yarn" else None)


def test_the_tokenizer_and_its_template_come_along(gguf_of: Callable[..., Path], cache_folder: Path) -> None:
    from transformers import AutoTokenizer

    path = gguf_of("llama")
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    ours = AutoTokenizer.from_pretrained(convert(path).folder, local_files_only=True)
    for text in (*tiny.CORPUS, "<|user|>hi</s>", "  two  spaces"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert ours.chat_template == tiny.CHAT_TEMPLATE
    assert (ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (1, 0, 2)


def test_all_tokens_that_end_an_answer_are_kept(tmp_path: Path, cache_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.save_llama(tmp_path / "model", layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    architecture, keys = KEYS["llama"]
    path = tmp_path / "chat.gguf"
    tokenizer = tiny.save_tokenizer(folder)
    renamed = {"<|user|>": "<|im_end|>"}
    save_gguf(path, model, architecture, keys, tokenizer, end_of_turn=5, renamed=renamed)
    converted = AutoModelForCausalLM.from_pretrained(convert(path).folder, local_files_only=True)
    # </s> is 1, the end of turn 5 as the file says, and <|im_end|> 4 is known by its text
    assert converted.generation_config.eos_token_id == [1, 5, 4]
    assert converted.generation_config.pad_token_id == 2


def test_a_conversion_names_no_folder_of_this_machine(
    gguf_of: Callable[..., Path], cache_folder: Path
) -> None:
    from transformers import GenerationConfig

    folder = convert(gguf_of("llama")).folder
    for file in folder.glob("*.json"):
        if file.name != "conversion.json":  # our own note of where it came from
            text = file.read_text(encoding="utf-8")
            assert str(cache_folder.parent) not in text
            assert str(gguf_of("llama").parent) not in text
    assert GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id == 1


def test_the_starter_answers(starter_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(starter_folder, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


# ---------------------------------------------------------------------------------------- once


def test_a_conversion_is_made_once_and_again_when_the_file_changes(
    gguf_of: Callable[..., Path], cache_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_of("llama").read_bytes())
    events: list[PhaseEvent] = []
    folder = convert(path, events.append).folder
    reports = [event for event in events if event.phase == "converting"]
    assert reports[-1].done == reports[-1].total > 0
    assert [event.done for event in reports] == sorted(event.done for event in reports)
    events.clear()
    assert convert(path, events.append).folder == folder
    assert not any(event.phase == "converting" for event in events)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    stamp = path.stat().st_mtime_ns
    path.write_bytes(raw)
    os.utime(path, ns=(stamp, stamp))  # even with the same size and time
    assert not is_converted(converted_folder(path))


def test_a_converted_model_resolves_without_heavy_imports(starter_folder: Path) -> None:
    code = (
        "import sys\n"
        "from llm_magic.backends.accelerate.source.sources import resolve\n"
        "from llm_magic.model import ModelSpec\n"
        "print(resolve(ModelSpec('starter'), lambda event: None).folder)\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == starter_folder


def test_two_at_once_give_one_whole_conversion(gguf_of: Callable[..., Path], cache_folder: Path) -> None:
    path = gguf_of("llama")
    barrier = threading.Barrier(3)
    results: list[ModelFiles | BaseException] = []

    def work() -> None:
        barrier.wait()
        try:
            results.append(convert(path))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.folder for r in results if isinstance(r, ModelFiles)] == [converted_folder(path)] * 3, results
    assert [entry.name for entry in (cache_folder / "converted").iterdir()] == [converted_folder(path).name]


# ------------------------------------------------------------------------------ or not at all


class CancelledError(Exception):
    """What a person's Ctrl-C becomes."""


@pytest.mark.parametrize("after", [0, 1, 12])
def test_a_cancelled_conversion_leaves_nothing(
    gguf_of: Callable[..., Path], cache_folder: Path, after: int
) -> None:
    path = gguf_of("llama")
    seen = 0

    def cancel(event: PhaseEvent) -> None:
        nonlocal seen
        if event.phase == "converting":
            seen += 1
            if seen > after:
                raise CancelledError

    with pytest.raises(CancelledError):
        convert(path, cancel)
    assert list((cache_folder / "converted").iterdir()) == []
    assert resolve(ModelSpec(str(path)), ignore).weight_files == ()
    assert convert(path).weight_files


def test_leftovers_of_a_killed_conversion_do_not_count(
    gguf_of: Callable[..., Path], cache_folder: Path
) -> None:
    path = gguf_of("llama")
    target = converted_folder(path)
    young, old = (target.parent / f".{target.name}.{name}" for name in ("young", "old"))
    for folder in (young, old):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    assert resolve(ModelSpec(str(path)), ignore).weight_files == ()
    convert(path)
    assert young.exists()  # another process may be at work on it
    assert not old.exists()


FULL = """
import resource, sys
from llm_magic.backends.accelerate.source.sources import fetch_weights, resolve
from llm_magic.errors import SourceError
from llm_magic.headers import read_gguf_header
from llm_magic.model import ModelLayout, ModelSpec
import torch, transformers, gguf
spec = ModelSpec(sys.argv[1])
files = resolve(spec, lambda event: None)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fetch_weights(spec, files, lambda event: None)
except SourceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files through resource")
def test_a_failed_write_is_explained_and_cleaned_up(gguf_of: Callable[..., Path], cache_folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(gguf_of("llama"))], capture_output=True, text=True, check=True
    )
    message, step = run.stdout.splitlines()
    assert message.startswith("llama.Q8_0.gguf cannot be converted")
    assert "LLM_MAGIC_CACHE" in step
    assert list((cache_folder / "converted").iterdir()) == []


def test_a_conversion_that_does_not_fit_the_disk_is_refused_first(tmp_path: Path, cache_folder: Path) -> None:
    # 2^20 x 2^20 of F16: 2 TiB, in a file that is mostly a hole
    keys = ATTENTION | {"embedding_length": 1 << 20, "block_count": 0, "vocab_size": 1 << 20}
    width = 1 << 20
    raw = _llama_header(
        keys, [("token_embd.weight", (width, width), 1, 0), ("output_norm.weight", (width,), 0, 2 * width**2)]
    )
    path = tmp_path / "huge.gguf"
    path.write_bytes(raw)
    try:
        os.truncate(path, len(raw) + 2 * width**2 + 4 * width)
    except OSError:
        pytest.skip("this file system has no files of 2 TiB")
    with pytest.raises(SourceError, match=r"needs 2\.0 TiB of disk") as caught:
        convert(path)
    assert "LLM_MAGIC_CACHE" in caught.value.next_step
    assert list((cache_folder / "converted").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    gguf_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLM_MAGIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot be converted") as caught:
        convert(gguf_of("llama"))
    assert "LLM_MAGIC_CACHE" in caught.value.next_step


# ------------------------------------------------------------------------------------ bad files


def _llama_header(
    keys: dict[str, Any], tensors: list[Any], architecture: str = "llama", extra: Sequence[bytes] = ()
) -> bytes:
    import struct

    entries = list(extra)
    for key, value in keys.items():
        kind, code = (6, "<f") if isinstance(value, float) else (4, "<I")
        entries.append(entry(f"{architecture}.{key}", kind, struct.pack(code, value)))
    entries.append(entry("tokenizer.ggml.model", 8, string("gpt2")))
    entries.append(entry("tokenizer.ggml.tokens", 9, array(8, [string("a"), string("b")])))
    entries.append(entry("tokenizer.ggml.merges", 9, array(8, [])))
    return gguf_bytes(entries, tensors, architecture=architecture)


def refused(path: Path) -> str:
    spec = ModelSpec(str(path))
    with pytest.raises(SourceError) as caught:
        read_layout(spec, resolve(spec, ignore))
    with pytest.raises(SourceError):
        convert(path)
    assert path.name in caught.value.message
    assert str(path.parent) not in str(caught.value)
    return caught.value.message


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_llama_header(ATTENTION, [], architecture="warpdrive"))
    assert "'warpdrive'" in refused(path)


def test_absurd_counts_are_refused_before_anything_is_built(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_llama_header(ATTENTION | {"block_count": 2**31}, []))
    assert "block_count" in refused(path)


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count"])
def test_a_header_of_zeros_is_refused(tmp_path: Path, cache_folder: Path, key: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_llama_header(ATTENTION | {key: 0}, []))
    with pytest.raises(SourceError):
        convert(path)
    assert not any(cache_folder.rglob("conversion.json"))


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_llama_header(ATTENTION, [("output_norm.weight", (64,), 0, 0)]) + bytes(256))
    with pytest.raises(SourceError, match=r"lacks .* tensors"):
        convert(path)
    assert list((cache_folder / "converted").iterdir()) == []


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_llama_header(ATTENTION, [("output_norm.weight", (32,), 0, 0)]) + bytes(128))
    with pytest.raises(SourceError, match="shape"):
        convert(path)
    assert list((cache_folder / "converted").iterdir()) == []


def test_large_conversions_are_sharded(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from llm_magic.backends.accelerate.source.convert import SafetensorsWriter

    path = gguf_of("llama")
    theirs = as_transformers_reads(path, "bfloat16")
    theirs.config.save_pretrained(tmp_path)
    tensors = dict(theirs.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path, shapes, torch.bfloat16, 50_000) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name].detach())
        assert not writer.missing
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert len(resolve(ModelSpec(str(tmp_path)), ignore).weight_files) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype="auto").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


def test_the_starters_file_is_where_its_package_is() -> None:
    assert json.dumps(find_starter().name) == '"SmolLM2-135M-Instruct.Q4_1.gguf"'
