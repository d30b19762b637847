"""Recorded operations as compiled loops: each makes of numbers what torch makes of them, however these lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from torch.nn import functional  # noqa: E402

from llm_magic.backends.accelerate.kernels.elementwise import merged  # noqa: E402
from llm_magic.backends.accelerate.recorded.bound import Bound  # noqa: E402
from llm_magic.backends.accelerate.recorded.noting.recorder import record  # noqa: E402
from llm_magic.backends.accelerate.recorded.program import CompiledRegion, Program  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = DTYPES[1:]
SPECIAL = (
    *(float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-40, -1e-40, 6e-8),
    *(1e-38, 3e38, -3e38, 65504.0, -65504.0, 88.0, -88.0, 1e-4, -1e-4, 1e4, -1e4, 20.0, -20.0),
)


class Layer(torch.nn.Module):
    """Computes one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def computed(function: Callable[..., Any], *tensors: Any, by_torch: bool = False) -> Any:
    """What a recording makes of some tensors; of compiled loops alone, or not of them alone."""
    result, is_by_torch = recorded(function, *tensors)
    assert is_by_torch == by_torch
    return result


def found(function: Callable[..., Any], *tensors: Any) -> Any:
    """By whatever."""
    return recorded(function, *tensors)[0]


@torch.no_grad()
def recorded(function: Callable[..., Any], *tensors: Any) -> tuple[Any, bool]:
    layer = Layer(function)
    recording, _ = record(layer, layer.forward, (tensors, {}))
    program = Program(recording)
    is_by_torch = any(not isinstance(part, CompiledRegion) for part in program.parts)
    return Bound(program, layer).run(tensors), is_by_torch


def numbers(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    chance = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=chance) * 2).to(dtype)


def all_kinds(count: int, dtype: Any, seed: int = 0) -> Any:
    """Every special number beside every other, for functions of two; then random ones of all sizes."""
    chance = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-30, 15, (count,), generator=chance).float())
    return (torch.randn(count, generator=chance) * sizes).to(dtype)


def pairs(dtype: Any) -> tuple[Any, Any]:
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    left, right = special.repeat(len(special)), special.repeat_interleave(len(special))
    return torch.cat([left, all_kinds(1000, dtype)]), torch.cat([right, all_kinds(1000, dtype, seed=1)])


def bits(value: Any) -> Any:
    """Of numbers; one pattern for all that are none."""
    kind = {4: torch.int32, 2: torch.int16}[value.dtype.itemsize]
    return torch.where(value.isnan(), torch.full_like(value, torch.nan).view(kind), value.view(kind))


def same(mine: Any, theirs: Any, ulp: int = 0) -> None:
    """The same numbers, but for so many units in the last place."""
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    left, right = bits(mine.contiguous()).long(), bits(theirs.contiguous()).long()
    if not ulp:
        assert torch.equal(left, right), (mine[left != right][:5], theirs[left != right][:5])
        return
    lowest = -(1 << (8 * mine.dtype.itemsize - 1))
    left, right = (torch.where(each < 0, lowest - each, each) for each in (left, right))
    far = (left - right).abs()
    assert int(far.max()) <= ulp, (mine.flatten()[far.argmax()], theirs.flatten()[far.argmax()], far.max())


def near(mine: Any, theirs: Any, ulp: float, scale: Any = None) -> None:
    """As near as so many units in the last place of ``scale``, by default of the largest of them."""
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    scale = theirs.abs().max() if scale is None else scale
    far = (mine.double() - theirs.double()).abs() / (torch.finfo(theirs.dtype).eps * scale)
    assert float(far.max()) <= ulp


# ------------------------------------------------------------------------------------------ one number at a time

EXACT: dict[str, Callable[[Any], Any]] = {
    "neg": lambda x: -x,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "one by it": lambda x: 1.0 / x,
    "relu": torch.relu,
    "clone": torch.clone,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "power of a half": lambda x: x**0.5,
    "power of minus a half": lambda x: x**-0.5,
    "power of minus one": lambda x: x**-1,
    "times a number": lambda x: x * 0.3,
    "times a whole number": lambda x: x * 3,
    "by a number": lambda x: x / 0.3,
    "plus a number": lambda x: x + 0.3,
    "plus a tiny number": lambda x: x + 1e-6,
    "minus a number": lambda x: x - 0.3,
    "a number minus it": lambda x: 0.3 - x,
    "at least": lambda x: x.clamp(min=-0.3),
    "at most": lambda x: x.clamp(max=0.3),
    "between": lambda x: x.clamp(-0.7, 7.03),
    "between none": lambda x: x.clamp(1.0, -1.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_every_number_becomes_the_same(name: str, dtype: Any) -> None:
    value = pairs(dtype)[0]
    if "half" in name:  # torch has more than one way for these, and not the same signs in each
        value = value[(value > 0) | value.isnan()]
    is_root = "half" in name or "sqrt" in name  # of which torch does not round each to the nearest
    same(computed(EXACT[name], value), EXACT[name](value), ulp=int(is_root))


OF_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_TWO)
def test_every_two_numbers_become_the_same(name: str, dtype: Any) -> None:
    left, right = pairs(dtype)
    same(computed(OF_TWO[name], left, right), OF_TWO[name](left, right))


PARTS: dict[str, Callable[[Any, Any], Any]] = {
    "plus a part of a number": lambda x, _: torch.add(x, 0.3, alpha=1.7),
    "minus a part of a number": lambda x, _: torch.sub(x, 0.3, alpha=1.7),
    "a number minus a part": lambda x, _: torch.rsub(x, 0.3, alpha=1.7),
    "plus a part": lambda x, y: torch.add(x, y, alpha=1.7),
    "minus a part": lambda x, y: torch.sub(x, y, alpha=1.7),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_added_by_torch(name: str, dtype: Any) -> None:
    left, right = pairs(dtype)
    same(found(PARTS[name], left, right), PARTS[name](left, right))


@pytest.mark.parametrize("name", OF_TWO)
@pytest.mark.parametrize("wide", [(5, 48), (1,), ()])
def test_numbers_of_two_dtypes(name: str, wide: tuple[int, ...]) -> None:
    """Where one of them is a single number without a dimension, the result is of the other's dtype."""
    short = numbers(5, 48, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        other = numbers(*wide, dtype=dtype, seed=1)
        for function in (OF_TWO[name], lambda x, y: OF_TWO[name](y, x)):
            same(found(function, short, other), function(short, other))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_numbers_of_another_dtype(source: Any, target: Any) -> None:
    value = pairs(source)[0]
    same(computed(lambda x: x.to(target, copy=True), value), value.to(target))
    if source == torch.float32:  # the largest, and ties
        odd = torch.tensor([0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000], dtype=torch.int32)
        same(computed(lambda x: x.to(target, copy=True), odd.view(source)), odd.view(source).to(target))


CURVES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "exp": (torch.exp, 3),
    "sigmoid": (torch.sigmoid, 5),
    "silu": (functional.silu, 6),
    "softplus": (functional.softplus, 5),
    "tanh": (torch.tanh, 12),
}
"""And how far they may be from the true number, in units of the last place of float32."""


def dense() -> Any:
    """Every 4999th number of float32 between those where every curve is flat."""
    positive = torch.arange(0x1F000000, 0x42AE0000, 4999, dtype=torch.int32).view(torch.float32)
    return torch.cat([positive, -positive, torch.zeros(7)])


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_near_the_true_ones(name: str) -> None:
    function, ulp = CURVES[name]
    value = dense()
    true = function(value.double()).float()
    is_normal = true.abs() >= 2.0**-126
    same(computed(function, value)[is_normal], true[is_normal], ulp=ulp)
    assert (computed(function, value)[~is_normal].abs() <= 2.0**-126).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_near_the_true_one(approximate: str) -> None:
    """Where it goes to 0 from below it is a difference of almost equal numbers, as torch's."""
    value = dense()

    def function(x: Any) -> Any:
        return functional.gelu(x, approximate=approximate)

    far = (computed(function, value).double() - function(value.double())).abs()
    assert float((far / value.abs().clamp(min=1.0)).max()) <= 4e-7
    small = value[(value.abs() < 0.5)]
    same(computed(function, small), function(small.double()).float(), ulp=24)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", [*CURVES, "gelu", "gelu_tanh"])
def test_curves_of_short_numbers_are_torchs(name: str, dtype: Any) -> None:
    """All of them; in few does the last bit fall the other way."""
    curves = {each: function for each, (function, _) in CURVES.items()} | {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    value = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    value = value[~(value.float().abs() > 1e37)]  # for which torch's gelu has no number on some processors
    mine, theirs = computed(curves[name], value), curves[name](value)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.isinf(), theirs.isinf())
    # Smaller ones are nothing beside what they are added to, and those of gelu a difference of almost equal numbers.
    least = 1e-3 if "gelu" in name else 1e-5
    is_seen = theirs.abs() >= least
    is_seen &= ~theirs.isnan()
    same(mine[is_seen], theirs[is_seen], ulp=1)
    assert float((bits(mine[is_seen]) == bits(theirs[is_seen])).float().mean()) > 0.99
    assert ((mine - theirs)[~is_seen & ~theirs.isnan()].abs() <= least * 2**-7).all()


@pytest.mark.parametrize("name", CURVES)
def test_curves_of_numbers_that_are_not_finite(name: str) -> None:
    function, _ = CURVES[name]
    value = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3e38, -3e38] * 5)
    torch.testing.assert_close(computed(function, value), function(value), equal_nan=True)


# ------------------------------------------------------------------------------------------ how numbers lie

FORMS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "a row": ((1, 1, 64), lambda x: x),
    "an odd row": ((1, 1, 37), lambda x: x),
    "a short row": ((1, 1, 5), lambda x: x),
    "one number": ((1, 1, 1), lambda x: x),
    "rows": ((2, 3, 48), lambda x: x),
    "odd rows": ((3, 5, 19), lambda x: x),
    "transposed": ((2, 3, 32), lambda x: x.transpose(1, 2)),
    "transposed twice": ((2, 5, 24), lambda x: x.unflatten(2, (3, 8)).transpose(1, 2)),
    "expanded": ((2, 1, 32), lambda x: x.expand(2, 4, 32)),
    "expanded inside": ((2, 3, 1), lambda x: x.expand(2, 3, 20)),
    "the second half": ((2, 3, 64), lambda x: x[..., 32:]),
    "from the third on": ((2, 3, 33), lambda x: x[..., 3:]),
    "every second": ((2, 3, 64), lambda x: x[..., ::2]),
    "every second row": ((2, 6, 20), lambda x: x[:, 1::2]),
    "a column": ((2, 3, 20), lambda x: x[..., 4]),
    "one row": ((2, 3, 20), lambda x: x[1, 2]),
    "one number of all": ((2, 3, 20), lambda x: x[1, 2, 3]),
    "with a dimension": ((2, 3, 20), lambda x: x.unsqueeze(2)),
    "five dimensions": ((2, 4, 24), lambda x: x.view(2, 2, 2, 3, 8).permute(3, 0, 4, 2, 1)),
    "nothing": ((2, 3, 20), lambda x: x[..., :0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_numbers_that_lie_in_any_way(name: str, dtype: Any) -> None:
    """Of one and of two, of a lone number and of a row for all."""
    shape, form = FORMS[name]
    left, right = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)

    def function(x: Any, y: Any) -> Any:
        a, b = form(x), form(y)
        return (
            -a,
            a + b,
            a.clone(),
            (a * b).contiguous(),
            a * b[..., :1] if a.dim() else a * b,
            a + a,
            a.abs(),
        )

    for mine, theirs in zip(computed(function, left, right), function(left, right), strict=True):
        same(mine, theirs)
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shapes",
    [
        *(((2, 3, 48), (48,)), ((2, 3, 48), (1, 3, 1)), ((2, 3, 48), (2, 1, 48)), ((2, 3, 48), ())),
        *(((48,), (2, 3, 48)), ((3, 1), (1, 20)), ((2, 1, 37), (2, 5, 1)), ((1,), (1, 1)), ((), ())),
        ((4, 1, 16), (1, 3, 16)),
    ],
)
def test_numbers_that_are_spread(shapes: Any, dtype: Any) -> None:
    left, right = numbers(*shapes[0], dtype=dtype), numbers(*shapes[1], dtype=dtype, seed=1)

    def function(x: Any, y: Any) -> Any:
        return x + y, x * y, torch.maximum(x, y), y - x, y / x

    for mine, theirs in zip(computed(function, left, right), function(left, right), strict=True):
        same(mine, theirs)


def test_directions_are_merged_where_that_is_the_same() -> None:
    assert merged([2, 3, 4], [[12, 4, 1]]) == ([24], [[1]])
    assert merged([2, 3, 4], [[12, 4, 1], [0, 0, 1]]) == ([6, 4], [[4, 1], [0, 1]])
    assert merged([2, 3, 4], [[12, 4, 1], [3, 1, 0]]) == ([6, 4], [[4, 1], [1, 0]])
    assert merged([2, 1, 4], [[4, 99, 1]]) == ([8], [[1]])
    assert merged([2, 4], [[1, 2]]) == ([2, 4], [[1, 2]])
    assert merged([1, 1], [[7, 7]]) == ([1], [[1]])
    assert merged([], [[]]) == ([1], [[1]])


# ------------------------------------------------------------------------------------------ several at a time

DIMS: tuple[Any, ...] = (-1, 0, 1, (-1,), (1, 2), (0, 2), (0, 1, 2), (-1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 3, 37), (1, 1, 16), (5, 7, 3), (1, 1, 1)])
def test_sums_means_and_largest(shape: tuple[int, ...], keepdim: bool, dtype: Any) -> None:
    value = numbers(*shape, dtype=dtype)

    def function(x: Any) -> Any:
        found = []
        for form in (x, x.transpose(1, 2), x[..., ::2]):
            for dims in DIMS:
                found += [form.sum(dims, keepdim=keepdim), form.mean(dims, keepdim=keepdim)]
                found += [form.amax(dims, keepdim=keepdim)]
        return tuple(found)

    results = zip(computed(function, value), function(value), strict=True)
    for number, (mine, theirs) in enumerate(results):
        if number % 3 == 2:
            same(mine, theirs)
        else:
            near(mine, theirs, 1 if dtype in SHORT else 8, max(float(theirs.abs().max()), 1.0))
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", SHORT)
def test_a_sum_in_another_dtype(dtype: Any) -> None:
    value = numbers(2, 3, 64, dtype=dtype)

    def function(x: Any) -> Any:
        return x.sum(-1, dtype=torch.float32), x.mean((0, 1), keepdim=True, dtype=torch.float32)

    for mine, theirs in zip(computed(function, value), function(value), strict=True):
        near(mine, theirs, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("width", [5, 64])
def test_what_is_no_number_is_not_lost_in_a_sum_or_among_others(width: int, wrong: str, dtype: Any) -> None:
    """Wherever it stands."""
    value = numbers(1, width, width, dtype=dtype)
    value[0].fill_diagonal_(float(wrong))

    def function(x: Any) -> Any:
        return x.sum(-1), x.mean(-1), x.amax(-1), torch.relu(x), x.softmax(-1)

    for mine, theirs in zip(computed(function, value), function(value), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_a_sum_of_all_and_of_none() -> None:
    value = numbers(2, 3, 5)

    def function(x: Any) -> Any:
        return x.amax(), x.mean(), x[..., :0].sum(-1), x[:0].sum((1, 2)), x.sum(None), x.sum((), keepdim=True)

    for mine, theirs in zip(found(function, value), function(value), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
def test_softmax(dim: int, dtype: Any) -> None:
    value = numbers(3, 5, 33, dtype=dtype) * 4
    value[0, 0, 1:] = float("-inf")
    value[1, 1] = float("-inf")
    value[2, 2, 3] = float("nan")

    def function(x: Any) -> Any:
        return (
            x.softmax(dim),
            x.transpose(0, 2).softmax(dim),
            torch.softmax(x, dim, dtype=torch.float32),
            x[..., ::2].softmax(dim),
        )

    for mine, theirs in zip(computed(function, value), function(value), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(
            mine, theirs, equal_nan=True, atol=1e-6, rtol=2**-7 if dtype in SHORT else 1e-5
        )
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 37, 1])
@pytest.mark.parametrize("has", ["both", "weight", "none"])
def test_norms(has: str, width: int, dtype: Any) -> None:
    value = numbers(2, 3, width, dtype=dtype)
    weight, bias = numbers(width, dtype=dtype, seed=1), numbers(width, dtype=dtype, seed=2)

    def function(x: Any, w: Any, b: Any) -> Any:
        w, b = (None if has == "none" else w), (b if has == "both" else None)
        return (
            functional.layer_norm(x, (width,), w, b, 1e-5),
            functional.layer_norm(x, (3, width), None, None, 1e-5),
            functional.rms_norm(x, (width,), w, 1e-6),
            functional.rms_norm(x.transpose(0, 1), (width,), w, 1e-6),
        )

    for mine, theirs in zip(
        computed(function, value, weight, bias), function(value, weight, bias), strict=True
    ):
        near(mine, theirs, 1 if dtype in SHORT else 16, max(float(theirs.abs().max()), 1.0))


# ------------------------------------------------------------------------------------------ beside one another


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_and_stacked(dtype: Any) -> None:
    left, right = numbers(2, 3, 20, dtype=dtype), numbers(2, 3, 20, dtype=dtype, seed=1)

    def function(x: Any, y: Any) -> Any:
        return (
            torch.cat((x, y), dim=-1),
            torch.cat((-x[..., 7:], x[..., :7]), dim=-1),
            torch.cat((x, y, x)),
            torch.cat((x.transpose(1, 2), y.transpose(1, 2)), dim=1),
            torch.cat((x[..., :0], y), dim=2),
            torch.stack((x, y), dim=-1).flatten(-2),
            torch.stack((x, y)),
            torch.stack((x.transpose(0, 1), y.transpose(0, 1)), dim=1),
            torch.stack((x[..., ::2], -y[..., 1::2]), dim=-2),
        )

    for mine, theirs in zip(computed(function, left, right), function(left, right), strict=True):
        same(mine, theirs)


def test_joined_numbers_of_two_dtypes() -> None:
    left, right = numbers(2, 3, 20), numbers(2, 3, 20, dtype=torch.bfloat16)
    same(computed(lambda x, y: torch.cat((y, x)), left, right), torch.cat((right, left)))


def test_what_is_joined_with_nothing_is_joined_by_torch() -> None:
    def function(x: Any, y: Any) -> Any:
        return torch.cat((y, x), dim=-1)

    value, nothing = numbers(2, 3, 20), torch.empty(0)
    same(computed(function, value, nothing, by_torch=True), value)


# ------------------------------------------------------------------------------------------ where they are


def in_place(x: Any, y: Any, change: Callable[[Any, Any], Any]) -> Any:
    own = x.clone()
    before = own * 1
    change(own, y)
    return before, own, own + 1


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "mul_": lambda x, y: x.mul_(y),
    "add_": lambda x, y: x.add_(y, alpha=0.5),
    "sub_": lambda x, y: x.sub_(y),
    "div_": lambda x, y: x.div_(y),
    "neg_": lambda x, _: x.neg_(),
    "exp_": lambda x, _: x.clamp_(-1, 1),
    "relu_": lambda x, _: x.relu_(),
    "a number": lambda x, _: x.mul_(0.3).add_(0.7),
    "itself": lambda x, _: x.mul_(x),
    "copy_": lambda x, y: x.copy_(y),
    "copy_ of one": lambda x, y: x.copy_(y[:1, :1]),
    "half by the other": lambda x, _: x[..., :10].add_(x[..., 10:]),
    "a slice": lambda x, y: x[..., 3:17].copy_(y[..., :14]),
    "every second": lambda x, y: x[..., ::2].mul_(y[..., 1::2]),
    "a transposed one": lambda x, y: x.transpose(1, 2).add_(y.transpose(1, 2)),
    "an assignment": lambda x, y: x.__setitem__((slice(None), 1), y[:, 2]),
    "rows in turn": lambda x, _: [x[:, each].add_(x[:, each - 1]) for each in range(1, 3)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANGES)
def test_numbers_that_are_changed_where_they_are(name: str, dtype: Any) -> None:
    left, right = numbers(2, 3, 20, dtype=dtype), numbers(2, 3, 20, dtype=dtype, seed=1)

    def function(x: Any, y: Any) -> Any:
        return in_place(x, y, CHANGES[name])

    kept = left.clone()
    for mine, theirs in zip(found(function, left, right), function(left, right), strict=True):
        near(mine, theirs, 1)
    same(left, kept)


def test_what_is_not_known_torch_computes() -> None:
    value = numbers(2, 3, 20)
    for function in (torch.sin, lambda x: x**2.5, lambda x: x.clamp(min=x.mean()), lambda x: x.prod(-1)):
        same(computed(function, value, by_torch=True), function(value), ulp=2)


def test_double_precision_is_left_to_torch() -> None:
    value = numbers(2, 3, 20)
    same(computed(lambda x: (x.double() * 3).float(), value, by_torch=True), (value.double() * 3).float())
