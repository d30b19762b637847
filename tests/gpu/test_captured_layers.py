"""Recorded layers, where a sweep cannot be one graph: between blocks of the CPU, and over several GPUs."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate import quick as of_quick  # noqa: E402
from llm_magic.backends.accelerate.decoding.captured_layers import CapturedLayers  # noqa: E402
from llm_magic.backends.accelerate.decoding.speculate import Proposal, Speculation  # noqa: E402
from llm_magic.backends.accelerate.decoding.static_cache import FixedLayer, StaticCache  # noqa: E402
from llm_magic.errors import EngineError  # noqa: E402
from llm_magic.events import Message, Request, Sampling, TokenEvent  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.families import FAMILIES, save  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402
from tests.gpu.test_families import EAGER  # noqa: E402
from tests.gpu.test_placed import DEVICE, HYBRID, ON_CPU, RESIDENT, STREAMED, layers  # noqa: E402
from tests.placements import Place, placed_plan  # noqa: E402

NAMES = ("llama", "gemma", "gpt2")
PROMPT = "The capital of France is Paris, and the capital of Italy"
REPEATING = "one two three four one two three four one two three four one two"


def on_second(number: int, label: str) -> tuple[str, str, bool, str]:
    """The layers over both GPUs in turn, one of three streamed."""
    device = f"cuda:{number % 2}" if label.startswith("layers.") else DEVICE
    return ("cpu" if number % 3 == 0 and label.startswith("layers.") else device), device, False, ""


WAYS: Mapping[str, Place] = {
    **{way: HYBRID[way] for way in HYBRID if way != "visiting in prompts"},
    "two in a row": layers(STREAMED, STREAMED, ON_CPU, RESIDENT),
    **({"two GPUs": on_second} if torch.cuda.device_count() > 1 else {}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / name
        return save(name, folder) if name in FAMILIES else tiny.MODELS[name](folder)

    return cache(make)


@pytest.fixture
def engine_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[[str, Place], Any]]:
    made: list[Any] = []

    def load(name: str, way: Place) -> Any:
        folder = folder_of(name)
        spec, _ = plan_for(folder, "ram")
        made.append(BACKEND.load(spec, placed_plan(folder, way), lambda _event: None))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str], Path]) -> Callable[..., str]:
    """What the CPU alone answers."""

    @cache
    def answer(name: str, prompt: str = PROMPT, count: int = 24) -> str:
        engine = BACKEND.load(*plan_for(folder_of(name), "ram"), lambda _event: None)
        try:
            return ask(engine, request(prompt, max_new_tokens=count)).text
        finally:
            engine.close()

    return answer


def steps_of(engine: Any) -> CapturedLayers:
    steps = engine._quick.steps
    assert isinstance(steps, CapturedLayers)
    return steps


def graphs_of(engine: Any) -> dict[Any, Any]:
    return steps_of(engine)._layer_graphs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_wherever_layers_are(
    name: str, way: str, engine_of: Callable[..., Any], expected: Callable[..., str]
) -> None:
    engine = engine_of(name, WAYS[way])
    for _ in range(2):
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == expected(name)
        assert steps_of(engine).status == "captured layers"
    captured = {key[0] for key in graphs_of(engine)}
    on_gpus = {i for i, p in enumerate(layers_of(engine)) if p.compute.startswith("cuda")}
    assert captured == on_gpus


def layers_of(engine: Any) -> list[Any]:
    names = {block.name for block in engine.plan.layout.layers}
    return [place for place in engine.plan.placements if place.block.name in names]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EAGER])
def test_other_architectures(name: str, engine_of: Callable[..., Any], expected: Callable[..., str]) -> None:
    """Those that keep a state run as they did."""
    engine = engine_of(name, layers(RESIDENT, ON_CPU, STREAMED))
    for _ in range(2):
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == expected(name)
    steps = engine._quick.steps
    assert steps is None or steps.status == "captured layers"


def test_a_number_that_a_layer_brings_from_the_host_is_recorded(engine_of: Callable[..., Any]) -> None:
    engine = engine_of("llama", layers(RESIDENT, ON_CPU, STREAMED))
    bringing = engine._placed.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _module, args: (args[0] * torch.tensor(1.5).to(args[0].device), *args[1:])
    )
    steps, engine._quick.steps = engine._quick.steps, None
    wanted = ask(engine, request(PROMPT, max_new_tokens=24)).text
    engine._quick.steps = steps
    for _ in range(2):
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == wanted
        assert steps_of(engine).status == "captured layers"
    bringing.remove()


@pytest.mark.parametrize(
    "way", ["streamed, and computed by the CPU", "a bit of each, and visiting in prompts"]
)
@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_proposals_are_verified(
    name: str,
    way: str,
    engine_of: Callable[..., Any],
    expected: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sweeps of several tokens, of which some are taken back: on the CPU's layers, too."""
    monkeypatch.setattr(of_quick, "clock", count().__next__)  # several tokens take no longer than one
    engine = engine_of(name, WAYS[way])
    asked = request(REPEATING, max_new_tokens=40, extra={"prompt_lookup_num_tokens": 5})
    answer = ask(engine, asked)
    assert answer.text == expected(name, REPEATING, 40)
    assert answer.finish.sweeps < answer.finish.generated_tokens
    assert {key[2].tokens for key in graphs_of(engine)} > {1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_chats_go_on_over_moves(
    name: str, way: str, engine_of: Callable[..., Any], expected: Callable[..., str]
) -> None:
    engine = engine_of(name, WAYS[way])
    plan = engine.plan
    chat = request(PROMPT, max_new_tokens=24, chat="talk")
    for there in (plan, replace(plan, placements=resident_of(plan)), plan):
        engine.apply(there, lambda _event: None)
        again = ask(engine, chat)
        assert again.text == expected(name)
    assert again.finish.cached_tokens > 0 or name == "gemma"  # whose windows have gone on
    longer = f"{PROMPT} is Rome, and that of Spain"
    assert ask(engine, request(longer, max_new_tokens=24, chat="talk")).text == expected(name, longer)


def resident_of(plan: Any) -> tuple[Any, ...]:
    return tuple(
        replace(p, home=DEVICE, compute=DEVICE, kept=False, prefill="") if not p.block.is_idle else p
        for p in plan.placements
    )


def test_a_stop_or_an_error_in_any_layer_leaves_the_next_answer_right(
    engine_of: Callable[..., Any], expected: Callable[..., str]
) -> None:
    engine = engine_of("gemma", WAYS["a bit of each, and visiting in prompts"])
    asked = request(PROMPT, max_new_tokens=24, chat="talk")
    for place in layers_of(engine):
        for error in (KeyboardInterrupt, RuntimeError("no")):
            calls: list[int] = []

            def fail(_module: Any, _inputs: Any, calls: list[int] = calls, error: Any = error) -> None:
                calls.append(1)
                if len(calls) == 9:
                    raise error

            handle = engine.model.get_submodule(place.block.name).register_forward_pre_hook(fail)
            with pytest.raises((KeyboardInterrupt, EngineError)):
                ask(engine, asked)
            handle.remove()
            assert ask(engine, asked).text == expected("gemma")


class Moving:
    """In the place of a repair: moves all to another plan, once."""

    plan: Any = None

    def __init__(self, _plan: Any, _free: Any, _drop: Any, apply: Callable[[Any], object]) -> None:
        self.notes: list[str] = []
        self._apply = apply

    def __call__(self, error: BaseException) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        self._apply(type(self).plan)
        return True


@pytest.mark.parametrize("nth", [2, 4, 7, 12])
@pytest.mark.parametrize(
    ("before", "after", "inside"),
    [
        (layers(RESIDENT, ON_CPU), layers(STREAMED, ON_CPU), False),
        (layers(RESIDENT, ON_CPU), layers(STREAMED, ON_CPU), True),
        (layers(RESIDENT, ON_CPU), layers(ON_CPU, ON_CPU, ON_CPU, RESIDENT), False),
        (layers(RESIDENT, ON_CPU), layers(ON_CPU, ON_CPU, ON_CPU, RESIDENT), True),
        (layers(RESIDENT), layers(ON_CPU, RESIDENT), False),
    ],
)
def test_a_move_in_the_midst_of_an_answer(
    before: Place,
    after: Place,
    nth: int,
    inside: bool,
    folder_of: Callable[[str], Path],
    engine_of: Callable[..., Any],
    expected: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After proposals that were wrong, or within a sweep: layers with windows keep what they need."""
    engine = engine_of("mistral", before)
    monkeypatch.setattr(Moving, "plan", placed_plan(folder_of("mistral"), after))
    monkeypatch.setattr("llm_magic.backends.accelerate.engine.Repair", Moving)
    chance, calls = random.Random(nth), 0

    def propose(_self: Any, text: list[int], room: int) -> Proposal:
        nonlocal calls
        calls += 1
        if calls == nth and not inside:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Proposal([chance.randrange(5, 60) for _ in range(chance.randrange(0, 6))][:room])

    def fail(*_: Any) -> None:
        if calls == nth and inside:
            handle.remove()
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Speculation, "propose", propose)
    handle = engine.model.get_submodule(layers_of(engine)[2].block.name).register_forward_pre_hook(fail)
    answer = ask(engine, request(REPEATING, max_new_tokens=40, extra={"prompt_lookup_num_tokens": 5}))
    handle.remove()
    assert answer.text == expected("mistral", REPEATING, 40)
    assert {place.compute for place in layers_of(engine)} == {DEVICE, "cpu"}


def test_a_move_that_finds_no_memory_for_a_copy_leaves_the_cpus_layers_alone(
    folder_of: Callable[[str], Path],
    engine_of: Callable[..., Any],
    expected: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("llama", layers(RESIDENT, ON_CPU))
    monkeypatch.setattr(Moving, "plan", placed_plan(folder_of("llama"), layers(STREAMED, ON_CPU)))
    monkeypatch.setattr("llm_magic.backends.accelerate.engine.Repair", Moving)
    give, calls = StaticCache.give, 0

    def fail_once(static: StaticCache, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            give(static, *args, **options)
            return
        with monkeypatch.context() as patched:
            patched.setattr(FixedLayer, "taken", no_memory)
            give(static, *args, **options)

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(*_: Any) -> None:
        if engine._quick.steps.holds_memory:
            handle.remove()
            no_memory()

    monkeypatch.setattr(StaticCache, "give", fail_once)
    handle = engine.model.get_submodule(layers_of(engine)[2].block.name).register_forward_pre_hook(fail)
    assert ask(engine, request(PROMPT, max_new_tokens=24)).text == expected("llama")
    assert calls > 1


@pytest.mark.skipif(not IS_SIMULATED, reason="sets a limit to the driver's memory")
def test_graphs_that_nobody_needs_now_give_way(
    engine_of: Callable[..., Any], expected: Callable[..., str]
) -> None:
    """No plan counts them: blocks would have to go for those of sweeps of more tokens."""
    from tests.simulated_cuda import driver_bytes, set_total_memory

    engine = engine_of("llama", layers(RESIDENT, ON_CPU))
    assert ask(engine, request(PROMPT, max_new_tokens=24)).text == expected("llama")
    of_one_token = driver_bytes()
    before = set_total_memory(torch.cuda.memory_reserved() + of_one_token + of_one_token // 2)
    try:
        asked = request(REPEATING, max_new_tokens=24, extra={"prompt_lookup_num_tokens": 3})
        answer = ask(engine, asked)
        assert answer.text == expected("llama", REPEATING, 24)
        assert (answer.finish.notes, len({key[2].tokens for key in graphs_of(engine)})) == ((), 1)
    finally:
        set_total_memory(before)


def test_layers_of_the_cpu_run_as_recorded_beside_graphs(
    engine_of: Callable[..., Any], expected: Callable[..., str]
) -> None:
    """What captures leave in their modules is no change of somebody."""
    pytest.importorskip("llvmlite")
    engine = engine_of("llama", layers(RESIDENT, ON_CPU))
    for _ in range(2):
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == expected("llama")
    assert graphs_of(engine)
    assert any(said.startswith("recorded layers") for said in engine.status())


def test_a_layer_that_cannot_be_recorded_runs_as_it_is(
    engine_of: Callable[..., Any], expected: Callable[..., str]
) -> None:
    engine = engine_of("llama", layers(RESIDENT, ON_CPU))
    layer = engine.model.get_submodule(layers_of(engine)[2].block.name)
    usual = layer.mlp.forward

    def waits(states: Any) -> Any:
        float(states.sum())  # the host waits
        return usual(states)

    layer.mlp.forward = waits
    for _ in range(2):
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == expected("llama")
        assert steps_of(engine).status.startswith("eager decode: ")
    del layer.mlp.forward


def test_padding_and_rows(engine_of: Callable[..., Any], expected: Callable[..., str]) -> None:
    """Several sequences, some of them padded, as `generate` of transformers reads them."""
    engine = engine_of("gemma", layers(RESIDENT, ON_CPU, STREAMED))
    from llm_magic.backends.accelerate.decoding.decode import Decoding

    class Silent:
        def put(self, _tokens: Any) -> None: ...

        def end(self) -> None: ...

    torch.manual_seed(1)
    ids = torch.randint(5, 60, (3, 20)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[1, :4] = 0
    answers = []
    for quick in (None, engine._quick.steps):
        if quick is not None:
            quick.prepare(40, mask)
        decoding = Decoding(Silent(), quick=quick)
        answers.append(
            engine.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=16,
                pad_token_id=2,
                custom_generate=decoding,
                streamer=decoding.streamer,
            ).tolist()
        )
    assert answers[0] == answers[1]
    assert {key[2].batch for key in graphs_of(engine)} == {3}


def test_a_block_in_another_slot_has_a_graph_of_its_own(engine_of: Callable[..., Any]) -> None:
    engine = engine_of("llama", lambda number, label: STREAMED if label.startswith("layers.") else ON_CPU)
    ask(engine, request(PROMPT, max_new_tokens=24, extra={"prompt_lookup_num_tokens": 0}))
    count = engine._placed.lanes[0]._slots
    assert {key[:2] for key in graphs_of(engine)} == {
        (i, slot) for i in range(4) for slot in range(len(count))
    }


def test_times_are_measured_in_recorded_sweeps(engine_of: Callable[..., Any]) -> None:
    engine = engine_of("llama", WAYS["streamed, and computed by the CPU"])
    events: list[Any] = []
    asked = Request(
        (Message("user", PROMPT),), Sampling(temperature=0, max_new_tokens=60), use_template=False
    )
    engine.generate(asked, events.append, threading.Event())
    assert sum(isinstance(event, TokenEvent) for event in events) > 30
    assert steps_of(engine).calls_model
    assert any(type(event).__name__ == "SweepEvent" and event.sweeps > 0 for event in events)
