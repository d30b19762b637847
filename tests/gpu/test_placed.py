"""A placed model on a real GPU: the logits of the resident one wherever its blocks are, however late copies are.

Both streams are held up at random by kernels that do nothing, and a slot is filled with NaNs before a
copy into it begins: what computes too early, or is overwritten too early, shows.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.files.reader import page_buffer  # noqa: E402
from llm_magic.backends.accelerate.placement.blocks import RamStore, pin, unpin  # noqa: E402
from llm_magic.backends.accelerate.placement.placed import PlacedModel  # noqa: E402
from llm_magic.backends.accelerate.placement.stream import AcceleratorStreams  # noqa: E402
from tests import tiny  # noqa: E402
from tests.caches import cache_of, given  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402
from tests.placements import Place, Where, load_placed, placed_plan, stock  # noqa: E402

DEVICE = "cuda:0"
MODELS = ("llama", "llama-tied", "qwen3-moe")
SWEEPS = 5
PROMPT = [[7, 11, 13, 17, 19, 23]]
SLEEPS = (0, 0, 100_000, 2_000_000)  # cycles of the device: up to about a millisecond

RESIDENT: Where = (DEVICE, DEVICE, False, "")
STREAMED: Where = ("cpu", DEVICE, False, "")
READ: Where = ("disk", DEVICE, False, "")
KEPT: Where = ("disk", DEVICE, True, "")
ON_CPU: Where = ("cpu", "cpu", False, "")
READ_BY_CPU: Where = ("disk", "cpu", False, "")
VISITING: Where = ("cpu", "cpu", False, DEVICE)
KEPT_VISITING: Where = ("disk", "cpu", True, DEVICE)


def layers(*homes: Where) -> Place:
    """The layers in turn in these places, the rest resident."""
    return lambda number, label: homes[number % len(homes)] if label.startswith("layers.") else RESIDENT


def looked_up(table: Where, *homes: Where) -> Place:
    """Tables and layers in these places; of tables that are not on the GPU, rows are looked up."""
    return lambda number, label: table if label.startswith("embed") else layers(*homes)(number, label)


ON_GPU: Mapping[str, Place] = {
    "resident": layers(RESIDENT),
    "streamed": layers(STREAMED),
    "every second layer streamed": layers(RESIDENT, STREAMED),
    "read": layers(READ),
    "kept": layers(KEPT),
    "a bit of each": layers(STREAMED, READ, KEPT, RESIDENT),
    "all but the layers streamed": lambda _number, label: (
        RESIDENT if label.startswith("layers.") else STREAMED
    ),
    "looked up in RAM": looked_up(STREAMED, RESIDENT),
    "looked up in a file, and streamed": looked_up(READ, STREAMED),
    "everything streamed": lambda _number, _label: STREAMED,
    "everything read": lambda _number, _label: READ,
}
"""Every block is computed by the GPU: the same kernels, so the same bits."""

HYBRID: Mapping[str, Place] = {
    "streamed, and computed by the CPU": layers(STREAMED, ON_CPU),
    "resident, and computed by the CPU": layers(RESIDENT, ON_CPU),
    "read by both": layers(READ, READ_BY_CPU),
    "looked up in RAM, and computed by the CPU": looked_up(STREAMED, ON_CPU, STREAMED),
    "streamed, and visiting in prompts": layers(STREAMED, VISITING),
    "visiting in prompts": layers(VISITING),
    "a bit of each, and visiting in prompts": layers(RESIDENT, KEPT_VISITING, READ, ON_CPU),
}


def test_copies_never_share_a_stream_with_what_computes() -> None:
    """torch has 32 streams and begins anew: one in 32 loads would wait for every copy before it computes."""
    computing = {torch.cuda.Stream(DEVICE).cuda_stream for _ in range(64)}
    copying = {AcceleratorStreams(DEVICE)._copies.cuda_stream for _ in range(64)}
    assert len(computing) == len(copying) == 32
    assert not computing & copying


class LateStreams(AcceleratorStreams):
    """Streams that are held up at random; slots hold NaNs until a copy has ended; copies are from pinned memory."""

    def __init__(self, device: str, seed: int, *, from_pinned: bool = True) -> None:
        super().__init__(device)
        self._random, self._from_pinned = random.Random(seed), from_pinned

    def mark(self) -> Any:
        torch.cuda._sleep(self._random.choice(SLEEPS))
        return super().mark()

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: Any) -> Any:
        for each in (each for pair in pairs for each in pair if each.device.type == "cpu"):
            assert each.is_pinned() or not self._from_pinned
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            for _, target in pairs:
                target.flatten().view(torch.uint8).fill_(255)
            torch.cuda._sleep(self._random.choice(SLEEPS))
        return super().copy(pairs, after)


def late(**options: Any) -> Callable[[str], Any]:
    """Late streams for the GPU of a placed model."""
    seeds = iter(range(1000))
    return lambda device: None if device == "cpu" else LateStreams(device, next(seeds), **options)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder_of("llama")``: the folder of a tiny model."""
    return cache(lambda name: tiny.MODELS[name](tmp_path_factory.mktemp("tiny") / name))


def in_turn(model: Any) -> Any:
    """Experts are computed in turn, as those that move are: other kernels round in another way."""
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model


def resident(folder: Path) -> Any:
    """The model as torch moves it."""
    return in_turn(stock(folder).to(DEVICE))


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.tensor(PROMPT, device=DEVICE)).logits


def tokens(model: Any) -> list[int]:
    ids = torch.tensor(PROMPT, device=DEVICE)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
    return found


def place(folder: Path, where: Place, streams: Any = None, **options: Any) -> PlacedModel:
    placed = load_placed(folder, placed_plan(folder, where), streams or late(), **options)
    in_turn(placed.model)
    return placed


@pytest.mark.parametrize("way", ON_GPU)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_bit_equal_to_the_resident_models(
    name: str, way: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    model = resident(folder)
    expected, answer = logits(model), tokens(model)
    placed = place(folder, ON_GPU[way])
    for _ in range(SWEEPS):
        assert torch.equal(logits(placed.model), expected)
    assert tokens(placed.model) == answer
    placed.close()


@pytest.mark.parametrize("way", HYBRID)
@pytest.mark.parametrize("name", MODELS)
def test_cpu_and_gpu_compute_together(name: str, way: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    model = resident(folder)
    expected, answer = logits(model), tokens(model)
    placed = place(folder, HYBRID[way])
    first = logits(placed.model)
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-3)
    for _ in range(SWEEPS):
        assert torch.equal(logits(placed.model), first)
    assert tokens(placed.model) == answer
    placed.close()


@pytest.mark.parametrize("where", [layers(VISITING), layers(STREAMED, KEPT_VISITING)])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_read_by_the_gpu_and_keys_and_values_go_back(
    name: str, where: Place, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    model = resident(folder)
    placed = place(folder, where)
    prompt, short = torch.tensor(PROMPT, device=DEVICE), torch.tensor([[29]], device=DEVICE)
    homes = [torch.device(p.compute) for p in placed.plan.placements if p.block.label.startswith("layers.")]
    with torch.inference_mode():
        for _ in range(SWEEPS):
            ours, theirs = placed.model(prompt), model(prompt)
            assert torch.equal(ours.logits, theirs.logits)
            pairs = zip(cache_of(ours).layers, cache_of(theirs).layers, homes, strict=True)
            for kept, right, home in pairs:
                assert (kept.keys.device, kept.values.device) == (home, home)
                assert torch.equal(kept.keys.to(DEVICE), right.keys)
                assert torch.equal(kept.values.to(DEVICE), right.values)
            for tokens in (short, short, prompt):  # the CPU goes on, and then the GPU, with what the CPU kept
                more = placed.model(tokens, **given(cache_of(ours)))
                expected = model(tokens, **given(cache_of(theirs)))
                torch.testing.assert_close(more.logits, expected.logits, rtol=1e-3, atol=1e-3)
    placed.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("where", [STREAMED, READ])
def test_any_number_of_slots(where: Where, slots: int, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    expected = logits(resident(folder))
    placed = place(folder, layers(where), slots=lambda _device: slots)
    for _ in range(SWEEPS):
        assert torch.equal(logits(placed.model), expected)
    placed.close()


@pytest.mark.parametrize("also_staging", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_memory_that_the_system_does_not_pin(
    name: str, also_staging: bool, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks go through pinned buffers, or through such that are not pinned either."""
    folder, refusing = folder_of(name), True
    register = torch.cuda.cudart().cudaHostRegister

    def refuse(*memory: int) -> Any:
        return 2 if refusing else register(*memory)

    def moved(done: int, total: int, _label: str) -> None:
        nonlocal refusing
        refusing = also_staging or done < total  # buffers are made once all blocks are in their places

    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", refuse)
    expected = logits(resident(folder))
    placed = load_placed(folder, None, late(from_pinned=not also_staging))
    placed.apply(placed_plan(folder, layers(STREAMED)), moved)
    in_turn(placed.model)
    assert placed.memory()["cpu"]["slots"] > 0
    for _ in range(SWEEPS):
        assert torch.equal(logits(placed.model), expected)
    monkeypatch.undo()
    placed.close()


class Quota:
    """A system that pins so many bytes and no more, as Windows does."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.refusals = size, 0
        self._sizes: dict[int, int] = {}
        runtime = torch.cuda.cudart()
        self._register, self._unregister = runtime.cudaHostRegister, runtime.cudaHostUnregister
        monkeypatch.setattr(runtime, "cudaHostRegister", self.register)
        monkeypatch.setattr(runtime, "cudaHostUnregister", self.unregister)

    def register(self, address: int, size: int, flags: int) -> int:
        if size > self.left:
            self.refusals += 1
            return 2
        self.left -= size
        self._sizes[address] = size
        return int(self._register(address, size, flags))

    def unregister(self, address: int) -> int:
        self.left += self._sizes.pop(address)
        return int(self._unregister(address))


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of eight layers of 150 kB; two of them, and of a mixture eight experts of 74 kB, are staged at a time."""
    save = {"llama": tiny.save_llama, "qwen3-moe": tiny.save_mixture}
    return cache(lambda name: save[name](tmp_path_factory.mktemp("longer") / name, layers=8))


@pytest.mark.skipif(not IS_SIMULATED, reason="of the simulated device alone")
@pytest.mark.parametrize("way", ["streamed", "a bit of each", "a bit of each, and visiting in prompts"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", 350_000),
        ("llama", 600_000),
        ("llama", 1_100_000),
        ("qwen3-moe", 950_000),
        ("qwen3-moe", 1_150_000),
    ],
)
def test_a_quota_of_pinned_memory_is_for_staging_first(
    name: str, size: int, way: str, longer: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then for blocks; and some is left for CUDA itself."""
    spare = 20_000
    monkeypatch.setattr("llm_magic.backends.accelerate.placement.attachments._SPARE_PINNED_BYTES", spare)
    monkeypatch.setattr("llm_magic.planning.costs._CACHE_PIECE_BYTES", 4096)
    where = (ON_GPU | HYBRID)[way]
    model = resident(longer(name))
    expected, answer = logits(model), tokens(model)
    quota = Quota(size, monkeypatch)
    placed = place(longer(name), where)  # its streams see to it that every copy is from pinned memory
    assert quota.refusals <= 4  # of a block, and of staging for blocks, for keys and values, and for experts
    assert quota.left >= spare
    torch.testing.assert_close(logits(placed.model), expected, rtol=1e-3, atol=1e-3)
    assert tokens(placed.model) == answer
    placed.apply(placed_plan(longer(name), layers(STREAMED, RESIDENT)))
    assert tokens(in_turn(placed.model)) == answer
    stores = [
        part.store for part in placed.blocks.values() if part.travels and isinstance(part.store, RamStore)
    ]
    left_out = [store.memory.numel() for store in stores if not store.is_pinned]
    assert not left_out or quota.left < spare + 2 * max(
        left_out
    )  # blocks that stayed have what others gave back
    placed.close()
    assert quota.left == size


def test_kernels_are_not_blamed_for_memory_that_was_not_pinned() -> None:
    """CUDA remembers a refusal as its last error, and reports it with the next kernel."""
    memory = page_buffer(1 << 20)
    assert pin(memory)
    assert memory.is_pinned()
    assert not pin(memory)
    assert torch.ones(4, device=DEVICE).sum() == 4
    unpin(memory)
    assert not memory.is_pinned()
    assert torch.ones(4, device=DEVICE).sum() == 4
    assert pin(memory)
    unpin(memory)


@pytest.mark.parametrize("name", MODELS)
def test_moves_between_all_of_them(name: str, folder_of: Callable[[str], Path]) -> None:
    folder, chooser = folder_of(name), random.Random(3)
    expected = logits(resident(folder))
    plans = {way: placed_plan(folder, where) for way, where in (ON_GPU | HYBRID).items()}
    placed = load_placed(folder, None, late())
    for _ in range(3):
        for way in chooser.sample(list(plans), len(plans)):
            placed.apply(plans[way])
            in_turn(placed.model)
            for _ in range(2):
                if way in ON_GPU:
                    assert torch.equal(logits(placed.model), expected), way
                else:
                    torch.testing.assert_close(logits(placed.model), expected, rtol=1e-3, atol=1e-3)
    placed.close()


@pytest.mark.parametrize("way", ["streamed", "read", "a bit of each", "everything streamed"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_steady_and_given_back(name: str, way: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    logits(resident(folder))  # what cuBLAS keeps for itself is there from here on
    gc.collect()
    before = torch.cuda.memory_allocated()
    placed = place(folder, ON_GPU[way])
    held = set()
    for sweep in range(23):
        logits(placed.model)
        torch.cuda.synchronize()
        if sweep >= 3:
            held.add(torch.cuda.memory_allocated())
    assert len(held) == 1
    placed.close()
    del placed
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("way", ["streamed", "read", "everything streamed"])
def test_a_sweep_that_ends_early(way: str, folder_of: Callable[[str], Path]) -> None:
    """At each layer in turn; the next sweep starts while the kernels of this one still run."""

    class Stop(Exception):
        pass

    def stop(_module: Any, _inputs: Any) -> None:
        raise Stop

    folder = folder_of("llama")
    expected = logits(resident(folder))
    placed = place(folder, ON_GPU[way])
    for layer in placed.model.model.layers:
        handle = layer.mlp.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            logits(placed.model)
        handle.remove()
        placed.settle()
        for _ in range(2):
            assert torch.equal(logits(placed.model), expected)
    placed.close()


# --- The engine: as the libraries load and dispatch it, captured where it can be


CAPITAL = request("The capital of France", max_new_tokens=24)


@pytest.fixture(scope="module")
def answer_of(folder_of: Callable[[str], Path]) -> Callable[[str], str]:
    """``answer_of("llama")``: what the CPU alone answers to ``CAPITAL``, asked once."""

    @cache
    def answer(name: str) -> str:
        engine = BACKEND.load(*plan_for(folder_of(name), "ram"), lambda _event: None)
        text = ask(engine, CAPITAL).text
        engine.close()
        return text

    return answer


@pytest.mark.parametrize("way", [*ON_GPU, *HYBRID])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_engine_answers_and_moves(
    name: str, way: str, folder_of: Callable[[str], Path], answer_of: Callable[[str], str]
) -> None:
    folder, expected = folder_of(name), answer_of(name)
    ways = ON_GPU | HYBRID
    engine = BACKEND.load(plan_for(folder, "ram")[0], placed_plan(folder, ways[way]), lambda _event: None)
    assert ask(engine, CAPITAL).text == expected
    assert ask(engine, CAPITAL).text == expected
    for after in ("everything streamed", "streamed, and computed by the CPU", "resident", way):
        engine.apply(placed_plan(folder, ways[after]), lambda _event: None)
        assert ask(engine, CAPITAL).text == expected, after
    homes = engine.plan.device_map.items()
    assert engine.model.hf_device_map == {block: 0 if home == DEVICE else home for block, home in homes}
    engine.close()


def test_a_model_is_loaded_on_the_default_stream_whatever_its_caller_is_on(
    folder_of: Callable[[str], Path], answer_of: Callable[[str], str]
) -> None:
    """transformers' threads begin there, and copy weights to where some were that are merged meanwhile."""
    folder, expected, seen = folder_of("qwen3-moe"), answer_of("qwen3-moe"), set()
    for place in (layers(RESIDENT), layers(STREAMED)):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            here = torch.cuda.current_stream()
            spec, plan = plan_for(folder, "ram")[0], placed_plan(folder, place)
            engine = BACKEND.load(
                spec, plan, lambda _event: seen.add(torch.cuda.current_stream().cuda_stream)
            )
            assert torch.cuda.current_stream() == here
            assert ask(engine, CAPITAL).text == expected
            engine.close()
    assert torch.cuda.default_stream().cuda_stream in seen


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_chat_goes_on_where_the_cpu_decodes_and_the_gpu_reads(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """Several turns: what the CPU has added to the cache is there when the GPU reads the next prompt."""
    folder = folder_of(name)
    where = placed_plan(folder, layers(STREAMED, VISITING))
    wanted = BACKEND.load(*plan_for(folder, "ram"), lambda _event: None)
    engine = BACKEND.load(plan_for(folder, "ram")[0], where, lambda _event: None)
    turns = ["The capital of France"]
    for question in ("And of Italy?", "A language model reads tokens", ""):
        asked = request(*turns, max_new_tokens=12, chat="talk")
        answer, expected = ask(engine, asked), ask(wanted, asked)
        assert answer.text == expected.text
        assert answer.finish.cached_tokens == expected.finish.cached_tokens
        turns += [answer.text, question]
    engine.close()
    wanted.close()


def test_an_adapter_comes_along(folder_of: Callable[[str], Path]) -> None:
    peft = pytest.importorskip("peft")
    folder = folder_of("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        model.add_adapter(config)
        return model.eval()

    model = adapted(stock(folder)).to(DEVICE)
    expected = logits(model)
    for way in (layers(VISITING), layers(STREAMED), layers(READ), layers(RESIDENT)):
        placed = place(folder, way)
        adapted(placed.model)
        lora = {p.device for name, p in placed.model.named_parameters() if "lora" in name}
        assert lora == {torch.device("cpu" if way(0, "layers.0") == VISITING else DEVICE)}
        for _ in range(2):
            torch.testing.assert_close(logits(placed.model), expected, rtol=1e-4, atol=1e-4)
        placed.close()


def test_captured_steps_stream_blocks(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    engine = BACKEND.load(
        plan_for(folder, "ram")[0], placed_plan(folder, ON_GPU["everything streamed"]), lambda _event: None
    )
    ask(engine, request("The capital of France", max_new_tokens=24))
    assert engine._quick.steps is not None
    assert engine._quick.steps.reason == ""
    engine.close()
