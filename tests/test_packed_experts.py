"""Packed experts compute what their unpacked matrices would, wherever these are and however tokens are routed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.experts import expert_products, packed_experts
from llm_magic.backends.accelerate.experts.stacks import find_stacks
from llm_magic.backends.accelerate.packed import packed_stack, packing
from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.weights import multiplied
from llm_magic.backends.accelerate.placement.blocks import BlockTensors
from llm_magic.backends.accelerate.placement.expert_cache import ExpertCache
from llm_magic.backends.accelerate.placement.expert_stores import RamExperts
from llm_magic.backends.accelerate.placement.routed_experts import RoutedExperts
from llm_magic.backends.accelerate.placement.stream import HostStreams
from llm_magic.backends.accelerate.quantizing.libraries import import_library
from llm_magic.backends.accelerate.quantizing.methods import METHODS
from llm_magic.backends.accelerate.quantizing.pack import pack_block
from llm_magic.backends.accelerate.quantizing.prepare import prepare

EXPERTS, WIDTH, INSIDE = 8, 256, 256  # wide enough for every kernel
TOKENS = (1, 2, 5, 40)
"""One by itself; some that share experts; many."""


def _experts(kind: str) -> Any:
    """The experts of one layer, with random weights, and what transformers sets for them in a model."""
    import importlib

    module, name, own = {
        "gated": ("qwen3_moe", "Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INSIDE}),
        "transposed, with biases": (
            "gpt_oss",
            "GptOss",
            {"num_local_experts": EXPERTS, "intermediate_size": INSIDE},
        ),
        "without a gate": (
            "nemotron_h",
            "NemotronH",
            {"n_routed_experts": EXPERTS, "moe_intermediate_size": INSIDE, "moe_latent_size": None},
        ),
    }[kind]
    library = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    config = getattr(configs, f"{name}Config")(hidden_size=WIDTH, **own)
    config._experts_implementation = "eager"
    torch.manual_seed(5)
    experts = getattr(library, f"{name}Experts")(config)
    for parameter in experts.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    return experts.eval().requires_grad_(False)


KINDS = ("gated", "transposed, with biases", "without a gate")


class Model(torch.nn.Module):
    """As little of a model as can be prepared."""

    _keep_in_fp32_modules = None

    def __init__(self, experts: Any, linear: Any = None) -> None:
        super().__init__()
        self.all_tied_weights_keys: dict[str, str] = {}
        self.mlp = torch.nn.ModuleDict({"linear": linear or torch.nn.Identity(), "experts": experts})
        self.config = experts.config

    def get_output_embeddings(self) -> None:
        return None

    get_input_embeddings = get_output_embeddings


def packed(experts: Any, method: str) -> Any:
    weights = {name: parameter.data for name, parameter in experts.named_parameters()}
    model = Model(copy.deepcopy(experts).to("meta"))
    names = prepare(model, method, next(experts.parameters()).dtype)
    assert set(names) == {f"mlp.experts.{name}" for name, value in weights.items() if value.dim() == 3}
    found = model.mlp["experts"]
    pack_block(found, weights, "cpu")
    return found


def unpacked(experts: Any, module: Any) -> Any:
    """Plain experts with what the packed matrices say."""
    plain = copy.deepcopy(experts)
    for name, stack in module.named_children():
        if isinstance(stack, PackedStack):
            like = torch.eye(stack.linear.in_features, dtype=plain.down_proj.dtype)
            matrices = [stack[expert](like) for expert in range(EXPERTS)]  # (in, out)
            values = torch.stack([m if module.is_transposed else m.T for m in matrices])
            plain._parameters[name] = torch.nn.Parameter(values.contiguous(), requires_grad=False)
    return plain


def routed_to(tokens: int, *, of_each: int = 2, last: int = EXPERTS) -> tuple[Any, Any, Any]:
    random = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(last, generator=random)[:of_each] for _ in range(tokens)])
    hidden = torch.randn(tokens, WIDTH, generator=random)
    return hidden, chosen, torch.rand(tokens, of_each, generator=random)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_they_compute_what_transformers_would_with_their_matrices(
    method: str, kind: str, tokens: int
) -> None:
    experts = _experts(kind)
    module = packed(experts, method)
    plain, inputs = unpacked(experts, module), routed_to(tokens)
    assert are_alike(module(*inputs), plain(*inputs))


def are_alike(found: Any, expected: Any) -> bool:
    """But for the rounding of kernels that compute in fewer bits."""
    return bool(
        torch.nn.functional.cosine_similarity(found.float().flatten(), expected.float().flatten(), dim=0)
        > 0.9999
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_each_matrix_is_packed_as_a_linear_layer_of_the_same_weight(method: str, kind: str) -> None:
    experts = _experts(kind)
    module = packed(experts, method)
    for name, stack in module.named_children():
        if not isinstance(stack, PackedStack):
            continue
        matrix = experts._parameters[name][EXPERTS - 1]
        weight = matrix.T if experts.is_transposed else matrix
        alone = layer(*reversed(weight.shape), method)
        pack_block(alone, {"weight": weight}, "cpu")
        parts = list(packing.parts(alone, "weight").values())
        assert len(parts) == len(list(stack.parameters()))
        for part, held in zip(parts, stack.parameters(), strict=True):
            assert torch.equal(held[EXPERTS - 1].view(torch.uint8), part.view(torch.uint8))


def stacks_of(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in expert_products.stack_names(module)}


def one_by_one(product: Any) -> Any:
    """A module, tokens and experts to what these make of each."""
    return lambda module, *args: expert_products.one_by_one(stacks_of(module), product)(module, *args)


def layer(inputs: int, outputs: int, method: str, dtype: Any = torch.float32) -> Any:
    """A packed linear layer without bytes."""
    with torch.device("meta"):
        model = Model(_experts("gated"), torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    prepare(model, method, dtype)
    return model.mlp["linear"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_beyond_the_last_expert_mean_none(kind: str, tokens: int) -> None:
    module = packed(_experts(kind), "nf4")
    module._is_expert_parallel = True
    hidden, chosen, shares = routed_to(tokens)
    without, none = chosen.clone(), shares.clone()
    without[-1, 1], none[-1, 1] = EXPERTS, 0
    torch.testing.assert_close(module(hidden, without, shares), module(hidden, chosen, none))
    few = expert_products.side_by_side(stacks_of(module))(module, hidden, without.flatten())
    assert few.isfinite().all()  # those of the last expert, whose share is nothing


def test_no_tokens_make_nothing() -> None:
    module = packed(_experts("gated"), "nf4")
    assert module(*(part[:0] for part in routed_to(1))).shape == (0, WIDTH)


@pytest.mark.parametrize("method", ["nf4", "int8", "quanto-int8"])
def test_gradients_come_through_to_the_tokens(method: str) -> None:
    module = packed(_experts("gated"), method)
    BlockTensors(module).arrange("cuda")
    hidden, chosen, _ = routed_to(20)
    with torch.inference_mode():
        module(hidden, chosen, torch.ones(20, 2))  # what it keeps is of no use for gradients
    hidden.requires_grad_()
    found = packed_experts._unpacked(module, hidden, chosen.flatten())
    assert torch.equal(found, packed_experts._unpacked(module, hidden.detach(), chosen.flatten()))
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_autocast_computes_in_fewer_bits() -> None:
    module = packed(_experts("gated"), "int8")
    inputs = routed_to(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(*inputs)
    assert are_alike(found, module(*inputs))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_routed_ones_compute_the_same_bits(method: str, kind: str, tokens: int) -> None:
    """One by one in slots of a cache."""
    module = packed(_experts(kind), method)
    inputs = routed_to(tokens)
    expected = module(*inputs)
    stacks = find_stacks(module)
    assert len({stack.name for stack in stacks}) == len(list(module.parameters()))
    tensors = [dict(module.named_parameters())[stack.name].data for stack in stacks]
    store = RamExperts(stacks, tensors, HostStreams())
    cache = ExpertCache(
        torch.full((2 * store.slot_bytes,), 255, dtype=torch.uint8), store.slot_bytes, HostStreams()
    )
    held = BlockTensors(module)
    held.clear()
    routed = RoutedExperts(module, store, cache)
    assert torch.equal(module(*inputs), expected)
    assert cache.fetched_bytes
    routed.detach()
    held.bind(tensors)
    assert torch.equal(module(*inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_many_tokens_of_a_gpu_multiply_with_the_numbers(
    method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some experts at a time, of which one has no tokens; the same bits as one by one, as routed ones do."""
    module = packed(_experts(kind), method)
    BlockTensors(module).arrange("cuda")
    hidden, chosen, _ = routed_to(40)
    chosen[chosen == 4] = 3
    experts = chosen.flatten()
    found = packed_experts._unpacked(module, hidden, experts)
    assert torch.equal(found, one_by_one(packed_experts._unpacked_product)(module, hidden, experts))
    assert are_alike(found, one_by_one(packed_experts._packed_product)(module, hidden, experts))
    for size in (1, 2 * 4 * 2 * INSIDE * WIDTH):
        monkeypatch.setattr(packed_stack, "UNPACKED_EXPERTS_BYTES", size)
        assert torch.equal(packed_experts._unpacked(module, hidden, experts), found)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_what_the_kernels_multiply_with(method: str) -> None:
    """Those of torch's 4-bit kernel too, whose weights this machine's order is for."""
    linear = layer(WIDTH, INSIDE, method, torch.bfloat16)
    pack_block(linear, {"weight": torch.randn(INSIDE, WIDTH, dtype=torch.bfloat16)}, "cpu", "mps")
    for order in ("mps", "cpu")[: 1 + (method == "int4")]:
        packing.arrange(linear, order, fresh=True)
        parts = packing.parts(linear, "weight")
        stacks = {part: torch.stack([tensor, tensor]) for part, tensor in parts.items()}
        first, second = packing.template(linear, "weight").unpacked(stacks, torch.bfloat16)
        assert torch.equal(first, second)
        tokens = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        assert are_alike(tokens @ first.T, multiplied(tokens, linear.weight))


def test_experts_without_tokens_are_not_unpacked() -> None:
    module = packed(_experts("gated"), "quanto-int8")
    stack = module.down_proj
    assert [m is None for m in stack.unpacked([0] * EXPERTS, torch.float32)] == [True] * EXPERTS
    assert all(m is not None for m in stack.unpacked([0, 2, *[0] * (EXPERTS - 2)], torch.float32))


@pytest.mark.parametrize("tokens", TOKENS)
def test_numbers_of_experts_may_be_of_32_bits(tokens: int) -> None:
    module = packed(_experts("gated"), "nf4")
    states, chosen, shares = routed_to(tokens)
    assert torch.equal(module(states, chosen.int(), shares), module(states, chosen, shares))


@pytest.fixture
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that could not use a GPU: others ask for one."""
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.usefixtures("_no_cuda")
def test_their_order_follows_the_device() -> None:
    """Where there is no such kernel as quanto's for CPUs, its integers stay as they are then."""
    module = packed(_experts("gated").bfloat16(), "int4")
    inputs = tuple(each.bfloat16() if each.is_floating_point() else each for each in routed_to(5))
    expected = module(*inputs)
    tensors = BlockTensors(module)
    tensors.arrange("cuda")
    tensors = tensors.packed_anew()
    held = dict(module.named_parameters())
    assert [piece.name for piece in tensors.pieces] == list(held)
    assert tensors.added() == []
    assert {stack.name for stack in find_stacks(module)} == set(held)
    assert all(stack.known is None for stack in module.children() if isinstance(stack, PackedStack))
    tensors.arrange("cpu")
    assert are_alike(module(*inputs), expected)
    held = list(module.parameters())
    tensors.packed_anew().arrange("cpu")  # nothing to do
    assert [parameter.data_ptr() for parameter in module.parameters()] == [h.data_ptr() for h in held]


@pytest.mark.parametrize("method", METHODS)
def test_only_some_methods_have_orders(method: str) -> None:
    module = packed(_experts("gated").bfloat16(), method)
    assert BlockTensors(module).has_order == (method == "int4")


@pytest.mark.usefixtures("_no_cuda")
def test_a_layer_and_its_experts_change_their_order_apart() -> None:
    """Each is a part of its own, and knows which parameters are its."""
    model = Model(_experts("gated").bfloat16().to("meta"), torch.nn.Linear(WIDTH, INSIDE, bias=False))
    prepare(model.bfloat16(), "int4", torch.bfloat16)
    values = dict(_experts("gated").bfloat16().named_parameters(prefix="mlp.experts"))
    pack_block(model, values | {"mlp.linear.weight": torch.randn(INSIDE, WIDTH)}, "cpu")
    stacks = {stack.name for stack in find_stacks(model)}
    rest = BlockTensors(model, without=stacks)
    experts = BlockTensors(model, without={name for name, _ in model.named_parameters()} - stacks)
    for part in (experts, rest):
        part.arrange("cuda")
    new_rest, new_experts = rest.packed_anew(), experts.packed_anew()
    assert {piece.name for piece in new_rest.pieces} == {"mlp.linear.weight"}
    assert {piece.name for piece in new_experts.pieces} == {stack.name for stack in find_stacks(model)}
    assert new_rest.added() == new_experts.added() == []


def test_what_was_made_of_experts_goes_when_others_are_bound() -> None:
    """Or their memory would not be given back."""
    module = packed(_experts("gated"), "nf4")
    tensors = BlockTensors(module)
    module(*routed_to(1))
    stacks: list[Any] = [stack for stack in module.children() if isinstance(stack, PackedStack)]
    assert all(stack.known for stack in stacks)
    held = [tensor.clone() for tensor in tensors.current()]
    tensors.clear()
    assert not any(stack.known for stack in stacks)
    tensors.bind(held)
    assert module(*routed_to(1)).isfinite().all()


@pytest.fixture(autouse=True)
def _libraries() -> None:
    for library in ("bitsandbytes", "optimum.quanto"):
        import_library(library)
