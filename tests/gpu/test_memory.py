"""Memory of the device that runs out at any allocation: the answer is right, and so is the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.gpu.conftest import IS_SIMULATED  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_SIMULATED, reason="of the simulated device alone")]

from llm_magic.backends.accelerate import quick  # noqa: E402
from llm_magic.errors import EngineError  # noqa: E402
from llm_magic.machine import Device  # noqa: E402
from llm_magic.plan import Plan  # noqa: E402
from llm_magic.planning.constants import Constants  # noqa: E402
from llm_magic.planning.planner import make_budget  # noqa: E402
from llm_magic.planning.setting import Setting  # noqa: E402
from llm_magic.units import GIB, MIB  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, MACHINE, ask, plan_for, request  # noqa: E402
from tests.gpu.test_placed import DEVICE, HYBRID, ON_GPU  # noqa: E402
from tests.placements import placed_plan  # noqa: E402
from tests.simulated_cuda import fail_allocation_in, set_total_memory  # noqa: E402

WAYS = {**ON_GPU, **HYBRID}
MANY = 1_000_000
_GRAPHS = 4 << 20  # what recorded sweeps of so small a model keep, most of it in the driver's memory
TRIALS = 10  # of the allocations of some answers, evenly spread
ASKED = [
    request("The capital of France", max_new_tokens=12, chat="a"),
    request("Layers live in memory", max_new_tokens=6, chat="b", temperature=1.5, seed=3),
    request("The capital of France", "is", "And of Italy?", max_new_tokens=8, chat="a"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more layers than slots, so that some can go."""
    return tiny.save_llama(tmp_path_factory.mktemp("tiny") / "llama", layers=8)


def plan(folder: Path, way: str) -> Plan:
    gpu = Device(DEVICE, "gpu", "simulated", 2 * GIB, 2 * GIB, read_bytes_per_s=1e12)
    machine = replace(MACHINE, devices=(gpu, *MACHINE.devices))
    placed = replace(placed_plan(folder, WAYS[way]), machine=machine, budget=make_budget(machine, {}))
    return replace(placed, uses=Setting.of(placed, Constants()).uses(placed.placements))


def answers(engine: Any) -> list[str]:
    return [ask(engine, asked).text for asked in ASKED]


@pytest.mark.parametrize(
    "way",
    [
        "resident",
        "streamed",
        "a bit of each",
        "streamed, and visiting in prompts",
        "streamed, and computed by the CPU",
    ],
)
def test_answers(way: str, folder: Path) -> None:
    """All are mended, and the engine says so; where a whole answer has no room, its cache is what is lost."""
    spec, _ = plan_for(folder, "ram")
    engine = BACKEND.load(spec, plan(folder, way), lambda _event: None)
    fail_allocation_in(MANY)
    expected = answers(engine)
    count = MANY - fail_allocation_in(-1)
    engine.close()
    mended = 0
    for nth in (*range(count // TRIALS, count, count // TRIALS), count - 1):
        engine = BACKEND.load(spec, plan(folder, way), lambda _event: None)
        fail_allocation_in(nth)
        found = [ask(engine, asked) for asked in ASKED]
        fail_allocation_in(-1)
        assert [answer.text for answer in found] == expected, nth
        mended += any(answer.finish.notes for answer in found)
        assert answers(engine) == expected, nth
        engine.close()
    assert mended


def test_a_long_chat_is_captured_where_the_plan_fills_the_gpu(folder: Path) -> None:
    """There is room for its keys and values, and for one layer's once more."""
    spec, _ = plan_for(folder, "ram")
    placed = plan(folder, "resident")
    engine = BACKEND.load(spec, placed, lambda _event: None)
    text = "The capital of France is Paris, and the capital of Italy. " * 3
    turns = [text]
    wanted = BACKEND.load(*plan_for(folder, "ram"), lambda _event: None)
    use = placed.use(DEVICE)
    layer = placed.layout.layers[0].cache.bytes_for(placed.workload.context_length)
    torch.cuda.empty_cache()
    room = use.kv_cache + use.activations + layer + _GRAPHS
    before = set_total_memory(torch.cuda.memory_reserved() + room)
    try:
        for question in ("And of Spain? " * 3, "Of Greece? " * 3, "Of Norway?"):
            asked = request(*turns, max_new_tokens=8, chat="talk")
            answer = ask(engine, asked)
            assert answer.text == ask(wanted, asked).text
            assert (answer.finish.notes, engine._quick.steps.status) == ((), "captured decode")
            turns += [answer.text, question]
        assert engine._caches.tokens > placed.workload.context_length // 2
    finally:
        set_total_memory(before)
        engine.close()
        wanted.close()


@pytest.mark.parametrize("left", [0, MANY])
def test_fixed_addresses_go_before_a_prompt_that_has_no_room_beside_them(
    left: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = plan_for(folder, "ram")
    engine = BACKEND.load(spec, plan(folder, "resident"), lambda _event: None)
    expected = answers(engine)
    monkeypatch.setattr(quick, "free_bytes", lambda _device: left)
    steps, held = engine._quick.steps, []
    prepare = steps.prepare
    monkeypatch.setattr(steps, "prepare", lambda room: (held.append(steps.holds_memory), prepare(room)))
    assert answers(engine) == expected
    assert held == [left > 0] * len(ASKED)
    assert steps.status == "captured decode"
    engine.close()


def test_torch_refuses_where_the_driver_would_take_ram(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When blocks are placed, and anew when they move: what is free is another figure then."""
    allowed: list[float] = []
    monkeypatch.setattr("platform.release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: allowed.append(share * torch.cuda.mem_get_info(device)[1]),
    )
    spec, _ = plan_for(folder, "ram")
    total = set_total_memory(2 * GIB)
    try:
        engine = BACKEND.load(spec, plan(folder, "resident"), lambda _event: None)
        set_total_memory(2 * GIB - 64 * MIB)  # somebody else takes some
        engine.apply(plan(folder, "streamed"), lambda _event: None)
        assert len(allowed) == 2
        assert allowed[0] - allowed[1] == pytest.approx(60 * MIB)  # and a sixteenth less is spared
        engine.close()
    finally:
        set_total_memory(total)


@pytest.mark.parametrize("after", ["resident", "streamed", "streamed, and computed by the CPU"])
def test_moves(after: str, folder: Path) -> None:
    """A move that fails leaves everything where it was."""
    spec, _ = plan_for(folder, "ram")
    before = plan(folder, "a bit of each")
    engine = BACKEND.load(spec, before, lambda _event: None)
    expected = answers(engine)
    for nth in range(0, 10_000, 13):
        fail_allocation_in(nth)
        try:
            engine.apply(plan(folder, after), lambda _event: None)
        except EngineError:
            assert engine.plan.device_map == before.device_map
        if fail_allocation_in(-1) >= 0:
            break
        assert answers(engine) == expected, nth
        if engine.plan.device_map != before.device_map:
            engine.apply(before, lambda _event: None)
    assert nth
    assert answers(engine) == expected
    engine.close()
