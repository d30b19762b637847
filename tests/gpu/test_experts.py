"""Routed experts on a GPU: copied from pinned RAM or through a staging ring, while it computes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu

from safetensors.torch import save_file  # noqa: E402

from llm_magic.backends.accelerate.experts.stacks import find_stacks  # noqa: E402
from llm_magic.backends.accelerate.files.extents import file_extents  # noqa: E402
from llm_magic.backends.accelerate.files.reader import FileReader, page_buffer  # noqa: E402
from llm_magic.backends.accelerate.placement.blocks import pin, unpin  # noqa: E402
from llm_magic.backends.accelerate.placement.expert_cache import ExpertCache  # noqa: E402
from llm_magic.backends.accelerate.placement.expert_stores import FileExperts, RamExperts, expert_images  # noqa: E402
from llm_magic.backends.accelerate.placement.routed_experts import RoutedExperts  # noqa: E402
from llm_magic.backends.accelerate.placement.stream import AcceleratorStreams, Staging  # noqa: E402

LAYERS, EXPERTS = 4, 16
DEVICE = "cuda:0"
PROMPT = [[5, 17, 80, 33, 2, 61, 44, 9, 70, 28, 12, 95]]


class SlowCompute(AcceleratorStreams):
    """The computing stream is far behind the host, and copies are not: an early copy would show."""

    def mark(self) -> Any:
        torch.cuda._sleep(2_000_000)
        return super().mark()


class SlowCopies(AcceleratorStreams):
    """Copies come long after they were asked for: an early computation would show."""

    def copy(self, pairs: Any, after: Any) -> Any:
        with torch.cuda.stream(self._copies):
            torch.cuda._sleep(2_000_000)
        return super().copy(pairs, after)


@pytest.fixture
def model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        initializer_range=0.1,
    )
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def _tokens(model: Any) -> Any:
    model.set_experts_implementation("eager")
    prompt = torch.tensor(PROMPT, device=DEVICE)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    answer = model.generate(prompt, **settings, return_dict_in_generate=True)
    return torch.stack(answer.logits)


def _modules(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def _without_stacks(model: Any) -> list[list[Any]]:
    """Takes the stacks out of a model on the CPU, and moves the rest to the device."""
    stacks = []
    for experts in _modules(model):
        stacks.append([parameter.data for parameter in experts.parameters()])
        for name, parameter in list(experts.named_parameters()):
            meta = torch.empty_like(parameter, device="meta")
            experts._parameters[name] = torch.nn.Parameter(meta, requires_grad=False)
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(DEVICE)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(DEVICE)
    return stacks


def _cache(slots: int, slot_bytes: int, streams: Any) -> ExpertCache:
    memory = torch.full((slots * slot_bytes,), 255, dtype=torch.uint8, device=DEVICE)  # NaN in any float
    return ExpertCache(memory, slot_bytes, streams)


@pytest.mark.parametrize("make", [AcceleratorStreams, SlowCompute, SlowCopies])
@pytest.mark.parametrize("slots", [1, 2, 5, LAYERS * EXPERTS])
def test_from_pinned_memory(model: Any, slots: int, make: Any) -> None:
    expected = _tokens(copy.deepcopy(model).to(DEVICE))
    streams = make(DEVICE)
    pinned, stores = [], []
    for experts, tensors in zip(_modules(model), _without_stacks(model), strict=True):
        held = [page_buffer(tensor.nbytes) for tensor in tensors]
        assert all(pin(memory) for memory in held)
        pinned += held
        views = [
            memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for memory, tensor in zip(held, tensors, strict=True)
        ]
        assert all(view[0].is_pinned() for view in views)
        stores.append(RamExperts(find_stacks(experts), views, streams))
    cache = _cache(slots, stores[0].slot_bytes, streams)
    for experts, store in zip(_modules(model), stores, strict=True):
        RoutedExperts(experts, store, cache)
    try:
        for _ in range(2):
            assert torch.equal(_tokens(model), expected)
    finally:
        cache.close()
        torch.cuda.synchronize()
        for memory in pinned:
            unpin(memory)


@pytest.mark.parametrize("make", [AcceleratorStreams, SlowCompute, SlowCopies])
@pytest.mark.parametrize("source", ["file", "ram"])
def test_through_a_staging_ring(model: Any, tmp_path: Path, source: str, make: Any) -> None:
    expected = _tokens(copy.deepcopy(model).to(DEVICE))
    streams, reader, executor = make(DEVICE), FileReader(direct=False), ThreadPoolExecutor(1)
    buffers = [page_buffer(1 << 20) for _ in range(3)]
    assert all(pin(buffer) for buffer in buffers)
    staging = Staging(buffers)
    stores: list[Any] = []
    for number, (experts, tensors) in enumerate(zip(_modules(model), _without_stacks(model), strict=True)):
        stacks = find_stacks(experts)
        if source == "ram":
            stores.append(RamExperts(stacks, tensors, streams, staging, executor))
            continue
        path = tmp_path / f"{number}.safetensors"
        save_file({stack.name: tensor for stack, tensor in zip(stacks, tensors, strict=True)}, path)
        places = [file_extents(path)[stack.name].extent for stack in stacks]
        stores.append(FileExperts(stacks, expert_images(stacks, places), reader, staging, streams))
    cache = _cache(6, stores[0].slot_bytes, streams)
    for experts, store in zip(_modules(model), stores, strict=True):
        RoutedExperts(experts, store, cache)
    try:
        for _ in range(2):
            assert torch.equal(_tokens(model), expected)
    finally:
        cache.close()
        reader.close()
        executor.shutdown()
        torch.cuda.synchronize()
        for buffer in buffers:
            unpin(buffer)
