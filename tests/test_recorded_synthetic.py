"""Recording a decoder layer that does anything that code may do: it is recorded, or left as it is, never wrong."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from transformers import DynamicCache  # noqa: E402

from llm_magic.backends.accelerate.decoding import attention  # noqa: E402
from llm_magic.backends.accelerate.recorded import lowering  # noqa: E402
from llm_magic.backends.accelerate.recorded.layers import RecordedLayers  # noqa: E402
from llm_magic.backends.accelerate.recorded.recordings import Recordings  # noqa: E402
from tests.recorded_layers import WIDTH, Layer, Twins, cache, programs, states  # noqa: E402

Pair = namedtuple("Pair", ["states", "rest"])
Forward = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def whole_in_place(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    z = y * 2
    y.mul_(3).add_(z)
    return x + layer.down(y + z)


def part_in_place(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    first, second = y.chunk(2, dim=-1)
    before = y + 1
    first.mul_(second)
    second.add_(first)
    y[..., 3:5] = before[..., :2]
    return x + layer.down(y * before)


def read_before_and_after(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    before = layer.down(y)
    y.neg_()
    after = layer.down(y)
    y.mul_(2)
    return x + before * 2 + after, layer.down(y)


def torch_reads_before_and_after(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    before = y.sin()
    y.neg_()
    middle = y.sin()
    y.zero_()
    y[..., :7] = middle[..., 7:14]
    return x + layer.down(before + middle), y.sin()


def complex_parts(layer: Any, x: Any) -> Any:
    y = layer.up(x).float()
    z = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
    return x + layer.down(torch.view_as_real(z * z).flatten(-2).to(x.dtype))


def complex_parts_then_a_change(layer: Any, x: Any) -> Any:
    y = layer.up(x).float()
    z = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
    y.mul_(2)
    return x + layer.down(torch.view_as_real(z).flatten(-2).to(x.dtype))


def bits_then_a_change(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    words = y.view(torch.int16)
    y.mul_(2)
    return x + layer.down(words.view(x.dtype))


def a_view_is_changed(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    turned = y.transpose(1, 2)
    turned[:, ::3] *= 2
    return x + layer.down(y)


def empty_then_filled(layer: Any, x: Any) -> Any:
    y = torch.empty_like(x)
    y[..., ::2], y[..., 1::2] = x[..., 1::2], -x[..., ::2]
    return layer.mixed(y)


def zeros_then_added(layer: Any, x: Any) -> Any:
    y = x.new_zeros(x.shape)
    y += layer.mixed(x)
    return y


def two_results(layer: Any, x: Any) -> Any:
    return layer.mixed(x), None


def reshaped_with_a_copy(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    return x + layer.down(y.unflatten(-1, (6, 8)).transpose(-1, -2).reshape(y.shape))


def an_index(layer: Any, x: Any) -> Any:
    best = x.topk(4, dim=-1).indices
    return layer.mixed(x) + x.gather(-1, best).sum(-1, keepdim=True)


def split_evenly(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    a, b, c = y.split([16, 24, 8], dim=-1)
    return x + layer.down(torch.cat((c, b, a), dim=-1))


def a_weight_that_is_viewed(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * (1 + layer.weight.view(4, 8).t().reshape(-1)) + layer.up.bias[:WIDTH]


def its_norm(layer: Any, x: Any) -> Any:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return layer.mixed(layer.weight * y.to(x.dtype))


def the_same_twice(layer: Any, x: Any) -> Any:
    y = layer.up(x)
    return x + layer.down(y * y + y) + layer.down(y)


def a_number_of_its_own(layer: Any, x: Any) -> Any:
    """As the sparse activations of Gemma 3n, whose threshold is a quantile of the normal distribution."""
    share = torch.tensor(0.9, dtype=torch.float32)
    factor = torch.distributions.normal.Normal(0, 1).icdf(share).type(x.dtype)
    y = layer.up(x)
    return x + layer.down(torch.relu(y - (y.mean(-1, keepdim=True) + y.std(-1, keepdim=True) * factor)))


def a_half_that_is_not_used(layer: Any, x: Any) -> Any:
    layer.up(x) * 3
    return layer.mixed(x)


RECORDED: dict[str, Forward] = {
    name: function
    for name, function in list(globals().items())
    if getattr(function, "__module__", None) == __name__
    and "layer" in getattr(function, "__annotations__", {})
}
del RECORDED["complex_parts_then_a_change"], RECORDED["bits_then_a_change"]


@pytest.mark.parametrize("name", RECORDED)
def test_a_layer_is_recorded(name: str) -> None:
    twins = Twins(Layer(RECORDED[name]))
    for seed, tokens in enumerate((1, 1, 1, 3, 3, 16, 1, 17)):
        twins.check(states(tokens, seed))
    assert twins.programs == 3


def test_results_of_several_batches() -> None:
    twins = Twins(Layer(its_norm))
    for seed, (batch, tokens) in enumerate(((1, 2), (2, 1), (2, 2), (2, 1), (4, 4), (1, 2), (4, 5))):
        twins.check(states(tokens, seed, batch))
    assert twins.programs == 4  # the first one is only looked at


# ------------------------------------------------------------------------------- what is the same in every sweep


def returns_an_argument(layer: Any, x: Any, other: Any) -> Any:
    return layer.mixed(x), other


def returns_its_states(_layer: Any, x: Any) -> Any:
    return x


def returns_a_view_of_its_states(layer: Any, x: Any) -> Any:
    return layer.mixed(x), x[..., :5]


def returns_a_weight(layer: Any, x: Any) -> Any:
    return layer.mixed(x), layer.weight


def returns_a_part_of_a_weight(layer: Any, x: Any) -> Any:
    return layer.mixed(x), layer.up.weight[3]


def returns_one_thing_twice(layer: Any, x: Any) -> Any:
    y = layer.mixed(x)
    return y, y


@pytest.mark.parametrize(
    "function",
    [
        returns_its_states,
        returns_a_view_of_its_states,
        returns_a_weight,
        returns_a_part_of_a_weight,
        returns_one_thing_twice,
    ],
)
def test_results_that_are_something_else_as_well(function: Forward) -> None:
    twins = Twins(Layer(function))
    for seed in range(3):
        twins.check(states(1, seed))
    mine, theirs = twins.run(states())
    if function is returns_one_thing_twice:
        assert (mine[0].data_ptr() == mine[1].data_ptr()) == (theirs[0].data_ptr() == theirs[1].data_ptr())
    if function is returns_a_weight:
        assert mine[1].data_ptr() == twins.layer.weight.data_ptr()


def test_an_argument_that_is_handed_on() -> None:
    twins = Twins(Layer(returns_an_argument))
    for seed in range(4):
        twins.check(states(1, seed), states(1, seed + 10))
        twins.check(states(1, seed), None)
        twins.check(states(1, seed), "a word")


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: [y, y + 1],
        lambda y: {"states": y, "more": y + 1},
        lambda y: Pair(y, None),
        lambda y: OrderedDict(states=y),
        lambda y: (y, (y + 1, [y])),
        lambda y: (y, torch.float32),
        lambda y: ((y,), 3, "word"),
        lambda _: None,
    ],
)
def test_results_of_any_kind(kind: Callable[[Any], Any]) -> None:
    twins = Twins(Layer(lambda layer, x: kind(layer.mixed(x))))
    for seed in range(3):
        twins.check(states(1, seed))


def rotated(layer: Any, x: Any, position_embeddings: Any = None, scale: Any = 1.0, **_: Any) -> Any:
    cos, sin = position_embeddings
    return layer.mixed(x * cos + x.flip(-1) * sin) * scale


def test_arguments_by_any_name_in_any_order() -> None:
    twins = Twins(Layer(rotated))
    cos, sin = states(1, 8), states(1, 9)
    for seed in range(3):
        x = states(1, seed)
        twins.check(x, (cos, sin))
        twins.check(x, position_embeddings=(cos, sin), scale=2.0)
        twins.check(x, scale=2.0, position_embeddings=(sin, cos))
        twins.check(scale=3, position_embeddings=(sin, cos), hidden_states=x)
        twins.check(x, (cos, cos))  # the same one twice
        twins.check(x, (x, x), scale=sin)
        twins.check(x, (cos, sin), scale=True)
        twins.check(x, (cos, sin), scale=1)
        twins.check(x, (cos, sin[:, :, :1]))
        twins.check(x, [cos, sin])
    assert twins.programs >= 7


def test_one_tensor_for_several_arguments() -> None:
    twins = Twins(Layer(rotated))
    with torch.no_grad():
        for seed in range(3):
            x = states(1, seed)
            mine = twins.layer(x, (x, x), past_key_values=twins.cache)
            assert torch.equal(mine, twins.usual(x, (x, x)))


def test_states_that_lie_in_another_way() -> None:
    twins = Twins(Layer(its_norm))
    for seed in range(3):
        twins.check(states(3, seed))
    wide = states(3, 7).repeat(1, 1, 2)
    for x in (
        wide[..., ::2],
        wide[..., 5 : 5 + WIDTH],
        states(WIDTH, 3)[:, :, :3].transpose(1, 2),
        states(1, 3).expand(1, 3, WIDTH),
    ):
        assert not x.is_contiguous()  # torch may add its numbers in another order then
        with torch.no_grad():
            assert torch.equal(twins.layer(x, past_key_values=twins.cache), twins.usual(x.contiguous()))
    assert twins.programs == 1


@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
def test_states_that_are_no_numbers(wrong: str) -> None:
    twins = Twins(Layer(its_norm))
    for seed in range(3):
        x = states(2, seed)
        if seed:
            x[0, 0, 5] = float(wrong)
        twins.check(x)
    assert twins.programs == 1


def masked(layer: Any, x: Any, attention_mask: Any = None) -> Any:
    y = layer.mixed(x)
    if attention_mask is None:
        return y
    if attention_mask.dtype == torch.bool:
        return y.masked_fill(~attention_mask.any(-1).view(1, -1, 1), 0)
    return y * attention_mask.sum(-1).view(1, -1, 1).to(y.dtype)


def test_masks_of_all_kinds() -> None:
    twins = Twins(Layer(masked))
    for seed in range(3):
        x = states(2, seed)
        for places in (4, 5, 4):
            for dtype in (torch.bfloat16, torch.float32, torch.bool, torch.int64):
                mask = torch.randint(0, 2, (1, 1, 2, places), generator=torch.Generator().manual_seed(seed))
                twins.check(x, attention_mask=mask.to(dtype))
                twins.check(x, attention_mask=mask[0].to(dtype))
                twins.check(x, attention_mask=mask[0, 0].to(dtype))
            twins.check(x)
            twins.check(x, None)


def test_lengths_that_are_numbers_do_not_fill_memory() -> None:
    """Some code tells its layers the length of the text, which is another one in each sweep."""
    twins = Twins(Layer(lambda layer, x, length=0: layer.mixed(x) * length))
    for length in range(200):
        twins.check(states(1, length), length=length)
    assert len(twins.recorded._layers[0]._bound) <= 64


def test_masks_of_three_dimensions_do_not_fill_memory() -> None:
    """BLOOM's ALiBi is ``[heads, 1, places]``."""
    twins = Twins(Layer(lambda layer, x, alibi=None: layer.mixed(x) + alibi.sum()))
    for places in range(1, 200):
        twins.check(states(1, places), alibi=torch.ones(4, 1, places))
    assert len(twins.recorded._layers[0]._bound) <= 64


# ------------------------------------------------------------------------------------- what is another thing later


def counts_calls(layer: Any, x: Any) -> Any:
    layer.calls += 1
    return layer.mixed(x) * layer.calls


def counts_calls_and_changes_later(layer: Any, x: Any) -> Any:
    layer.calls += 1
    return layer.mixed(x) * (-1 if layer.calls > 6 else 1)


def turns(layer: Any, x: Any) -> Any:
    layer.calls = 1 - layer.calls
    return layer.mixed(x) * (1 + layer.calls)


def counts_in_a_list(layer: Any, x: Any) -> Any:
    layer.held.append(len(layer.held))
    return layer.mixed(x) * (-1 if len(layer.held) > 6 else 1)


def counts_in_a_dict(layer: Any, x: Any) -> Any:
    layer.named["calls"] = layer.named.get("calls", 0) + 1
    return layer.mixed(x) * (-1 if layer.named["calls"] > 6 else 1)


def counts_in_a_buffer(layer: Any, x: Any) -> Any:
    layer.count += 1
    return layer.mixed(x) * layer.count


def counts_in_a_new_buffer(layer: Any, x: Any) -> Any:
    layer.count = layer.count + 1
    return layer.mixed(x) * layer.count


def counts_in_the_data_of_a_buffer(layer: Any, x: Any) -> Any:
    layer.count.data = layer.count.data + 1
    return layer.mixed(x) * layer.count


def changes_a_weight(layer: Any, x: Any) -> Any:
    layer.weight[3:].mul_(1.5)
    return layer.mixed(x) * layer.weight


def keeps_the_last(layer: Any, x: Any) -> Any:
    y = layer.mixed(x)
    if layer.last is not None:
        y = y + layer.last
    layer.last = x
    return y


def keeps_what_nobody_reads(layer: Any, x: Any) -> Any:
    layer.last = layer.up(x)
    return layer.mixed(x)


def changes_its_states(layer: Any, x: Any) -> Any:
    y = layer.mixed(x)
    x += 1
    return y


def changes_a_view_of_its_states(layer: Any, x: Any) -> Any:
    x[..., :3].mul_(2)
    return layer.mixed(x)


def draws_numbers(layer: Any, x: Any) -> Any:
    return layer.mixed(x) + torch.rand_like(x) * 0


def draws_numbers_of_python(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * (1 + 0 * random.random())


def looks_at_numbers(layer: Any, x: Any) -> Any:
    return layer.mixed(x) if x.sum() > 0 else -layer.mixed(x)


def takes_an_item(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * x.float().max().item()


def takes_a_list(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * x.float().flatten()[0].tolist()


def takes_an_array(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * float(np.abs(x.float().numpy()).max() > 2)


def compares(layer: Any, x: Any) -> Any:
    return layer.mixed(x) if torch.equal(x, x.abs()) else -layer.mixed(x)


def compares_nearly(layer: Any, x: Any) -> Any:
    return layer.mixed(x) if torch.allclose(x, x.abs()) else -layer.mixed(x)


def selects(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * x[x > 0].sum()


def selects_by_places(layer: Any, x: Any) -> Any:
    """Of two places as many are chosen now as they were when it was recorded."""
    chosen = (x[0, :, :1] > 0).nonzero()[:, 0]
    return layer.mixed(x).index_add(1, chosen, x[:, chosen])


def has_another_tensor(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * layer.other


def makes_a_tensor(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * torch.tensor(2.0)


def makes_a_tensor_of_a_list(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * torch.tensor(layer.listed, dtype=x.dtype)


def makes_a_tensor_of_a_number(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * torch.tensor(layer.calls)


def makes_a_tensor_and_changes_it(layer: Any, x: Any) -> Any:
    factors = torch.tensor([2.0] * WIDTH).to(x.dtype)
    factors.add_(layer.up(x).mean())
    return layer.mixed(x) * factors


def makes_a_large_tensor(layer: Any, x: Any) -> Any:
    return layer.mixed(x) * torch.tensor([[2.0] * WIDTH] * 16).to(x.dtype).sum(0)


def assigns_a_number(layer: Any, x: Any) -> Any:
    y = layer.mixed(x)
    y[..., 0] = 0.25
    return y


def has_another_layer(layer: Any, x: Any) -> Any:
    return layer.mixed(x) + layer.elsewhere[0](x)


def fails_sometimes(layer: Any, x: Any) -> Any:
    return layer.mixed(x) + layer.missing


LATER: dict[str, Forward] = {
    name: function
    for name, function in list(globals().items())
    if getattr(function, "__module__", None) == __name__
    and "layer" in getattr(function, "__annotations__", {})
}
LATER = {
    name: function
    for name, function in LATER.items()
    if list(LATER).index(name) >= list(LATER).index("counts_calls") and name != "fails_sometimes"
} | {each.__name__: each for each in (complex_parts_then_a_change, bits_then_a_change)}


def changing(function: Forward) -> Layer:
    elsewhere = [torch.nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)]
    other = torch.full((1,), 3.0, dtype=torch.bfloat16)
    return Layer(
        function, calls=0, held=[], named={}, last=None, other=other, elsewhere=elsewhere, listed=[2]
    )


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", LATER)
def test_a_layer_is_right_or_left_as_it_is(name: str, tokens: int) -> None:
    twins = Twins(changing(LATER[name]))
    torch.manual_seed(0)
    for seed in range(12):
        if name == "has_another_tensor":
            for layer in (twins.layer, twins.usual):
                layer.other = torch.full((1,), float(seed), dtype=torch.bfloat16)
        if name == "makes_a_tensor_of_a_number":
            twins.layer.calls = twins.usual.calls = seed // 3
        if name == "makes_a_tensor_of_a_list":
            twins.layer.listed[0] = twins.usual.listed[0] = seed // 3
        x = states(tokens, seed)
        mine, theirs = x.clone(), x.clone()
        results = [
            layer(own, past_key_values=twins.cache)
            for layer, own in ((twins.layer, mine), (twins.usual, theirs))
        ]
        assert torch.equal(*results), seed
        assert torch.equal(mine, theirs)
        for attribute in ("calls", "held", "named"):
            assert getattr(twins.layer, attribute) == getattr(twins.usual, attribute), attribute
        if twins.usual.last is not None:
            assert torch.equal(twins.layer.last, twins.usual.last)
        assert torch.equal(twins.layer.count, twins.usual.count)


def positions(layer: Any, x: Any, position_ids: Any) -> Any:
    return layer.mixed(x) * position_ids.tolist()[0][0]


def positions_as_an_array(layer: Any, x: Any, position_ids: Any) -> Any:
    return layer.mixed(x) * int(position_ids.numpy()[0, 0])


def positions_as_numbers(layer: Any, x: Any, position_ids: Any) -> Any:
    return layer.mixed(x) * position_ids.to(x.dtype).unsqueeze(-1)


def positions_are_chosen(layer: Any, x: Any, position_ids: Any) -> Any:
    return layer.mixed(x) * (position_ids % 2 == 0).nonzero().shape[0]


@pytest.mark.parametrize(
    "function", [positions, positions_as_an_array, positions_as_numbers, positions_are_chosen]
)
def test_positions_are_those_of_the_sweep(function: Forward) -> None:
    twins = Twins(Layer(function))
    for seed in range(8):
        twins.check(states(1, seed), position_ids=torch.tensor([[seed + 3]]))
    assert twins.programs == (function is positions_as_numbers)


def places(layer: Any, x: Any, mask: Any) -> Any:
    """As many rows as the mask has, which recordings have seen alike."""
    rows = mask.nonzero()[:, 1]
    return layer.mixed(x) + x[:, rows].sum(1, keepdim=True)


def test_masks_that_choose_places() -> None:
    twins = Twins(Layer(places))
    for seed in range(8):
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, : 1 + seed % 4] = True
        twins.check(states(4, seed), mask)


# --------------------------------------------------------------------------------------------- the KV cache


class Attends(torch.nn.Module):
    """Asks the cache in some way."""

    layer_idx = 0

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function, self.up = function, torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.eval()

    def forward(self, hidden_states: Any, past_key_values: Any = None) -> Any:
        return self.function(self, hidden_states, past_key_values)


def keys(module: Any, x: Any, kept: Any) -> Any:
    return kept.update(module.up(x)[:, None], x[:, None], module.layer_idx)[0]


def length_or_else(module: Any, x: Any, kept: Any) -> Any:
    try:
        count = kept.get_seq_length()
    except Exception:
        count = 0
    return module.up(x) * count


ASKS: dict[str, Forward] = {
    "length, or else": length_or_else,
    "length": lambda module, x, kept: module.up(x) * kept.get_seq_length(),
    "length of keys": lambda module, x, kept: module.up(x) * keys(module, x, kept).shape[2],
    "many keys": lambda module, x, kept: module.up(x) * (-1 if keys(module, x, kept).shape[2] > 40 else 1),
    "sum of keys": lambda module, x, kept: module.up(x) + keys(module, x, kept).sum(),
    "last key": lambda module, x, kept: module.up(x) + keys(module, x, kept)[:, :, -1:].sum(),
    "layers": lambda module, x, kept: module.up(x) * kept.layers[0].keys.shape[2],
    "is there": lambda module, x, kept: module.up(x) * (2 if kept else 1),
    "how many": lambda module, x, kept: module.up(x) * len(kept),
    "by its class": lambda module, x, kept: module.up(x) * type(kept).__name__.startswith("Dyn"),
    "an attribute": lambda module, x, kept: module.up(x) * hasattr(kept, "get_seq_length"),
}


@pytest.mark.parametrize("name", ASKS)
def test_a_layer_that_asks_the_cache(name: str) -> None:
    twins = Twins(Attends(ASKS[name]))
    mine, theirs = ([cache_of_states() for _ in range(2)] for _ in range(2))
    for seed in range(60):
        for number in range(2):
            x = states(1, seed)
            found = twins.layer(x, past_key_values=mine[number])
            assert torch.equal(found, twins.usual(x, past_key_values=theirs[number])), seed
    for left, right in zip(mine, theirs, strict=True):
        assert torch.equal(left.layers[0].keys, right.layers[0].keys)


def cache_of_states() -> Any:
    from transformers import DynamicCache

    made = DynamicCache()
    made.update(states(3)[:, None], states(3)[:, None], 0)
    return made


# ------------------------------------------------------------------------- keys and values that layers share


def hands_on(layer: Any, x: Any, shared: Any, kept: Any) -> Any:
    keys, values = kept.update(layer.up(x)[:, None], x[:, None], layer.layer_idx)
    shared["all"] = keys, values
    return layer.attend(x, keys, values)


def takes(layer: Any, x: Any, shared: Any, kept: Any) -> Any:
    keys, values = shared["all"]
    return layer.attend(x, keys, values)


class Shares(torch.nn.Module):
    """Attends to keys and values of its own, or of another layer."""

    def __init__(self, function: Forward, index: int) -> None:
        super().__init__()
        self.function, self.layer_idx = function, index
        self.up = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.config = type("Config", (), {"_attn_implementation": "sdpa"})()
        self.num_key_value_groups, self.is_causal = 1, True
        self.eval()

    def attend(self, x: Any, keys: Any, values: Any) -> Any:
        found, _ = attention.sdpa_attention(self, self.up(x)[:, None], keys, values, None, scaling=0.2)
        return x + found.reshape(x.shape)

    def forward(self, hidden_states: Any, shared: Any = None, past_key_values: Any = None) -> Any:
        return self.function(self, hidden_states, shared, past_key_values)


def shares_itself(layer: Any, x: Any, shared: Any, kept: Any) -> Any:
    hands_on(layer, x, shared, kept)
    return takes(layer, x, shared, kept)


def hands_on_what_it_took(layer: Any, x: Any, shared: Any, kept: Any) -> Any:
    shared["others"] = shared["all"]
    return takes(layer, x, shared, kept)


def hands_on_states(layer: Any, x: Any, shared: Any, kept: Any) -> Any:
    shared["all"] = (*shared["all"][:1], x[:, None])
    return takes(layer, x, shared, kept)


def looks_what_is_there(layer: Any, x: Any, shared: Any, kept: Any) -> Any:
    return takes(layer, x, shared, kept) * (1 + len(shared["all"]) + ("others" in shared))


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize(
    ("function", "is_recorded"),
    [
        (takes, True),
        (hands_on_what_it_took, True),
        (shares_itself, False),
        (hands_on_states, False),
        (looks_what_is_there, False),
    ],
)
def test_keys_and_values_that_layers_share(function: Forward, is_recorded: bool, kind: Any) -> None:
    torch.manual_seed(3)
    layers = [Shares(hands_on, 0), Shares(function, 1), Shares(takes, 2)]
    usual = copy.deepcopy(layers)
    held = RecordedLayers({str(number): layer for number, layer in enumerate(layers)}, Recordings())
    caches = DynamicCache(), DynamicCache()
    for seed, tokens in enumerate((5, 1, 1, 2, 1, 2)):
        found, kept = [], []
        for some, cached in zip((layers, usual), caches, strict=True):
            x, shared = states(tokens, seed), kind()
            for layer in some:
                x = layer(x, shared, past_key_values=cached)
            found.append(x)
            kept.append(shared)
        assert torch.equal(*found), seed
        assert list(kept[0]) == list(kept[1])
        for name, tensors in kept[0].items():
            assert all(map(torch.equal, tensors, kept[1][name]))
        if not seed:  # the first tokens of a text go through the layers' own code
            assert not any(layer.is_tried for layer in held._layers)
    assert [layer.is_recorded for layer in held._layers] == [True, is_recorded, True]


def test_no_cache_and_one_of_another_kind() -> None:
    twins = Twins(Layer(lambda layer, x: layer.mixed(x)))
    with torch.no_grad():
        for seed in range(3):
            x = states(1, seed)
            for kept in (None, twins.cache, cache(5), 3, {}):
                assert torch.equal(twins.layer(x, past_key_values=kept), twins.usual(x))


# ---------------------------------------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize("function", [its_norm, the_same_twice, two_results])
def test_what_a_compiled_function_makes_otherwise_is_seen_before_a_linear_layer_as_well(
    function: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aten.silu.default", "aten.rsqrt.default"):
        monkeypatch.setitem(lowering._OF_ONE, name, "tanh")
    monkeypatch.setitem(lowering._OF_TWO, "aten.mul.Tensor", ("add", "add_number"))
    twins = Twins(Layer(function))
    for seed in range(3):
        twins.check(states(1, seed))
    assert twins.programs == 0


# -------------------------------------------------------------------------------------- linear layers of their own


class Wide(torch.nn.Linear):
    """Computes in float32, as routers do."""

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.linear(x.float(), self.weight.float())


class Scaled(torch.nn.Linear):
    def forward(self, x: Any, scale: Any = 1.0) -> Any:
        return super().forward(x) * scale


class Turned(torch.nn.Linear):
    """Gives what lies in another way."""

    def forward(self, x: Any) -> Any:
        return super().forward(x).transpose(1, 2).contiguous().transpose(1, 2)


class Several(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x), None


class Halved(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x)[..., ::2]


OWN: dict[str, tuple[type[torch.nn.Linear], Forward]] = {
    "wide": (
        Wide,
        lambda layer, x: layer.mixed(x) + (layer.own(x) * 2 + 1).sum(-1, keepdim=True).to(x.dtype),
    ),
    "scaled": (Scaled, lambda layer, x: layer.mixed(x) + layer.own(x, 3.0) * 2 + layer.own(x, scale=x)),
    "turned": (Turned, lambda layer, x: layer.mixed(x) + layer.own(x) * 2),
    "several": (Several, lambda layer, x: layer.mixed(x) + layer.own(x)[0] * 2),
    "halved": (Halved, lambda layer, x: layer.mixed(x) + layer.own(x).repeat(1, 1, 2)),
}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", OWN)
def test_linear_layers_of_another_class(name: str, tokens: int) -> None:
    kind, function = OWN[name]
    twins = Twins(Layer(function, own=kind(WIDTH, WIDTH, bias=False)))
    for seed in range(4):
        twins.check(states(tokens, seed))
    assert twins.programs == (name != "several")


def test_a_part_that_makes_something_else_later_is_said() -> None:
    """Better than numbers that are read as others."""
    twins = Twins(Layer(OWN["wide"][1], own=Wide(WIDTH, WIDTH, bias=False)))
    for seed in range(3):
        twins.check(states(1, seed))

    def narrow(_self: Any, x: Any) -> Any:
        return x[..., :3]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wide, "forward", narrow)
        twins.check(states(1))  # as its own code
        patch.setattr(twins.recorded._layers[0]._guard, "is_as_it_was", lambda: True)
        with pytest.raises(RuntimeError, match="it was recorded with"):
            twins.run(states(1))


def test_states_by_another_name_than_those_of_a_linear_layer() -> None:
    twins = Twins(Layer(lambda layer, x: x + layer.down(input=layer.up(input=x))))
    for seed in range(3):
        twins.check(states(1, seed))


# ------------------------------------------------------------------------------------------ layers that are alike


class Kin(torch.nn.Module):
    """Layers that differ in one thing, which shows with several tokens alone."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.function, self.number, self._number = function, 1, 1.0
        self.held, self.named, self.other = HELD, NAMED, torch.nn.Module()
        self.other.number = (1, (1,))
        self.register_buffer("kept", torch.ones(1, dtype=torch.bfloat16))
        self.eval()

    def forward(self, hidden_states: Any, past_key_values: Any = None) -> Any:
        found = self.up(hidden_states)
        return found if hidden_states.shape[1] == 1 else found * self.function(self)


HELD, NAMED = [1], {"number": 1}

DIFFERENCES: dict[str, tuple[Forward, Callable[[Any, int], object]]] = {
    "a setting": (lambda layer: layer.number, lambda layer, n: setattr(layer, "number", n)),
    "its kind": (
        lambda layer: 2 if isinstance(layer.number, bool) else 3,
        lambda layer, n: setattr(layer, "number", [True, 1, 1.0][n % 3]),
    ),
    "one that is private": (
        lambda layer: layer._number,
        lambda layer, n: setattr(layer, "_number", float(n)),
    ),
    "a list": (lambda layer: layer.held[0], lambda layer, n: setattr(layer, "held", [n])),
    "a dictionary": (
        lambda layer: layer.named["number"],
        lambda layer, n: setattr(layer, "named", {"number": n}),
    ),
    "a setting of a part": (
        lambda layer: layer.other.number[1][0],
        lambda layer, n: setattr(layer.other, "number", (1, (n,))),
    ),
    "the size of a buffer": (
        lambda layer: layer.kept.shape[0],
        lambda layer, n: setattr(layer, "kept", torch.ones(n, dtype=torch.bfloat16)),
    ),
    "a weight": (lambda layer: layer.up.weight[0, 0], lambda layer, n: layer.up.weight.fill_(n / 100)),
    "a forward": (lambda _: 1, lambda layer, n: setattr(layer, "forward", times(layer.forward, n))),
}


def times(forward: Forward, number: int) -> Forward:
    return lambda x, **kwargs: forward(x, **kwargs) * (number if x.shape[1] > 1 else 1)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_layers_that_are_not_quite_alike(name: str) -> None:
    function, differ = DIFFERENCES[name]
    layers = [Kin(function) for _ in range(3)]
    for number, layer in zip((2, 3, 5), layers, strict=True):
        differ(layer, number)
    inputs = [states(tokens, seed) for seed, tokens in enumerate((1, 1, 2, 2, 3, 1, 2))]
    usual = [[layer(x) for x in inputs] for layer in layers]
    held = RecordedLayers({str(number): layer for number, layer in enumerate(layers)}, Recordings())
    kept = cache()
    for turn, x in enumerate(inputs):
        for layer, expected in zip(layers, usual, strict=True):
            assert torch.equal(layer(x, past_key_values=kept), expected[turn])
    assert programs(held) == 9
