"""Recorded layers in a loaded model: answers are those that its layers' own code gives, wherever the layers are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

import peft  # noqa: E402

from llm_magic.backends.accelerate import quick  # noqa: E402
from llm_magic.backends.accelerate.quiet import quiet  # noqa: E402
from llm_magic.backends.accelerate.recorded.picks import Pick  # noqa: E402
from llm_magic.errors import EngineError  # noqa: E402
from llm_magic.events import SweepEvent, TokenEvent  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from llm_magic.planning.planner import make_plan  # noqa: E402
from llm_magic.planning.select import edited  # noqa: E402
from tests.engines import MAPS, ask, ask_with, load, request  # noqa: E402
from tests.packed_checkpoints import save_mxfp4  # noqa: E402
from tests.recorded_layers import programs  # noqa: E402
from tests.test_recorded import members_of  # noqa: E402

TinyModel = Callable[[str], Path]
PROMPT = "The capital of France"
REPEATING = "the capital of France is Paris and the capital of France is Paris and the capital of"


def asked(prompt: str = PROMPT, *more: str, chat: str = "", tokens: int = 24, **extra: Any) -> Any:
    return request(prompt, *more, chat=chat, max_new_tokens=tokens, extra=extra)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As ``load``, of a model whose layers run their own code."""

    def load_it(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(quick, "_of_the_cpu", lambda _placed: {})
            engine = load(*args, **kwargs)
        recorded = engine._quick.after_move

        def after_move() -> None:
            recorded()
            engine._quick._recorded.undo()

        engine._quick.after_move = after_move
        return engine

    return load_it


@pytest.fixture
def engines(plain: Callable[..., Any]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """A model whose layers are recorded, and the same one whose layers are not; closed in the end."""
    made: list[Any] = []

    def both(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        pair = load(*args, **kwargs), plain(*args, **kwargs)
        made.extend(pair)
        return pair

    yield both
    for engine in made:
        engine.close()


def count(engine: Any) -> int:
    return programs(engine._quick._recorded)


@pytest.mark.parametrize("placement", MAPS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "gpt2", "qwen3-moe", "gemma4"])
def test_answers_are_those_of_the_layers_own_code(
    name: str, placement: str, tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model(name), placement)
    for prompt in (PROMPT, REPEATING, PROMPT):
        assert ask(mine, asked(prompt)).text == ask(theirs, asked(prompt)).text
    assert count(mine)
    assert not count(theirs)


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_models_without_such_layers(name: str, tiny_model: TinyModel, engines: Callable[..., Any]) -> None:
    mine, theirs = engines(tiny_model(name), "half")
    for _ in range(2):
        assert ask(mine, asked()).text == ask(theirs, asked()).text


@pytest.mark.parametrize("kind", ["nf4", "int8", "float8"])
def test_packed_layers(kind: str, tiny_model: TinyModel, engines: Callable[..., Any]) -> None:
    folder = tiny_model("llama")
    for placement in ("ram", "half"):
        mine, theirs = engines(folder, placement, spec=ModelSpec(str(folder), quantize=kind))
        for prompt in (PROMPT, REPEATING):
            assert ask(mine, asked(prompt)).text == ask(theirs, asked(prompt)).text
        assert count(mine)


@pytest.mark.parametrize("placement", ["ram", "half", "mapped"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_chats_in_turn_that_go_on(
    name: str, placement: str, tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model(name), placement)
    said: dict[str, list[str]] = {"one": [PROMPT], "two": [REPEATING]}
    for _ in range(3):
        for chat, contents in said.items():
            answers = [ask(engine, asked(*contents, chat=chat, tokens=9)) for engine in (mine, theirs)]
            assert answers[0].text == answers[1].text
            assert answers[0].finish.cached_tokens == answers[1].finish.cached_tokens
            contents += [answers[0].text, "And the next?"]


@pytest.mark.parametrize("most", [0, 4, 8])
@pytest.mark.parametrize("placement", ["ram", "half", "disk"])
def test_proposals_by_the_text(
    placement: str, most: int, tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model("llama"), placement)
    texts = [
        ask(engine, asked(REPEATING, tokens=60, prompt_lookup_num_tokens=number)).text
        for engine, number in ((mine, most), (mine, most), (theirs, most), (theirs, 0))
    ]
    assert len(set(texts)) == 1
    assert count(mine)


def moved(plan: Any, labels: list[str], device: str) -> Any:
    names = {place.block.name: device for place in plan.placements if place.block.label in labels}
    return make_plan(plan.layout, plan.machine, plan.workload, placement=edited(plan, names), policy="hand")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "qwen3-moe"])
def test_layers_that_move_and_come_back(
    name: str, tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model(name), "ram")
    expected = ask(theirs, asked()).text
    assert ask(mine, asked(chat="talk")).text == expected
    before = [dict(vars(block.module)) for block in mine._placed.blocks.values()]
    for labels, device in (
        (["layers.1"], "disk"),
        (["layers.0", "layers.3"], "disk"),
        (["layers.1"], "cpu"),
        (["layers.0", "layers.3"], "cpu"),
    ):
        mine.apply(moved(mine.plan, labels, device), lambda _event: None)
        assert ask(mine, asked(chat="talk")).text == expected
        assert ask(mine, asked()).text == expected
        assert count(mine)
    assert [vars(block.module).keys() for block in mine._placed.blocks.values()] == [
        each.keys() for each in before
    ]


def test_layers_that_move_in_the_midst_of_a_chat(tiny_model: TinyModel, engines: Callable[..., Any]) -> None:
    mine, theirs = engines(tiny_model("llama"), "ram")
    contents = [PROMPT]
    for device in ("disk", "cpu", "disk"):
        answers = [ask(engine, asked(*contents, chat="talk", tokens=9)) for engine in (mine, theirs)]
        assert answers[0].text == answers[1].text
        contents += [answers[0].text, "And the next?"]
        mine.apply(moved(mine.plan, ["layers.0", "layers.2"], device), lambda _event: None)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_an_adapter_is_at_work_in_the_next_answer_and_gone_in_another(
    tiny_model: TinyModel, engines: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    made = load(folder, "ram")
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    made.model.add_adapter(settings)
    with quiet():
        made.model.save_pretrained(tmp_path)
    made.close()
    for placement in ("ram", "half"):
        mine, theirs = engines(folder, placement)
        without = ask(theirs, asked()).text
        assert ask(mine, asked()).text == without
        for engine in (mine, theirs):
            engine.model.load_adapter(str(tmp_path))
        having = ask(theirs, asked()).text
        assert having != without
        for change, text in ((None, having), ("disable_adapters", without), ("enable_adapters", having)):
            for engine in (mine, theirs):
                if change:
                    getattr(engine.model, change)()
            for _ in range(2):
                assert ask(mine, asked()).text == text
        for engine in (mine, theirs):
            engine.model.delete_adapter("default")
        for _ in range(2):
            assert ask(mine, asked()).text == without


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("placement", ["ram", "half"])
def test_an_answer_that_is_halted_leaves_the_next_one_right(
    placement: str, at: int, error: type[BaseException], tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model("llama"), placement)
    seen = 0

    def halt(event: Any) -> None:
        nonlocal seen
        seen += isinstance(event, (TokenEvent, SweepEvent))
        if seen == at:
            seen += 1
            raise error

    with pytest.raises((error, EngineError)):
        ask_with(mine, asked(chat="talk"), threading.Event(), halt)
    expected = ask(theirs, asked()).text
    for chat in ("talk", "", "talk"):
        assert ask(mine, asked(chat=chat)).text == expected
    assert count(mine)


def test_a_hook_of_somebody_is_called_in_the_next_answer(
    tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model("llama"), "half")
    expected = ask(theirs, asked()).text
    assert ask(mine, asked()).text == expected
    for engine in (mine, theirs):
        engine.seen = []
        layer = engine.model.model.layers[1]
        engine.handle = layer.mlp.register_forward_hook(
            lambda _part, _args, result, seen=engine.seen: seen.append(1) or result * 3
        )
    changed = ask(theirs, asked()).text
    assert ask(mine, asked()).text == changed != expected
    assert len(mine.seen) == len(theirs.seen) > 1
    for engine in (mine, theirs):
        engine.handle.remove()
    assert ask(mine, asked()).text == expected


def test_weights_that_somebody_changes_are_those_of_the_next_answer(
    tiny_model: TinyModel, engines: Callable[..., Any]
) -> None:
    mine, theirs = engines(tiny_model("llama"), "ram")
    ask(mine, asked())
    for engine in (mine, theirs):
        layer = engine.model.model.layers[2]
        with torch.no_grad():
            layer.mlp.up_proj.weight.mul_(-2)
            layer.input_layernorm.weight.data = layer.input_layernorm.weight * 3
    assert ask(mine, asked()).text == ask(theirs, asked()).text
    assert count(mine)


def test_a_model_that_is_closed_has_its_layers_as_they_were(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "ram")
    ask(engine, asked())
    layers = list(engine.model.model.layers)
    assert count(engine)
    engine.close()
    for layer in layers:
        held = vars(layer)
        assert "llm_magic" not in str(getattr(held.get("forward"), "__module__", ""))
        assert "llm_magic" not in str(getattr(held.get("_old_forward"), "__module__", ""))


@pytest.mark.parametrize("placement", MAPS)
def test_layers_in_16_bits_are_recorded_and_served_wherever_they_are(
    tiny_model: TinyModel, placement: str
) -> None:
    """Accelerate leaves methods of classes on modules of the disk, which hid the kernels."""
    source = tiny_model("llama")
    engine = load(source, placement, spec=ModelSpec(str(source), dtype="bfloat16"))
    try:
        assert ask(engine, asked()).finish.generated_tokens
        assert engine.status()[0] == "recorded layers"
        layers = {id(layer) for layer in engine.model.model.layers}
        left = [
            name for name, m in engine.model.named_modules() if "forward" in vars(m) and id(m) not in layers
        ]
        assert not [name for name in left if name.startswith("model.layers.")]
    finally:
        engine.close()


def test_rows_of_chosen_experts(tmp_path: Path, engines: Callable[..., Any]) -> None:
    """gpt-oss adds biases to what each makes, which are picked as its matrices are."""
    mine, theirs = engines(save_mxfp4(tmp_path), "ram")
    assert ask(mine, asked()).text == ask(theirs, asked()).text
    picks = [member for member in members_of(mine._quick._recorded, alone=False) if isinstance(member, Pick)]
    assert len(picks) == 4
