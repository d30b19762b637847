"""The decoding loop against transformers' own: the same tokens, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.decoding.decode import Decoding
from llm_magic.backends.accelerate.decoding.pace import Pace
from llm_magic.backends.accelerate.decoding.rollback import Rollback
from llm_magic.backends.accelerate.decoding.speculate import Proposal, Speculation
from tests import tiny
from tests.caches import given

TinyModel = Callable[[str], Path]
PROMPT = "The capital of France is Paris, and"
DECODERS = ("llama", "gpt2", "qwen3-moe", "gemma")
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}


class Gathered:
    """A streamer that keeps what it gets, and may do something at each token."""

    def __init__(self, on_token: Callable[[int], None] = lambda _count: None) -> None:
        self.steps: list[list[int]] = []
        self.ended = False
        self._on_token, self._saw_prompt = on_token, False

    def put(self, tokens: Any) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.steps.append(tokens.tolist())
        self._on_token(len(self.steps))

    def end(self) -> None:
        self.ended = True


class Parrot:
    """Proposes a known continuation; every ``wrong``-th token of the answer is made wrong."""

    priors = (0.9,)

    def __init__(self, text: Sequence[int], wrong: int = 0, most: int = 99) -> None:
        self.text, self.wrong, self.most = list(text), wrong, most

    def begin(self, ids: list[int], processors: Any, device: Any) -> None:
        pass

    def propose(self, ids: list[int], most: int) -> Proposal:
        places = range(len(ids), min(len(self.text), len(ids) + min(most, self.most)))
        return Proposal([self._token(place) for place in places])

    def _token(self, place: int) -> int:
        is_wrong = self.wrong and place % self.wrong == 0
        return (self.text[place] + 7) % tiny.VOCABULARY if is_wrong else self.text[place]


def eager_pace() -> Pace:
    """A pace for which sweeps take no longer with more tokens."""
    pace = Pace(clock=lambda: 0.0)
    for tokens in (1, 2, 3, 5, 9, 17):
        pace.add(tokens, 1.0)
    pace.add = lambda tokens, seconds: None  # type: ignore[method-assign] # no clock, no new times
    return pace


def parrot(text: Sequence[int], wrong: int = 0, most: int = 99) -> Speculation:
    return Speculation(Parrot(text, wrong, most), eager_pace())


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Callable[[str], Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    models: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in models:
            folder = tiny_model(name)
            is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
            auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
            models[name] = auto.from_pretrained(folder).eval()
        return models[name]

    return load


@pytest.fixture(scope="module")
def prompt(tiny_model: TinyModel) -> Any:
    """``[1, tokens]``: all tiny models have the same tokenizer."""
    import torch
    from transformers import AutoTokenizer

    return torch.tensor([AutoTokenizer.from_pretrained(tiny_model("llama"))(PROMPT).input_ids])


@pytest.fixture(scope="module")
def stock(model: Callable[[str], Any], prompt: Any) -> Callable[[str], list[int]]:
    """``stock("llama")``: prompt and answer by transformers' own loop, made once."""
    return cache(lambda name: answer(model(name), prompt)[0])


def answer(model: Any, ids: Any, decoding: Decoding | None = None, **options: Any) -> list[list[int]]:
    """Rows of prompt and answer, by the loop or by transformers' own."""
    import torch

    torch.manual_seed(options.pop("seed", 1))
    options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids)} | options
    if decoding is not None:
        options |= {"custom_generate": decoding, "streamer": decoding.streamer}
    return model.generate(input_ids=ids, **options).tolist()


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def lengths(cache: Any) -> set[int]:
    return {int(layer.get_seq_length()) for layer in cache.layers}


# ------------------------------------------------------------------------- as transformers does it


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("choice", [{}, SAMPLED, SAMPLED | {"seed": 5}, {"repetition_penalty": 1.5}])
def test_tokens_are_those_of_transformers(
    name: str, choice: dict[str, Any], model: Callable[[str], Any], prompt: Any
) -> None:
    decoding = Decoding(Gathered())
    wanted = answer(model(name), prompt, **choice)
    assert answer(model(name), prompt, decoding, **choice) == wanted
    streamed = [token for (token,) in decoding.streamer.steps]
    assert streamed == wanted[0][-len(streamed) :]
    assert decoding.streamer.ended
    assert decoding.counts.sweeps == len(streamed) - 1


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("choice", [{}, SAMPLED])
def test_a_batch_with_padding_and_rows_that_end_early(
    name: str, choice: dict[str, Any], model: Callable[[str], Any], prompt: Any
) -> None:
    import torch

    padding = torch.full((1, 3), 2)
    short = torch.cat([padding, prompt[:, 3:]], dim=1)
    ids = torch.cat([prompt, short, prompt.flip(1), prompt])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[0], [3], [0], [0]])).long()
    free = answer(model(name), ids, attention_mask=mask, eos_token_id=None, **choice)
    ends = [row[ids.shape[1] + early] for row, early in zip(free, (3, 9, 5, 12), strict=True)]
    options = choice | {"attention_mask": mask, "eos_token_id": ends[:2], "pad_token_id": 2}
    wanted = answer(model(name), ids, **options)
    decoding = Decoding(Gathered(), speculation=parrot(wanted[0]))
    assert answer(model(name), ids, decoding, **options) == wanted
    assert any(row[-1] == 2 for row in wanted), "a row should have ended before the others"
    assert decoding.counts.proposed == 0
    assert [list(step) for step in zip(*decoding.streamer.steps, strict=True)] == [
        row[ids.shape[1] :] for row in wanted
    ]


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt2"])
def test_without_a_cache(name: str, model: Callable[[str], Any], prompt: Any) -> None:
    wanted = answer(model(name), prompt, use_cache=False)
    decoding = Decoding(Gathered(), recover=lambda _error: True)
    with fails_at(decoder_layers(model(name))[1], call=3):
        assert answer(model(name), prompt, decoding, use_cache=False) == wanted
    assert decoding.counts.repeats == 1


# ------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("part_tokens", [1, 4, 5, 100])
@pytest.mark.parametrize("cached", [0, 6])
def test_a_prompt_in_parts_behind_a_kept_cache(
    name: str,
    part_tokens: int,
    cached: int,
    model: Callable[[str], Any],
    prompt: Any,
    stock: Callable[[str], list[int]],
) -> None:
    loaded = model(name)
    cache = new_cache(loaded)
    if cached:
        loaded(prompt[:, :cached], **given(cache), use_cache=True)
    passes = Calls(decoder_layers(loaded)[0])
    decoding = Decoding(Gathered(), part_tokens=part_tokens)
    with passes:
        tokens = answer(loaded, prompt, decoding, **given(cache))
    assert tokens == [stock(name)]
    parts = len(range(cached, prompt.shape[1], part_tokens))
    assert passes.count == parts + decoding.counts.sweeps
    assert lengths(cache) == {len(tokens[0]) - 1}


def test_a_padded_prompt_in_parts(model: Callable[[str], Any], prompt: Any) -> None:
    import torch

    ids = torch.cat([torch.cat([torch.full((1, 5), 2), prompt[:, 5:]], dim=1), prompt])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[5], [0]])).long()
    wanted = answer(model("llama"), ids, attention_mask=mask)
    assert answer(model("llama"), ids, Decoding(Gathered(), part_tokens=3), attention_mask=mask) == wanted


# --------------------------------------------------------------------------------------- failures


def decoder_layers(model: Any) -> Any:
    return {"gpt2": lambda: model.transformer.h, "mamba": lambda: model.backbone.layers}.get(
        model.config.model_type, lambda: model.model.layers
    )()


class Calls:
    """Counts the calls of a module while it is entered."""

    def __init__(self, module: Any) -> None:
        self.module, self.count = module, 0

    def __enter__(self) -> None:
        self._handle = self.module.register_forward_pre_hook(self._add)

    def __exit__(self, *_error: object) -> None:
        self._handle.remove()

    def _add(self, _module: Any, _inputs: Any) -> None:
        self.count += 1


class NoRoom(RuntimeError):
    pass


@contextmanager
def fails_at(module: Any, call: int, times: int = 1, error: type[BaseException] = NoRoom) -> Iterator[None]:
    """Calls ``call``, ``call + 1``, ... of a module raise, ``times`` of them."""
    seen = [0]

    def before(_module: Any, _inputs: Any) -> None:
        seen[0] += 1
        if call <= seen[0] < call + times:
            raise error("at a layer")

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
    assert seen[0] >= call, "the failure was never reached"


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("speculates", [False, True])
def test_a_pass_that_failed_is_repeated(
    name: str,
    layer: int,
    call: int,
    speculates: bool,
    model: Callable[[str], Any],
    prompt: Any,
    stock: Callable[[str], list[int]],
) -> None:
    """Calls 1 and 2 read parts of the prompt, the others decode or verify."""
    loaded, wanted = model(name), stock(name)
    asked: list[BaseException] = []
    decoding = Decoding(
        Gathered(),
        part_tokens=-(-prompt.shape[1] // 2),
        speculation=parrot(wanted, wrong=5, most=4) if speculates else None,
        recover=lambda error: asked.append(error) is None,
    )
    cache = new_cache(loaded)
    with fails_at(decoder_layers(loaded)[layer], call):
        assert answer(loaded, prompt, decoding, **given(cache)) == [wanted]
    assert [type(error) for error in asked] == [NoRoom]
    assert decoding.counts.repeats == 1
    assert lengths(cache) == {len(wanted) - 1}
    assert (decoding.counts.accepted > 0) == speculates


def test_several_repeats_and_no_more_than_that(model: Callable[[str], Any], prompt: Any) -> None:
    layer = decoder_layers(model("llama"))[2]
    wanted = answer(model("llama"), prompt)
    with fails_at(layer, call=4, times=3):
        assert answer(model("llama"), prompt, Decoding(Gathered(), recover=lambda _error: True)) == wanted
    decoding = Decoding(Gathered(), recover=lambda _error: True)
    with pytest.raises(NoRoom), fails_at(layer, call=4, times=4):
        answer(model("llama"), prompt, decoding)
    assert len(decoding.streamer.steps) == 3
    assert not decoding.streamer.ended


@pytest.mark.parametrize("speculates", [False, True])
def test_an_error_that_is_not_recovered_from_goes_up_and_leaves_a_true_cache(
    speculates: bool, model: Callable[[str], Any], prompt: Any
) -> None:
    import torch

    loaded = model("llama")
    (wanted,) = answer(loaded, prompt)
    for layer in range(tiny.LAYERS):
        cache = new_cache(loaded)
        decoding = Decoding(Gathered(), speculation=parrot(wanted, wrong=4) if speculates else None)
        with pytest.raises(NoRoom), fails_at(decoder_layers(loaded)[layer], call=4):
            answer(loaded, prompt, decoding, **given(cache))
        held = prompt.shape[1] + len(decoding.streamer.steps) - 1
        assert lengths(cache) == {held}
        ids = torch.tensor([wanted[: held + 1]])
        rest = len(wanted) - held - 1
        assert answer(loaded, ids, **given(cache), max_new_tokens=rest) == [wanted]


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_states_that_cannot_go_back_are_not_repeated(
    name: str, model: Callable[[str], Any], prompt: Any
) -> None:
    loaded = model(name)
    asked: list[BaseException] = []
    layers = loaded.decoder.block if name == "t5" else decoder_layers(loaded)
    decoding = Decoding(Gathered(), recover=lambda error: asked.append(error) is None)
    with pytest.raises(NoRoom), fails_at(layers[1], call=3):
        answer(loaded, prompt, decoding)
    assert not asked
    speculation = parrot(answer(loaded, prompt)[0])
    decoding = Decoding(Gathered(), speculation=speculation)
    assert answer(loaded, prompt, decoding) == answer(loaded, prompt)
    assert decoding.counts.proposed == 0


def test_what_a_failed_pass_held_is_free_when_recovery_is_asked(
    model: Callable[[str], Any], prompt: Any
) -> None:
    import weakref

    import torch

    held: list[Any] = []

    def before(_module: Any, _inputs: Any) -> None:
        if not held:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise NoRoom

    decoding = Decoding(Gathered(), recover=lambda _error: held[0]() is None)
    handle = decoder_layers(model("llama"))[1].register_forward_pre_hook(before)
    try:
        assert answer(model("llama"), prompt, decoding) == answer(model("llama"), prompt)
    finally:
        handle.remove()


# ----------------------------------------------------------------------------------------- stops


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 7, 11])
def test_a_stop_at_any_token_leaves_a_cache_to_go_on_with(
    name: str, at: int, model: Callable[[str], Any], prompt: Any, stock: Callable[[str], list[int]]
) -> None:
    """With four tokens verified at once most stops are in the middle of them."""
    import torch

    def stop(count: int) -> None:
        if count == at:
            raise Stop

    loaded, wanted = model(name), stock(name)
    cache = new_cache(loaded)
    decoding = Decoding(Gathered(stop), speculation=parrot(wanted, wrong=5, most=4))
    with pytest.raises(Stop):
        answer(loaded, prompt, decoding, **given(cache))
    came = [token for (token,) in decoding.streamer.steps]
    assert came == wanted[prompt.shape[1] : prompt.shape[1] + at]
    assert lengths(cache) == {prompt.shape[1] + at - 1}
    ids = torch.tensor([wanted[: prompt.shape[1] + at]])
    assert answer(loaded, ids, **given(cache), max_new_tokens=24 - at) == [wanted]


# ----------------------------------------------------------------------------------- quick steps


class Aside:
    """Quick steps that keep the tokens of the cache aside, as recorded steps do; some shapes are refused."""

    calls_model = False

    def __init__(self, model: Any, refused: Sequence[int] = (), fails: int = 0) -> None:
        self.model, self.refused, self.fails = model, refused, fails
        self.asked: list[int] = []
        self.given_back: list[int] = []
        self.steps = 0
        self._cache: Any = None
        self._own: Any = None

    def step(self, cache: Any, batch: int, tokens: int) -> Any:
        assert batch == 1
        self.asked.append(tokens)
        if tokens in self.refused:
            return None
        if self._own is None:
            self._cache, self._own = cache, new_cache(self.model)
            self._move(cache, self._own, cache.get_seq_length())
        return self._sweep

    def give_back(self, length: int) -> None:
        self.given_back.append(length)
        self._move(self._own, self._cache, length)
        self._cache = self._own = None

    def _sweep(self, ids: Any, cache_length: int) -> Any:
        self.steps += 1
        if self.steps == self.fails:
            raise NoRoom
        for layer in self._own.layers:
            layer.keys, layer.values = (states[:, :, :cache_length] for states in (layer.keys, layer.values))
        return self.model(ids, **given(self._own), use_cache=True).logits

    @staticmethod
    def _move(source: Any, target: Any, length: int) -> None:
        for old, new in zip(source.layers, target.layers, strict=True):
            new.is_initialized = False
            new.update(old.keys[:, :, :length].clone(), old.values[:, :, :length].clone())
            old.keys = old.values = None
            old.is_initialized = False


@pytest.mark.parametrize(
    ("refused", "fails"), [((), 0), ((5,), 0), ((1,), 0), ((3, 5), 0), ((1, 2, 3, 5), 0), ((5,), 2), ((), 1)]
)
@pytest.mark.parametrize("speculates", [False, True])
def test_quick_steps_take_over_and_give_back(
    refused: tuple[int, ...],
    fails: int,
    speculates: bool,
    model: Callable[[str], Any],
    prompt: Any,
    stock: Callable[[str], list[int]],
) -> None:
    loaded, wanted = model("llama"), stock("llama")
    quick, cache = Aside(loaded, refused, fails), new_cache(loaded)
    speculation = parrot(wanted, wrong=4, most=4) if speculates else None
    decoding = Decoding(Gathered(), speculation=speculation, quick=quick, recover=lambda _error: True)
    assert answer(loaded, prompt, decoding, **given(cache)) == [wanted]
    assert lengths(cache) == {len(wanted) - 1}
    taken = [tokens for tokens in quick.asked if tokens not in refused]
    assert quick.steps == len(taken)
    assert len(quick.asked) == decoding.counts.sweeps + decoding.counts.repeats
    assert decoding.counts.repeats == (1 if 0 < fails <= quick.steps else 0)
    assert bool(quick.given_back) == bool(taken)
    assert answer(loaded, prompt, **given(cut(cache, prompt.shape[1] - 1))) == [wanted]


def cut(cache: Any, length: int) -> Any:
    from llm_magic.backends.accelerate.decoding.kv_cache import crop

    assert crop(cache, length)
    return cache


# ---------------------------------------------------------------------------------------- rollback


def filled(kind: str, tokens: int) -> Any:
    import torch
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    layer = DynamicLayer() if kind == "full" else DynamicSlidingWindowLayer(sliding_window=6)
    cache = Cache(layers=[layer])
    feed(cache, range(tokens))
    assert torch.is_tensor(layer.keys)
    return cache


def feed(cache: Any, values: Sequence[int]) -> None:
    import torch

    states = torch.tensor(list(values), dtype=torch.float32)[None, None, :, None]
    cache.layers[0].update(states, states + 100)


def held(cache: Any) -> tuple[list[float], list[float]]:
    return cache.layers[0].keys.flatten().tolist(), cache.layers[0].values.flatten().tolist()


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("before", [1, 4, 5, 6, 12])
@pytest.mark.parametrize("fed", [1, 3, 8])
@pytest.mark.parametrize("torn", ["whole", "keys only", "counted only", "untouched"])
def test_a_torn_pass_is_taken_back_exactly(kind: str, before: int, fed: int, torn: str) -> None:
    cache, wanted = filled(kind, before), filled(kind, before)
    rollback = Rollback(cache)
    rollback.start()
    layer = cache.layers[0]
    values = layer.values
    if torn in ("whole", "keys only"):
        feed(cache, range(before, before + fed))
    if torn == "keys only":
        layer.values = values
    if torn == "counted only" and kind == "window":
        layer.cumulative_length += fed
    assert rollback.cut(before, before)
    assert held(cache) == held(wanted)
    assert layer.get_seq_length() == before
    rollback.finish()
    feed(cache, [before])
    feed(wanted, [before])
    assert held(cache) == held(wanted)


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("before", [1, 4, 5, 6, 12])
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_accepted_part_of_a_pass_stays(kind: str, before: int, kept: int) -> None:
    cache, wanted = filled(kind, before), filled(kind, before + kept)
    rollback = Rollback(cache)
    rollback.start()
    feed(cache, range(before, before + 4))
    assert rollback.after(before, 4, kept)
    rollback.finish()
    assert held(cache) == held(wanted)
    assert cache.layers[0].get_seq_length() == before + kept


def test_a_window_that_has_forgotten_says_so() -> None:
    cache = filled("window", 12)
    assert not Rollback(cache).cut(10, 10)
    assert Rollback(cache).cut(12, 12)
    assert not Rollback(filled("full", 3)).cut(5, 5)
