"""Packed experts on a GPU: captured while they stay there, fetched one by one otherwise, the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytest.importorskip("optimum.quanto")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding.static_cache import SWEEP_TOKENS  # noqa: E402
from llm_magic.backends.accelerate.packed import packed_stack  # noqa: E402
from llm_magic.machine import Device  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from llm_magic.plan import Placement  # noqa: E402
from llm_magic.units import GIB  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.gpu.test_placed import DEVICE, HYBRID, ON_GPU, RESIDENT, VISITING, layers  # noqa: E402
from tests.placements import LONG  # noqa: E402

WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8}
PROMPT = "The capital of France is"
RESTING = "resident, and visiting in prompts"
WAYS = {**ON_GPU, **HYBRID, RESTING: layers(RESIDENT, VISITING)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_mixture(tmp_path_factory.mktemp("packed") / "mixture", layers=4, **WIDE)


def loaded(folder: Path, method: str, way: str, dtype: str = "bfloat16") -> Any:
    spec = ModelSpec(str(folder), quantize=method, dtype=dtype)
    _, plan = plan_for(folder, "ram", spec=spec)
    gpu = Device(DEVICE, "gpu", "GPU", 8 * GIB, 7 * GIB)
    place = WAYS[way]
    placements = tuple(
        Placement(p.block, *place(number, p.block.label)) for number, p in enumerate(plan.placements)
    )
    machine = replace(plan.machine, devices=(gpu, *plan.machine.devices))
    plan = replace(plan, machine=machine, placements=placements, long_sweep=LONG)
    return BACKEND.load(spec, plan, lambda _event: None)


def answers(engine: Any) -> list[str]:
    """Two of a chat, the second after what was read before."""
    first = ask(engine, request(PROMPT * 3, chat="c", max_new_tokens=16)).text
    return [first, ask(engine, request(PROMPT * 3, first, "And of Spain?", chat="c", max_new_tokens=16)).text]


@pytest.mark.parametrize("method", ["nf4", "quanto-int8", "float8"])
def test_the_same_tokens_wherever_the_experts_stay(method: str, folder: Path) -> None:
    engine = loaded(folder, method, "resident", "float32")  # captured steps round in another way
    try:
        expected = answers(engine)
        assert engine.status() == ("captured decode",)
    finally:
        engine.close()
    for way in ("streamed", "every second layer streamed", "a bit of each", "everything read"):
        engine = loaded(folder, method, way, "float32")
        try:
            assert answers(engine) == expected, way
        finally:
            engine.close()


def test_the_cpu_computes_some_of_them(folder: Path) -> None:
    """What the GPU keeps is recorded, layer by layer, unless experts come to it when they are asked for."""
    for way in (*HYBRID, RESTING):
        engine = loaded(folder, "nf4", way)
        try:
            assert all(answers(engine)), way
            is_recorded = any("captured layers" in said for said in engine.status())
            assert is_recorded == (way.startswith("resident")), way
        finally:
            engine.close()


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "quanto-int8", "float8", "int2"])
def test_packed_layers_of_the_cpu_visit_the_gpu_for_prompts(method: str, folder: Path) -> None:
    """Their bytes lie as the GPU's do: a prompt is read as if they streamed, to the last bit."""
    prompt, found = torch.arange(7, 40, device=DEVICE)[None], {}
    for way in ("streamed", "visiting in prompts", "streamed, and visiting in prompts", RESTING):
        engine = loaded(folder, method, way)
        try:
            with torch.no_grad():
                found[way] = engine.model(prompt).logits
            assert all(answers(engine))
        finally:
            engine.close()
    assert all(torch.equal(each, found["streamed"]) for each in found.values())


@pytest.mark.parametrize("tokens", SWEEP_TOKENS)
@pytest.mark.parametrize("method", ["nf4", "int4", "int8", "quanto-int8", "float8"])
def test_a_few_tokens_need_nothing_of_the_host(method: str, tokens: int, folder: Path) -> None:
    engine = loaded(folder, method, "resident")
    try:
        experts = engine.model.model.layers[0].mlp.experts
        hidden = torch.randn(tokens, 256, dtype=torch.bfloat16, device=DEVICE)
        chosen = torch.randint(0, 8, (tokens, 2), device=DEVICE)
        shares = torch.rand(tokens, 2, dtype=torch.bfloat16, device=DEVICE)
        with torch.no_grad():
            experts(hidden, chosen, shares)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = experts(hidden, chosen, shares)
            chosen.copy_((chosen + 3) % 8)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(found, experts(hidden, chosen, shares))
    finally:
        engine.close()


@pytest.mark.parametrize(("of_a_token", "most"), [(2, 16), (8, 4)])
def test_no_more_tokens_are_recorded_than_experts_are_worth(
    of_a_token: int, most: int, tmp_path: Path
) -> None:
    """Every token's product with every expert is a kernel of its own; with more of them a recording takes seconds."""
    folder = tiny.save_mixture(tmp_path / "mixture", layers=1, **WIDE, num_experts_per_tok=of_a_token)
    engine = loaded(folder, "nf4", "resident")
    try:
        repeats = request(
            f"{PROMPT} {PROMPT} {PROMPT}", max_new_tokens=24, extra={"prompt_lookup_num_tokens": 9}
        )
        assert ask(engine, repeats).text
        recorded = {shape.tokens for shape in engine._quick.steps._graphs}
        assert engine.status() == ("captured decode",)
        assert 1 in recorded
        assert max(recorded) <= most
    finally:
        engine.close()


def test_experts_are_copied_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded(folder, "nf4", "resident")
    try:
        experts = engine.model.model.layers[0].mlp.experts
        hidden = torch.randn(4, 256, dtype=torch.bfloat16, device=DEVICE)
        chosen = torch.randint(0, 8, (4, 2), device=DEVICE)
        shares = torch.rand(4, 2, dtype=torch.bfloat16, device=DEVICE)
        with torch.no_grad():
            expected = experts(hidden, chosen, shares)
            monkeypatch.setattr(packed_stack, "_GATHERED_BYTES", 1)
            assert torch.equal(experts(hidden, chosen, shares), expected)
    finally:
        engine.close()


@pytest.mark.parametrize("method", ["nf4", "int4"])
def test_steps_are_captured_of_experts_that_the_cpu_had(method: str, folder: Path) -> None:
    engine = loaded(folder, method, "resident")
    try:
        resident = engine.plan
        expected = answers(engine)
        by_cpu = tuple(replace(p, home="cpu", compute="cpu") for p in resident.placements)
        engine.apply(replace(resident, placements=by_cpu), lambda _event: None)
        assert all(answers(engine))
        engine.apply(resident, lambda _event: None)
        assert answers(engine) == expected
        assert engine.status() == ("captured decode",)
    finally:
        engine.close()
