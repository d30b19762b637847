"""A packed parameter comes apart, lies in a flat buffer, and computes the same when it is bound again."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_magic.backends.accelerate.packed import tinygemm
from llm_magic.backends.accelerate.packed.packing import arrange, parameters, parts, template
from llm_magic.backends.accelerate.packed.templates import Template, bind
from llm_magic.backends.accelerate.quantizing.libraries import import_library
from tests.packed import extension_was_loaded, without_extension

FOUR_BIT = ["nf4", "fp4", "nf4-nested", "nf4-words"]
QUANTO = ["quanto-int8", "int4", "int2", "float8"]
METHODS = ["plain", *FOUR_BIT, "int8", *QUANTO]
WIDTH = 256
"""Quanto's groups are 128 wide, and narrower layers have none."""
ALIGNMENT = 64


# ------------------------------------------------------------------ small packed networks


def network_of(method: str, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """Two packed layers with a norm between them, packed by the libraries themselves."""
    import torch

    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 128), torch.nn.LayerNorm(128), torch.nn.Linear(128, WIDTH, bias=False)
    )
    network = network.to(getattr(torch, dtype)).requires_grad_(False).eval()
    for place in (0, 2) if method != "plain" else ():
        network[place] = packed_layer(network[place], method).requires_grad_(False).eval()
    return network


def packed_layer(linear: Any, method: str) -> Any:
    return (quanto_layer if method in QUANTO else bitsandbytes_layer)(linear, method)


def quanto_layer(linear: Any, method: str) -> Any:
    quanto = import_library("optimum.quanto")
    kind = getattr(quanto, "qint8" if method == "quanto-int8" else f"q{method}")
    layer = quanto.QLinear.from_module(linear, weights=kind)
    layer.freeze()
    return layer


def bitsandbytes_layer(linear: Any, method: str) -> Any:
    import torch

    nn = import_library("bitsandbytes").nn
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if method == "int8":
        layer = nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        layer.weight = nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        options = {
            "compress_statistics": method == "nf4-nested",
            "quant_type": method[:3],
            "quant_storage": torch.bfloat16 if method == "nf4-words" else torch.uint8,
        }
        layer = nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, **options)
        layer.weight = nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **options)
    layer.bias = linear.bias
    return layer.to("cpu")


def inputs(dtype: str = "bfloat16", rows: int = 5) -> Any:
    import torch

    torch.manual_seed(1)
    x = torch.randn(rows, WIDTH).to(getattr(torch, dtype))
    x[:, 3] *= 20  # beyond the threshold of LLM.int8: the outliers' path
    return x


def forward(network: Any, x: Any) -> Any:
    import torch

    with torch.no_grad():
        return network(x)


@pytest.fixture(autouse=True)
def _no_compiler() -> Iterator[None]:
    """Quanto's own unpacking would compile an extension: nothing here may ask for it."""
    import_library("optimum.quanto")
    yield
    assert not extension_was_loaded()


# ------------------------------------------------------------------------------ a flat buffer


class Buffer:
    """A block's parts in one stretch of bytes, as views."""

    def __init__(self, templates: list[Template]) -> None:
        import torch

        self.templates = templates
        offsets, total = [], 0
        for left in templates:
            places = {}
            for part, (shape, dtype) in left.tensors.items():
                places[part] = total
                count = dtype.itemsize * torch.Size(shape).numel()
                total += -(-count // ALIGNMENT) * ALIGNMENT
            offsets.append(places)
        self.flat = torch.zeros(total, dtype=torch.uint8)
        self.views = [
            {part: self._view(places[part], *left.tensors[part]) for part in left.tensors}
            for left, places in zip(templates, offsets, strict=True)
        ]

    def _view(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        import torch

        count = torch.Size(shape).numel() * dtype.itemsize
        return self.flat[offset : offset + count].view(dtype).view(shape)

    def fill(self, found: list[dict[str, Any]]) -> None:
        for views, tensors in zip(self.views, found, strict=True):
            assert views.keys() == tensors.keys()
            for part, view in views.items():
                view.copy_(tensors[part])

    def assignments(self) -> list[Any]:
        pairs = zip(self.templates, self.views, strict=True)
        return [assignment for left, views in pairs for assignment in left.bindings(views)]

    def holds(self, tensor: Any) -> bool:
        start = self.flat.data_ptr()
        return bool(start <= tensor.data_ptr() < start + self.flat.nbytes)


def taken_apart(network: Any) -> tuple[list[Template], list[dict[str, Any]]]:
    found = list(parameters(network))
    templates = [template(module, leaf) for _, module, leaf in found]
    copies = [{k: t.clone() for k, t in parts(module, leaf).items()} for _, module, leaf in found]
    return templates, copies


def emptied(templates: list[Template]) -> list[Any]:
    return [assignment for left in templates for assignment in left.empty()]


def reference(method: str, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """What the libraries' own modules answer; quanto's without the extension that it would compile."""
    network = without_extension(network_of(method, dtype, seed))
    for layer in (network[0], network[2]):
        layer.support_avx512bf16_for_cpu = False  # an order that packed statistics do not survive
    return forward(network, inputs(dtype))


# -------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_network_computes_the_same_from_a_flat_buffer(method: str, dtype: str) -> None:
    import torch

    expected = reference(method, dtype)
    network, x = network_of(method, dtype), inputs(dtype)
    arrange(network, "cpu")
    templates, copies = taken_apart(network)
    buffer = Buffer(templates)
    buffer.fill(copies)
    bound, unbound = buffer.assignments(), emptied(templates)
    before = buffer.flat.clone()
    for _sweep in range(3):
        bind(unbound)
        assert all(p.device.type == "meta" for p in network.parameters())
        bind(bound)
        assert torch.equal(forward(network, x), expected)
    assert torch.equal(buffer.flat, before)


@pytest.mark.parametrize("method", METHODS)
def test_bound_parameters_lie_in_the_buffer(method: str) -> None:
    network = network_of(method)
    arrange(network, "cpu")
    templates, copies = taken_apart(network)
    buffer = Buffer(templates)
    buffer.fill(copies)
    bind(buffer.assignments())
    for _sweep in range(2):
        held = [tensor for _, module, leaf in parameters(network) for tensor in parts(module, leaf).values()]
        assert all(buffer.holds(tensor) for tensor in held)
        assert sum(t.nbytes for t in held) == sum(left.bytes for left in templates)
        forward(network, inputs())


@pytest.mark.parametrize("method", METHODS)
def test_two_blocks_take_turns_in_two_slots(method: str) -> None:
    """As streamed blocks do: whatever the other slot holds, even not-a-number everywhere."""
    import torch

    x = inputs()
    networks = [network_of(method, seed=seed) for seed in (0, 1)]
    expected = [reference(method, seed=seed) for seed in (0, 1)]
    for network in networks:
        arrange(network, "cpu")
    apart = [taken_apart(network) for network in networks]
    slots = [[Buffer(templates) for _slot in range(2)] for templates, _ in apart]
    for sweep, (turn, network) in itertools.product(range(3), enumerate(networks)):
        (templates, copies), slot = apart[turn], slots[turn][sweep % 2]
        slot.fill(copies)
        bind(slot.assignments())
        assert torch.equal(forward(network, x), expected[turn])
        bind(emptied(templates))
        slot.flat.fill_(0xFF)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_packed_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = network_of(method), inputs()
    arrange(network, "cpu")
    templates, copies = taken_apart(network)
    buffer = Buffer(templates)
    buffer.fill(copies)
    calls = count_packing(monkeypatch)
    network_of(method)
    assert bool(calls) == (method != "plain")  # the count can see it
    calls.clear()
    for _sweep in range(2):
        bind(emptied(templates))
        bind(buffer.assignments())
        forward(network, x)
    assert calls == []


def count_packing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the packing operators, each time one meets a weight."""
    functional = import_library("bitsandbytes").functional
    calls: list[str] = []

    def watch(owner: Any, name: str, of_weights: Callable[[Any], bool] = lambda _tensor: True) -> None:
        real = getattr(owner, name)

        def watched(tensor: Any, *args: Any, **options: Any) -> Any:
            if of_weights(tensor):
                calls.append(name)
            return real(tensor, *args, **options)

        monkeypatch.setattr(owner, name, watched)

    modules = import_library("bitsandbytes").nn.modules
    watch(functional, "quantize_4bit")
    watch(functional, "int8_vectorwise_quant", lambda tensor: tensor.shape[0] > 5)  # not of activations
    watch(modules, "_convert_weight_packed_for_cpu")
    quanto = import_library("optimum.quanto")
    watch(quanto.QModuleMixin, "freeze")
    return calls


# ------------------------------------------------------------------------- orders of the bytes


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    import torch

    def equal(a: Any, b: Any) -> bool:  # as bytes, which may spell not-a-number
        return a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))

    return all(
        a.keys() == b.keys() and all(equal(a[part], b[part]) for part in a)
        for a, b in zip(one, other, strict=True)
    )


def test_int4_finds_its_order_by_how_its_bytes_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by where: those of a block that a GPU computes and RAM holds are in the GPU's."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    network = network_of("int4")
    expected = reference("int4")
    arrange(network, "cuda")
    for_cuda = parts(network[0], "weight")
    assert for_cuda["_data._data"].dtype == torch.int32
    assert for_cuda["_data._data"].is_cpu
    arrange(network, "cpu")
    bind([a for left, tensors in zip(*taken_apart(network), strict=True) for a in left.bindings(tensors)])
    assert torch.equal(forward(network, inputs()), expected)


def test_int4_leaves_for_devices_without_its_kernel_as_quanto_packs_it() -> None:
    network = network_of("int4")
    whole = network[0].weight.weight_qbits_tensor()
    arrange(network, "mps")
    left = network[0].weight
    assert type(left) is type(whole)
    for name in ("_scale", "_shift"):
        assert getattr(left, name).equal(getattr(whole, name))
    assert left._data._data.equal(whole._data._data)


def test_a_large_int4_weight_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    quanto = import_library("optimum.quanto")
    torch.manual_seed(0)
    weight = torch.randn(208, WIDTH).bfloat16()
    options = {"axis": 0, "group_size": 128, "activation_qtype": None}
    scale, shift = quanto.MaxOptimizer()(weight, qtype=quanto.qint4, axis=0, group_size=128)

    def packed(*, optimized: bool) -> Any:
        made = quanto.quantize_weight(
            weight, quanto.qint4, scale=scale, shift=shift, optimized=optimized, **options
        )
        layer = torch.nn.Linear(WIDTH, 208, bias=False)
        layer.weight = torch.nn.Parameter(made, requires_grad=False)
        return torch.nn.Sequential(layer)

    monkeypatch.setattr(tinygemm, "_AT_A_TIME", 64 * WIDTH)
    in_parts = packed(optimized=False)
    arrange(in_parts, "cpu", fresh=True)
    assert same(taken_apart(packed(optimized=True))[1], taken_apart(in_parts)[1])


# --------------------------------------------------------------------------------- the templates


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_parameter_says_what_it_is(method: str) -> None:
    network = network_of(method)
    kinds = {name: (type(p), p.dtype, p.shape) for name, p in network.named_parameters()}
    templates, _ = taken_apart(network)
    bind(emptied(templates))
    assert {name: (type(p), p.dtype, p.shape) for name, p in network.named_parameters()} == kinds
    assert all(p.is_meta and not p.requires_grad for p in network.parameters())
    held = [t for _, module, leaf in parameters(network) for t in parts(module, leaf).values()]
    assert all(tensor.is_meta for tensor in held)
    assert [template(module, leaf).tensors for _, module, leaf in parameters(network)] == [
        left.tensors for left in templates
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_template_can_be_made_of_an_empty_parameter(method: str) -> None:
    import torch

    network, expected = network_of(method), reference(method)
    arrange(network, "cpu")
    templates, copies = taken_apart(network)
    bind(emptied(templates))
    again = [template(module, leaf) for _, module, leaf in parameters(network)]
    bind([a for left, found in zip(again, copies, strict=True) for a in left.bindings(found)])
    assert torch.equal(forward(network, inputs()), expected)


def test_a_large_weight_is_put_into_order_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, in_parts = network_of("nf4"), network_of("nf4")
    arrange(whole, "cpu")
    monkeypatch.setattr(tinygemm, "_AT_A_TIME", 40 * 128)
    arrange(in_parts, "cpu")
    assert same(taken_apart(whole)[1], taken_apart(in_parts)[1])
    arrange(in_parts, "cuda")
    assert same(taken_apart(network_of("nf4"))[1], taken_apart(in_parts)[1])


def test_the_names_of_the_parts() -> None:
    found = {method: list(parts(network_of(method)[0], "weight")) for method in METHODS}
    assert found["plain"] == [""]
    assert found["nf4"] == found["fp4"] == ["", "absmax"]
    assert found["nf4-nested"] == ["", "absmax", "offset", "state2.absmax"]
    assert found["int8"] == ["", "SCB"]
    assert found["quanto-int8"] == found["float8"] == ["_data", "_scale"]
    assert found["int2"] == ["_data._data", "_scale", "_shift"]
    assert found["int4"] == ["_data._data", "_scale_shift"]
    assert list(parts(network_of("int4", "float32")[0], "weight")) == ["_data._data", "_scale", "_shift"]


def test_a_tied_parameter_is_met_once() -> None:
    import torch

    one, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.weight = one.weight
    network = torch.nn.Sequential(one, other)
    assert [name for name, _, _ in parameters(network)] == ["0.weight", "0.bias", "1.bias"]


def test_what_was_not_packed_yet_is_refused() -> None:
    import torch

    nn = import_library("bitsandbytes").nn
    with torch.device("meta"):
        layers = [nn.Linear4bit(64, 64), nn.Linear8bitLt(64, 64, has_fp16_weights=False)]
    for layer in layers:
        with pytest.raises(ValueError, match="not packed yet"):
            parts(layer, "weight")


def test_an_unknown_kind_is_refused() -> None:
    import torch

    layer = torch.nn.LazyLinear(4)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="UninitializedParameter"):
        parts(layer, "weight")
