"""A packed model's blocks move between GPU, RAM and disk, and between the orders that their kernels read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytest.importorskip("optimum.quanto")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.packed import int4_orders, tinygemm  # noqa: E402
from llm_magic.errors import EngineError  # noqa: E402
from llm_magic.machine import Device  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from llm_magic.plan import Placement, Plan  # noqa: E402
from llm_magic.units import GIB  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, plan_for  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402

Where = tuple[str, str, bool] | tuple[str, str, bool, str]
DEVICE = "cuda:0"
PROMPT = [[7, 11, 13, 17, 19, 23]]
RESIDENT, STREAMED, READ = ("cuda:0", DEVICE, False), ("cpu", DEVICE, False), ("disk", DEVICE, False)
ON_CPU, KEPT_BY_CPU, READ_BY_CPU = ("cpu", "cpu", False), ("disk", "cpu", True), ("disk", "cpu", False)
VISITING, KEPT_VISITING = ("cpu", "cpu", False, DEVICE), ("disk", "cpu", True, DEVICE)
METHODS = ("int4", "nf4")  # one whose bytes lie in another order for a CPU, and one whose do not


@pytest.fixture(scope="module", params=["llama", "mixture"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / request.param
    if request.param == "mixture":
        return tiny.save_mixture(path, layers=3, hidden_size=256, head_dim=64, moe_intermediate_size=128)
    return tiny.save_llama(path, layers=3, hidden_size=256, intermediate_size=512)


def loaded(folder: Path, method: str, where: Where) -> Any:
    spec = ModelSpec(str(folder), quantize=method, dtype="bfloat16")
    _, plan = plan_for(folder, "ram", spec=spec)
    gpu = Device(DEVICE, "gpu", "GPU", 8 * GIB, 7 * GIB)
    plan = replace(plan, machine=replace(plan.machine, devices=(gpu, *plan.machine.devices)))
    return BACKEND.load(spec, with_layers(plan, where), lambda _event: None)


def with_layers(plan: Plan, where: Where) -> Plan:
    """The plan with the layers there, and the rest resident."""
    placed = (
        Placement(p.block, *(where if p.block.label.startswith("layers.") else RESIDENT))
        for p in plan.placements
    )
    return replace(plan, placements=tuple(placed), long_sweep=100)


def logits(engine: Any) -> Any:
    with torch.inference_mode():
        return engine.model(torch.tensor(PROMPT, device=DEVICE)).logits


@pytest.mark.parametrize("method", METHODS)
def test_blocks_move_to_the_cpu_from_wherever_a_gpu_computes_them(
    method: str, folder: Path, tmp_path: Path
) -> None:
    engine = loaded(folder, method, RESIDENT)
    try:
        expected = logits(engine)
        for there, by_cpu in ((RESIDENT, ON_CPU), (STREAMED, KEPT_BY_CPU), (READ, READ_BY_CPU)):
            for where in (there, by_cpu, there):
                engine.apply(with_layers(engine.plan, where), lambda _event: None)
                found = logits(engine)
                if where[1] == DEVICE:
                    assert torch.equal(found, expected)
                else:
                    assert torch.nn.functional.cosine_similarity(
                        found.flatten().float(), expected.flatten().float(), dim=0
                    ) > (0.99)
        # one file for each of three layers, and one for its experts; none in the order of before
        parts = 2 if folder.name == "mixture" else 1
        assert len(list((tmp_path / "cache").rglob("model.layers.*.bin"))) == 3 * parts
    finally:
        engine.close()


@pytest.mark.parametrize("where", [VISITING, KEPT_VISITING])
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_the_cpu_visit_in_its_order(method: str, where: Where, folder: Path) -> None:
    engine = loaded(folder, method, RESIDENT)
    try:
        ids = torch.arange(150, device=DEVICE)[None] % 89 + 3
        with torch.no_grad():
            expected = engine.model(ids).logits
            for _ in range(2):
                engine.apply(with_layers(engine.plan, where), lambda _event: None)
                text = ask(engine, "Hello").text
                assert torch.equal(engine.model(ids).logits, expected)
                assert ask(engine, "Hello").text == text
                engine.apply(with_layers(engine.plan, RESIDENT), lambda _event: None)
                assert torch.equal(engine.model(ids).logits, expected)
    finally:
        engine.close()


@pytest.mark.skipif(not IS_SIMULATED, reason="a real GPU's memory does not run out when it is told to")
@pytest.mark.parametrize("method", METHODS)
def test_memory_that_runs_out_leaves_every_weight_in_its_order(method: str, folder: Path) -> None:
    from tests.simulated_cuda import fail_allocation_in

    engine = loaded(folder, method, STREAMED)
    before = engine.plan
    failed = 0
    for here, there in ((STREAMED, ON_CPU), (RESIDENT, ON_CPU), (ON_CPU, RESIDENT)):
        engine.apply(with_layers(before, here), lambda _event: None)
        expected = logits(engine)
        for nth in range(0, 1000, 5):
            fail_allocation_in(nth)
            try:
                engine.apply(with_layers(before, there), lambda _event: None)
            except EngineError:
                failed += 1
            if fail_allocation_in(-1) >= 0:
                break
            engine.apply(with_layers(before, here), lambda _event: None)
            assert torch.equal(logits(engine), expected), nth
    assert failed
    engine.close()


def test_int8_is_decoded_eagerly_without_a_capture_that_fails(folder: Path) -> None:
    engine = loaded(folder, "int8", RESIDENT)
    try:
        ask(engine, "Hello")
        assert "eager decode: int8 looks for outliers on the host" in engine.status()
    finally:
        engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_block_needs_no_room_on_the_gpu_that_it_leaves(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is where memory has run out when blocks are moved away to make room."""
    folder = tiny.save_llama(tmp_path / "wide", layers=2, hidden_size=1024, intermediate_size=2048)
    for module in (tinygemm, int4_orders):
        monkeypatch.setattr(module, "_AT_A_TIME", 1 << 14)
    engine = loaded(folder, method, RESIDENT)
    try:
        layer = next(block.bytes for block in engine.plan.layout.blocks if block.label == "layers.0")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.apply(with_layers(engine.plan, ON_CPU), lambda _event: None)
        assert torch.cuda.max_memory_allocated() - before < layer / 3
    finally:
        engine.close()
