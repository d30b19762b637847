"""Layers that are computed before they are called: when that is, and that whoever comes between them is heard."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from transformers import DynamicCache  # noqa: E402

from llm_magic.backends.accelerate.decoding import cpu_attention  # noqa: E402
from llm_magic.backends.accelerate.looked_at import ONLY_LOOKS  # noqa: E402
from llm_magic.backends.accelerate.recorded import ahead, chain, lines  # noqa: E402
from llm_magic.backends.accelerate.served.cpu_linear import serve_linear  # noqa: E402
from llm_magic.events import SweepEvent, TokenEvent  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from tests.caches import given  # noqa: E402
from tests.engines import ask, load, request  # noqa: E402
from tests.test_packing import bitsandbytes_layer  # noqa: E402
from tests.test_recorded import layers_of, made, recorded, served_mixture, step  # noqa: E402

pytestmark = pytest.mark.skipif(not cpu_attention.is_there(), reason="no kernels for this processor")
IDS = torch.randint(5, 300, (1, 80), generator=torch.Generator().manual_seed(8))
FIRST = 21
Between = Callable[[int, Any], None]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Calls:
    """How often lists of kernels were called, for layers ahead and for one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = self.alone = 0
        self.error: type[BaseException] | None = None
        usual = chain.in_turn()

        def run(words: Any, *, is_ahead: bool) -> None:
            self.ahead += is_ahead
            self.alone += not is_ahead
            usual(words)
            if self.error is not None:
                raise self.error

        monkeypatch.setattr(ahead, "in_turn", lambda: lambda words: run(words, is_ahead=True))
        monkeypatch.setattr(chain, "in_turn", lambda: lambda words: run(words, is_ahead=False))

    def taken(self) -> tuple[int, int]:
        """Those since the last time."""
        found, self.ahead, self.alone = (self.ahead, self.alone), 0, 0
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


class Text:
    """One that goes on token by token: logits of each, and the cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.end = model, FIRST
        self.kept = DynamicCache(config=model.config)
        self.logits = [model(IDS[:, :FIRST], **given(self.kept), use_cache=True).logits[:, -1:]]

    def go_on(self, tokens: int = 1, each: int = 1) -> Text:
        for _ in range(tokens):
            self.end += each
            self.logits.append(step(self.model, self.kept, IDS[:, : self.end], each))
        return self

    @property
    def tensors(self) -> list[Any]:
        return [*self.logits, *(part for layer in self.kept.layers for part in (layer.keys, layer.values))]

    def check(self, other: Text) -> None:
        assert all(map(torch.equal, self.tensors, other.tensors))
        assert len(self.tensors) == len(other.tensors)


def warm(model: Any, calls: Calls) -> Text:
    """A text whose layers are ahead: the first token is looked at, the second one recorded."""
    text = Text(model).go_on(2)
    calls.taken()
    text.go_on()
    assert calls.taken() == (1, 0)
    return text


@pytest.fixture
def model() -> Any:
    return made("llama")


@pytest.fixture
def plain() -> Any:
    """The same model, which nobody records."""
    return made("llama")


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "olmo2", "glm4", "gemma", "granite", "phi3"])
def test_all_layers_are_one_call(name: str, calls: Calls) -> None:
    model = made(name)
    theirs = Text(model).go_on(8)
    recorded(model, context=64)
    mine = Text(model).go_on(2)
    calls.taken()
    mine.go_on(6).check(theirs)
    assert calls.taken() == (6, 0)


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        *[(name, torch.bfloat16) for name in ("qwen3_moe", "mixtral", "glm4_moe", "glm4_moe_lite")],
        *[(name, torch.float32) for name in ("glm4_moe", "glm4_moe_lite", "deepseek_v3")],
    ],
)
def test_mixtures_of_experts(name: str, routers: Any, calls: Calls) -> None:
    """Routers, too, which find the largest of equal numbers in one order; those of GLM may be in float32."""
    model = served_mixture(name, routers)
    theirs = Text(model).go_on(8)
    recorded(model, context=64)
    mine = Text(model).go_on(2)
    calls.taken()
    mine.go_on(6).check(theirs)
    assert calls.taken() == (6, 0)


def test_tokens_at_a_time(model: Any, calls: Calls) -> None:
    theirs = Text(model).go_on(2).go_on(3, 3).go_on(2)
    recorded(model)
    mine = Text(model).go_on(2).go_on(2, 3)
    calls.taken()
    mine.go_on(1, 3).go_on(2).check(theirs)
    assert calls.taken() == (3, 0)


def test_so_many_bytes_at_a_time(model: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can interrupt a call."""
    theirs = Text(model).go_on(5)
    size = sum(parameter.nbytes for parameter in layers_of(model)[0].parameters() if parameter.dim() > 1)
    for most, expected in ((2 * size, (2, 0)), (3 * size, (1, 1)), (size - 1, (0, 4))):
        monkeypatch.setattr(lines, "AHEAD_BYTES", most)
        held = recorded(model)
        mine = Text(model).go_on(4)
        calls.taken()
        mine.go_on().check(theirs)
        assert calls.taken() == expected
        held.undo()


# ------------------------------------------------------------------------------------- what comes between layers


def in_place(_module: Any, _inputs: Any, output: Any) -> None:
    output.mul_(1.25)


def anew(_module: Any, _inputs: Any, output: Any) -> Any:
    return output * 1.25


def before(_module: Any, inputs: Any) -> Any:
    return (inputs[0] * 1.25, *inputs[1:])


HOOKS: dict[str, Callable[[Any], Any]] = {
    "of the layer": lambda layer: layer.register_forward_hook(anew),
    "in place": lambda layer: layer.register_forward_hook(in_place),
    "before it": lambda layer: layer.register_forward_pre_hook(before),
    "inside": lambda layer: layer.mlp.register_forward_hook(anew),
    "everywhere": lambda _layer: torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: anew(module, inputs, output) if hasattr(module, "mlp") else None
    ),
}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_heard(hook: str, place: int, model: Any, plain: Any, calls: Calls) -> None:
    def told(text: Text) -> Text:
        handle = HOOKS[hook](layers_of(text.model)[place])
        text.go_on(2)
        handle.remove()
        return text.go_on(2)

    theirs = told(Text(plain).go_on(3))
    recorded(model, context=64)
    mine = told(warm(model, calls))
    mine.check(theirs)
    calls.taken()
    mine.go_on()
    assert calls.taken() == (1, 0)


@pytest.mark.parametrize("place", range(4))
def test_whoever_is_around_a_layer_is_heard(place: int, model: Any, plain: Any, calls: Calls) -> None:
    """And once they are gone, layers are ahead again."""
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        layer = layers_of(text.model)[place]
        usual = layer.forward

        def forward(states: Any, *args: Any, usual: Any = usual, **kwargs: Any) -> Any:
            states.mul_(1.25)
            return usual(states, *args, **kwargs)

        layer.forward = forward
        text.go_on(2)
        layer.forward = usual
        text.go_on(2)
    mine.check(theirs)
    calls.taken()
    mine.go_on(2)
    assert calls.taken() == (2, 0)


def test_hooks_that_only_look_come_between(model: Any, plain: Any, calls: Calls) -> None:
    theirs, seen = Text(plain).go_on(5), []
    recorded(model, context=64)
    mine = warm(model, calls)

    def look(module: Any, _inputs: Any) -> None:
        seen.append(module.self_attn.layer_idx)

    setattr(look, ONLY_LOOKS, True)
    handles = [layer.register_forward_pre_hook(look) for layer in layers_of(model)]
    mine.go_on(2).check(theirs)
    assert seen == [0, 1, 2, 3] * 2
    assert calls.taken() == (2, 0)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("place", range(4))
def test_a_layer_that_is_left_out(place: int, model: Any, plain: Any, calls: Calls) -> None:
    """What it computed before is not kept, neither now nor later."""
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        every = list(text.model.model.layers)
        for _ in range(3):
            text.model.model.layers = torch.nn.ModuleList(every[:place] + every[place + 1 :])
            text.go_on()
            text.model.model.layers = torch.nn.ModuleList(every)
            text.go_on()
    mine.check(theirs)


def test_another_order(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        every = list(text.model.model.layers)
        text.model.model.layers = torch.nn.ModuleList([every[0], every[2], every[1], every[3]])
        text.go_on(4)
        text.model.model.layers = torch.nn.ModuleList(every)
        text.go_on(3)
    mine.check(theirs)


@pytest.mark.parametrize("place", [1, 3])
def test_a_cache_that_changes_between_layers(place: int, model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):

        def crop(_module: Any, _inputs: Any, text: Text = text) -> None:
            layer = text.kept.layers[place]
            layer.keys, layer.values = layer.keys[..., 1:, :] * 2, layer.values[..., 1:, :]

        setattr(crop, ONLY_LOOKS, True)  # it does not
        handle = layers_of(text.model)[place].register_forward_pre_hook(crop)
        text.go_on(1)
        handle.remove()
        text.go_on(2)
    mine.check(theirs)


def test_somebody_looks_on_in_the_middle(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        layer = layers_of(text.model)[2]
        usual = type(layer).__call__

        def call(self: Any, *args: Any, usual: Any = usual, layer: Any = layer, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self is layer):
                return usual(self, *args, **kwargs)

        type(layer).__call__ = call
        text.go_on(2)
        type(layer).__call__ = usual
        text.go_on(2)
    mine.check(theirs)


def new_values(layer: Any) -> None:
    layer.values = layer.values * 1.25


def new_layer(kept: Any, index: int) -> None:
    kept.layers[index] = copy.deepcopy(kept.layers[index])
    kept.layers[index].keys = kept.layers[index].keys * 1.25


CACHES: dict[str, Callable[[Any, int], Any]] = {
    "new values": lambda kept, index: new_values(kept.layers[index]),
    "keys in place": lambda kept, index: kept.layers[index].keys.mul_(1.25),
    "values in place": lambda kept, index: kept.layers[index].values.mul_(1.25),
    "another layer": new_layer,
}


@pytest.mark.parametrize("change", CACHES)
def test_a_cache_that_a_class_changes_between_layers(
    change: str, model: Any, plain: Any, calls: Calls
) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        with calling(text.model, 2, lambda text=text: CACHES[change](text.kept, 2)):
            text.go_on(2)
        text.go_on(2)
    mine.check(theirs)


@contextmanager
def calling(model: Any, place: int, first: Callable[[], object]) -> Iterator[None]:
    """A class of layers that does something of its own before one of them."""
    kind, layer = type(layers_of(model)[place]), layers_of(model)[place]
    usual = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is layer:
            first()
        return usual(self, *args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = usual


def test_in_inference_mode_nobody_can_tell_what_changes(model: Any, plain: Any, calls: Calls) -> None:
    """Tensors do not count changes there, so layers are computed when they are called."""
    kind = type(layers_of(model)[0])
    usual = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = usual(self, *args, **kwargs)
        found += 0.125
        return found

    recorded(model, context=64)
    mine = warm(model, calls)
    theirs = Text(plain).go_on(3)
    kind.__call__ = call
    try:
        with torch.inference_mode():
            mine.go_on(3)
            theirs.go_on(3)
    finally:
        kind.__call__ = usual
    mine.go_on(2).check(theirs.go_on(2))
    calls.taken()
    mine.go_on(2)
    assert calls.taken() == (2, 0)


@pytest.mark.parametrize("what", ["before", "after", "rotation"])
def test_numbers_that_change_where_they_are(what: str, model: Any, plain: Any, calls: Calls) -> None:
    """Without a hook: a class that calls its layers so."""
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        layer = layers_of(text.model)[2]
        usual = type(layer).__call__

        def call(
            self: Any, states: Any, *args: Any, usual: Any = usual, layer: Any = layer, **kwargs: Any
        ) -> Any:
            if self is not layer:
                return usual(self, states, *args, **kwargs)
            if what == "before":
                states.mul_(1.25)
            if what == "rotation":
                kwargs["position_embeddings"][0].mul_(1.25)
            found = usual(self, states, *args, **kwargs)
            return found.mul_(1.25) if what == "after" else found

        type(layer).__call__ = call
        text.go_on(2)
        type(layer).__call__ = usual
        text.go_on(2)
    mine.check(theirs)


# ----------------------------------------------------------------------------------------------------- weights


def put_data(module: Any) -> None:
    module.weight.data = module.weight.data * 1.5


def put_parameter(module: Any) -> None:
    module.weight = torch.nn.Parameter(module.weight * 1.5, requires_grad=False)


def in_its_place(module: Any) -> None:
    module.weight.mul_(1.5)


def put_part(module: Any) -> None:
    """The first numbers of more."""
    more = torch.cat([module.weight * 1.5] * 2)
    module.weight.data = more[: len(module.weight)]


@pytest.mark.parametrize("change", [put_data, put_parameter, in_its_place, put_part])
@pytest.mark.parametrize("path", ["mlp.up_proj", "self_attn.o_proj", "input_layernorm"])
@pytest.mark.parametrize("place", [0, 2])
def test_other_weights(change: Any, path: str, place: int, model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        change(layers_of(text.model)[place].get_submodule(path))
        text.go_on(4)
    mine.check(theirs)


def test_layers_are_ahead_again_with_other_weights(model: Any, calls: Calls) -> None:
    recorded(model, context=64)
    mine = warm(model, calls)
    for number in range(6):
        put_data(layers_of(model)[number % 4].mlp.up_proj)
        mine.go_on(2)
        calls.taken()
        mine.go_on(2)
        assert calls.taken() == (2, 0)


def moved(linear: Any) -> None:
    """As ``Module._apply`` does it, and others have the memory then."""
    before = linear.weight.data
    linear.weight.data = before.clone()
    before.fill_(0x77)


def test_packed_weights_that_are_elsewhere(model: Any, plain: Any, calls: Calls) -> None:
    pytest.importorskip("bitsandbytes")
    for each in (model, plain):
        for layer in layers_of(each):
            for name in ("gate_proj", "up_proj"):
                packed = bitsandbytes_layer(getattr(layer.mlp, name), "nf4").eval()
                serve_linear(packed)
                setattr(layer.mlp, name, packed)
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        for layer in layers_of(text.model):
            moved(layer.mlp.up_proj)
        text.go_on(4)
    mine.check(theirs)


def test_weights_that_are_elsewhere_in_each_sweep(
    model: Any, plain: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where slots take turns: the layer itself, and that before it, gather others four times; those behind it do once."""
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    gathered: list[int] = []

    def gather(modules: Any, *args: Any) -> Any:
        gathered.append(len(modules))
        return ahead.Ahead(modules, *args)

    monkeypatch.setattr(lines, "Ahead", gather)
    for text in (mine, theirs):
        linear = layers_of(text.model)[1].mlp.up_proj
        for _ in range(40):
            linear.weight.data = linear.weight.data.clone()
            text.go_on()
    mine.check(theirs)
    assert len(gathered) <= 10
    calls.taken()
    mine.go_on()
    assert calls.taken() == (1, 2)


# ----------------------------------------------------------------------------------------- what passes, and is over


def test_what_follows_is_learned_again_after_one_miss(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        with calling(text.model, 2, lambda text=text: CACHES["new values"](text.kept, 2)):
            text.go_on()
        text.go_on(6)
    mine.check(theirs)
    calls.taken()
    mine.go_on(2)
    assert calls.taken() == (2, 0)


def test_misses_are_forgotten(model: Any, plain: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_LONG", 16)
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        with calling(text.model, 1, lambda text=text: CACHES["new values"](text.kept, 1)):
            text.go_on(12)
        text.go_on(24)
    mine.check(theirs)
    calls.taken()
    mine.go_on(2)
    assert calls.taken() == (2, 0)


def test_a_hook_that_stays_hinders_its_layer_alone(
    model: Any, plain: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_LONG", 8)
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    handles = [layers_of(text.model)[3].mlp.register_forward_hook(anew) for text in (mine, theirs)]
    for text in (mine, theirs):
        text.go_on(12)
    calls.taken()
    mine.go_on(2).check(theirs.go_on(2))
    assert calls.ahead == 2
    for handle in handles:
        handle.remove()
    for text in (mine, theirs):
        text.go_on(16)
    calls.taken()
    mine.go_on(2).check(theirs.go_on(2))
    assert calls.taken() == (2, 0)


class Counting(DynamicCache):
    """With a method of somebody."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


def test_a_cache_of_somebody_passes(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(9)
    recorded(model, context=64)
    mine = warm(model, calls)
    other, usual = Counting(config=model.config), mine.kept
    model(IDS[:, :FIRST], **given(other), use_cache=True)
    for end in range(FIRST + 1, FIRST + 9):
        step(model, other, IDS[:, :end])
    calls.taken()
    assert mine.kept is usual
    mine.go_on(6).check(theirs)
    assert calls.taken() == (6, 0)


def test_fewer_numbers_at_the_same_address(model: Any, plain: Any, calls: Calls) -> None:
    """As of a layer that somebody prunes."""
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        mlp = layers_of(text.model)[1].mlp
        for linear in (mlp.up_proj, mlp.gate_proj):
            linear.weight.data = linear.weight.data[:32]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :32]
        text.go_on(3)
    mine.check(theirs)


def test_a_module_that_is_another_one(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(3)
    recorded(model, context=64)
    mine = warm(model, calls)
    for text in (mine, theirs):
        layers_of(text.model)[2].mlp.act_fn = torch.nn.GELU()
        text.go_on(3)
    mine.check(theirs)


# ------------------------------------------------------------------------------------------ errors and threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_call_leaves_no_tokens(
    error: type[BaseException], model: Any, plain: Any, calls: Calls
) -> None:
    theirs = Text(plain).go_on(6)
    recorded(model, context=64)
    mine = warm(model, calls)
    calls.error = error
    with pytest.raises(error):
        step(model, mine.kept, IDS[:, : mine.end + 1])
    assert {layer.get_seq_length() for layer in mine.kept.layers} == {mine.end}
    calls.error = None
    mine.go_on(3).check(theirs)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_an_error_between_layers(place: int, model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(6)
    held = recorded(model, context=64)
    mine = warm(model, calls)

    def halt(_module: Any, _inputs: Any) -> None:
        raise KeyboardInterrupt

    setattr(halt, ONLY_LOOKS, True)
    handle = layers_of(model)[place].register_forward_pre_hook(halt)
    with pytest.raises(KeyboardInterrupt):
        step(model, mine.kept, IDS[:, : mine.end + 1])
    handle.remove()
    lengths = [layer.get_seq_length() for layer in mine.kept.layers]
    assert lengths == [mine.end + 1] * place + [mine.end] * (4 - place)
    assert [layer.line._ready is not None for layer in held._layers] == [
        number >= place for number in range(4)
    ]
    held.rest()
    assert not any(layer.line._ready for layer in held._layers)
    for layer in mine.kept.layers[:place]:
        layer.keys, layer.values = layer.keys[..., : mine.end, :], layer.values[..., : mine.end, :]
    mine.go_on(3).check(theirs)


def test_two_threads(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(30)
    recorded(model, context=64)
    warm(model, calls)
    texts: list[Text] = []

    def run() -> None:
        with torch.no_grad():
            texts.append(Text(model).go_on(30))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 3
    for text in texts:
        text.check(theirs)


def test_a_model_as_it_was(model: Any, plain: Any, calls: Calls) -> None:
    theirs = Text(plain).go_on(6)
    held = recorded(model, context=64)
    mine = warm(model, calls)
    held.undo()
    mine.go_on(1)
    recorded(model, context=64)
    mine.go_on(2).check(theirs)


# ------------------------------------------------------------------------------------------------------ an engine


def test_answers_that_are_stopped(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama")
    engine = load(folder, "ram", spec=ModelSpec(str(folder), dtype="bfloat16"))
    try:
        asked = request("The capital of France", max_new_tokens=24)
        wanted = ask(engine, asked).text
        calls = Calls(monkeypatch)
        for after in (3, 7):
            stop, tokens = threading.Event(), 0

            def emit(event: Any, stop: threading.Event = stop, after: int = after) -> None:
                nonlocal tokens
                tokens += isinstance(event, TokenEvent)
                if tokens == after:
                    stop.set()

            engine.generate(asked, emit, stop)
            assert not any(layer.line._ready for layer in engine._quick._recorded._layers)
            assert ask(engine, asked).text == wanted
        assert calls.ahead > 40
    finally:
        engine.close()


def test_sweeps_that_are_measured_are_computed_layer_by_layer(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    engine = load(folder, "ram", spec=ModelSpec(str(folder), dtype="bfloat16"))
    try:
        calls = Calls(monkeypatch)
        answer = ask(engine, request("The capital of France", max_new_tokens=24))
        said = [event for event in answer.events if isinstance(event, SweepEvent)]
        assert said
        assert all(all(compute > 0 for _, _, compute in event.times) for event in said)
        assert calls.ahead
    finally:
        engine.close()
