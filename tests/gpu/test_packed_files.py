"""Checkpoints that are packed already, on a GPU and split; batches with split layers; saving from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.gpu

from safetensors.torch import load_file  # noqa: E402

from llm_magic.backends.accelerate.packed import weights  # noqa: E402
from llm_magic.backends.accelerate.packed.scaled_floats import Form, ScaledFloats, product  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, request  # noqa: E402
from tests.gpu.test_placed import DEVICE, RESIDENT, STREAMED, layers  # noqa: E402
from tests.gpu.test_split import ON_CPU, SPLIT, VISITING_SPLIT, plan  # noqa: E402
from tests.packed_checkpoints import (  # noqa: E402
    save_awq,
    save_bitsandbytes,
    save_compressed,
    save_fp8,
    save_gptq,
    save_mxfp4,
)

PROMPT = "The capital of France is"
WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8}
WAYS = {
    "split": layers(SPLIT),
    "split, visiting in prompts": layers(VISITING_SPLIT, RESIDENT),
    "streamed": layers(STREAMED),
    "beside the CPU's": layers(RESIDENT, ON_CPU),
}


STREAMED_LAYERS = layers(STREAMED)
"""Whose experts are fetched one by one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With packed scales, whose unpacking is the device's own."""
    path = tmp_path_factory.mktemp("packed-files") / "mixture"
    return save_bitsandbytes(path, "nf4", tiny.save_mixture, is_double=True, layers=3, **WIDE)


@pytest.fixture
def engine_of(folder: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def load(way: Any, source: Path = folder, quantize: str = "", dtype: str = "float32") -> Any:
        spec = ModelSpec(str(source), quantize=quantize, dtype=dtype)
        made.append(BACKEND.load(spec, plan(source, way, spec), lambda _event: None))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


def answer(engine: Any) -> str:
    return str(ask(engine, request(PROMPT * 4, max_new_tokens=12)).text)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_wherever_blocks_are(way: str, engine_of: Callable[..., Any]) -> None:
    expected = answer(engine_of(layers(RESIDENT)))
    engine = engine_of(WAYS[way])
    assert [answer(engine), answer(engine)] == [expected, expected]


@pytest.fixture(scope="module", params=["GPTQ", "AWQ", "fp8", "fp8 in blocks", "mxfp4"])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed-files") / "grouped"
    shape = {"save": tiny.save_mixture, "layers": 3, **WIDE}
    if request.param == "GPTQ":
        return save_gptq(path, group=128, **shape)
    if request.param == "AWQ":
        return save_awq(path, group=32, **shape)
    if request.param == "fp8 in blocks":
        return save_fp8(path, **shape)
    if request.param == "mxfp4":
        return save_mxfp4(path)
    pytest.importorskip("compressed_tensors")
    facts = {"num_bits": 8, "type": "float", "strategy": "channel"}
    return save_compressed(path, "float-quantized", facts=facts, has_activations=True, **shape)


@pytest.mark.parametrize("way", WAYS)
def test_what_others_have_packed(way: str, grouped: Path, engine_of: Callable[..., Any]) -> None:
    expected = answer(engine_of(layers(RESIDENT), grouped))
    engine = engine_of(WAYS[way], grouped)
    assert [answer(engine), answer(engine)] == [expected, expected]


@pytest.mark.parametrize("save", [save_mxfp4, save_fp8])
def test_floats_are_multiplied_in_captured_steps(
    save: Callable[..., Path], tmp_path: Path, engine_of: Callable[..., Any]
) -> None:
    """All of a token on the GPU, its experts too, without a word to the host."""
    wide = {} if save is save_mxfp4 else {"layers": 3, "hidden_size": 256}
    folder, texts = save(tmp_path / "model", **wide), []
    for place in (layers(RESIDENT), STREAMED_LAYERS):
        engine = engine_of(place, folder)
        texts += [answer(engine), answer(engine)]
        if place is not STREAMED_LAYERS or save is save_fp8:
            assert engine.status()[0] == "captured decode"
    assert len(set(texts)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_token_times_floats_of_4_bits(dtype: Any) -> None:
    """By bitsandbytes' kernel, if it multiplies right on this GPU, which it is asked once."""
    form = Form("mxfp4", 192, 320, 32)
    data = torch.randint(0, 256, (form.rows, form.columns // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(118, 124, (form.rows, form.columns // 32), dtype=torch.uint8, device=DEVICE)
    states = torch.randn(1, form.columns, device=DEVICE).to(dtype)
    found = product(states, ScaledFloats(data, scales, form))
    expected = states.double() @ form.numbers(data, scales, torch.float64).T
    assert (found.double() - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_what_others_have_packed_by_the_kernel_for_4_bits(
    tmp_path: Path, engine_of: Callable[..., Any]
) -> None:
    folder = save_awq(tmp_path / "mixture", tiny.save_mixture, group=128, layers=3, **WIDE)
    found = []
    for place in (layers(RESIDENT), layers(STREAMED)):
        engine = engine_of(place, folder, dtype="bfloat16")
        with torch.no_grad():
            found.append(engine.model(torch.arange(40, device=DEVICE).view(1, 40) % 89 + 3).logits.cpu())
        assert answer(engine)
    assert torch.equal(*found)
    numbers = load_file(tmp_path / "mixture-plain" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    weight = engine_of(layers(RESIDENT), folder, dtype="bfloat16").model.get_submodule(name).weight
    held = weights.numbers(weight).float().cpu()
    torch.testing.assert_close(held, numbers[f"{name}.weight"], rtol=2e-2, atol=2**-7)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_is_the_same_from_everywhere(
    way: str, folder: Path, engine_of: Callable[..., Any], tmp_path: Path
) -> None:
    found = []
    for number, place in enumerate((layers(RESIDENT), WAYS[way])):
        engine = engine_of(place)
        expected = answer(engine)
        engine.model.save_pretrained(tmp_path / str(number))
        assert answer(engine) == expected
        found.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    for path in (*folder.glob("token*"), *folder.glob("*.jinja")):
        shutil.copy(path, tmp_path / "1")
    assert answer(engine_of(layers(RESIDENT), tmp_path / "1")) == expected


@pytest.mark.parametrize("way", WAYS)
def test_several_sequences_at_once(way: str, engine_of: Callable[..., Any]) -> None:
    """By transformers' own loop, the rows padded on the left, long enough for experts to visit."""
    ids = (torch.arange(3 * 40, device=DEVICE) % 89).view(3, 40) + 3
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :31] = 0, 0
    found = []
    for place in (layers(RESIDENT), WAYS[way]):
        model = engine_of(place).model
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found.append(out.tolist())
    assert found[0] == found[1]
