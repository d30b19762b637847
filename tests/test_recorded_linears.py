"""Linear layers of recorded ones: what is known of their weights from one sweep to the next."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from llm_magic.backends.accelerate.recorded import linears  # noqa: E402
from llm_magic.backends.accelerate.recorded.linears import Linears  # noqa: E402
from llm_magic.backends.accelerate.recorded.recording import View  # noqa: E402
from llm_magic.backends.accelerate.served.cpu_linear import serve_linear  # noqa: E402
from tests.test_cpu_products import bound  # noqa: E402
from tests.test_packing import METHODS, WIDTH, inputs, network_of  # noqa: E402


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_asked_for_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed parameter of bitsandbytes has another shape and dtype than the numbers that it stands for."""
    asked: list[Any] = []
    usual = linears.served_weights
    monkeypatch.setattr(linears, "served_weights", lambda *args: asked.append(args) or usual(*args))
    network = network_of(method)
    bound(network)
    layer = network[0]
    serve_linear(layer)
    states, made = (
        View(base, (1, size), (size, 1), 0, torch.bfloat16) for base, size in ((0, WIDTH), (1, 128))
    )
    together = Linears(states, [made], [layer])
    with torch.no_grad():
        x = inputs(rows=1)
        for _ in range(3):
            values = [x, None]
            together.run(values)
            assert torch.equal(values[1], layer(x))
    assert len(asked) == 1


@pytest.mark.parametrize("rows", [64, 256])
def test_a_weight_of_another_size_is_no_kernels(rows: int) -> None:
    """Memory for what it makes is of the size that was recorded."""
    network = network_of("nf4")
    bound(network)
    layer = network[0]  # of 128 rows
    serve_linear(layer)
    states, made = (
        View(base, (1, size), (size, 1), 0, torch.bfloat16) for base, size in ((0, WIDTH), (1, rows))
    )
    together = Linears(states, [made], [layer])
    assert not together.may_be_chained
    weights = together.weights()
    assert weights is not None
    assert together.prepared(weights) is None
