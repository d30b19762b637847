"""Captured decode on a real GPU: the tokens of eager decode, resident and streamed, and steady memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding import attention  # noqa: E402
from llm_magic.backends.accelerate.decoding.capture import CapturedSteps  # noqa: E402
from llm_magic.backends.accelerate.decoding.cuda_graphs import CudaGraphs  # noqa: E402
from llm_magic.backends.accelerate.decoding.decode import Decoding  # noqa: E402
from llm_magic.backends.accelerate.decoding.warmup import WarmUp  # noqa: E402
from llm_magic.backends.accelerate.placement.blocks import BlockTensors, flat_buffer, pin, unpin  # noqa: E402
from llm_magic.backends.accelerate.placement.stream import AcceleratorStreams, Lane, RamSource  # noqa: E402
from tests.caches import cache_of  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402

DEVICE = "cuda:0"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    },
    "middle": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "initializer_range": 0.08,
    },
}
EVERY_SIZE = list(SIZES)
if IS_SIMULATED:  # one size is like the other then, and as quick as the CPU
    SIZES["middle"] |= {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.2}
    EVERY_SIZE.remove("middle")


def new_model(size: str, dtype: Any = torch.float32) -> Any:
    """Random weights, large enough for answers that vary; full precision, for tokens that do not depend on
    the order in which a kernel adds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        **SIZES[size],
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(DEVICE, dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    return model


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


class Timed(CudaGraphs):
    """Remembers how long each capture took, with its first run."""

    def __init__(self) -> None:
        super().__init__(torch.device(DEVICE))
        self.seconds: list[float] = []

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        torch.cuda.synchronize()
        started = time.perf_counter()
        replay = super().record(sweep)
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return replay


class Silent:
    """A streamer that nobody reads; counts the memory that is in use at each token."""

    def __init__(self) -> None:
        self.allocated: list[int] = []

    def put(self, _tokens: Any) -> None:
        self.allocated.append(torch.cuda.memory_allocated())

    def end(self) -> None:
        pass


@dataclass
class Streamed:
    """Some layers of a model in pinned RAM, brought by a lane."""

    lane: Lane
    handles: list[Any]
    memory: list[Any]

    def close(self) -> None:
        self.lane.close()
        for handle in self.handles:
            handle.remove()
        for buffer in self.memory:
            unpin(buffer)


def stream(model: Any, slots: int, every: int) -> Streamed:
    layers = list(model.model.layers)[::every]
    blocks = [BlockTensors(layer) for layer in layers]
    memory = [flat_buffer(block) for block in blocks]
    for block, buffer in zip(blocks, memory, strict=True):
        block.copy_to(buffer)
        assert pin(buffer)
    streams = AcceleratorStreams(DEVICE)
    rooms = [
        torch.empty(max(b.numel() for b in memory), dtype=torch.uint8, device=DEVICE) for _ in range(slots)
    ]
    lane = Lane([RamSource(buffer, streams) for buffer in memory], rooms, streams)
    handles = []
    for index, (layer, block) in enumerate(zip(layers, blocks, strict=True)):

        def before(_module: Any, _args: Any, index: int = index, block: Any = block) -> None:
            block.bind(block.views(rooms[lane.take(index)]))

        def after(_module: Any, _args: Any, _out: Any, index: int = index, block: Any = block) -> None:
            block.clear()
            lane.release(index)

        block.clear()
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    return Streamed(lane, handles, memory)


def prompt(batch: int = 1, length: int = 12, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return torch.randint(5, 1000, (batch, length)).to(DEVICE)


def answer(model: Any, ids: Any, steps: CapturedSteps | None = None, **options: Any) -> list[list[int]]:
    torch.manual_seed(options.pop("seed", 1))
    options = {"do_sample": False, "max_new_tokens": 40, "attention_mask": torch.ones_like(ids)} | options
    if steps is not None:
        steps.prepare(ids.shape[1] + options["max_new_tokens"], options["attention_mask"])
        decoding = Decoding(options.pop("streamer", Silent()), quick=steps)
        options |= {"custom_generate": decoding, "streamer": decoding.streamer}
    return model.generate(input_ids=ids, **options).tolist()


def new_steps(model: Any, recorder: Any = None, **options: Any) -> CapturedSteps:
    return CapturedSteps(model, 2048, recorder or Timed(), torch.device(DEVICE), **options)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("size", EVERY_SIZE)
def test_resident(size: str, batch: int, record_property: Callable[[str, object], None]) -> None:
    model, timed = new_model(size), Timed()
    steps = new_steps(model, timed)
    for length in (5, 12, 130):
        ids = prompt(batch, length)
        assert answer(model, ids, steps) == answer(model, ids)
    assert (steps.status, len(timed.seconds)) == ("captured decode", 1)
    record_property("capture_s", timed.seconds)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(("slots", "every"), [(1, 1), (2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", EVERY_SIZE)
def test_streamed(
    size: str, slots: int, every: int, batch: int, record_property: Callable[[str, object], None]
) -> None:
    """Five and eight layers are no multiples of three slots."""
    model, timed = new_model(size), Timed()
    wanted = [answer(model, prompt(batch, length)) for length in (5, 130)]
    streamed = stream(model, slots, every)
    steps = new_steps(model, timed, lanes=[streamed.lane])
    for _ in range(2):
        assert [answer(model, prompt(batch, length), steps) for length in (5, 130)] == wanted
    assert (steps.reason, len(timed.seconds)) == ("", 1)
    assert [answer(model, prompt(batch, length)) for length in (5, 130)] == wanted
    record_property("capture_s", timed.seconds)
    steps.close()
    streamed.close()


def test_padding_on_the_left() -> None:
    model, ids = new_model("tiny"), prompt(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[1, :4] = 0
    assert answer(model, ids, new_steps(model), attention_mask=mask) == answer(
        model, ids, attention_mask=mask
    )


@pytest.mark.parametrize(
    "choice",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"eos_token_id": list(range(0, 1000, 7))},
        {"max_new_tokens": 3},
    ],
)
def test_processors_and_criteria(choice: dict[str, Any]) -> None:
    model = new_model("tiny")
    steps = new_steps(model)
    for seed in (1, 2, 3):
        assert answer(model, prompt(), steps, seed=seed, **choice) == answer(
            model, prompt(), seed=seed, **choice
        )


@pytest.mark.parametrize("streamed", [False, True])
def test_several_tokens_a_sweep_and_back(streamed: bool) -> None:
    """Sweeps of 1 to 16 tokens, each of which keeps one only."""
    model, ids = new_model("tiny"), prompt(1, 60)
    with torch.no_grad():
        wanted = model(ids).logits
        cache = cache_of(model(ids[:, :20], use_cache=True))
    held = stream(model, 3, 1) if streamed else None
    steps = new_steps(model, lanes=[held.lane] if held else [])
    steps.prepare(80)
    for length, tokens in zip(range(20, 44), [1, 3, 4, 7, 16, 2] * 4, strict=True):
        assert steps.step(cache, 1, tokens) is steps
        logits = steps(ids[:, length : length + tokens], length)
        torch.testing.assert_close(logits, wanted[:, length : length + tokens], rtol=1e-3, atol=1e-3)
    steps.give_back(44)
    assert cache.get_seq_length() == 44
    assert steps.reason == ""
    steps.close()
    if held:
        held.close()


def test_more_is_seen_as_the_answer_grows() -> None:
    model, timed = new_model("tiny"), Timed()
    steps = new_steps(model, timed)
    ids = prompt(1, 500)
    assert answer(model, ids, steps) == answer(model, ids)
    assert len(timed.seconds) == 2


def test_a_long_cache_is_attended_to_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = new_model("tiny"), prompt(2, 2040)
    mask = torch.ones_like(ids)
    mask[0, :300] = 0
    wanted = answer(model, ids, attention_mask=mask)
    counts: list[int] = []
    usual = attention._in_parts
    monkeypatch.setattr(attention, "_in_parts", lambda *args: (counts.append(args[-1]), usual(*args))[1])
    steps = new_steps(model)
    assert answer(model, ids, steps, attention_mask=mask) == wanted
    assert steps.status == "captured decode"
    assert set(counts) == {8, 9}
    steps.close()
    counts.clear()
    assert answer(model, ids, attention_mask=mask) == wanted
    assert counts == []


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_is_allocated_in_the_steady_state(streamed: bool) -> None:
    model, streamer = new_model("middle"), Silent()
    held = stream(model, 3, 1) if streamed else None
    steps = new_steps(model, lanes=[held.lane] if held else [])
    answer(model, prompt(), steps)
    answer(model, prompt(), steps, max_new_tokens=60, streamer=streamer)
    # The tokens so far grow by one place each time, in pieces of 512 bytes.
    assert max(streamer.allocated[9:]) - min(streamer.allocated[9:]) <= 2048
    steps.close()
    if held:
        held.close()


def test_keys_and_values_are_held_once_on_their_way_to_fixed_addresses() -> None:
    model, ids = new_model("middle"), prompt(1, 2020)
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    steps = new_steps(model)
    steps.prepare(2030)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert steps.step(cache, 1, 1) is steps
    fixed = sum(tensor.nbytes for tensor in steps.tensors())
    most = torch.cuda.max_memory_allocated() - before
    assert most < 1.01 * (fixed - held + held / len(cache.layers)) + 2**16
    assert held > 0.9 * fixed
    steps.close()


def test_everything_is_given_back() -> None:
    """From the second time on: the first leaves the workspace that cuBLAS has on the recorder's stream."""
    model, timed = new_model("tiny"), Timed()
    left = []
    for _ in range(3):
        steps = new_steps(model, timed)
        answer(model, prompt(2), steps)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        steps.close()
        left.append(torch.cuda.memory_allocated())
        assert left[-1] < held
    assert left[2] <= left[1]
    assert answer(model, prompt(), steps) == answer(model, prompt())


@pytest.mark.skipif(not IS_SIMULATED, reason="sets a limit to the driver's memory")
def test_graphs_that_nobody_needs_now_give_way() -> None:
    """No plan counts them: blocks would have to go for a graph of a longer text."""
    from tests.simulated_cuda import driver_bytes, set_total_memory

    model, ids = new_model("tiny"), prompt(1, 516)
    with torch.no_grad():
        wanted = model(ids).logits
        cache = cache_of(model(ids[:, :509], use_cache=True))
    steps = new_steps(model)
    steps.prepare(540)
    before = 0
    for place in range(509, 516):
        step = steps.step(cache, 1, 1)
        assert step is steps
        logits = step(ids[:, place : place + 1], place)
        torch.testing.assert_close(logits, wanted[:, place : place + 1], rtol=0, atol=1e-3)
        if not before:
            torch.cuda.synchronize()
            one = driver_bytes()
            before = set_total_memory(torch.cuda.memory_reserved() + one + one // 2)
    try:
        assert (steps.status, driver_bytes()) == ("captured decode", one)
    finally:
        set_total_memory(before)
        steps.close()


def test_what_waits_for_the_host_is_not_captured() -> None:
    model = new_model("tiny")
    wanted = answer(model, prompt())
    look = model.model.layers[1].register_forward_pre_hook(
        lambda _module, args: float(args[0].sum()) and None
    )
    steps = new_steps(model)
    for _ in range(2):
        assert answer(model, prompt(), steps) == wanted
    assert "not permitted when stream is capturing" in steps.reason
    look.remove()
    torch.cuda.synchronize()
    steps = new_steps(model)
    assert answer(model, prompt(), steps) == wanted
    assert steps.reason == ""


def test_a_number_that_the_host_brings_is_captured() -> None:
    """Gemma 3n of transformers 5.17 brings the smallest length of a vector to the GPU in each sweep."""
    model = new_model("tiny")
    model.model.layers[1].register_forward_pre_hook(
        lambda _module, args: (args[0] * torch.tensor(1.5).to(args[0].device), *args[1:])
    )
    wanted = answer(model, prompt())
    steps = new_steps(model)
    for _ in range(2):
        assert answer(model, prompt(), steps) == wanted
    assert steps.status == "captured decode"
    steps.close()


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_joined_projections(size: str) -> None:
    model = new_model(size)
    wanted = answer(model, prompt())
    steps = new_steps(model, warm_up=WarmUp(dict(enumerate(model.model.layers)), None))
    assert answer(model, prompt(), steps) == wanted
    steps.close()
    assert answer(model, prompt()) == wanted


def test_compiled_layers_take_over(record_property: Callable[[str, object], None]) -> None:
    pytest.importorskip("triton")
    model = new_model("middle")
    wanted = answer(model, prompt())
    warm_up = WarmUp(dict(enumerate(model.model.layers)))
    steps = new_steps(model, warm_up=warm_up)
    started = time.perf_counter()
    assert answer(model, prompt(), steps) == wanted
    while "compiled layers" not in warm_up.status and not warm_up.reason:
        assert answer(model, prompt(), steps) == wanted
    record_property("compile_s", time.perf_counter() - started)
    assert warm_up.reason == ""
    warm_up.wait()
    assert answer(model, prompt(), steps) == wanted
    assert steps.status == "captured decode, compiled layers"


def test_half_precision_differs_by_rounding_only() -> None:
    model, ids = new_model("middle", torch.bfloat16), prompt()
    tokens = torch.tensor(answer(model, ids, new_steps(model)), device=DEVICE)
    with torch.no_grad():
        logits = model(tokens).logits[:, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(-1, tokens[:, ids.shape[1] :, None])[..., 0]
    assert (logits.max(-1).values - chosen <= 0.1 * logits.abs().amax(-1)).all()
