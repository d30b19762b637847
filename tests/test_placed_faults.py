"""Errors and interrupts in a placed model: wherever one comes, the next forward pass is right."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.backends.accelerate.placement.stream import HostStreams, Lane, StagedSource, Staging
from llm_magic.backends.accelerate.placement.uninterrupted import uninterrupted
from llm_magic.errors import EngineError
from tests import tiny
from tests.caches import cache_of, given
from tests.fake_streams import HurriedStreams
from tests.interrupting import Interrupting
from tests.placements import (
    HOMES,
    LONG,
    PROMPT,
    layers_to,
    load_placed,
    logits,
    placed_plan,
    stock,
)

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]
TRAVELLING = ("streamed", "read to a GPU", "read", "kept for a GPU")
VISITING = ("visiting", "kept, visiting")
SHORT = PROMPT[:, : LONG - 1]


@pytest.fixture(autouse=True)
def _torch_is_as_before() -> Iterator[None]:
    """What an interrupt leaves switched, later tests would run into."""
    yield
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


class Fault(Exception):
    pass


# ------------------------------------------------------------------------------- errors in the model


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("home", TRAVELLING)
def test_an_error_in_any_layer_leaves_the_next_pass_right(
    home: str, error: type[BaseException], tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    for layer in placed.model.model.layers:
        for module in (layer, layer.input_layernorm, layer.mlp.down_proj):
            with failing(module, error), pytest.raises(error):
                logits(placed.model)
            placed.settle()
            assert all(weight.is_meta for weight in layer.parameters())
            assert torch.equal(logits(placed.model), expected)
    placed.close()


@contextmanager
def failing(module: Any, error: type[BaseException]) -> Iterator[None]:
    def fail(_module: Any, _inputs: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("home", TRAVELLING)
def test_a_matrix_product_that_fails(
    home: str, tiny_model: TinyModel, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    linear = torch.nn.functional.linear
    for at in range(1, 28, 4):
        calls = count(1)

        def product(*inputs: Any, at: int = at, calls: Any = calls) -> Any:
            if next(calls) == at:
                raise MemoryError
            return linear(*inputs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", product)
            with pytest.raises(MemoryError):
                logits(placed.model)
        placed.settle()
        assert torch.equal(logits(placed.model), expected)
    placed.close()


# --------------------------------------------------------------------------- errors of files and copies


@pytest.mark.parametrize("home", ["read to a GPU", "read"])
def test_a_file_that_cannot_be_read_for_a_while(home: str, tmp_path: Path, streams: Streams) -> None:
    folder = tiny.save_llama(tmp_path / "model")
    expected = logits(stock(folder))
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    assert torch.equal(logits(placed.model), expected)
    weights = folder / "model.safetensors"
    seen = weights.stat()
    os.utime(weights, ns=(seen.st_atime_ns, seen.st_mtime_ns + 10**9))
    for _ in range(3):
        with pytest.raises(EngineError, match="changed"):
            passes(placed.model, 2)  # what was on its way before is still right
        placed.settle()
    os.utime(weights, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    for _ in range(6):  # errors of what was fetched ahead come out first
        with suppress(EngineError):
            logits(placed.model)
        placed.settle()
    for _ in range(2):
        assert torch.equal(logits(placed.model), expected)
    placed.close()


def passes(model: Any, times: int) -> None:
    for _ in range(times):
        logits(model)


class FaultyStreams(HurriedStreams):
    """Copies fail when they are told to."""

    fault: type[BaseException] | None = None
    after = 0

    def copy(self, pairs: Any, after: Any) -> Any:
        if self.fault is not None:
            if not self.after:
                raise self.fault
            self.after -= 1
        return super().copy(pairs, after)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("home", ["streamed", "read to a GPU"])
def test_copies_that_fail(home: str, error: type[BaseException], tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    streams = FaultyStreams(1, 0.0005)
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), lambda _device: streams)
    for at in range(6):
        streams.fault, streams.after = error, at
        with pytest.raises(error):
            passes(placed.model, 4)
        streams.fault = None
        placed.settle()
        for _ in range(4):
            with suppress(error):  # what was fetched ahead
                logits(placed.model)
            placed.settle()
        for _ in range(2):
            assert torch.equal(logits(placed.model), expected)
    placed.close()
    streams.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_staged_read_that_does_not_start_gives_its_buffer_back(error: type[BaseException]) -> None:
    """As when no thread can be started: whoever has the buffer next must not wait for it."""
    fault: list[type[BaseException]] = [error, error]

    def read(buffer: Any, before: Callable[[], None] | None) -> Future[None]:
        if fault:
            raise fault.pop()
        if before is not None:
            before()
        buffer.fill_(9)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    memory = [torch.zeros(8, dtype=torch.uint8)]
    staging = Staging([torch.zeros(8, dtype=torch.uint8)])
    streams = HostStreams()
    lane = Lane([StagedSource(read, lambda b, s: [(b, s)], staging, streams)], memory, streams)
    for _ in range(2):
        with pytest.raises(error):
            lane.take(0)
    taken = threading.Thread(target=lane.take, args=(0,), daemon=True)
    taken.start()
    taken.join(20)
    assert not taken.is_alive()
    assert memory[0].tolist() == [9] * 8


# ----------------------------------------------------------------------------------------- interrupts


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("home", [*TRAVELLING, *VISITING])
def test_an_interrupt_at_any_line_of_a_sweep(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    expected, short = logits(model), logits(model, SHORT)
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    files = ("stream.py", "hooks.py", "lanes.py", "blocks.py", "reader.py", "templates.py", "visits.py")
    files += ("cache_lane.py",)
    with Interrupting(0, files) as counted:
        logits(placed.model)
    interrupted = 0
    for at in range(1, counted.places + 1, max(1, counted.places // 60)):
        try:
            with Interrupting(at, files):
                logits(placed.model)
        except KeyboardInterrupt:
            interrupted += 1
        placed.settle()
        assert not placed.visits.is_on
        for prompt, right in ((SHORT, short), (PROMPT, expected)):
            assert torch.equal(logits(placed.model, prompt), right)
    assert interrupted > 40
    placed.close()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("is_ahead", [False, True])
def test_an_interrupt_at_any_line_while_keys_and_values_come_along(
    is_ahead: bool, tiny_model: TinyModel, streams: Streams
) -> None:
    """Of a later pass of a prompt, which is taken back and repeated then."""
    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    (lane,) = placed._attachments._cache_lanes.values()
    if is_ahead:
        lane.let_go_ahead(0)

    def read(reader: Any, kept: Any = None) -> Any:
        with torch.inference_mode():
            return reader(PROMPT, **given(kept), use_cache=True)

    expected = read(model, cache_of(read(model)))
    files = ("cache_lane.py", "layer_cache.py", "pieces.py", "visits.py")
    kept = cache_of(read(placed.model))
    with Interrupting(0, files) as counted:
        read(placed.model, kept)
    interrupted = 0
    for at in range(1, counted.places + 1, max(1, counted.places // 80)):
        kept = cache_of(read(placed.model))
        try:
            with Interrupting(at, files):
                read(placed.model, kept)
        except KeyboardInterrupt:
            interrupted += 1
        placed.settle()
        assert not lane._coming
        assert not lane._going
        for layer in kept.layers:
            layer.crop(PROMPT.shape[1] - layer.get_seq_length())
        again = read(placed.model, kept)
        assert torch.equal(again.logits, expected.logits)
        for layer, right in zip(cache_of(again).layers, cache_of(expected).layers, strict=True):
            assert torch.equal(layer.keys, right.keys)
            assert torch.equal(layer.values, right.values)
    assert interrupted > 60
    placed.close()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("target", ["read", "streamed", "kept for a GPU", "visiting"])
def test_an_interrupt_at_any_line_of_a_move(target: str, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama-tied")
    expected = logits(stock(folder))
    placed = load_placed(folder, None, streams)
    files = (
        "placed.py",
        "attachments.py",
        "homes.py",
        "placed_block.py",
        "blocks.py",
        "hooks.py",
        "lanes.py",
        "stream.py",
        "checkpoint.py",
    )
    there, back = placed_plan(folder, lambda _n, _l: HOMES[target]), placed.plan
    with Interrupting(0, files) as counted:
        placed.apply(there)
    placed.apply(back)
    outcomes: set[str] = set()
    for at in range(1, counted.places + 1, max(1, counted.places // 40)):
        outcomes.add(interrupted_move(placed, there, Interrupting(at, files)))
        assert placed.model.hf_device_map == placed.plan.device_map
        assert torch.equal(logits(placed.model), expected)
        placed.apply(back)
        assert torch.equal(logits(placed.model), expected)
    assert "undone" in outcomes
    placed.close()


def interrupted_move(placed: PlacedModel, plan: Any, interrupting: Interrupting) -> str:
    before = placed.plan
    try:
        with interrupting:
            placed.apply(plan)
    except KeyboardInterrupt:
        # It may have come when all was done and nothing was left to undo.
        assert placed.plan in (before, plan)
    return "done" if placed.plan is plan else "undone"


def test_an_interrupt_waits_for_what_may_not_be_cut_in_two() -> None:
    done = []

    def interrupt() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_ignored_interrupts_are_left_alone() -> None:
    thread = threading.Thread(target=lambda: uninterrupted().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)
