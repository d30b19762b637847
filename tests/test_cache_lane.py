"""Keys and values on their way to a device and back: what crosses, what stays, and what is left when something fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm_magic.backends.accelerate.layer_cache import GrowingTensors
from llm_magic.backends.accelerate.placement.cache_lane import CacheLane
from llm_magic.backends.accelerate.placement.pieces import Ring, pieces
from tests.fake_streams import HurriedStreams
from tests.placements import GPU

CPU, THERE = torch.device("cpu"), torch.device(GPU)
HEADS, WIDTH = 2, 4
ROW_BYTES = 2 * HEADS * WIDTH * 4  # of one token's keys and values in float32: 64
CONTEXT = 32


class CountingStreams(HurriedStreams):
    """Late on purpose; they know how much they have carried, and fail when they are told to."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, 0.0005)
        self.carried_bytes = 0
        self.fails = False

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: Any) -> Any:
        if self.fails:
            raise RuntimeError("no copy")
        self.carried_bytes += sum(source.nbytes for source, _ in pairs)
        return super().copy(pairs, after)


class Lane:
    """A lane of two blocks, with its streams."""

    def __init__(self, piece_bytes: int = 48) -> None:
        self.there, self.back = CountingStreams(0), CountingStreams(1)
        made = iter((self.there, self.back))
        self.lane = CacheLane(THERE, [(0,), (1,)], piece_bytes, lambda: next(made), CONTEXT)

    def carried_rows(self) -> tuple[float, float]:
        """Tokens that went there, and back, since the last time."""
        found = self.there.carried_bytes / ROW_BYTES, self.back.carried_bytes / ROW_BYTES
        self.there.carried_bytes = self.back.carried_bytes = 0
        return found

    def pass_over(self, layer: Any, twin: Any, count: int) -> None:
        """Add tokens to a layer while it is there, and to its twin, which stays."""
        keys, values = states(count)
        stay = self.lane.visit(layer)
        layer.update(keys, values)
        twin.update(keys, values)
        stay.end()


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.lane.close()
    made.there.close()
    made.back.close()


def states(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, HEADS, count, WIDTH), torch.rand(1, HEADS, count, WIDTH)


def filled(layer: Any, count: int = 3) -> Any:
    layer.update(*states(count))
    return layer


def assert_same(layer: Any, twin: Any) -> None:
    assert torch.equal(layer.keys, twin.keys)
    assert torch.equal(layer.values, twin.values)
    assert layer.get_seq_length() == twin.get_seq_length()
    assert layer.device == CPU


# Pieces


@pytest.mark.parametrize("most_bytes", [1, 12, 16, 64, 100, 160, 10_000])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (3, 7), (6,), (), (1, 2, 0, 4), (0,)])
def test_pieces_are_all_of_a_tensor(shape: tuple[int, ...], most_bytes: int) -> None:
    source, target = torch.rand(shape), torch.zeros(shape)
    for piece, place in pieces([(source, target)], most_bytes):
        assert piece.nbytes <= max(most_bytes, 4)
        assert place.is_contiguous()
        place.copy_(piece)
    assert torch.equal(source, target)


@pytest.mark.parametrize("most_bytes", [12, 100, 10_000])
def test_pieces_come_from_and_go_to_parts_of_larger_tensors(most_bytes: int) -> None:
    source, target = torch.rand(2, 3, 9, 4), torch.zeros(2, 3, 11, 4)
    for piece, place in pieces([(source[..., 2:7, :], target[..., 4:9, :])], most_bytes):
        place.copy_(piece)
    assert torch.equal(target[..., 4:9, :], source[..., 2:7, :])
    assert not target[..., :4, :].any()
    assert not target[..., 9:, :].any()


def test_a_buffer_is_used_again_when_its_piece_is_done_with() -> None:
    ring, done = Ring([torch.zeros(16, dtype=torch.uint8) for _ in range(2)]), list[int]()
    for number in range(5):
        ring.turn(torch.zeros(2, 2)).fill_(number)
        ring.used_until(lambda number=number: done.append(number))
        assert done == list(range(number - 1))
    ring.drain()
    assert done == list(range(5))
    ring.drain()
    assert done == list(range(5))


# What crosses


@pytest.mark.parametrize("piece_bytes", [4, 48, 100_000])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_what_was_at_home_stays_and_what_is_new_joins_it(is_ahead: bool, piece_bytes: int) -> None:
    made = Lane(piece_bytes)
    if is_ahead:
        made.lane.let_go_ahead(0)
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicLayer()]
    twins = [DynamicLayer(), DynamicLayer()]
    seen = 0
    for count in (3, 2, 4, 40, 1):
        for number, (layer, twin) in enumerate(zip(cache.layers, twins, strict=True)):
            keys, values = states(count)
            twin.update(keys, values)
            stay = made.lane.visit(layer)
            made.lane.prepare(cache, number + 1)
            layer.update(keys, values)
            layer.keys[..., :-count, :] = float("nan")  # it is not brought home again
            stay.end()
        made.lane.finish()
        for layer, twin in zip(cache.layers, twins, strict=True):
            assert_same(layer, twin)
        assert made.carried_rows() == (2 * seen, 2 * count)
        seen += count
    made.lane.close()


@pytest.mark.parametrize("records", [False, True])
def test_of_a_window_only_new_tokens_come_home(records: bool, lane: Lane) -> None:
    layer, twin = (DynamicSlidingWindowLayer(sliding_window=4) for _ in range(2))
    layer.record_past = twin.record_past = records
    held = 0
    for count in (3, 1, 5, 2, 1):
        lane.pass_over(layer, twin, count)
        lane.lane.finish()
        assert_same(layer, twin)
        assert layer._sliding_window_tensor.device == CPU
        now = layer.keys.shape[-2]
        assert lane.carried_rows() == (held, min(count, now))
        held = now


def test_other_tensors_of_a_layer_go_both_ways(lane: Lane) -> None:
    class Indexed(DynamicLayer):
        """As layers of sparse attention are."""

    layer, twin = filled(Indexed()), Indexed()
    twin.update(layer.keys, layer.values)
    layer.indexer_keys = torch.rand(1, 3, 4)
    layer.states = {0: torch.rand(2, 5)}
    before = layer.indexer_keys, layer.states[0].clone()
    stay = lane.lane.visit(layer)
    layer.states[0] += 1
    stay.end()
    lane.lane.finish()
    assert_same(layer, twin)
    assert torch.equal(layer.indexer_keys, before[0])
    assert torch.equal(layer.states[0], before[1] + 1)


def test_a_layer_without_tokens_comes_home_with_its_first_ones(lane: Lane) -> None:
    layer, twin = filled(DynamicLayer()), filled(DynamicLayer())
    layer.crop(-3)
    twin.crop(-3)
    lane.pass_over(layer, twin, 2)
    lane.lane.finish()
    assert_same(layer, twin)


# Where it is in RAM


def test_a_layer_grows_where_it_is(lane: Lane) -> None:
    layer, twin = DynamicLayer(), DynamicLayer()
    places = set()
    for count in (3, 2, CONTEXT - 5):
        lane.pass_over(layer, twin, count)
        lane.lane.finish()
        places.add(layer.keys.data_ptr())
    assert len(places) == 1
    lane.pass_over(layer, twin, 1)  # there is no more room
    lane.lane.finish()
    assert layer.keys.data_ptr() not in places
    assert_same(layer, twin)


def test_what_somebody_else_has_of_a_layer_never_changes(lane: Lane) -> None:
    layer, twin = DynamicLayer(), DynamicLayer()
    lane.pass_over(layer, twin, 4)
    lane.lane.finish()
    held, copy = layer.keys, layer.keys.clone()
    for each in (layer, twin):
        each.crop(-2)
    lane.pass_over(layer, twin, 3)
    lane.lane.finish()
    assert_same(layer, twin)
    assert torch.equal(held, copy)


def test_room_behind_a_tensor_is_given_once() -> None:
    growing = GrowingTensors(8)
    tensor = growing.new(torch.zeros(1, 2, 3, 4))
    assert growing.grown(tensor[..., :2, :], (1, 2, 4, 4)) is None
    first = growing.grown(tensor, (1, 2, 5, 4))
    assert first.data_ptr() == tensor.data_ptr()
    assert growing.grown(tensor, (1, 2, 5, 4)) is None
    assert growing.grown(first, (1, 2, 9, 4)) is None
    del first, tensor
    assert not growing._room


def test_a_window_goes_on_in_its_place_until_there_is_no_room() -> None:
    growing = GrowingTensors(1000)
    window, rows = torch.zeros(1, 2, 3, 4), torch.arange(40.0).view(1, 1, 10, 4).expand(1, 2, 10, 4)
    wanted, places = window, []
    for number in range(10):
        before = window
        whole = growing.longer(window, rows[..., number : number + 1, :], 8)
        wanted = torch.cat([wanted, rows[..., number : number + 1, :]], dim=2)[..., -3:, :]
        window = growing.last(whole, 3)
        assert torch.equal(window, wanted)
        assert whole.shape[2] == 4
        places.append(window.untyped_storage().data_ptr())
        assert not number or places[-2] != places[-1] or window.data_ptr() == before.data_ptr() + 4 * 4
    assert len(set(places)) == 2, "of 8 rows each, and 3 of them taken along"
    assert growing.last(window, 5) is window
    assert window.untyped_storage().nbytes() == 2 * 8 * 4 * 4
    del window, whole, before
    assert not growing._room


# Ahead


def test_a_layer_that_has_changed_comes_anew(lane: Lane) -> None:
    lane.lane.let_go_ahead(0)
    cache = DynamicCache()
    cache.layers = [filled(DynamicLayer(), 5)]
    twin = DynamicLayer()
    twin.update(cache.layers[0].keys[..., :3, :], cache.layers[0].values[..., :3, :])
    lane.lane.prepare(cache, 0)
    lane.lane.prepare(cache, 0)
    cache.layers[0].crop(-2)
    lane.pass_over(cache.layers[0], twin, 2)
    lane.lane.finish()
    assert_same(cache.layers[0], twin)
    assert lane.carried_rows() == (5 + 3, 2)


def test_what_came_in_vain_is_forgotten(lane: Lane) -> None:
    lane.lane.let_go_ahead(0)
    cache = DynamicCache()
    cache.layers = [filled(DynamicLayer()), filled(DynamicLayer())]
    for end in (lane.lane.settle, lane.lane.finish):
        for number in range(3):  # there is no third block
            lane.lane.prepare(cache, number)
        coming = [each.arrival.result().parts[-1] for each in lane.lane._coming.values()]
        end()
        assert not lane.lane._coming
        assert len(coming) == 2
        assert all(
            copy._arrival._event.query() for copy in coming
        )  # or others would have the memory too early
    lane.lane.prepare(None, 0)
    assert not lane.lane._coming


# Errors


def test_a_layer_that_a_failed_pass_left_elsewhere_is_brought_home_first(lane: Lane) -> None:
    layer, twin = filled(DynamicLayer()), DynamicLayer()
    twin.update(layer.keys, layer.values)
    lane.lane.visit(layer)
    lane.lane.settle()
    lane.pass_over(layer, twin, 2)
    lane.lane.come_home(layer)
    assert_same(layer, twin)


def test_no_room_on_the_device_is_said_when_the_block_needs_it(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane.lane.let_go_ahead(0)
    cache = DynamicCache()
    layer = filled(DynamicLayer())
    cache.layers = [layer]
    twin = DynamicLayer()
    twin.update(layer.keys, layer.values)

    def full(*_shape: Any, **_named: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        lane.lane.prepare(cache, 0)
        with pytest.raises(torch.OutOfMemoryError):
            lane.lane.visit(layer)
    assert_same(layer, twin)
    lane.pass_over(layer, twin, 2)
    lane.lane.finish()
    assert_same(layer, twin)


@pytest.mark.parametrize("end", ["finish", "settle"])
def test_a_copy_that_fails_leaves_the_layer_as_it_was(end: str, lane: Lane) -> None:
    layer, twin = DynamicLayer(), DynamicLayer()
    lane.pass_over(layer, twin, 3)
    lane.lane.finish()
    lane.there.fails = True
    with pytest.raises(RuntimeError, match="no copy"):
        lane.lane.visit(layer)
    assert_same(layer, twin)
    lane.there.fails, lane.back.fails = False, True
    lane.pass_over(layer, DynamicLayer(), 2)
    if end == "finish":
        with pytest.raises(RuntimeError, match="no copy"):
            lane.lane.finish()
    lane.lane.settle()
    assert_same(layer, twin)
    lane.back.fails = False
    for count in (2, 3):
        lane.pass_over(layer, twin, count)
        lane.lane.finish()
        assert_same(layer, twin)


def test_few_layers_have_new_tokens_on_the_device(lane: Lane) -> None:
    layers = [DynamicLayer() for _ in range(6)]
    twins = [DynamicLayer() for _ in layers]
    for layer, twin in zip(layers, twins, strict=True):
        lane.pass_over(layer, twin, 3)
        assert len(lane.lane._going) <= 2
    lane.lane.finish()
    for layer, twin in zip(layers, twins, strict=True):
        assert_same(layer, twin)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_tensors_are_of_use_in_every_mode(mode: Callable[[], Any], lane: Lane) -> None:
    layer, twin = DynamicLayer(), DynamicLayer()
    for _ in range(2):
        with mode():
            lane.pass_over(layer, twin, 2)
            lane.lane.finish()
        assert_same(layer, twin)
        assert not layer.keys.is_inference()
