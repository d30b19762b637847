"""Keys and values of layers that visit a GPU: prompts in several passes, however late copies are, and what crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.placement.attachments import Attachments  # noqa: E402
from llm_magic.backends.accelerate.placement.placed import PlacedModel  # noqa: E402
from tests import tiny  # noqa: E402
from tests.caches import cache_of, given  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402
from tests.gpu.test_placed import (  # noqa: E402
    DEVICE,
    RESIDENT,
    STREAMED,
    VISITING,
    LateStreams,
    in_turn,
    late,
    layers,
    resident,
)
from tests.placements import load_placed, placed_plan  # noqa: E402

PASSES = ((7, 11, 13, 17, 19, 23), (29, 31, 37, 41, 43), (47, 53, 59, 61), (3, 5, 7, 9, 11, 13, 15))
WAYS = {
    "all visiting": layers(VISITING),
    "streamed and visiting": layers(STREAMED, VISITING),
    "resident and visiting": layers(RESIDENT, VISITING),
}
MODELS = ("llama", "gemma", "qwen3-moe")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: tiny.MODELS[name](tmp_path_factory.mktemp("tiny") / name))


@pytest.fixture(params=[4096, 96], ids=["whole", "in small pieces"])
def in_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_magic.planning.costs._CACHE_PIECE_BYTES", request.param)


def placed_model(folder: Path, way: str, streams: Any = None, *, is_ahead: bool = True) -> PlacedModel:
    placed = load_placed(folder, placed_plan(folder, WAYS[way]), streams or late())
    in_turn(placed.model)
    (lane,) = placed._attachments._cache_lanes.values()
    if is_ahead:
        lane.let_go_ahead(0)
    return placed


def read(model: Any, passes: Sequence[Sequence[int]] = PASSES, kept: Any = None) -> tuple[list[Any], Any]:
    """Logits of each pass, and the KV cache."""
    found = []
    with torch.inference_mode():
        for ids in passes:
            out = model(torch.tensor([ids], device=DEVICE), **given(kept), use_cache=True)
            found.append(out.logits)
            kept = cache_of(out)
    return found, kept


def assert_same(ours: tuple[list[Any], Any], theirs: tuple[list[Any], Any]) -> None:
    assert all(map(torch.equal, ours[0], theirs[0]))
    for mine, right in zip(ours[1].layers, theirs[1].layers, strict=True):
        assert torch.equal(mine.keys.to(DEVICE), right.keys)
        assert torch.equal(mine.values.to(DEVICE), right.values)


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_passes_of_a_prompt_are_bit_equal_to_the_resident_models(
    name: str, way: str, is_ahead: bool, in_pieces: None, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    right = read(resident(folder))
    placed = placed_model(folder, way, is_ahead=is_ahead)
    for _ in range(2):
        ours = read(placed.model)
        assert_same(ours, right)
    homes = [torch.device(p.compute) for p in placed.plan.placements if p.block.label.startswith("layers.")]
    assert [layer.keys.device for layer in ours[1].layers] == homes
    placed.close()


@pytest.mark.parametrize("refused", [1, 3, 4])
def test_buffers_that_the_system_does_not_pin(
    refused: int, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is not pinned is copied all the same, and waits."""
    folder = folder_of("llama")
    monkeypatch.setattr("llm_magic.planning.costs._CACHE_PIECE_BYTES", 3000)
    register = torch.cuda.cudart().cudaHostRegister
    pinned = []

    def refuse(address: int, size: int, flags: int) -> Any:
        if size == 4096:  # a page: a buffer of ours
            pinned.append(address)
            return 2 if len(pinned) > 4 - refused else register(address, size, flags)
        return register(address, size, flags)

    right = read(resident(folder))
    placed = load_placed(folder, None, late(from_pinned=False))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.cudart(), "cudaHostRegister", refuse)
        patch.setattr(Attachments, "_in_the_way", lambda _attachments: [])
        placed.apply(placed_plan(folder, WAYS["streamed and visiting"]))
    (lane,) = placed._attachments._cache_lanes.values()
    assert lane.refused_bytes == refused * 3000
    assert_same(read(placed.model), right)
    placed.close()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("way", ["all visiting", "streamed and visiting"])
def test_an_error_in_any_layer_of_a_later_pass_leaves_the_next_one_right(
    way: str, error: type[BaseException], folder_of: Callable[[str], Path]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    folder = folder_of("llama")
    right = read(resident(folder))
    placed = placed_model(folder, way)
    for layer in placed.model.model.layers:
        for module in (layer.self_attn, layer.mlp.down_proj):
            _, kept = read(placed.model, PASSES[:2])
            before = kept.get_seq_length()
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(error):
                read(placed.model, PASSES[2:3], kept)
            handle.remove()
            placed.settle()
            for each in kept.layers:  # as the decoding loop takes back a pass that failed
                each.keys, each.values = each.keys[..., :before, :], each.values[..., :before, :]
            logits, kept = read(placed.model, PASSES[2:], kept)
            assert_same(([*right[0][:2], *logits], kept), right)
    placed.close()


class Counting(LateStreams):
    """Know what crosses of keys and values, by whether the target is the GPU."""

    def __init__(self, carried: dict[str, int]) -> None:
        super().__init__(DEVICE, 0)
        self._carried = carried

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: Any) -> Any:
        for source, target in pairs:
            if target.dtype != torch.uint8:  # as weights are in their slots
                self._carried["there" if target.device.type == "cuda" else "back"] += source.nbytes
        return super().copy(pairs, after)


def test_only_what_is_needed_crosses(folder_of: Callable[[str], Path]) -> None:
    """All earlier tokens there, the new ones back, of each layer and pass."""
    folder = folder_of("llama")
    carried = {"there": 0, "back": 0}
    placed = placed_model(
        folder, "all visiting", lambda device: None if device == "cpu" else Counting(carried)
    )
    config, layers_ = placed.model.config, len(placed.model.model.layers)
    width = config.hidden_size // config.num_attention_heads
    row = 2 * config.num_key_value_heads * width * 4 * layers_
    kept, seen = None, 0
    for ids in PASSES:
        before = dict(carried)
        _, kept = read(placed.model, [ids], kept)
        assert carried["there"] - before["there"] == seen * row
        assert carried["back"] - before["back"] == len(ids) * row
        seen += len(ids)
    placed.close()


@pytest.mark.skipif(not IS_SIMULATED, reason="of the simulated device alone")
@pytest.mark.parametrize("is_ahead", [False, True])
def test_memory_that_runs_out_anywhere_in_a_pass(is_ahead: bool, folder_of: Callable[[str], Path]) -> None:
    from tests.simulated_cuda import fail_allocation_in

    folder = folder_of("llama")
    right = read(resident(folder))
    placed = placed_model(folder, "streamed and visiting", is_ahead=is_ahead)
    failures = 0
    for number in range(0, 200, 7):
        _, kept = read(placed.model, PASSES[:2])
        before = kept.get_seq_length()
        fail_allocation_in(number)
        try:
            logits, kept = read(placed.model, PASSES[2:3], kept)
        except torch.OutOfMemoryError:
            failures += 1
            fail_allocation_in(-1)
            placed.settle()
            for each in kept.layers:
                each.keys, each.values = each.keys[..., :before, :], each.values[..., :before, :]
            logits, kept = read(placed.model, PASSES[2:3], kept)
        fail_allocation_in(-1)
        assert torch.equal(logits[0], right[0][2])
    assert failures > 5
    placed.close()
