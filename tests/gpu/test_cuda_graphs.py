"""The recorder on a real GPU: memory that is as before, and captures that fail without a trace."""

from __future__ import annotations

import gc
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding.cuda_graphs import CudaGraphs  # noqa: E402
from llm_magic.backends.accelerate.files.reader import page_buffer  # noqa: E402
from llm_magic.backends.accelerate.placement import cpu_experts  # noqa: E402
from llm_magic.backends.accelerate.placement.blocks import pin  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402

DEVICE = "cuda:0"


def test_recorders_that_follow_each_other_take_no_more_memory() -> None:
    """Blocks move, and steps are made anew: the workspace that cuBLAS has on a recorder's stream stays for good."""
    states, held = torch.ones(8, 8, device=DEVICE), []
    for _ in range(5):
        recorder = CudaGraphs(torch.device(DEVICE))
        replay = recorder.record(lambda: states.copy_(states @ states))
        replay()
        del recorder, replay
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held)) == 1


@pytest.mark.parametrize("frees_memory", [False, True])
def test_a_graph_that_goes_leaves_others_the_workspaces_of_their_products(frees_memory: bool) -> None:
    """torch gives back those of a stream with any graph that was captured on it, pytorch/pytorch#193402."""
    recorder = CudaGraphs(torch.device(DEVICE), frees_memory=frees_memory)
    states = torch.eye(512, device=DEVICE)
    first, second = (recorder.record(lambda: states.copy_(2 * states @ states)) for _ in range(2))
    del first
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.zeros(1 << 20, device=DEVICE)
    second()
    torch.cuda.synchronize()
    assert states.sum() == 512 * 128  # 1, 2, 8, 128
    assert not held.any()


@pytest.mark.parametrize("frees_memory", [False, True])
def test_no_garbage_is_collected_while_a_sweep_is_captured(frees_memory: bool) -> None:
    """There may be pinned memory in it, and graphs: to let these go would end the capture."""
    recorder = CudaGraphs(torch.device(DEVICE), frees_memory=frees_memory)
    states = torch.zeros(4, device=DEVICE)

    class Garbage:
        def __init__(self, held: Any) -> None:
            self.itself, self.held = self, held

    def sweep() -> None:
        states.add_(1)
        if torch.cuda.is_current_stream_capturing():
            assert [[] for _ in range(100_000)]  # collects what nobody uses, and often
            return
        memory = page_buffer(4096)
        assert pin(memory)
        Garbage(memory)

    recorder.record(sweep)()
    torch.cuda.synchronize()
    assert states.tolist() == [2, 2, 2, 2]
    gc.collect()


def test_after_a_capture_that_failed_torch_draws_and_gives_memory_back() -> None:
    """What torch leaves open then concerns everybody in the process."""
    graphs, x = CudaGraphs(torch.device(DEVICE)), torch.ones(4, device=DEVICE)
    alive = graphs.record(lambda: x.mul_(1))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            graphs.record(lambda: x.sum().item())
        assert 0 <= int(torch.multinomial(torch.ones(8, device=DEVICE), 1)) < 8
        held = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
        reserved = torch.cuda.memory_reserved()
        del held
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= reserved - (1 << 28)
    x.fill_(1)
    replay = graphs.record(lambda: x.add_(1))
    replay()
    alive()
    torch.cuda.synchronize()
    assert x.tolist() == [3, 3, 3, 3]  # once when it was recorded, once replayed


def test_graphs_that_had_ended_before_a_capture_failed_give_their_memory_back() -> None:
    """Work of the host had ended the first of them well."""
    recorder = CudaGraphs(torch.device(DEVICE))

    def sweep() -> None:
        held = torch.ones(8 << 20, dtype=torch.uint8, device=DEVICE)
        if torch.cuda.is_current_stream_capturing():
            cpu_experts._recording.take(lambda: None)
            held += 1
            raise torch.OutOfMemoryError("there is no more")

    reserved = []
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            recorder.record(sweep)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert len(set(reserved)) == 1


@pytest.mark.skipif(not IS_SIMULATED, reason="sets a limit to the driver's memory")
def test_a_graph_that_finds_no_memory_to_be_executable_gives_its_own_back() -> None:
    from tests.simulated_cuda import set_total_memory

    recorder, states = CudaGraphs(torch.device(DEVICE)), torch.zeros(4, device=DEVICE)

    def sweep() -> None:
        torch.zeros(1 << 20, device=DEVICE)
        for _ in range(200):
            states.add_(1)

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    before = set_total_memory(total - free + (5 << 20))
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"\bGPU 0\b"):
            recorder.record(sweep)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == reserved
    finally:
        set_total_memory(before)
    recorder.record(sweep)()
    torch.cuda.synchronize()
    assert states.tolist() == [600] * 4
