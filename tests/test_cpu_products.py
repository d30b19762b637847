"""Kernels for packed weights on the CPU: what they compute, with every format, shape and dtype."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from llm_magic.backends.accelerate.kernels import (  # noqa: E402
    compiler,
    cpu_products,
    numbers,
)
from llm_magic.backends.accelerate.kernels.cpu_products import (  # noqa: E402
    PackedWeights,
    few_routed_tokens,
    few_tokens,
    multiplied,
    multiplied_each,
    multiplied_plain,
    multiplied_router,
    prepared,
)
from llm_magic.backends.accelerate.packed import four_bits, int4_orders  # noqa: E402
from llm_magic.backends.accelerate.packed.weights import packed_weights  # noqa: E402
from llm_magic.backends.accelerate.quantizing.libraries import import_library  # noqa: E402
from llm_magic.backends.accelerate.served.cpu_linear import is_linear, serve_linear  # noqa: E402
from llm_magic.backends.accelerate.served_model import serve_plain_modules  # noqa: E402
from tests.kernel_caches import forget_kernels  # noqa: E402
from tests.packed import without_extension  # noqa: E402
from tests.test_packing import METHODS, bind, forward, inputs, network_of, parameters, parts, template  # noqa: E402

KINDS = (
    "nf4",
    "fp4",
    "mxfp4",
    "int8",
    "float8",
    "float8 in groups",
    "int4",
    "int2",
    "int4 in 64 rows",
    "int4 in 32 rows",
)
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ((8, 64), (12, 192), (36, 320), (512, 1024))
HERE = [needed for needed, _, _ in numbers._WIDTHS if needed in compiler.instructions()]


@pytest.fixture(params=HERE)
def _vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose vectors are no wider."""
    known = compiler.instructions() - set(HERE[: HERE.index(request.param)])
    monkeypatch.setattr(compiler, "instructions", lambda: known)
    forget_kernels(monkeypatch)


def packed(
    kind: str, shape: tuple[int, int], dtype: str = "bfloat16", seed: int = 0
) -> tuple[PackedWeights, Any]:
    """Random bytes, and what they stand for (float64)."""
    chance = torch.Generator().manual_seed(seed)
    rows, columns = shape

    def integers(bits: int, *size: int) -> Any:
        return torch.randint(1 << bits, size, generator=chance, dtype=torch.uint8)

    def scales(*size: int) -> Any:
        return (torch.rand(size, generator=chance) / 50).to(getattr(torch, dtype))

    if kind.endswith("rows"):
        return in_blocks(integers(4, rows, columns), scales(rows, 2 * columns // 64), int(kind.split()[2]))
    if kind in ("nf4", "fp4"):
        codes, absmax = integers(4, rows, columns), torch.rand(rows * columns // 64, generator=chance)
        table = import_library("bitsandbytes").functional.get_4bit_type(kind, device="cpu")
        table = (table.bfloat16() if dtype == "bfloat16" else table).double()
        values = table[codes.long()].view(rows, -1, 64) * absmax.view(rows, -1, 1).double()
        data = codes[:, ::2] << 4 | codes[:, 1::2]
        return PackedWeights(kind, data, absmax, None, rows, columns, 64), values.view(shape)
    if kind == "mxfp4":
        codes, exponents = integers(4, rows, columns), 118 + integers(3, rows, columns // 32)
        values = torch.tensor(cpu_products.MXFP4_NUMBERS, dtype=torch.float64)[codes.long()]
        values = values.view(rows, -1, 32) * torch.exp2(exponents.double() - 127).unsqueeze(-1)
        data = codes[:, ::2] | codes[:, 1::2] << 4
        return PackedWeights(kind, data, exponents, None, rows, columns, 32), values.view(shape)
    if kind == "float8 in groups":
        data = integers(8, rows, columns)
        data[(data & 127) == 127] = 0  # nan
        scale, group = scales(rows, columns // 64).float(), 64
        values = data.view(torch.float8_e4m3fn).double().view(rows, -1, 64) * scale.double().unsqueeze(-1)
        return PackedWeights("float8", data, scale, None, rows, columns, group), values.view(shape)
    if kind in ("int8", "float8"):
        data, scale = integers(8, rows, columns), scales(rows, 1)
        data = data.view(torch.int8) if kind == "int8" else data.view(torch.float8_e4m3fn)
        data = (
            data
            if kind == "int8"
            else torch.where(data.float().isnan(), torch.zeros(()), data.float()).to(data.dtype)
        )
        return PackedWeights(kind, data, scale, None, rows, columns), data.double() * scale.double()
    bits, group = int(kind[-1]), next(group for group in (128, 96, 64) if columns % group == 0)
    plain, count = integers(bits, rows, columns), rows * columns // group
    scale, shift = scales(count, 1), scales(count, 1)
    each = plain.view(8 // bits, -1)
    data = torch.zeros_like(each[0])
    for place, some in enumerate(each):
        data |= some << (bits * place)
    values = plain.view(-1, group).double() * scale.double() - shift.double()
    return PackedWeights(kind, data, scale, shift, rows, columns, group), values.view(shape)


def in_blocks(integers: Any, statistics: Any, block: int) -> tuple[PackedWeights, Any]:
    """Integers of 4 bits as torch has them for CPUs, with scales and middles for groups of 64."""
    rows, columns = integers.shape
    of_groups = statistics.bfloat16().view(rows, -1, 2)
    scale, middle = of_groups.double().unsqueeze(-2).unbind(-1)
    values = (integers.view(rows, -1, 64).double() - 8) * scale + middle
    low, high = integers.view(-1, 2, block // 2, columns).unbind(1)
    data = (low | high << 4).transpose(1, 2).contiguous().view(rows, columns // 2)
    held = of_groups.transpose(0, 1).contiguous()
    return PackedWeights("int4", data, held, None, rows, columns, 64, block=block), values.view(rows, columns)


def tokens(count: int, columns: int, dtype: str = "bfloat16") -> Any:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(
        getattr(torch, dtype)
    )


def unpacked(weights: PackedWeights, dtype: Any) -> Any:
    """The numbers of a matrix, as products with many tokens take them."""
    return cpu_products._unpacked(weights, 0, torch.empty(weights.rows * weights.columns, dtype=dtype)).T


def are_close(found: Any, expected: Any, dtype: str) -> bool:
    nearly = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    return bool((found.double() - expected).abs().max() <= nearly * expected.abs().max())


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_few_tokens_and_with_many(kind: str, shape: tuple[int, int], dtype: str) -> None:
    shape = (-(-shape[0] // 64) * 64, shape[1]) if kind.endswith("rows") else shape
    weights, values = packed(kind, shape, dtype)
    few = few_tokens(getattr(torch, dtype))
    for count in (1, 2, 3, 4, 5, few, few + 1, 40):
        some = tokens(count, shape[1], dtype)
        found = multiplied(some, weights)
        assert (found.dtype, found.shape) == (some.dtype, (count, shape[0]))
        assert are_close(found, some.double() @ values.T, dtype)


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_that_the_bytes_stand_for(kind: str, dtype: str) -> None:
    weights, values = packed(kind, (192, 384), dtype)
    whole = unpacked(weights, torch.float32)
    assert torch.equal(whole, values.float()) or (kind in ("nf4", "fp4") and are_close(whole, values, dtype))
    rounded = unpacked(weights, getattr(torch, dtype)).double()
    assert are_close(rounded, values, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_8_bits_are_read(kind: str) -> None:
    weights, _ = packed(kind, (64, 256))
    weights.data.view(torch.uint8).view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    if kind == "float8":
        is_number = ~weights.data.float().isnan()
        expected = weights.data.double() * weights.scales.double()
        assert torch.equal(unpacked(weights, torch.float32)[is_number], expected.float()[is_number])
    found = unpacked(weights, torch.float32)
    one = torch.eye(256)[[0, 77, 255]]  # a column each
    assert torch.equal(multiplied(one, weights), found.T[[0, 77, 255]]) or kind == "float8"


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_bits_whatever_comes_with_it(kind: str) -> None:
    """Or proposals would be refused for their rounding, and experts would depend on their place."""
    weights, _ = packed(kind, (192, 384))
    some = tokens(few_tokens(torch.bfloat16), 384)
    together = multiplied(some, weights)
    for count in (1, 2, 3, 5):
        assert torch.equal(multiplied(some[:count], weights), together[:count])


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("kind", KINDS)
def test_each_token_with_a_matrix_of_its_own(kind: str) -> None:
    several = [packed(kind, (64, 256), seed=seed)[0] for seed in range(5)]
    first = several[0]
    stack = replace(
        first,
        data=torch.stack([one.data.view(torch.uint8) for one in several]).view(first.data.dtype),
        scales=torch.stack([one.scales for one in several]),
        shifts=None if first.shifts is None else torch.stack([one.shifts for one in several]),
    )
    chosen, some = torch.tensor([4, 0, 0, 3, 1, 2, 4]), tokens(7, 256)
    found = multiplied_each(some, stack, chosen)
    expected = [multiplied(some[i : i + 1], several[number]) for i, number in enumerate(chosen)]
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_codes_with_blocks_of_any_size(block: int) -> None:
    functional = import_library("bitsandbytes").functional
    values = torch.randn(24, 512, generator=torch.Generator().manual_seed(block))
    data, scales = four_bits.packed(values, "nf4", block)
    found = multiplied(tokens(2, 512, "float32"), PackedWeights("nf4", data, scales, None, 24, 512, block))
    if block < 32:
        assert found is None
        return
    state = functional.QuantState(
        scales, values.shape, functional.get_4bit_type("nf4", "cpu"), block, "nf4", torch.float32
    )
    numbers_of_library = functional.dequantize_4bit(data, state)
    assert are_close(found, (tokens(2, 512, "float32") @ numbers_of_library.T).double(), "float32")


@pytest.mark.parametrize("count", [3, 30])
def test_tokens_of_any_layout(count: int) -> None:
    weights, values = packed("nf4", (32, 256))
    some = tokens(256, count).T
    assert not some.is_contiguous()
    assert are_close(multiplied(some, weights), some.double() @ values.T, "bfloat16")
    batch = tokens(2 * count, 256).view(2, count, 256)
    assert multiplied(batch, weights).shape == (2, count, 32)


def test_all_threads_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = packed("nf4", (67, 512))
    some, before = tokens(3, 512), torch.get_num_threads()
    alone = multiplied(some, weights)
    monkeypatch.setattr(cpu_products, "_OF_A_SHARE", 1)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(multiplied(some, weights), alone)
    finally:
        torch.set_num_threads(before)


def test_several_of_pythons_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_OF_A_SHARE", 1)
    weights, _ = packed("nf4", (96, 512))
    some = [tokens(count, 512) for count in (1, 4, 20)]
    expected, wrong = [multiplied(each, weights) for each in some], []

    def work() -> None:
        for _ in range(50):
            wrong.extend(
                1 for x, y in zip(some, expected, strict=True) if not torch.equal(multiplied(x, weights), y)
            )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_no_kernel_takes() -> None:
    weights, _ = packed("nf4", (32, 256))
    some = tokens(1, 256)
    going_on = replace(weights, rows=16, columns=96)  # groups that do so in the next row
    assert multiplied(tokens(1, 96), going_on) is None
    assert multiplied(some.double(), weights) is None
    assert multiplied(some[:0], weights) is None
    assert multiplied(some.requires_grad_(), weights) is None
    with torch.no_grad():
        assert multiplied(some, weights) is not None
    assert multiplied(tokens(40, 256).double(), weights) is None


def with_several(some: Any, several: list[PackedWeights]) -> list[Any]:
    """Tokens times each of some matrices, with one call of a kernel."""
    products = prepared(several[0].layout, tuple(of.rows for of in several), "bfloat16", len(some))
    assert products is not None
    room = torch.empty(products.room, dtype=torch.uint8)
    results = [some.new_empty(products.places, of.rows) for of in several]
    addresses = [
        cpu_products.address(part)
        for of, result in zip(several, results, strict=True)
        for part in (of.data, of.scales, of.shifts, result)
    ]
    products.run(products.words(some.data_ptr(), room.data_ptr(), addresses))
    return [result[: len(some)] for result in results]


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_with_several_matrices(kind: str) -> None:
    sizes = (192, 64, 128) if kind.endswith("rows") else (48, 4, 20)
    several = [packed(kind, (rows, 384), seed=rows)[0] for rows in sizes]
    for count in (1, 3, few_tokens(torch.bfloat16)):
        some = tokens(count, 384)
        found = with_several(some, several)
        for result, weights in zip(found, several, strict=True):
            assert torch.equal(result, multiplied(some, weights))


def test_blocks_of_rows_that_are_not_full_are_torchs() -> None:
    weights, _ = packed("int4 in 32 rows", (96, 128))
    assert multiplied(tokens(2, 128), weights) is not None
    for count in (2, 40):
        assert multiplied(tokens(count, 128), replace(weights, block=64)) is None


@pytest.mark.parametrize("count", [1, 3, 8, 9, 17])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prepared_products_are_called_with_addresses(dtype: str, count: int) -> None:
    halves = [plain(dtype, (rows, 96)) for rows in (40, 3)]
    products = prepared(halves[0].layout, (40, 3), dtype, count)
    some, room = tokens(count, 96, dtype), torch.empty(products.room, dtype=torch.uint8)
    results = [some.new_empty(products.places, weights.rows) for weights in halves]
    parts = (
        (each.data.data_ptr(), 0, 0, result.data_ptr()) for each, result in zip(halves, results, strict=True)
    )
    words = products.words(some.data_ptr(), room.data_ptr(), [address for part in parts for address in part])
    for _ in range(2):
        products.run(words)
        for result, weights in zip(results, halves, strict=True):
            assert are_close(result[:count], some.double() @ weights.data.double().T, dtype)
        some.copy_(tokens(count + 1, 96, dtype)[:count])


@pytest.mark.usefixtures("_vectors", "_slow")
@pytest.mark.parametrize("columns", [64, 80, 320])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plain_matrices(dtype: str, columns: int) -> None:
    weights = plain(dtype, (37, columns))
    for count in range(1, 18):
        some = tokens(count, columns, dtype)
        found = multiplied_plain(some, weights.data)
        assert are_close(found, some.double() @ weights.data.double().T, dtype)


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("columns", [64, 80, 320])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_matrices_of_routers_with_tokens_of_32_bits(dtype: str, columns: int) -> None:
    weights = plain(dtype, (37, columns)).data
    for count in range(1, few_routed_tokens(weights.dtype) + 1):
        some = tokens(count, columns, "float32")
        found = multiplied_router(some, weights, is_wide=dtype != "float32")
        assert are_close(found, some.double() @ weights.double().T, "float32")


def test_tokens_of_16_bits_with_matrices_of_32_are_torchs() -> None:
    weights = plain("float32", (37, 64))
    for dtype in ("bfloat16", "float16"):
        some = tokens(1, 64, dtype)
        assert multiplied_router(some, weights.data, is_wide=False) is None
        assert multiplied_plain(some, weights.data) is None
        assert prepared(weights.layout, (37,), dtype, 1) is None


def plain(dtype: str, shape: tuple[int, int]) -> PackedWeights:
    """Weights that are not packed."""
    return PackedWeights(dtype, tokens(*shape, dtype), None, None, *shape)


# ------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_layer_computes_by_kernels_what_its_library_does(method: str, dtype: str, used: list[int]) -> None:
    by_library, network = network_of(method, dtype), network_of(method, dtype)
    for each in (by_library, network):
        bound(each)
    for layer in (network[0], network[2]):
        name, bias = type(layer).__name__, layer.bias
        serve_linear(layer)
        assert (type(layer).__name__, layer.bias) == (name, bias)
    assert isinstance(network[0], type(by_library[0]))
    for rows in (1, 5, 40):
        x = inputs(dtype, rows)
        found, expected = forward(network, x), forward(without_extension(by_library), x)
        # LLM.int8() rounds the activations as well.
        nearly = 0.03 if method == "int8" else 0.01
        assert (found - expected).abs().max() <= nearly * expected.abs().max()
    assert bool(used) == (method != "nf4-nested")


def bound(network: Any) -> None:
    """As a sweep binds it."""
    for _, module, leaf in list(parameters(network)):
        bind(template(module, leaf).bindings(parts(module, leaf)))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every product that a kernel makes."""
    products: list[int] = []

    def counted(ours: Callable[[Any, Any], Any], some: Any, weights: Any) -> Any:
        result = ours(some, weights)
        products.extend([] if result is None else [len(some)])
        return result

    for name in ("multiplied", "multiplied_plain"):
        monkeypatch.setattr(cpu_products, name, partial(counted, getattr(cpu_products, name)))
    return products


@pytest.mark.parametrize("method", METHODS[1:])
def test_without_kernels_the_libraries_compute(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(method)
    bound(network)
    expected = forward(without_extension(network), inputs())
    monkeypatch.setattr(cpu_products, "_readers", lambda: None)
    forget_kernels(monkeypatch)
    assert not cpu_products.is_there()
    for layer in (network[0], network[2]):
        serve_linear(layer)
    assert torch.equal(forward(network, inputs()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 40])
def test_without_llvmlite_no_kernel_takes_tokens(
    count: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "_readers", lambda: None)
    monkeypatch.setitem(sys.modules, compiler.__name__, None)  # nor is anything imported that needs it
    forget_kernels(monkeypatch)
    weights, _ = packed("int8", (8, 64))
    assert multiplied(torch.ones(count, 64, dtype=getattr(torch, dtype)), weights) is None


# --------------------------------------------------------------------- plain weights of 16 bits


@pytest.fixture
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for products in 16 bits, as most of them are."""
    halves = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(
        cpu_products, "_quick_dtype", lambda dtype: torch.float32 if dtype in halves else dtype
    )
    monkeypatch.setattr(cpu_products, "few_plain_tokens", cpu_products.few_plain_tokens.__wrapped__)


@pytest.mark.usefixtures("_vectors", "_slow")
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_layers_of_16_bits_are_served_where_the_cpu_is_slow_with_them(
    dtype: str, used: list[int]
) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(80, 48), torch.nn.Linear(48, 7, bias=False), torch.nn.Linear(7, 5)]
    model = torch.nn.Sequential(*layers, torch.nn.Conv1d(3, 3, 3)).to(getattr(torch, dtype))
    model.eval().requires_grad_(False)
    serve_plain_modules(model)
    serve_plain_modules(model)  # once is enough
    assert [is_linear(layer) for layer in model] == [True, True, True, False]
    assert [type(layer).__name__ for layer in layers] == ["Linear"] * 3
    for count in (1, 3, few_tokens(getattr(torch, dtype)), 33):
        x = tokens(count, 80, dtype)
        for layer in layers:  # of 7 columns no vector can be made
            bias = None if layer.bias is None else layer.bias.double()
            expected = torch.nn.functional.linear(x.double(), layer.weight.double(), bias)
            x = layer(x)
            assert are_close(x, expected, dtype)
            assert x.dtype == layer.weight.dtype
    assert len(used) == (0 if dtype == "float32" else 8)


@pytest.mark.usefixtures("_slow")
def test_plain_layers_refuse_what_torch_refuses() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16().eval().requires_grad_(False)
    serve_plain_modules(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.zeros(1, 64))


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx2"}, {"bfloat16": 24, "float16": 24}),  # as packed ones: torch is slow with any number of them
        ({"avx2", "avx512bf16"}, {"bfloat16": 16, "float16": 24}),
        ({"avx512bf16", "avx512fp16", "amx-bf16"}, {"bfloat16": 8, "float16": 24}),
        ({"avx512bf16", "avx512fp16", "amx-bf16", "amx-fp16"}, {"bfloat16": 8, "float16": 8}),
        ({"neon", "bf16"}, {"bfloat16": 0, "float16": 24}),
    ],
)
def test_plain_layers_are_kernels_with_as_many_tokens_as_these_are_quicker_with(
    known: set[str], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "_instructions", lambda: known)
    monkeypatch.setattr(cpu_products, "is_there", lambda: True)
    monkeypatch.setattr(cpu_products, "_quick_dtype", cpu_products._quick_dtype.__wrapped__)
    few = cpu_products.few_plain_tokens.__wrapped__
    assert {dtype: few(getattr(torch, dtype)) for dtype in DTYPES} == {**expected, "float32": 0}


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with instructions for products in bfloat16, but for few tokens."""
    monkeypatch.setattr(cpu_products, "_quick_dtype", lambda dtype: dtype)
    monkeypatch.setattr(cpu_products, "few_plain_tokens", {torch.bfloat16: 5}.get)


@pytest.mark.usefixtures("_quick")
def test_plain_layers_with_many_tokens_are_torchs_where_the_cpu_is_quick(used: list[int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16().eval().requires_grad_(False)
    usual = copy.deepcopy(model)
    serve_plain_modules(model)
    for count in (1, 5, 6, 40):
        assert are_close(model(tokens(count, 64)), usual(tokens(count, 64)).double(), "bfloat16")
    assert used == [1, 5]
    assert torch.equal(model(tokens(6, 64)), usual(tokens(6, 64)))


@pytest.mark.usefixtures("_quick")
def test_plain_layers_stay_torchs_where_no_kernel_is_quicker() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).half()
    serve_plain_modules(model)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx2"}, ("float32", "float32", "float32")),
        ({"avx2", "avx512bf16"}, ("bfloat16", "float32", "float32")),
        ({"avx512fp16", "amx-bf16"}, ("bfloat16", "float16", "float32")),
    ],
)
def test_products_are_in_a_dtype_that_the_cpu_has_instructions_for(
    known: set[str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "_instructions", lambda: known)
    ask = cpu_products._quick_dtype.__wrapped__
    assert tuple(str(ask(getattr(torch, dtype))).removeprefix("torch.") for dtype in DTYPES) == expected


def served(method: str = "nf4", dtype: str = "bfloat16") -> Any:
    network = network_of(method, dtype)
    bound(network)
    for layer in (network[0], network[2]):
        serve_linear(layer)
    return network


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("method", ["int4", "int2"])
def test_rows_that_do_not_share_bytes_evenly_are_quantos(method: str, rows: int) -> None:
    """A gate of one row (Qwen2-MoE): its groups share bytes with each other."""
    from optimum.quanto import QLinear, qint2, qint4

    linear = (
        torch.nn.Linear(256, rows, bias=False).half().requires_grad_(False).eval()
    )  # torch's kernel takes bfloat16
    layer = QLinear.from_module(linear, weights=qint4 if method == "int4" else qint2)
    layer.freeze()
    network = torch.nn.Sequential(layer.eval())
    bound(network)
    x = tokens(3, 256, "float16")
    expected = network(x)
    serve_linear(layer)
    assert are_close(network(x), expected.double(), "bfloat16")


@pytest.mark.parametrize("method", ["nf4", "int8", "quanto-int8", "int2"])
def test_a_layer_without_bytes_is_not_read(method: str) -> None:
    network = served(method)
    for _, module, leaf in list(parameters(network)):
        bind(template(module, leaf).empty())
    weights = [packed_weights(layer.weight) for layer in (network[0], network[2])]
    assert all(multiplied(tokens(1, each.columns), each) is None for each in weights if each is not None)


def test_scales_that_are_elsewhere_are_not_read() -> None:
    """bitsandbytes keeps those of 8-bit integers in the layer, after it has computed once."""
    network = served("int8")
    expected = forward(network, inputs())
    network[0].weight.SCB = None
    assert are_close(forward(network, inputs()), expected.double(), "bfloat16")


@pytest.mark.usefixtures("_slow")
def test_a_plain_layer_may_become_wider_again() -> None:
    layer = torch.nn.Linear(64, 64).bfloat16().eval()
    serve_plain_modules(layer)
    x = tokens(2, 64, "float32")
    layer.float()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("_slow")
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_layer_learns(bias: bool) -> None:
    layer = torch.nn.Linear(64, 64, bias=bias).bfloat16().eval()
    serve_plain_modules(layer)
    layer(tokens(2, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.usefixtures("_slow")
def test_a_plain_layer_is_cast_traced_called_with_others_and_pickled() -> None:
    layer = torch.nn.Linear(64, 64).bfloat16().eval().requires_grad_(False)
    serve_plain_modules(layer)
    x = tokens(2, 64)
    expected = layer(x)
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16
    zeros = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (x,)).any()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert is_linear(other)
        assert torch.equal(other(x), expected)
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    assert are_close(traced(x), expected.double(), "bfloat16")


def test_a_layer_without_outputs_makes_none() -> None:
    """A kernel would end the process: by a division."""
    weights, _ = packed("int8", (8, 64))
    assert prepared(weights.layout, (8, 0), "bfloat16", 1) is None
    assert prepared(weights.layout, (8, 8), "bfloat16", 1) is not None


def test_a_processor_without_conversions_has_no_kernels_for_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "instructions", lambda: frozenset({"avx2"}))
    kernel = cpu_products._kernel.__wrapped__
    weights, _ = packed("nf4", (32, 256))
    assert kernel(weights.layout, "float16", 1) is None
    assert kernel(weights.layout, "bfloat16", 1) is not None


def test_an_llvmlite_that_is_broken_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> frozenset[str]:
        raise AttributeError

    monkeypatch.setattr(compiler, "instructions", broken)
    assert cpu_products._readers.__wrapped__() is None


def test_a_layer_that_is_trained_is_its_librarys() -> None:
    """Gradients go through what the library computes."""
    network = served("nf4")
    x = inputs().requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None


def test_torchs_integers_of_4_bits_are_read_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever order torch has for this processor, from one to several of its blocks, and what it has no kernel for."""
    network, expected = network_of("int4", "bfloat16"), None
    weight = next(
        parameter for _, parameter in network.named_parameters() if hasattr(parameter, "_scale_shift")
    )
    block = int4_orders.block_in_halves()
    assert block in (32, 64)
    found = packed_weights(weight)
    assert found is not None
    assert found.block == block
    for count in (1, 7, 40):
        some = tokens(count, weight.shape[1])
        expected = torch.nn.functional.linear(some, weight)
        assert are_close(multiplied(some, found), expected.double(), "bfloat16")
    monkeypatch.setattr(int4_orders, "block_in_halves", lambda: 0)
    assert packed_weights(weight) is None
