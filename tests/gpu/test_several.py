"""A model over two GPUs: each has its own lane and slots, and hands its results to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

from llm_magic.backends.accelerate.default_streams import on_default_streams  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.gpu.test_placed import (  # noqa: E402
    KEPT,
    ON_CPU,
    READ,
    RESIDENT,
    STREAMED,
    VISITING,
    folder_of,  # noqa: F401
    layers,
    logits,
    place,
    resident,
)
from tests.placements import Place, Where, placed_plan  # noqa: E402

FolderOf = Callable[[str], Path]
MODELS = ("llama", "llama-tied", "qwen3-moe", "gemma")


def second(where: Where) -> Where:
    """The same place, beside the other GPU."""
    home, compute, kept, prefill = (
        part.replace("0", "1") if isinstance(part, str) else part for part in where
    )
    return str(home), str(compute), bool(kept), str(prefill)


def last(where: Where, of_layers: Place) -> Place:
    """Some place for the blocks around the layers."""
    return lambda number, label: of_layers(number, label) if label.startswith("layers.") else where


SAME_KERNELS: Mapping[str, Place] = {
    "resident on both": layers(RESIDENT, second(RESIDENT)),
    "streamed to both": layers(STREAMED, second(STREAMED)),
    "read by both": layers(READ, second(READ)),
    "one streams to the other": layers(RESIDENT, second(STREAMED)),
    "everything at the other": last(second(RESIDENT), layers(second(RESIDENT))),
    "the ends at the other": last(second(STREAMED), layers(STREAMED, second(RESIDENT))),
    "a bit of each": layers(RESIDENT, second(STREAMED), READ, second(KEPT), second(RESIDENT), STREAMED),
}
HYBRID: Mapping[str, Place] = {
    "beside the CPU": layers(STREAMED, ON_CPU, second(STREAMED)),
    "visiting both": layers(VISITING, second(VISITING)),
    "visiting one, streamed to the other": layers(VISITING, second(STREAMED), second(VISITING), RESIDENT),
}
WAYS: Mapping[str, Place] = {**SAME_KERNELS, **HYBRID}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_gpu(name: str, way: str, folder_of: FolderOf) -> None:  # noqa: F811
    folder = folder_of(name)
    expected = logits(resident(folder))
    placed = place(folder, WAYS[way])
    for _ in range(3):
        found = logits(placed.model).to(expected.device)
        if way in SAME_KERNELS:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    placed.close()


def test_the_default_streams_of_all_of_them() -> None:
    """They follow what was current, and are followed by it; other GPUs and the current one are left alone."""
    gpus = ["cuda:0", "cuda:1"]
    tensors = [torch.zeros(1000, device=gpu) for gpu in gpus]
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    side = [torch.cuda.Stream(gpu) for gpu in gpus]
    with torch.cuda.device(0), torch.cuda.stream(side[1]), torch.cuda.device(0), torch.cuda.stream(side[0]):
        for tensor in tensors:
            tensor.add_(1)
        with on_default_streams(["cuda:1", "cpu", "", "cuda:0"]):
            assert torch.cuda.current_device() == 0
            assert [torch.cuda.current_stream(gpu).cuda_stream for gpu in gpus] == [0, 0]
            for tensor in tensors:
                tensor.add_(1)
        assert [torch.cuda.current_stream(gpu) for gpu in gpus] == side
        assert torch.cuda.current_device() == 0
        for tensor in tensors:
            tensor.add_(1)
        assert [tensor.tolist() for tensor in tensors] == [[3.0] * 1000] * 2


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma"])
def test_an_engine_moves_over_all_of_them(name: str, folder_of: FolderOf) -> None:  # noqa: F811
    """A chat goes on, its cache goes along."""
    folder = folder_of(name)
    wanted = BACKEND.load(*plan_for(folder, "ram"), lambda _event: None)
    spec, _ = plan_for(folder, "ram")
    engine = BACKEND.load(spec, placed_plan(folder, WAYS["resident on both"]), lambda _event: None)
    turns = ["The capital of France"]
    for way in WAYS:
        engine.apply(placed_plan(folder, WAYS[way]), lambda _event: None)
        asked = request(*turns, max_new_tokens=12, chat="talk")
        answer, expected = ask(engine, asked), ask(wanted, asked)
        assert answer.text == expected.text, way
        assert answer.finish.cached_tokens == expected.finish.cached_tokens
        turns = [*turns, answer.text, "And then?"][-5:]
        if len(turns) == 5:
            turns = ["The capital of Italy"]
    engine.close()
    wanted.close()
