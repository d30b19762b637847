"""Small products of torch in recorded layers, by one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from llm_magic.backends.accelerate.kernels import torch_threads  # noqa: E402
from llm_magic.backends.accelerate.kernels.torch_threads import one_thread  # noqa: E402
from llm_magic.backends.accelerate.recorded import bound  # noqa: E402
from llm_magic.backends.accelerate.recorded.linears import Linears  # noqa: E402
from llm_magic.backends.accelerate.recorded.recording import View  # noqa: E402
from tests.recorded_layers import Layer, Twins, states  # noqa: E402

THREADS = 3


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def test_there_are_as_many_as_before_afterwards() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == THREADS


def test_after_an_error_as_well() -> None:
    def fail() -> None:
        with one_thread():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == THREADS


def test_other_threads_keep_theirs() -> None:
    found: list[int] = []
    with one_thread():
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert found == [THREADS]


def test_where_nobody_can_tell_openmp_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_threads, "_teller", lambda: None)
    with one_thread():
        assert torch.get_num_threads() == THREADS


@pytest.mark.parametrize(("width", "threads"), [(4, 1), (1 << 16, THREADS)])
def test_products_of_recorded_layers(width: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_product(layer: Any, x: Any) -> Any:
        y = layer.up(x).reshape(-1, 4)
        products = y @ y[:4, :1].expand(4, width)
        return layer.mixed(x) * products.mean()

    twins = Twins(Layer(with_a_product))
    for seed in range(2):
        twins.check(states(1, seed))
    assert twins.programs == 1
    usual, found = bound.call, list[int]()

    def call(node: Any, *args: Any) -> None:
        if node.name is torch.ops.aten.mm.default:
            found.append(torch.get_num_threads())
        usual(node, *args)

    monkeypatch.setattr(bound, "call", call)
    twins.check(states(1, 2))
    assert found == [threads]


@pytest.mark.parametrize(("columns", "threads"), [(4, 1), (1 << 16, THREADS)])
def test_linear_layers_without_a_kernel(columns: int, threads: int) -> None:
    """Gemma 3n has some of four numbers."""
    found: list[int] = []

    class Linear(torch.nn.Linear):
        def forward(self, inputs: Any) -> Any:
            found.append(torch.get_num_threads())
            return super().forward(inputs)

    layer = Linear(columns, 4, bias=False)
    view = View(0, (1, columns), (columns, 1), 0, torch.float32)
    out = View(1, (1, 4), (4, 1), 0, torch.float32)
    linears = Linears(view, [out], [layer])
    values = [torch.randn(1, columns), None]
    linears.run(values)
    assert found == [threads]
    assert torch.equal(values[1], layer(values[0]))
