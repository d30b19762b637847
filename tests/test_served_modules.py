"""Modules that compute by kernels: what somebody asks of them, changes in them or sees of them, as of any module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

import torch.autograd.forward_ad as forward_ad  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from llm_magic.backends.accelerate.experts import plain_experts  # noqa: E402
from llm_magic.backends.accelerate.experts.expert_products import (  # noqa: E402
    one_by_one,
    weighted,
)
from llm_magic.backends.accelerate.kernels import (  # noqa: E402
    compiler,
    cpu_products,
    numbers,
    row_blocks,
)
from llm_magic.backends.accelerate.packed import int4_orders  # noqa: E402
from llm_magic.backends.accelerate.served_model import serve_plain_modules  # noqa: E402
from tests.test_packed_experts import EXPERTS, WIDTH, _experts, packed  # noqa: E402
from tests.test_plain_experts import arguments, router_of, served, stacks_of  # noqa: E402
from tests.test_plain_experts import made as made_experts  # noqa: E402
from tests.test_recorded import answers, equal, kinds_of_parts, layers_of, recorded, served_mixture  # noqa: E402

pytestmark = pytest.mark.skipif(
    not cpu_products.few_plain_tokens(torch.bfloat16), reason="torch is quicker on this processor"
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def module_of(kind: str) -> Any:
    return served() if kind == "plain" else packed(_experts("gated").bfloat16(), kind)


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8", "int4"])
def test_numbers_of_experts_need_not_be_contiguous(kind: str) -> None:
    """The best of a sorted list, as ``argsort(...)[:, :1]`` has it."""
    module, (hidden, _, shares) = module_of(kind), arguments(4)
    order = torch.stack(
        [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    )
    best = order[:, :1]
    assert torch.equal(module(hidden, best, shares[:, :1]), module(hidden, best.contiguous(), shares[:, :1]))


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8", "int4"])
def test_a_number_beyond_the_last_expert_means_none(kind: str) -> None:
    """As in transformers' own code (eager): memory beyond is not read."""
    module, (hidden, chosen, shares) = module_of(kind), arguments(1)
    without = shares.clone()
    without[0, 0] = 0
    expected = module(hidden, chosen, without)
    chosen = chosen.clone()
    chosen[0, 0] = EXPERTS
    assert torch.equal(module(hidden, chosen, shares), expected)


@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward"])
def test_what_somebody_puts_on_a_part_of_recorded_experts(what: str) -> None:
    model = served_mixture()
    held = recorded(model)
    answers(model)
    assert "experts" in kinds_of_parts(held)
    part = layers_of(model)[0].mlp.experts.act_fn
    if what == "hook":
        part.register_forward_hook(lambda _module, _args, output: output * 0)
    elif what == "pre-hook":
        part.register_forward_pre_hook(lambda _module, args: (args[0] * 0,))
    else:
        part.forward = lambda states: states * 0
    mine = answers(model)
    held.undo()
    assert equal(mine, answers(model))


def test_a_gate_that_somebody_changes_in_recorded_experts() -> None:
    model = served_mixture()
    held = recorded(model)
    answers(model)
    layers_of(model)[0].mlp.experts._apply_gate = lambda both: both.chunk(2, -1)[0] * 0
    mine = answers(model)
    held.undo()
    assert equal(mine, answers(model))


def test_a_class_of_routers_that_somebody_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of the served class stays the same."""
    model = served_mixture()
    held = recorded(model)
    answers(model)
    kind = type(layers_of(model)[0].mlp.gate).__mro__[1]
    usual = kind.forward

    def patched(self: Any, *args: Any) -> Any:
        logits, shares, experts = usual(self, *args)
        return logits, shares * 0, experts

    monkeypatch.setattr(kind, "forward", patched)
    mine = answers(model)
    held.undo()
    assert equal(mine, answers(model))


def test_a_class_of_experts_that_somebody_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = served(), arguments(2)
    monkeypatch.setattr(type(module).__mro__[1], "forward", lambda _self, hidden, *_: hidden * 3)
    assert torch.equal(module(*inputs), inputs[0] * 3)


def test_an_implementation_of_experts_that_somebody_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = served(), arguments(2)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", lambda _self, hidden, *_: hidden * 3)
    module.config._experts_implementation = "mine"
    assert torch.equal(module(*inputs), inputs[0] * 3)


def test_bits_do_not_depend_on_where_experts_are_when_all_tokens_take_the_same() -> None:
    """More tokens than are multiplied with the bytes of a matrix: torch adds up in another order."""
    count = cpu_products.few_plain_tokens(torch.bfloat16) + 1
    module = served()
    random, inside = torch.Generator().manual_seed(0), 2048
    for name, shape in (("gate_up_proj", (64, 2 * inside, WIDTH)), ("down_proj", (64, WIDTH, inside))):
        stack = torch.randn(shape, generator=random).bfloat16() / 4
        module._parameters[name] = torch.nn.Parameter(stack, requires_grad=False)
    module.num_experts = 64
    hidden = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = hidden, torch.zeros(count, 1, dtype=torch.long), torch.ones(count, 1).bfloat16()
    in_slots = weighted(module, one_by_one(stacks_of(module), plain_experts.product), *inputs)
    assert torch.equal(module(*inputs), in_slots)


def test_a_router_whose_weight_somebody_packs() -> None:
    """A tensor subclass has no address; in a process of its own, which would die."""
    script = """
import torch
from optimum.quanto import qint8, quantize_weight
from tests.test_plain_experts import router_of
from tests.test_recorded import served_mixture
torch.set_grad_enabled(False)
router = router_of(served_mixture())
weight = router.weight.data
scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
router.weight = torch.nn.Parameter(quantize_weight(weight, qint8, 0, scale), requires_grad=False)
router(torch.randn(2, weight.shape[1]).bfloat16())
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_a_router_that_multiplies_with_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_of(served_mixture())
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        type(router).__mro__[1], "forward", lambda self, states: linear(states, self.weight[0])
    )
    assert router(torch.randn(2, router.weight.shape[1]).bfloat16()).shape == (2,)


def _forget_orders() -> None:
    for known in (int4_orders._cpu_block, int4_orders.block_in_halves, int4_orders._cpu_halves):
        known.cache_clear()


def test_int4_with_a_default_device_of_somebody() -> None:
    """The first product asks torch for its order, whatever device is the default."""
    inputs = arguments(2)
    expected = packed(_experts("gated").bfloat16(), "int4")(*inputs)
    module = packed(_experts("gated").bfloat16(), "int4")
    _forget_orders()
    try:
        with torch.device("meta"):
            found = module(*inputs)
    finally:
        _forget_orders()
    assert torch.equal(found, expected)


def test_experts_without_numbers() -> None:
    """As transformers' implementations can, which ask for no numbers."""
    shapes = []
    for make in (made_experts, served):
        module = make()
        module.config._experts_implementation = "batched_mm"
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            shapes.append(module(*map(mode.from_tensor, arguments(2))).shape)
    assert shapes[0] == shapes[1]


def _vmap(layer: Callable[..., Any]) -> Any:
    return torch.vmap(layer)(torch.ones(3, 2, 64).bfloat16())


def _tangent(layer: Callable[..., Any]) -> Any:
    states = torch.ones(2, 64).bfloat16()
    with torch.enable_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(states, states))).tangent
        return None if tangent is None else tangent.clone()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch uses it
@pytest.mark.parametrize("transform", [_vmap, _tangent])
def test_torchs_functional_transforms(transform: Callable[..., Any]) -> None:
    layer = torch.nn.Linear(64, 64, bias=False).bfloat16().eval().requires_grad_(False)
    expected = transform(layer)
    serve_plain_modules(layer)
    found = transform(layer)
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_blocks_of_rows_need_vectors_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM would call a function for every ``fma``."""
    monkeypatch.setattr(compiler, "instructions", lambda: frozenset({"sse2"}))
    assert not list(numbers._widths())
    assert row_blocks.row_blocks(64, 128, "bfloat16") is None
