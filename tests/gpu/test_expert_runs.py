"""Experts of long prompts come to a GPU in runs of neighbours: the same bits, few copies, any end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytest.importorskip("optimum.quanto")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.packed import packed_stack  # noqa: E402
from llm_magic.backends.accelerate.placement import expert_runs  # noqa: E402
from llm_magic.backends.accelerate.placement.expert_runs import ExpertRuns  # noqa: E402
from llm_magic.backends.accelerate.placement.stream import AcceleratorStreams, Lane  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, request  # noqa: E402
from tests.families import save  # noqa: E402
from tests.gpu.test_placed import DEVICE, RESIDENT, STREAMED, layers  # noqa: E402
from tests.gpu.test_split import VISITING_SPLIT, plan  # noqa: E402

EXPERTS, LAYERS = 32, 3
WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts_per_tok": 4}
PROMPT = "The capital of France is Paris, and that of Spain is Madrid. " * 6
WAYS = {
    "split": layers(VISITING_SPLIT),
    "streamed": layers(STREAMED),
    "some": layers(VISITING_SPLIT, RESIDENT),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "mixture"
    return tiny.save_mixture(path, layers=LAYERS, num_experts=EXPERTS, **WIDE)


@pytest.fixture
def engine_of(folder: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def load(way: Any, method: str = "nf4", dtype: str = "float32", source: Path = folder) -> Any:
        spec = ModelSpec(str(source), quantize=method, dtype=dtype)
        made.append(BACKEND.load(spec, plan(source, way, spec), lambda _event: None))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


@pytest.fixture(autouse=True)
def of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of some experts: as small as these are, all of a layer would be one."""
    monkeypatch.setattr(packed_stack, "UNPACKED_EXPERTS_BYTES", 4 * 4 * 256 * 256)


def logits(engine: Any, count: int = 150) -> Any:
    with torch.no_grad():
        return engine.model((torch.arange(count, device=DEVICE) % 97)[None]).logits


def runs_of(engine: Any) -> ExpertRuns:
    runs = engine._placed._attachments._expert_lanes[DEVICE].runs
    assert isinstance(runs, ExpertRuns)
    return runs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["nf4", "int8", "quanto-int8", "float8", "int2"])
def test_the_same_bits_as_all_on_the_gpu(method: str, way: str, engine_of: Callable[..., Any]) -> None:
    expected = logits(engine_of(layers(RESIDENT), method))
    engine = engine_of(WAYS[way], method)
    runs = runs_of(engine)
    for number in range(1, 3):
        assert torch.equal(logits(engine), expected)
        travelling = LAYERS - (way == "some")
        of_a_pass = sum(len(each._runs) for twin in runs._twins.values() for each in stand_ins(twin))
        assert of_a_pass > 4 * travelling
        ahead = 3  # of the pass that comes next
        assert 0 <= runs.lane.fetched - number * of_a_pass <= ahead
        assert runs.lane.missed == 1, "the very first one"
    assert ask(engine, request(PROMPT, max_new_tokens=6)).text


def stand_ins(twin: Any) -> list[Any]:
    return [each for each in twin.__dict__.values() if isinstance(each, expert_runs._Runs)]


@pytest.mark.parametrize("way", WAYS)
def test_integers_of_4_bits_come_in_either_order(way: str, engine_of: Callable[..., Any]) -> None:
    """In that of the GPU where it decodes with them, in that of the CPU where they are there for a prompt alone."""
    expected = logits(engine_of(layers(RESIDENT), "int4", "bfloat16"))
    engine = engine_of(WAYS[way], "int4", "bfloat16")
    for _ in range(2):
        assert torch.equal(logits(engine), expected)
    assert runs_of(engine).lane.fetched
    assert ask(engine, request(PROMPT, max_new_tokens=6)).text


def test_biases_come_along(engine_of: Callable[..., Any], tmp_path: Path) -> None:
    source = save("gpt_oss", tmp_path / "gpt-oss", num_local_experts=EXPERTS)
    expected = logits(engine_of(layers(RESIDENT), "quanto-int8", source=source))
    engine = engine_of(layers(STREAMED), "quanto-int8", source=source)
    assert torch.equal(logits(engine), expected)
    assert runs_of(engine).lane.fetched


def test_few_tokens_and_few_experts_come_one_by_one(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(layers(STREAMED))
    logits(engine, 16)
    assert runs_of(engine).lane.fetched == 0
    assert engine._placed._attachments._expert_lanes[DEVICE].cache.misses > 0


def test_few_copies(engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each run: it is the host's time that they cost."""
    calls: list[int] = []
    usual = AcceleratorStreams.copy

    def copy(self: Any, pairs: Any, after: Any) -> Any:
        calls.append(len(pairs))
        return usual(self, pairs, after)

    engine = engine_of(layers(VISITING_SPLIT))
    monkeypatch.setattr(AcceleratorStreams, "copy", copy)
    logits(engine)
    assert 0 < len(calls) < LAYERS * EXPERTS / 2


def test_memory_is_counted(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(layers(VISITING_SPLIT))
    held = engine._placed._attachments._expert_lanes[DEVICE]
    assert held.device_bytes >= runs_of(engine).bytes + 2 * held.cache.slot_bytes
    assert held.device_bytes <= engine.plan.use(DEVICE).slots


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("way", ["split", "streamed"])
def test_the_next_prompt_is_right_whatever_ended_one(
    way: str, error: type[BaseException], engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(engine_of(layers(RESIDENT)))
    engine = engine_of(WAYS[way])
    usual, calls = Lane.take, [0]
    nth = 0
    while True:
        nth, calls[0] = nth + 3, 0

        def fail(self: Any, index: int, nth: int = nth) -> int:
            slot = usual(self, index)
            calls[0] += 1
            if calls[0] == nth:
                raise error("in the midst of it")
            return slot

        monkeypatch.setattr(Lane, "take", fail)
        try:
            logits(engine)
        except error:
            engine._placed.settle()
        monkeypatch.setattr(Lane, "take", usual)
        if calls[0] < nth:
            break
        assert torch.equal(logits(engine), expected), nth
    assert nth > 9


def test_moves(engine_of: Callable[..., Any]) -> None:
    from tests.gpu.test_split import plan_in

    expected = logits(engine_of(layers(RESIDENT)))
    engine = engine_of(layers(VISITING_SPLIT))
    for way in (layers(RESIDENT), layers(STREAMED), layers(STREAMED, RESIDENT), layers(VISITING_SPLIT)):
        engine.apply(plan_in(engine, way), lambda _event: None)
        assert torch.equal(logits(engine), expected)
