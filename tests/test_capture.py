"""Captured decode steps, with a recorder that does to tensors what a CUDA graph does, on the CPU.

``Tape`` writes down every kernel with its operands and runs the same list again: a number that Python
computed at capture stays what it was, and a value that the host wants to read cannot be captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import AutoModelForCausalLM

from llm_magic.backends.accelerate.decoding.capturable import why_not
from llm_magic.backends.accelerate.decoding.capture import CapturedSteps
from llm_magic.backends.accelerate.decoding.decode import Decoding
from llm_magic.backends.accelerate.decoding.speculate import Speculation
from llm_magic.backends.accelerate.decoding.warmup import COMPILING
from llm_magic.backends.accelerate.memory_errors import TokensLostError
from llm_magic.backends.accelerate.placement.lookups import Lookup
from llm_magic.plan import Placement, Plan
from tests import families, tiny
from tests.caches import given
from tests.engines import plan_for
from tests.test_decode import Gathered, Parrot, answer, eager_pace, parrot
from tests.test_placed import layers_to, load_placed, placed_plan
from tests.test_static_cache import Full

CONTEXT = 256
WITH_STATES = ("qwen3_5_text", "kimi_linear", "lfm2", "nemotron_h", "granitemoehybrid")


class Tape(TorchDispatchMode):
    """The kernels of one sweep, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        made: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, out in self.kernels:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and not any(old is arg for arg in tree_flatten(args)[0]):
                    made[id(old)] = new


class Tapes:
    """A recorder like ``CudaGraphs``: the first run counts, the second one is only written down."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        sweep()
        self.recorded += 1
        with Tape() as tape:
            sweep()
        return tape.replay


class Failing(Tapes):
    """Refuses as CUDA does: while it captures, after the sweep ran once."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        sweep()
        raise self.error


def qwen3(folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**tiny._common(3), num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    return tiny._save(Qwen3ForCausalLM, config, folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def read(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        key = (name, dtype, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("capture") / name
            if name in families.FAMILIES:
                families.save(name, folder)
            else:
                {**tiny.MODELS, "qwen3": qwen3}[name](folder)
            made[key] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
        return made[key]

    return read


@pytest.fixture(params=["llama", "gemma"])
def usual(model: Any, request: Any) -> Any:
    """A model, and one with layers that see a window."""
    return model(request.param)


def prompts(batch: int = 1, length: int = 9, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(6, tiny.VOCABULARY, (batch, length))


def prefilled(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """A cache of all tokens but the last."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        model(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            **given(cache),
            use_cache=True,
        )
    return cache


def eager(model: Any, ids: torch.Tensor, count: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    return out[:, ids.shape[1] :]


def full_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_close(first: torch.Tensor, second: torch.Tensor) -> None:
    """Up to what other kernels round differently; logits are around 10."""
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def begin(steps: CapturedSteps, cache: Any, mask: torch.Tensor | None, room: int) -> None:
    """Let the steps of an answer take over its cache."""
    steps.prepare(room, mask)
    batch = next(
        keys.shape[0] for layer in cache.layers if (keys := getattr(layer, "keys", None)) is not None
    )
    assert steps.step(cache, batch, 1) is steps


def greedy(
    step: CapturedSteps, model: Any, ids: torch.Tensor, count: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    cache, length = prefilled(model, ids, mask), ids.shape[1] - 1
    begin(step, cache, mask, ids.shape[1] + count)
    tokens, last = [], ids[:, -1:]
    for _ in range(count):
        last = step(last, length)[:, -1:].argmax(-1)
        length += 1
        tokens.append(last)
    step.give_back(length)
    assert cache.get_seq_length() == length
    return torch.cat(tokens, dim=1)


def step_of(model: Any, recorder: Any = None, **options: Any) -> CapturedSteps:
    return CapturedSteps(model, CONTEXT, recorder or Tapes(), torch.device("cpu"), **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_tokens_are_those_of_generate(model: Any, name: str, attention: str) -> None:
    tested, tapes = model(name, attn_implementation=attention), Tapes()
    step = step_of(tested, tapes)
    for seed in range(3):
        ids = prompts(length=4 + 5 * seed, seed=seed)
        assert torch.equal(greedy(step, tested, ids, 20), eager(tested, ids, 20))
    assert (tapes.recorded, step.reason, step.status) == (1, "", "captured decode")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_half_precision_differs_by_rounding_only(model: Any, name: str) -> None:
    tested = model(name, torch.bfloat16)
    ids = prompts()
    tokens = greedy(step_of(tested), tested, ids, 16)
    whole = torch.cat([ids, tokens], dim=1)
    logits = full_logits(tested, whole)[:, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    assert (logits.max(-1).values - chosen <= 0.03 * logits.abs().amax(-1)).all()


def test_a_batch_is_padded_on_the_left(model: Any) -> None:
    for name in ("llama", "gpt2"):
        tested = model(name)
        ids, mask = prompts(3, 8), torch.ones(3, 8, dtype=torch.long)
        mask[0, :5] = mask[2, :2] = 0
        ids[mask == 0] = 2
        step = step_of(tested)
        assert torch.equal(greedy(step, tested, ids, 12, mask), eager(tested, ids, 12, mask))
        alone = prompts()  # smaller batches and other masks use the same room
        assert torch.equal(greedy(step, tested, alone, 12), eager(tested, alone, 12))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rejected_tokens_leave_no_trace(model: Any, name: str) -> None:
    tested, tapes = model(name), Tapes()
    ids = prompts()
    truth = eager(tested, ids, 24)[0].tolist()
    step, tokens, wrong = step_of(tested, tapes), [], 300
    begin(step, prefilled(tested, ids), None, 64)
    length, last = ids.shape[1] - 1, int(ids[0, -1])
    while len(tokens) < 20:  # every draft is right, then wrong: 0 to 3 tokens of it are accepted
        right = len(tokens) % 4
        draft = truth[len(tokens) : len(tokens) + right] + [wrong] * (3 - right)
        said = step(torch.tensor([[last, *draft]]), length)[0].argmax(-1).tolist()
        accepted = next((i for i in range(3) if draft[i] != said[i]), 3)
        tokens += said[: accepted + 1]
        length, last = length + accepted + 1, tokens[-1]
    step.give_back(length)
    assert tokens == truth[: len(tokens)]
    assert tapes.recorded == 1


@pytest.mark.parametrize("length", [4, 15, 16, 17, 63, 64, 100])
def test_windows_go_around_their_ring(model: Any, length: int) -> None:
    """Proposals are right, or wrong from the first on, one after the other: each lot is 15 tokens."""
    tested, ids = model("gemma"), prompts(length=length)
    truth = eager(tested, ids, 120)[0].tolist()
    step, cache, tokens = step_of(tested), prefilled(tested, ids), []
    begin(step, cache, None, length + 120)
    last, before = int(ids[0, -1]), length - 1
    while len(tokens) < 100:
        right = (len(tokens) * 7) % 16
        draft = [*truth[len(tokens) : len(tokens) + right], *[300] * (15 - right)]
        said = step(torch.tensor([[last, *draft]]), before)[0].argmax(-1).tolist()
        accepted = next((i for i in range(15) if draft[i] != said[i]), 15)
        tokens += said[: accepted + 1]
        before, last = before + accepted + 1, tokens[-1]
    assert tokens == truth[: len(tokens)]
    step.give_back(before)
    whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
    for layer, other in zip(cache.layers, prefilled(tested, whole).layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() == before
        assert_close(layer.keys, other.keys)
        assert_close(layer.values, other.values)


def test_layers_that_share_keys_and_hold_none(model: Any) -> None:
    tested, tapes = model("gemma4"), Tapes()
    step = step_of(tested, tapes)
    for length in (5, 40):
        ids = prompts(length=length)
        assert torch.equal(greedy(step, tested, ids, 40), eager(tested, ids, 40))
    assert (tapes.recorded, step.reason) == (1, "")


@pytest.fixture
def looked_up(model: Any) -> Iterator[Callable[[str], tuple[Any, list[Lookup]]]]:
    """``looked_up("llama")``: a model, and what looks up the rows of each of its tables."""
    made: list[Lookup] = []

    def begin(name: str) -> tuple[Any, list[Lookup]]:
        tested = model(name)
        tables = [m for n, m in tested.named_modules() if "embed_tokens" in n and isinstance(m, nn.Embedding)]
        made.extend(Lookup(table, torch.device("cpu")) for table in tables)
        return tested, made

    yield begin
    for lookup in made:
        lookup.detach()


@pytest.mark.parametrize(("name", "tables"), [("llama", 1), ("gemma4", 2), ("gemma3n_text", 2)])
def test_rows_are_looked_up_before_each_sweep(looked_up: Any, name: str, tables: int) -> None:
    (tested, lookups), tapes = looked_up(name), Tapes()
    assert len(lookups) == tables
    step = step_of(tested, tapes, lookups=lookups)
    for seed in range(3):
        ids = prompts(length=4 + 5 * seed, seed=seed)
        assert torch.equal(greedy(step, tested, ids, 20), eager(tested, ids, 20))
    ids = prompts(3, 8)
    assert torch.equal(greedy(step, tested, ids, 9), eager(tested, ids, 9))
    assert (tapes.recorded, step.reason) == (2, "")


def test_proposals_are_looked_up_too(looked_up: Any) -> None:
    tested, lookups = looked_up("llama")
    ids = prompts(length=30)
    wanted = full_logits(tested, ids)
    step, cache = step_of(tested, lookups=lookups), prefilled(tested, ids[:, :11])
    begin(step, cache, None, 40)
    for length, tokens in zip(range(10, 22), [1, 3, 4, 7] * 3, strict=True):
        assert_close(step(ids[:, length : length + tokens], length), wanted[:, length : length + tokens])
    assert step.reason == ""


def test_a_table_of_other_rows_is_not_captured(looked_up: Any) -> None:
    """Its tokens are those of generate all the same."""
    tested, lookups = looked_up("llama")
    turned = tested.model.embed_tokens.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
    ids = prompts()
    step = step_of(tested, lookups=lookups)
    assert torch.equal(greedy(step, tested, ids, 12), eager(tested, ids, 12))
    assert "looks up other rows" in step.reason
    turned.remove()


class Again:
    """A recorder whose replay is the sweep: a tape would run it a second time, and a state with it."""

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        sweep()
        return sweep


@pytest.mark.parametrize("name", WITH_STATES)
def test_states_are_those_of_generate(model: Any, name: str) -> None:
    tested = model(name)
    step = step_of(tested, Again())
    for seed in range(3):
        ids = prompts(length=3 + 7 * seed, seed=seed)
        assert torch.equal(greedy(step, tested, ids, 30), eager(tested, ids, 30))
    ids = prompts(2, 6)  # a batch of another size has other addresses
    assert torch.equal(greedy(step, tested, ids, 9), eager(tested, ids, 9))
    assert (step.status, step.step(prefilled(tested, ids), 2, 2)) == ("captured decode", None)


@pytest.mark.parametrize("name", WITH_STATES)
def test_states_are_as_before_when_a_capture_fails(model: Any, name: str) -> None:
    tested, ids = model(name), prompts()
    step = step_of(tested, Failing(RuntimeError("no")))
    assert torch.equal(greedy(step, tested, ids, 12), eager(tested, ids, 12))
    assert step.reason == "RuntimeError: no"


@pytest.mark.parametrize("layer", range(4))
def test_states_are_as_before_when_a_sweep_fails(model: Any, layer: int) -> None:
    tested, ids, error = model("qwen3_5_text"), prompts(), torch.OutOfMemoryError("CUDA out of memory.")
    step, cache = step_of(tested, Again()), prefilled(model("qwen3_5_text"), ids)
    begin(step, cache, None, 64)

    def fail(*_args: Any) -> None:
        raise error

    handle = tested.model.layers[layer].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(ids[:, -1:], 8)
    handle.remove()
    first = step(ids[:, -1:], 8)
    assert_close(first, full_logits(tested, ids)[:, -1:])
    for length in (7, 8):  # nothing is fed twice
        with pytest.raises(ValueError, match=f"9 tokens cannot go back to {length}"):
            step(ids[:, -1:], length)
    step.close()
    assert cache.get_seq_length() == 9
    longer = torch.cat([ids, first.argmax(-1)], dim=1)
    with torch.no_grad():
        after = tested(longer[:, -1:], **given(cache), use_cache=True).logits
    assert_close(after, full_logits(tested, longer)[:, -1:])


def test_nothing_is_asked_of_memory_once_states_have_a_token(model: Any) -> None:
    """They could not go back, and a move that makes room would lose the logits."""
    tested, ids = model("qwen3_5_text"), prompts()
    step, cache = step_of(tested, Again()), prefilled(tested, ids)
    begin(step, cache, None, 64)
    first = step(ids[:, -1:], 8).argmax(-1)

    class NoCopies(TorchDispatchMode):
        """No memory once the sweep is over."""

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.clone.default and args[0].shape[-1] == tiny.VOCABULARY:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return op(*args, **(kwargs or {}))

    with NoCopies():
        logits = step(first, 9)
    assert_close(logits, full_logits(tested, torch.cat([ids, first], dim=1))[:, -1:])


def test_states_leave_their_room_to_what_goes_back(model: Any) -> None:
    """Where memory is short, nothing else holds what was copied."""
    tested, ids = model("qwen3_5_text"), prompts()
    step, cache = step_of(tested, Again()), prefilled(tested, ids)
    begin(step, cache, None, 64)
    held = [weakref.ref(tensor) for state in step._static.states.values() for tensor in state.tensors()]
    step._static.give(cache, 1, 8, frees=True)
    assert held
    assert all(tensor() is None for tensor in held)


def test_states_that_are_ahead_of_the_answer_are_lost(model: Any) -> None:
    tested, ids = model("qwen3_5_text"), prompts()
    step, cache = step_of(tested, Again()), prefilled(tested, ids)
    begin(step, cache, None, 64)
    step(ids[:, -1:], 8)
    with pytest.raises(TokensLostError):
        step.give_back(8)
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(step, tested, ids, 12), eager(tested, ids, 12))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11, 16])
def test_token_counts_are_rounded_up_and_what_is_too_much_is_unseen(usual: Any, count: int) -> None:
    tested = usual
    ids = prompts(2, 30)
    step = step_of(tested)
    start = 30 - count - 1
    begin(step, prefilled(tested, ids[:, : start + 1]), None, 40)
    expected = full_logits(tested, ids)
    assert_close(step(ids[:, start : start + count], start), expected[:, start : start + count])
    assert_close(step(ids[:, -1:], 29), expected[:, -1:])
    step.give_back(30)


def test_the_last_positions_of_a_context(model: Any) -> None:
    """A rounded sweep must not ask for positions that the model has not learned."""
    tested = model("gpt2")
    ids = prompts(1, tiny.CONTEXT)
    step = step_of(tested)
    start = tiny.CONTEXT - 5
    begin(step, prefilled(tested, ids[:, : start + 1]), None, tiny.CONTEXT)
    assert_close(step(ids[:, start:], start), full_logits(tested, ids)[:, start:])


def test_more_is_seen_as_the_answer_grows() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    widths = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**widths, vocab_size=tiny.VOCABULARY, initializer_range=0.3)
    tested, tapes = LlamaForCausalLM(config).eval(), Tapes()
    step = CapturedSteps(tested, 2048, tapes, torch.device("cpu"))
    ids = prompts(1, 506)
    assert torch.equal(greedy(step, tested, ids, 12), eager(tested, ids, 12))
    assert tapes.recorded == 2
    assert {tensor.shape[2] for tensor in step.tensors()} == {2048}
    assert torch.equal(greedy(step, tested, prompts(), 5), eager(tested, prompts(), 5))
    assert tapes.recorded == 2


def test_no_more_room_than_the_context_needs(usual: Any) -> None:
    step = step_of(usual)
    greedy(step, usual, prompts(), 3)
    around = {64} if usual.config.model_type == "gemma2" else set()  # a window, and two sweeps
    assert {tensor.shape[2] for tensor in step.tensors()} == {
        320
    } | around  # 256 and one sweep, in steps of 64


def test_logits_are_the_callers_own(usual: Any) -> None:
    tested = usual
    ids = prompts()
    step = step_of(tested)
    begin(step, prefilled(tested, ids), None, 32)
    first = step(ids[:, -1:], 8)
    copy = first.clone()
    step(first.argmax(-1), 9)
    assert torch.equal(first, copy)


def test_the_cache_that_comes_back_is_what_the_model_would_have_made(usual: Any) -> None:
    tested = usual
    ids = prompts()
    step = step_of(tested)
    cache = prefilled(tested, ids)
    before = [layer.keys.clone() for layer in cache.layers]
    begin(step, cache, None, 32)
    step(torch.cat([ids[:, -1:], ids[:, :3]], dim=1), 8)
    step.give_back(9)
    expected = prefilled(tested, torch.cat([ids, ids[:, :1]], dim=1))
    for layer, kept, other in zip(cache.layers, before, expected.layers, strict=True):
        assert torch.equal(layer.keys[:, :, :8], kept)
        assert_close(layer.keys, other.keys)
        assert_close(layer.values, other.values)


def test_a_sweep_that_was_not_prepared_is_refused(usual: Any) -> None:
    tested = usual
    step = step_of(tested)
    begin(step, prefilled(tested, prompts()), None, 32)
    for ids, length in ((prompts(1, 17), 8), (prompts(2, 1), 8), (prompts(1, 1), 320)):
        with pytest.raises(ValueError, match="not prepared"):
            step(ids, length)


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when capturing\nmore"), TypeError("x")]
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_why(usual: Any, error: Exception) -> None:
    tested = usual
    step = step_of(tested, Failing(error))
    ids = prompts()
    assert torch.equal(greedy(step, tested, ids, 12), eager(tested, ids, 12))
    assert step.reason.startswith(type(error).__name__)
    assert "\n" not in step.reason
    assert step.status == f"eager decode: {step.reason}"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]
)
def test_memory_that_runs_out_while_capturing_is_told_and_capturing_tried_again(
    usual: Any, error: Exception
) -> None:
    """Whoever hears of it may make room."""
    tested, recorder = usual, Failing(error)
    step = step_of(tested, recorder)
    begin(step, prefilled(tested, prompts()), None, 32)
    with pytest.raises(type(error)):
        step(prompts()[:, -1:], 8)
    assert step.reason == ""
    step.reset()
    step._recorder = Tapes()
    assert torch.equal(greedy(step, tested, prompts(), 8), eager(tested, prompts(), 8))
    assert step.status == "captured decode"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]
)
def test_without_room_for_fixed_addresses_sweeps_are_eager(usual: Any, error: Exception) -> None:
    tested = usual
    step = step_of(tested)

    def take(*_args: Any) -> None:
        raise error

    step._static.take = take  # type: ignore[method-assign]
    cache = prefilled(tested, prompts())
    step.prepare(32)
    assert step.step(cache, 1, 1) is None
    assert step.status == "eager decode: no memory for a cache at fixed addresses"
    assert cache.get_seq_length() == prompts().shape[1] - 1


def test_nothing_is_captured_while_something_is_compiled(usual: Any) -> None:
    """The compiler synchronizes the device, which ends a capture."""
    tested, tapes, ids = usual, Tapes(), prompts()
    step = step_of(tested, tapes)
    with COMPILING:
        assert torch.equal(greedy(step, tested, ids, 8), eager(tested, ids, 8))
        assert (tapes.recorded, step.reason) == (0, "")
    assert torch.equal(greedy(step, tested, ids, 8), eager(tested, ids, 8))
    assert tapes.recorded == 1


def test_a_model_that_reads_values_on_the_host_is_not_captured(usual: Any) -> None:
    tested = usual
    step = step_of(tested)
    looked = tested.model.layers[1].register_forward_pre_hook(
        lambda _module, args: float(args[0].sum()) and None
    )
    try:
        assert torch.equal(greedy(step, tested, prompts(), 8), eager(tested, prompts(), 8))
        assert "not permitted" in step.reason
    finally:
        looked.remove()


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [_Stopped, KeyboardInterrupt])
@pytest.mark.parametrize("pass_number", [1, 2])
def test_an_interrupt_passes_and_the_next_answer_is_right(
    usual: Any, error: type[BaseException], pass_number: int
) -> None:
    """In the first run of a sweep, and while it is captured."""
    tested = usual
    step, seen = step_of(tested), []

    def interrupt(_module: Any, _args: Any) -> None:
        seen.append(1)
        if len(seen) == pass_number:
            raise error

    ids = prompts()
    cache = prefilled(tested, ids)
    begin(step, cache, None, 32)
    hook = tested.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        step(ids[:, -1:], 8)
    hook.remove()
    step.give_back(8)
    assert cache.get_seq_length() == 8
    assert torch.equal(greedy(step, tested, ids, 8), eager(tested, ids, 8))
    assert step.reason == ""


def test_after_a_reset_the_next_answer_begins_anew(usual: Any) -> None:
    tested = usual
    step = step_of(tested)
    begin(step, prefilled(tested, prompts()), None, 32)
    step(prompts()[:, -1:], 8)
    step.reset()
    step.give_back(9)
    assert torch.equal(greedy(step, tested, prompts(), 8), eager(tested, prompts(), 8))


def test_after_closing_nothing_is_held_and_it_starts_again(usual: Any) -> None:
    tested, tapes = usual, Tapes()
    step = step_of(tested, tapes)
    greedy(step, tested, prompts(), 4)
    step.close()
    assert not list(step.tensors())
    assert torch.equal(greedy(step, tested, prompts(), 8), eager(tested, prompts(), 8))
    assert tapes.recorded == 2


def test_memory_is_given_up_between_answers_only(usual: Any) -> None:
    tested, tapes = usual, Tapes()
    step = step_of(tested, tapes)
    assert not step.free()  # nothing was captured yet
    greedy(step, tested, prompts(), 4)
    assert list(step.tensors())
    assert step.free()
    assert not list(step.tensors())
    assert not step.free()
    begin(step, prefilled(tested, prompts()), None, 32)
    step(prompts()[:, -1:], 8)
    assert not step.free()  # the answer's tokens are there
    step.reset()
    assert torch.equal(greedy(step, tested, prompts(), 8), eager(tested, prompts(), 8))
    assert tapes.recorded == 2


class WrittenLane:
    """Writes down what is asked of it, between the layers of the model."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    @property
    def is_capturable(self) -> bool:
        return False

    def begin_captured_sweep(self) -> None:
        self.log.append("begin")

    def end_captured_sweep(self) -> None:
        self.log.append("end")

    def fence(self) -> None:
        self.log.append("fence")


def test_streamed_blocks_are_part_of_the_sweep(usual: Any) -> None:
    tested, log = usual, []
    step = step_of(tested, lanes=[WrittenLane(log)])
    ids = prompts()
    cache = prefilled(tested, ids)
    hooks = [layer.register_forward_pre_hook(lambda *_: log.append("layer")) for layer in tested.model.layers]
    begin(step, cache, None, 32)
    assert log == ["fence"]  # the prefill's copies are over before a replay writes to their slots
    step(ids[:, -1:], 8)
    assert log[1:] == 2 * ["begin", *4 * ["layer"], "end"]
    del log[:]
    step(ids[:, -1:], 9)
    assert not log
    step.give_back(10)
    assert log == ["fence"]
    for hook in hooks:
        hook.remove()


def test_real_lanes_bring_every_block_in_every_replay(model: Any, tmp_path: Path) -> None:
    """A placed model whose copies are kernels of the CPU; slots that earlier sweeps filled are never trusted."""
    folder = tiny.save_llama(tmp_path / "llama", layers=5)
    wanted = eager(AutoModelForCausalLM.from_pretrained(folder), prompts(), 12)
    for every in (1, 2):
        place = layers_to("streamed", every=every)
        placed = load_placed(folder, placed_plan(folder, place))
        tapes = Tapes()
        steps = step_of(placed.model, tapes, lanes=placed.lanes, settle=placed.settle)
        for _ in range(2):  # the prefill of the second answer finds what the replays of the first left
            assert torch.equal(greedy(steps, placed.model, prompts(), 12), wanted)
        assert (tapes.recorded, steps.reason) == (1, "")
        assert torch.equal(eager(placed.model, prompts(), 12), wanted)
        placed.close()


@pytest.mark.parametrize("layer", range(4))
def test_a_capture_that_fails_between_streamed_blocks(model: Any, tmp_path: Path, layer: int) -> None:
    folder = tiny.save_llama(tmp_path / "llama")
    wanted = eager(AutoModelForCausalLM.from_pretrained(folder), prompts(), 8)
    placed = load_placed(folder, placed_plan(folder, layers_to("streamed")))
    steps = step_of(placed.model, lanes=placed.lanes, settle=placed.settle)
    norm = placed.model.model.layers[layer].post_attention_layernorm
    norm.register_forward_pre_hook(lambda _module, args: float(args[0].sum()) and None)
    for _ in range(2):
        assert torch.equal(greedy(steps, placed.model, prompts(), 8), wanted)
    assert "not permitted" in steps.reason
    placed.close()


@pytest.mark.parametrize("at", ["layer", "end"])
def test_copies_of_a_sweep_that_ends_early_end_with_it(usual: Any, at: str) -> None:
    """A capture that misses their end fails with an error of its own, in the place of what ended the sweep."""

    class Ending(WrittenLane):
        def end_captured_sweep(self) -> None:
            super().end_captured_sweep()
            if at == "end":
                raise RuntimeError("the capture is invalid by now")

    def stop(_module: Any, _args: Any) -> None:
        raise _Stopped

    tested, log = usual, []
    step = step_of(tested, lanes=[Ending(log)])
    begin(step, prefilled(tested, prompts()), None, 32)
    handle = tested.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(_Stopped):
        step(prompts()[:, -1:], 8)
    handle.remove()
    assert log == ["fence", "begin", "end", "fence"]
    assert step.reason == ""


def test_streamed_blocks_are_put_in_order_after_an_interrupt(usual: Any) -> None:
    tested, log = usual, []
    steps = step_of(
        tested, Failing(KeyboardInterrupt()), lanes=[WrittenLane(log)], settle=lambda: log.append("settle")
    )
    begin(steps, prefilled(tested, prompts()), None, 32)
    with pytest.raises(KeyboardInterrupt):
        steps(prompts()[:, -1:], 8)
    assert log == ["fence", "begin", "end", "settle", "fence"]


def test_streamed_blocks_are_put_in_order_after_a_capture_that_failed(usual: Any) -> None:
    tested, log = usual, []
    step = step_of(tested, Failing(RuntimeError("no")), lanes=[WrittenLane(log)])
    begin(step, prefilled(tested, prompts()), None, 32)
    step(prompts()[:, -1:], 8)
    assert log == ["fence", "begin", "end", "fence", "begin", "end"]


class NoRoomForTokens(TorchDispatchMode):
    """No memory for a cache that grows."""

    def __torch_dispatch__(self, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.cat.default:
            raise torch.OutOfMemoryError
        return op(*args, **(kwargs or {}))


def test_streamed_blocks_are_put_in_order_when_tokens_cannot_go_back(usual: Any) -> None:
    """Their cache has no memory any more; what the last sweep read may not be overwritten all the same."""
    tested, log = usual, []
    steps = step_of(tested, lanes=[WrittenLane(log)])
    begin(steps, prefilled(tested, prompts()), None, 32)
    steps(prompts()[:, -1:], 8)
    with pytest.raises(torch.OutOfMemoryError), NoRoomForTokens():
        steps.close()
    assert log == ["fence", "begin", "end", "begin", "end", "fence"]
    assert greedy(steps, tested, prompts(), 8).tolist() == eager(tested, prompts(), 8).tolist()


def test_graphs_are_given_up_before_tokens_go_back(usual: Any) -> None:
    """Their memory is what the cache of the tokens needs when memory ran out."""
    tested, tapes, there = usual, Tapes(), []
    steps = step_of(tested, tapes)
    cache = prefilled(tested, prompts())
    begin(steps, cache, None, 32)
    steps(prompts()[:, -1:], 8)
    replay = weakref.ref(next(iter(steps._graphs.values())))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            there.append(replay() is not None)
            return op(*args, **(kwargs or {}))

    with Watch():
        steps.close()
    assert there
    assert not any(there)
    assert cache.get_seq_length() == 9


# --- Inside transformers' generate

CHOICES = [
    {},
    {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
    {"max_time": 60.0, "max_new_tokens": 7},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_processors_and_criteria_are_those_of_transformers(usual: Any, choice: dict[str, Any]) -> None:
    tested, tapes, ids = usual, Tapes(), prompts()
    steps = step_of(tested, tapes)
    for seed in (1, 2):
        steps.prepare(ids.shape[1] + 24)
        decoding = Decoding(Gathered(), quick=steps)
        wanted = answer(tested, ids, seed=seed, **choice)
        assert answer(tested, ids, decoding, seed=seed, **choice) == wanted
    assert (tapes.recorded, steps.reason) == (1, "")


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_proposals_are_verified_by_captured_sweeps(usual: Any, wrong: int) -> None:
    tested, tapes, ids = usual, Tapes(), prompts()
    wanted = answer(tested, ids, eos_token_id=None)
    steps = step_of(tested, tapes)
    steps.prepare(ids.shape[1] + 24)
    decoding = Decoding(Gathered(), quick=steps, speculation=parrot(wanted[0], wrong, most=5))
    assert answer(tested, ids, decoding, eos_token_id=None) == wanted
    assert decoding.counts.proposed > 0
    assert tapes.recorded >= 1


def test_more_proposals_than_a_sweep_takes_go_to_the_model(usual: Any) -> None:
    tested, ids = usual, prompts()
    wanted = answer(tested, ids, eos_token_id=None, max_new_tokens=40)
    steps = step_of(tested)
    steps.prepare(ids.shape[1] + 40)
    decoding = Decoding(Gathered(), quick=steps, speculation=parrot(wanted[0], 11, most=20))
    assert answer(tested, ids, decoding, eos_token_id=None, max_new_tokens=40) == wanted


@pytest.mark.parametrize("then", ["captured", "eager"])
def test_an_answer_goes_on_after_its_steps_were_closed(usual: Any, then: str) -> None:
    """As when memory runs out: everything is given back in the midst of an answer, and perhaps taken again."""
    tested, tapes, ids = usual, Tapes(), prompts()
    wanted = answer(tested, ids, eos_token_id=None)
    steps = step_of(tested, tapes)
    full = Full(0 if then == "eager" else 1000)

    def close_in_the_middle(count: int) -> None:
        if count == 5:
            steps.close()
            full.__enter__()

    speculation = parrot(wanted[0], wrong=2, most=5)
    steps.prepare(ids.shape[1] + 24)
    decoding = Decoding(Gathered(close_in_the_middle), quick=steps, speculation=speculation)
    try:
        assert answer(tested, ids, decoding, eos_token_id=None) == wanted
    finally:
        full.__exit__(None, None, None)
    assert ("no memory" in steps.status) == (then == "eager")


def test_a_pass_that_failed_is_repeated_after_steps_were_closed(usual: Any) -> None:
    tested, tapes, ids = usual, Tapes(), prompts()
    wanted = answer(tested, ids, eos_token_id=None)
    steps, failed = step_of(tested, tapes), []

    class Failure(Exception):
        pass

    def fail_once(module: Any, args: Any) -> None:
        if args[0].shape[1] > 1 and tapes.recorded and not failed:  # a sweep of another size is recorded
            failed.append(1)
            raise Failure

    def recover(error: BaseException) -> bool:
        steps.close()
        return isinstance(error, Failure)

    hook = tested.model.layers[1].register_forward_pre_hook(fail_once)
    steps.prepare(ids.shape[1] + 24)
    speculation = parrot(wanted[0], wrong=2, most=5)
    decoding = Decoding(Gathered(), quick=steps, recover=recover, speculation=speculation)
    assert answer(tested, ids, decoding, eos_token_id=None) == wanted
    hook.remove()
    assert failed


class FailingCopies(NoRoomForTokens):
    """No memory for some of the tensors that tokens go back to, by their number."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self._fails, self._count = fails, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is not torch.ops.aten.cat.default:
            return op(*args, **(kwargs or {}))
        self._count += 1
        return (super().__torch_dispatch__ if self._fails(self._count) else call)(op, types, args, kwargs)


def call(op: Any, _types: Any, args: Any, kwargs: Any) -> Any:
    return op(*args, **(kwargs or {}))


# Four layers with keys and values: each attempt makes eight tensors.
COPIES: dict[str, tuple[Callable[[int], bool], bool]] = {
    "at once": (lambda _n: False, True),
    "into the room of the fixed addresses": (lambda n: n == 3, True),
    "never": (lambda _n: True, False),
    "not all": (lambda n: n == 3 or n > 6, False),
}
"""Which copies fail, and whether the cache has all tokens in the end."""


@pytest.mark.parametrize("stopped_after", [0, 3, 4, 5])
@pytest.mark.parametrize("way", COPIES)
def test_an_answer_stands_whatever_becomes_of_its_cache(usual: Any, way: str, stopped_after: int) -> None:
    """Memory runs out when all is said: the cache has the tokens, or nothing; nothing else moves for it."""
    from transformers import DynamicCache

    tested, ids = usual, prompts()
    wanted = answer(tested, ids, eos_token_id=None)
    fails, has_all = COPIES[way]
    count, full = stopped_after or len(wanted[0]) - ids.shape[1], FailingCopies(fails)

    def fill_at_the_end(said: int) -> None:
        if said == count:
            full.__enter__()
            if stopped_after:
                raise StopIteration

    def recover(error: BaseException) -> bool:
        assert not isinstance(error, torch.OutOfMemoryError)
        return False

    cache, steps = DynamicCache(config=tested.config), step_of(tested)
    decoding = Decoding(
        Gathered(fill_at_the_end),
        quick=steps,
        recover=recover,
        speculation=parrot(wanted[0], wrong=3, most=5),
    )
    steps.prepare(ids.shape[1] + 24)
    try:
        with pytest.raises(StopIteration) if stopped_after else nullcontext():
            assert answer(tested, ids, decoding, eos_token_id=None, **given(cache)) == wanted
    finally:
        full.__exit__(None, None, None)
    kept = ids.shape[1] + count - 1 if has_all else 0
    assert {layer.get_seq_length() for layer in cache.layers} == {kept}
    steps.reset()
    assert greedy(steps, tested, ids, 8).tolist() == eager(tested, ids, 8).tolist()


@pytest.mark.parametrize("way", ["never", "not all"])
def test_tokens_that_cannot_go_back_in_the_midst_of_an_answer_stay_or_end_it(usual: Any, way: str) -> None:
    """More proposals than a captured sweep takes: the model itself wants the cache."""
    tested, ids = usual, prompts()
    wanted = answer(tested, ids, eos_token_id=None, max_new_tokens=40)
    steps, full = step_of(tested), FailingCopies(COPIES[way][0])
    errors: list[type] = []
    tried: list[object] = []

    def recover(error: BaseException) -> bool:
        errors.append(type(error))
        full.__exit__(None, None, None)
        return isinstance(error, torch.OutOfMemoryError)

    class Wanting(Parrot):
        """Proposes much once."""

        def propose(self, ids: list[int], room: int) -> Any:
            is_time = len(ids) >= 20 and not tried
            if is_time:
                tried.append(full.__enter__())
            return super().propose(ids, min(room, 20 if is_time else 3))

    decoding = Decoding(
        Gathered(), quick=steps, recover=recover, speculation=Speculation(Wanting(wanted[0]), eager_pace())
    )
    steps.prepare(ids.shape[1] + 40)
    with nullcontext() if way == "never" else pytest.raises(TokensLostError):
        assert answer(tested, ids, decoding, eos_token_id=None, max_new_tokens=40) == wanted
    assert errors == [torch.OutOfMemoryError if way == "never" else TokensLostError]
    steps.reset()
    assert greedy(steps, tested, ids, 8).tolist() == eager(tested, ids, 8).tolist()


def test_an_interrupt_while_tokens_go_back_is_one_still(usual: Any) -> None:
    tested, ids = usual, prompts()
    steps, cache = step_of(tested), prefilled(tested, ids)
    begin(steps, cache, None, 32)
    steps(ids[:, -1:], 8)

    class Interrupted(FailingCopies):
        """No memory for the first attempt, and an interrupt in the second."""

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.cat.default and self._count == 6:
                raise KeyboardInterrupt
            return super().__torch_dispatch__(op, types, args, kwargs)

    with pytest.raises(KeyboardInterrupt), Interrupted(lambda n: n == 3):
        steps.give_back(9)
    assert cache.get_seq_length() == 0
    assert greedy(steps, tested, ids, 8).tolist() == eager(tested, ids, 8).tolist()


@pytest.mark.parametrize("stopped_after", [0, 3, 4, 5])
def test_a_cache_has_the_right_tokens_after_steps_were_made_anew(usual: Any, stopped_after: int) -> None:
    """A move gives back all that was written, proposals that were wrong too, and of windows what was before."""
    from transformers import DynamicCache

    tested, ids = usual, prompts(length=20)
    wanted = answer(tested, ids, eos_token_id=None)
    count = stopped_after or len(wanted[0]) - ids.shape[1]

    def move(said: int) -> None:
        if said == count:
            decoding.quick.close()
            decoding.quick = step_of(tested)
            if stopped_after:
                raise StopIteration

    cache, steps = DynamicCache(config=tested.config), step_of(tested)
    decoding = Decoding(Gathered(move), quick=steps, speculation=parrot(wanted[0], wrong=3, most=5))
    steps.prepare(ids.shape[1] + 24)
    with pytest.raises(StopIteration) if stopped_after else nullcontext():
        assert answer(tested, ids, decoding, eos_token_id=None, **given(cache)) == wanted
    assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1] + count - 1}
    again = prefilled(tested, torch.tensor(wanted)[:, : ids.shape[1] + count])
    for layer, other in zip(cache.layers, again.layers, strict=True):
        assert_close(layer.keys, other.keys)
        assert_close(layer.values, other.values)


@pytest.mark.parametrize("room", [0, 3, 6])
def test_without_memory_for_fixed_addresses_the_answer_goes_on(usual: Any, room: int) -> None:
    """Some layers have moved there by then, and others have not."""
    tested, ids = usual, prompts()
    wanted = answer(tested, ids)
    steps = step_of(tested)
    steps.prepare(ids.shape[1] + 24)
    cache = prefilled(tested, ids)
    with Full(room):
        assert steps.step(cache, 1, 1) is None
    assert "no memory" in steps.status
    assert cache.get_seq_length() == 8
    again = prefilled(tested, ids)
    for layer, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert answer(tested, ids, Decoding(Gathered(), quick=steps)) == wanted
    steps.prepare(ids.shape[1] + 24)
    assert steps.step(cache, 1, 1) is steps
    assert steps.status == "captured decode"


# --- What cannot be captured


def on_gpu(plan: Plan, change: Callable[[int, Placement], Placement] = lambda _i, p: p) -> Plan:
    placed = [replace(p, home="cuda:0", compute="cuda:0") for p in plan.placements]
    return replace(plan, placements=tuple(change(i, p) for i, p in enumerate(placed)))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_for(tiny.MODELS["llama"](tmp_path_factory.mktemp("plan") / "llama"))[1]


def third(**changes: Any) -> Callable[[int, Placement], Placement]:
    return lambda index, placement: replace(placement, **changes) if index == 2 else placement


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"home": "cpu"}, ""),
        ({"home": "disk", "kept": True}, ""),
        ({"home": "disk"}, "blocks are read from the disk"),
        ({"home": "cpu", "compute": "cpu"}, "the CPU computes some blocks"),
        ({"home": "cuda:1", "compute": "cuda:1"}, "several GPUs"),
    ],
)
def test_placements(model: Any, plan: Plan, changes: dict[str, Any], reason: str) -> None:
    assert why_not(model("llama"), on_gpu(plan, third(**changes))) == reason


def test_experts_that_move(model: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model("llama").config, "_experts_implementation", "grouped_mm", raising=False)
    block = replace(plan.placements[2].block, experts=4)
    assert why_not(model("llama"), on_gpu(plan, third(block=block))) == ""
    assert why_not(model("llama"), on_gpu(plan, third(block=block, home="cpu"))) == "experts move on demand"


def test_experts_that_are_taken_one_after_the_other(
    model: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested, block = model("llama"), replace(plan.placements[2].block, experts=4)
    monkeypatch.setattr(tested.config, "_experts_implementation", "eager", raising=False)
    assert why_not(tested, on_gpu(plan, third(block=block))) == "experts are taken one after the other"
    assert why_not(tested, on_gpu(plan)) == ""  # no experts


@pytest.mark.parametrize("kind", ["dynamic", "longrope", {"full_attention": "dynamic"}])
def test_rotary_tables_that_follow_the_length(model: Any, plan: Plan, kind: Any) -> None:
    tested = model("llama")
    tested.model.rotary_emb.rope_type, usual = kind, tested.model.rotary_emb.rope_type
    try:
        assert why_not(tested, on_gpu(plan)) == "rotary tables that follow the length"
    finally:
        tested.model.rotary_emb.rope_type = usual


def test_streamed_blocks_that_threads_bring(model: Any, plan: Plan) -> None:
    """What a thread copies to a buffer first would be copied once, at capture."""
    reason = why_not(model("llama"), on_gpu(plan, third(home="cpu")), [WrittenLane([])])
    assert reason == "blocks in RAM that is not pinned"


@pytest.mark.parametrize(
    ("method", "reason"), [("int8", "int8 looks for outliers on the host"), ("quanto-int8", ""), ("nf4", "")]
)
def test_packed_layers_that_ask_the_host(model: Any, plan: Plan, method: str, reason: str) -> None:
    packed = replace(plan, layout=replace(plan.layout, quantization=method))
    assert why_not(model("llama"), on_gpu(packed)) == reason


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cpu", "the CPU computes every block"), ("mps", "no CUDA device computes a block")],
)
def test_where_no_gpu_computes(model: Any, plan: Plan, device: str, reason: str) -> None:
    """Whether the machine has a GPU is another question: every block of it may be elsewhere."""
    places = tuple(replace(place, home=device, compute=device) for place in plan.placements)
    assert why_not(model("llama"), replace(plan, placements=places)) == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", ""),
        ("qwen3", ""),
        ("gemma", ""),
        ("gemma4", ""),
        ("qwen3_5_text", ""),
        ("falcon_h1", "layers that keep more than keys and values, or a state"),
        ("glm_moe_dsa", "layers that keep more than keys and values, or a state"),
        ("mamba", "a forward pass without cache or positions"),
    ],
)
def test_architectures(model: Any, plan: Plan, name: str, reason: str) -> None:
    assert why_not(model(name), on_gpu(plan)) == reason


def test_encoder_decoders(plan: Plan) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert why_not(T5ForConditionalGeneration(config), on_gpu(plan)) == "encoder-decoder"


def test_architectures_that_make_their_own_masks(plan: Plan) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2))
    assert why_not(bloom, on_gpu(plan)) == "a forward pass without cache or positions"
