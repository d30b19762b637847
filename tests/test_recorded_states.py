"""Recurrent layers as recorded: a token of one is a list of kernels, which change the states of the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from transformers import DynamicCache  # noqa: E402

from llm_magic.backends.accelerate.kernels import cpu_products  # noqa: E402
from llm_magic.backends.accelerate.layer_cache import state_in  # noqa: E402
from llm_magic.backends.accelerate.recorded.attending import Attention  # noqa: E402
from llm_magic.backends.accelerate.recorded.states import StateStep  # noqa: E402
from llm_magic.backends.accelerate.served import step_kernels  # noqa: E402
from tests.caches import given  # noqa: E402
from tests.test_recorded import answers, equal, kinds_of_parts, layers_of, made, members_of, recorded, step  # noqa: E402
from tests.test_recurrent_steps import SIZES, mixers_of, to_mixer  # noqa: E402

# Older ones ask the cache in another way, and are parts of a layer as a whole.
pytestmark = pytest.mark.skipif(
    not (cpu_products.is_there() and hasattr(DynamicCache, "get_recurrent_state")),
    reason="no such kernels or states",
)
TOKENS = tuple((place, place + 1) for place in range(30, 36))
NAMES = sorted({*SIZES, "kimi_linear", "lfm2"})


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def served(name: str, dtype: Any = torch.bfloat16) -> Any:
    return made(name, dtype, **SIZES.get(name, {})).requires_grad_(False)


def steps_of(held: Any) -> list[StateStep]:
    """The kernels of states, in chains and beside them."""
    return [member for member in members_of(held) if isinstance(member, StateStep)]


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_recorded_with_their_mixers(name: str) -> None:
    model = served(name)
    theirs = answers(model, TOKENS)
    held = recorded(model)
    assert equal(answers(model, TOKENS), theirs)
    assert held.status == "recorded layers"
    if name == "bailing_hybrid" and mixers_of(model)[0].conv1d.weight.dtype != torch.bfloat16:
        return  # since transformers 5.24: torch's, as the kernel computes with one dtype
    of_each = 1 if name == "lfm2" else 2
    assert len(steps_of(held)) == of_each * len(mixers_of(model)), "a convolution, and what it is for"
    assert not any(
        "mixer" in path or "attn" in path or "mamba" in path
        for layer in held._layers
        for bound in layer._bound.values()
        for path in [part.name for part in bound._program.parts if getattr(part, "kind", "") == "module"]
    )
    held.undo()
    assert equal(answers(model, TOKENS), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qwen3_next", "granitemoehybrid", "kimi_linear"])
def test_in_other_dtypes(name: str, dtype: Any) -> None:
    """In float32 linear layers are torch's: kernels of states are called one by one."""
    model = served(name, dtype)
    theirs = answers(model, TOKENS)
    held = recorded(model)
    for mine, right in zip(answers(model, TOKENS), theirs, strict=True):
        torch.testing.assert_close(
            mine, right, atol=float(right.abs().max()) * 100 * torch.finfo(dtype).eps, rtol=0
        )
    assert len(steps_of(held)) == 2 * len(mixers_of(model))


def test_several_tokens_and_one_in_turn() -> None:
    """Several are the module's own."""
    model, sweeps = served("qwen3_5_text"), ((30, 31), (31, 34), (34, 35), (35, 36), (36, 38), (38, 39))
    theirs = answers(model, sweeps)
    recorded(model)
    assert equal(answers(model, sweeps), theirs)


def test_attention_beside_a_state_in_the_same_layer() -> None:
    """Of Falcon-H1; keys and values of the layer go on in their place."""
    model = served("falcon_h1")
    theirs = answers(model, TOKENS)
    held = recorded(model, context=64)
    assert equal(answers(model, TOKENS), theirs)
    members = members_of(held, alone=False)
    assert sum(isinstance(member, Attention) for member in members) == 4


def test_several_texts_at_once() -> None:
    model = served("granitemoehybrid")
    theirs = answers(model, TOKENS, batch=2)
    held = recorded(model)
    assert equal(answers(model, TOKENS, batch=2), theirs)
    assert not steps_of(held)
    assert kinds_of_parts(held) >= {"module"}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What computed by a mixer's own code, once for each."""
    found: list[Any] = []
    usual = step_kernels.StateKernel.changed

    def changed(kernel: Any, *args: Any) -> Any:
        found.append(kernel)
        return usual(kernel, *args)

    monkeypatch.setattr(step_kernels.StateKernel, "changed", changed)
    return found


def moved(kept: Any) -> None:
    for layer in kept.layers:
        if hasattr(layer, "recurrent_states"):
            layer.recurrent_states[0] = layer.recurrent_states[0].clone()
            layer.conv_states[0] = layer.conv_states[0].clone()


def spread(kept: Any) -> None:
    """As states of another order."""
    for layer in kept.layers:
        if hasattr(layer, "recurrent_states"):
            state = layer.recurrent_states[0]
            layer.recurrent_states[0] = state.transpose(2, 3).contiguous().transpose(2, 3)


def recording_past(kept: Any) -> None:
    for layer in kept.layers:
        if hasattr(layer, "recurrent_states"):
            layer.activate_past_recording()


def of_somebody(kept: Any) -> None:
    """Who halves what a mixer finds."""
    usual = kept.get_conv_state
    kept.get_conv_state = lambda *args, **options: usual(*args, **options).mul_(0.5)


def of_a_layer(kept: Any) -> None:
    for layer in kept.layers:
        if hasattr(layer, "recurrent_states"):
            usual = type(layer).update_recurrent_state.__get__(layer)
            layer.update_recurrent_state = lambda states, *args, usual=usual, **options: usual(
                states * 0.5, *args, **options
            )


def of_another_class(kept: Any) -> None:
    class Halving(DynamicCache):
        def update_recurrent_state(self, states: Any, *args: Any, **options: Any) -> Any:
            return super().update_recurrent_state(states * 0.5, *args, **options)

    kept.__class__ = Halving


CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "moved": (moved, True),
    "another order": (spread, False),
    "recording past": (recording_past, False),
    "a method of somebody": (of_somebody, False),
    "a method of a layer": (of_a_layer, False),
    "another class": (of_another_class, False),
}
"""And whether layers run as recorded then."""


@pytest.mark.parametrize("name", CHANGES)
def test_caches_that_change_between_tokens(name: str, used: list[Any]) -> None:
    change, is_recorded = CHANGES[name]
    model = served("qwen3_5_text", torch.bfloat16)
    kept = DynamicCache(config=model.config)
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    held = recorded(model)
    model(ids[:, :30], **given(kept))
    step(model, kept, ids[:, :31])
    assert len(steps_of(held)) == 4
    other = copy.deepcopy(kept)
    change(kept)
    change(other)
    used.clear()
    mine = [step(model, kept, ids[:, :end]) for end in (32, 33)]
    assert bool(used) != is_recorded
    held.undo()
    theirs = [step(model, other, ids[:, :end]) for end in (32, 33)]
    assert equal(mine, theirs)


def test_states_that_nobody_may_change() -> None:
    model = served("qwen3_5_text")
    kept = DynamicCache(config=model.config)
    assert state_in(kept, 0, "recurrent_states", 0) is None, "it has none yet"
    model(torch.arange(5)[None], **given(kept))
    assert state_in(kept, 0, "recurrent_states", 0) is kept.layers[0].recurrent_states[0]
    assert state_in(kept, 1, "recurrent_states", 0) is None, "keys and values"
    assert state_in(kept, 0, "recurrent_states", 1) is None
    assert state_in(kept, 4, "recurrent_states", 0) is None


def test_a_mixer_that_does_not_use_what_a_kernel_has_made() -> None:
    """It gives the cache other numbers, which nobody would see in a recording."""
    model = served("qwen3_5_text")
    kind = type(mixers_of(model)[0])
    usual, (name,) = kind.forward, to_mixer(mixers_of(model)[0], None)

    def forward(self: Any, hidden_states: Any, **options: Any) -> Any:
        out, cache = usual(self, hidden_states, **options), options[name]
        state = cache.get_recurrent_state(self.layer_idx)
        cache.update_recurrent_state(state * 0.5, self.layer_idx)
        return out

    for mixer in mixers_of(model):
        mixer.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    theirs = answers(model, TOKENS)
    held = recorded(model)
    assert equal(answers(model, TOKENS), theirs)
    assert not steps_of(held)
    assert len(layers_of(model)) == len(held._layers)
