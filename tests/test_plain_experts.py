"""Experts and routers in 16 bits that the CPU computes by kernels: numbers, bits, and who gets transformers' own code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from llm_magic.backends.accelerate.experts import plain_experts  # noqa: E402
from llm_magic.backends.accelerate.experts.expert_products import (  # noqa: E402
    are_few_for_a_cpu,
    one_by_one,
    side_by_side,
    weighted,
)
from llm_magic.backends.accelerate.experts.plain_experts import PlainStack, is_served_experts  # noqa: E402
from llm_magic.backends.accelerate.experts.plain_routers import is_served_router, serve_plain_router  # noqa: E402
from llm_magic.backends.accelerate.experts.stacks import can_route, find_stacks  # noqa: E402
from llm_magic.backends.accelerate.kernels import cpu_products  # noqa: E402
from llm_magic.backends.accelerate.placement.expert_cache import ExpertCache  # noqa: E402
from llm_magic.backends.accelerate.placement.expert_stores import RamExperts  # noqa: E402
from llm_magic.backends.accelerate.placement.routed_experts import RoutedExperts  # noqa: E402
from llm_magic.backends.accelerate.placement.stream import HostStreams  # noqa: E402
from llm_magic.backends.accelerate.served_model import serve_plain_modules  # noqa: E402
from tests.test_packed_experts import WIDTH, _experts, routed_to  # noqa: E402

pytestmark = pytest.mark.skipif(
    not cpu_products.few_plain_tokens(torch.bfloat16), reason="torch is quicker on this processor"
)

KINDS = ("gated", "without a gate")
COUNTS = (1, 2, 3, 16, 40)


def made(kind: str = "gated", dtype: Any = torch.bfloat16) -> Any:
    return _experts(kind).to(dtype)


def served(kind: str = "gated", dtype: Any = torch.bfloat16) -> Any:
    module = made(kind, dtype)
    serve_plain_modules(module)
    return module


def arguments(tokens: int, dtype: Any = torch.bfloat16) -> tuple[Any, Any, Any]:
    hidden, chosen, shares = routed_to(tokens)
    return hidden.to(dtype), chosen, shares.to(dtype)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The products that kernels are asked for from now on."""
    asked: list[Any] = []
    for name in ("multiplied_plain", "multiplied_each_plain", "multiplied_router"):
        usual = getattr(cpu_products, name)

        def spy(*args: Any, usual: Any = usual, **options: Any) -> Any:
            found = usual(*args, **options)
            if found is not None:
                asked.append(args)
            return found

        monkeypatch.setattr(cpu_products, name, spy)
    return asked


def stacks_of(module: Any) -> dict[str, PlainStack]:
    return {name: PlainStack(stack) for name, stack in module._parameters.items()}


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_they_compute_what_transformers_would(
    kind: str, dtype: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, usual = served(kind, dtype), made(kind, dtype)
    asked, inputs = watched(monkeypatch), arguments(tokens, dtype)
    exact = usual.double()(inputs[0].double(), inputs[1], inputs[2].double())
    torch.testing.assert_close(module(*inputs).double(), exact, rtol=0, atol=2e-2 * float(exact.abs().max()))
    assert asked or tokens > cpu_products.few_plain_tokens(
        dtype
    )  # torch takes those on a processor with tiles
    named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), inputs, strict=True))
    assert torch.equal(module(**named), module(*inputs))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_bits_with_others_and_one_by_one(kind: str, tokens: int) -> None:
    """Or proposals would be refused for their rounding, and moves would change answers.

    Where torch is quicker with an expert's tokens together, on a processor with tiles, they are as near as 16 bits are.
    """
    module, inputs = served(kind), arguments(tokens)
    expected = module(*inputs)
    alone = torch.cat([module(*(part[i : i + 1] for part in inputs)) for i in range(tokens)])
    most = cpu_products.few_plain_tokens(torch.bfloat16)
    if not are_few_for_a_cpu(module, *inputs[1].shape, most):
        torch.testing.assert_close(alone, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
        return
    assert torch.equal(alone, expected)
    for compute in (
        side_by_side(stacks_of(module)),
        one_by_one(stacks_of(module), plain_experts.product),
    ):
        assert torch.equal(weighted(module, compute, *inputs), expected)


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_slots_compute_the_same_bits(kind: str, tokens: int) -> None:
    module, inputs = served(kind), arguments(tokens)
    expected = module(*inputs)
    assert can_route(module)
    stacks = find_stacks(module)
    tensors = [dict(module.named_parameters())[stack.name].data for stack in stacks]
    store = RamExperts(stacks, tensors, HostStreams())
    memory = torch.full((2 * store.slot_bytes,), 255, dtype=torch.uint8)
    cache = ExpertCache(memory, store.slot_bytes, HostStreams())
    routed = RoutedExperts(module, store, cache)
    assert torch.equal(module(*inputs), expected)
    assert cache.fetched_bytes
    routed.detach()
    assert torch.equal(module(*inputs), expected)


def test_who_is_served() -> None:
    for module in (_experts("gated"), made("transposed, with biases")):  # of 32 bits; rows are columns
        serve_plain_modules(module)
        assert not is_served_experts(module)
    module = served()
    kind = type(module)
    serve_plain_modules(module)
    assert type(module) is kind
    assert kind.__name__ == type(made()).__name__
    assert isinstance(module, type(made()))


def test_counters_training_gradients_and_autocast_get_the_usual_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, usual, asked = served(), made(), watched(monkeypatch)
    inputs = arguments(3)
    with FlopCounterMode(display=False) as counted:
        module(*inputs)
    assert counted.get_total_flops()
    with torch.autocast("cpu", torch.bfloat16):
        module(*inputs)
    hidden = inputs[0].clone().requires_grad_()
    module(hidden, *inputs[1:]).sum().backward()
    assert hidden.grad.abs().sum() > 0
    module.train()
    assert torch.equal(module(*inputs), usual(*inputs))
    module.eval().requires_grad_(True)
    module(*inputs).sum().backward()
    assert module.down_proj.grad.abs().sum() > 0
    module.requires_grad_(False)
    assert not asked
    module(*inputs)
    assert asked


def test_they_are_cast_copied_and_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = served(), arguments(2)
    expected = module(*inputs)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert is_served_experts(copied)
        assert torch.equal(copied(*inputs), expected)
    asked = watched(monkeypatch)
    wide = module.float()(*arguments(2, torch.float32))
    torch.testing.assert_close(wide, expected.float(), rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert not asked


def test_no_tokens_make_nothing() -> None:
    assert served()(*(part[:0] for part in arguments(1))).shape == (0, WIDTH)


def test_another_parameter_is_used_from_then_on() -> None:
    module, inputs = served(), arguments(1)
    module.down_proj = torch.nn.Parameter(torch.zeros_like(module.down_proj), requires_grad=False)
    assert not module(*inputs).any()


# --------------------------------------------------------------------- routers


def mixture(name: str = "qwen3_moe") -> Any:
    from tests.test_recorded import made as made_model

    with torch.no_grad():
        return made_model(name).requires_grad_(False)


def router_of_any(model: Any) -> Any:
    names = ("router", "gate")  # of gpt-oss, and of the others
    return next(module for path, module in model.named_modules() if path.rpartition(".")[2] in names)


def router_of(model: Any) -> Any:
    return next(module for module in model.modules() if is_served_router(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "glm4_moe"])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_routers_multiply_by_kernels(
    tokens: int, name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of gpt-oss add a bias, those of GLM multiply in float32, and have their weights in that as well since 5.24."""
    model = mixture(name)
    of_model = router_of_any(model)
    of_model.to(dtype)
    serve_plain_modules(model)
    router = router_of(model)
    assert router is of_model
    usual = next(kind for kind in type(router).__mro__[1:])
    asked = watched(monkeypatch)
    is_wide = name == "glm4_moe"  # takes states in 16 bits, whatever its weight is in
    states = torch.randn(tokens, router.weight.shape[1]).to(torch.bfloat16 if is_wide else dtype)
    with torch.no_grad():
        mine, theirs = router(states), usual.forward(router, states)
    if is_wide:
        assert mine[0].dtype == torch.float32
        assert float((mine[0] - theirs[0]).abs().max()) < 1e-5, "not rounded to 16 bits"
    assert bool(asked) == (tokens <= cpu_products.few_routed_tokens(dtype))
    for found, expected in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_router_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    serve_plain_modules(model)
    router, asked = router_of(model), watched(monkeypatch)
    router.requires_grad_(True)
    router(torch.randn(2, router.weight.shape[1]).bfloat16())[0].sum().backward()
    assert router.weight.grad is not None
    assert not asked


def test_linear_layers_and_others_are_no_routers() -> None:
    model = mixture("mixtral")
    serve_plain_modules(model)
    names = {type(module).__name__ for module in model.modules() if is_served_router(module)}
    assert names == {"MixtralTopKRouter"}


class ScaledRouter(torch.nn.Module):
    """Multiplies with twice its weight."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
        self.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)

    def forward(self, states: Any) -> Any:
        weight = self.weight.float()
        weight.mul_(2.0)
        return torch.nn.functional.linear(states.float(), weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_router_that_changes_its_copy_of_a_weight(mode: Any) -> None:
    """In inference mode nobody could tell that it did."""
    served, usual = ScaledRouter().eval(), ScaledRouter().eval()
    serve_plain_router(served)
    with mode():
        states = torch.randn(1, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
        torch.testing.assert_close(served(states), usual(states))
