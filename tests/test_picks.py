"""The largest of some numbers, and what is picked by their places: kernels do what torch does, with one order of equal numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from llm_magic.backends.accelerate.experts.plain_routers import few_largest  # noqa: E402
from llm_magic.backends.accelerate.kernels import cpu_products  # noqa: E402
from llm_magic.backends.accelerate.kernels.largest import MOST, largest  # noqa: E402
from llm_magic.backends.accelerate.kernels.rows import picked_rows  # noqa: E402
from llm_magic.backends.accelerate.recorded.plan import Plan  # noqa: E402
from tests.recorded_layers import WIDTH, Layer, Twins, states  # noqa: E402

pytestmark = pytest.mark.skipif(not cpu_products.is_there(), reason="no kernels for this processor")
DTYPES = [dtype for dtype in ("float32", "float16", "bfloat16") if cpu_products.are_read(dtype)]


def by_kernel(values: Any, count: int) -> tuple[Any, Any]:
    rows, columns = values.shape
    found, places = values.new_full((rows, count), -9.0), torch.full((rows, count), -1)
    addresses = (each.data_ptr() for each in (values, found, places))
    words = (ctypes.c_int64 * 7)(*addresses, rows, columns, count, values.stride(0))
    largest(str(values.dtype).removeprefix("torch."))(words)
    return found, places


def agree(values: Any, count: int) -> None:
    for mine, theirs in zip(by_kernel(values, count), few_largest(values, count), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "count"), [(1, 1, 1), (1, 128, 8), (3, 32, 4), (16, 64, 64), (2, 7, 3), (1, MOST, 10)]
)
def test_the_largest(rows: int, columns: int, count: int, dtype: str) -> None:
    """Many of few different numbers are equal."""
    chance = torch.Generator().manual_seed(rows + columns)
    for _ in range(4):
        agree(torch.randn(rows, columns, generator=chance).to(getattr(torch, dtype)), count)
        agree(torch.randint(-2, 3, (rows, columns), generator=chance).to(getattr(torch, dtype)), count)
        wide = torch.randn(rows, columns + 5, generator=chance).to(getattr(torch, dtype))
        agree(wide[:, 2 : columns + 2], count)


def test_numbers_that_are_none_and_signs() -> None:
    nan, infinite = float("nan"), float("inf")
    agree(torch.tensor([[1.0, nan, 2.0, nan, -infinite, infinite, 0.0, -0.0]]), 8)
    agree(torch.full((2, 6), nan), 3)
    agree(torch.full((2, 6), -infinite), 6)


def test_torch_finds_the_same_ones() -> None:
    values = torch.randn(5, 60, generator=torch.Generator().manual_seed(3))
    mine, theirs = few_largest(values, 6), values.topk(6)
    assert torch.equal(mine.values, theirs.values)
    assert torch.equal(mine.indices, theirs.indices)


@pytest.mark.parametrize("width", [1, 3, 64])
def test_rows_of_tables(width: int) -> None:
    tables = torch.arange(4 * 10 * width, dtype=torch.int16).view(4, 10, width)
    numbers = torch.tensor([[3, 3, 0], [9, 1, 2], [0, 9, 5], [4, 4, 4]])
    found = torch.zeros(4, 3, width, dtype=torch.int16)
    addresses = (each.data_ptr() for each in (found, tables, numbers))
    picked_rows()((ctypes.c_int64 * 7)(*addresses, 4, 3, 2 * width, tables[0].nbytes))
    wanted = torch.stack([table[some] for table, some in zip(tables, numbers, strict=True)])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("tokens", [1, 2])
def test_what_is_picked_in_a_layer(tokens: int) -> None:
    """Of tables of any kind; what no kernel picks torch does."""

    def function(layer: Any, states: Any) -> Any:
        rows = states.reshape(-1, WIDTH)
        table = torch.stack([rows[0] * (number + 1) for number in range(6)])  # [6, WIDTH]
        places = table[:, :6].topk(3, dim=-1)[1]  # below 6
        found = [
            table.index_select(0, places[0]),
            table[places[1]],
            table[:, :6].contiguous().gather(1, places)[:, :1].expand(6, WIDTH),
            table.gather(0, places)[:, :1].expand(6, WIDTH),
            table.index_select(1, places.flatten()[:6])[:, :1].expand(6, WIDTH),
            table.index_select(-1, places[0])[:, :1].expand(6, WIDTH),
        ]
        return states + torch.cat(found).sum(0) / 64

    with torch.no_grad():
        twins = Twins(Layer(function))
    for seed in range(4):
        twins.check(states(tokens, seed))
    assert twins.programs == 1


def test_places_that_are_changed_where_they_are() -> None:
    """To negative ones, which count from the end: nobody knows below what they are any more."""

    def function(layer: Any, states: Any) -> Any:
        rows = states.reshape(-1, WIDTH)
        table = torch.stack([rows[0] * (number + 1) for number in range(6)])
        places = table[:, :6].float().topk(3, dim=-1)[1]
        places.sub_(6)
        return states + table[places[0]].sum(0) / 64

    with torch.no_grad():
        twins = Twins(Layer(function))
    for seed in range(3):
        twins.check(states(1, seed))
    assert twins.programs == 1


def test_kernels_are_there_as_long_as_they_are_planned() -> None:
    """Threads may have compiled one at the same time, of which one alone is remembered."""
    plan = Plan(2, set())
    for kernel in (picked_rows(), largest("float32")):
        plan.begin(kernel, [0] * 7)
    assert plan.words.kernels == [picked_rows(), largest("float32")]
