"""Packed parameters on a GPU: through pinned memory and slots, and between the orders of CPU and GPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("bitsandbytes")
pytest.importorskip("optimum.quanto")
pytestmark = pytest.mark.gpu

from bitsandbytes.nn import Int8Params  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from llm_magic.backends.accelerate.packed.packing import arrange, parameters, parts, template  # noqa: E402
from llm_magic.backends.accelerate.packed.templates import bind  # noqa: E402
from llm_magic.backends.accelerate.quantizing.methods import METHODS  # noqa: E402
from llm_magic.backends.accelerate.quantizing.pack import pack_block  # noqa: E402
from llm_magic.backends.accelerate.quantizing.prepare import prepare  # noqa: E402
from llm_magic.backends.accelerate.quantizing.sizes import packed_bytes  # noqa: E402
from llm_magic.backends.accelerate.source.skeleton import build_skeleton  # noqa: E402

DEVICE = "cuda:0"
DTYPES = ["bfloat16", "float16"]
CASES = [(name, dtype) for name in METHODS for dtype in DTYPES]


def block_of(name: str, dtype: Any, device: str, compute: str | None = None, seed: int = 0) -> Any:
    """One packed feed-forward network, wide enough for every kernel."""
    block, sizes = prepared_block(name, dtype)
    torch.manual_seed(seed)
    weights = {n: torch.randn(p.shape) / 16 for n, p in block.named_parameters()}
    pack_block(block, weights, device, compute)
    held = [sum(t.nbytes for t in parts(module, leaf).values()) for _, module, leaf in parameters(block)]
    assert held == sizes
    return block


def prepared_block(name: str, dtype: Any) -> tuple[Any, list[int]]:
    """The same without bytes, and what it will have of them once it is packed."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = build_skeleton(config, dtype)
    names = prepare(model, name, dtype)
    block, prefix = model.model.layers[0].mlp, "model.layers.0.mlp."
    sizes = [
        packed_bytes(model.get_submodule(n.removesuffix(".weight")), dtype) for n in names if prefix in n
    ]
    return block, sizes


def run(block: Any, dtype: Any, device: str = DEVICE, rows: int = 1) -> Any:
    torch.manual_seed(1)
    x = torch.randn(1, rows, 256).to(dtype).to(device)
    with torch.no_grad():
        return block(x)


@pytest.fixture(autouse=True)
def _no_compiler() -> Any:
    """None of quanto's extensions, which need a CUDA compiler, may be asked for."""
    yield
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    for name in ("quanto_cpp", "quanto_cuda"):
        assert not is_extension_available(name) or get_extension(name)._lib is None


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_streamed_packed_weights_compute_what_resident_ones_do(name: str, dtype: str, rows: int) -> None:
    """Through pinned memory into two slots in turn, which are poisoned after each use."""
    torch_dtype = getattr(torch, dtype)
    blocks = [block_of(name, torch_dtype, DEVICE, seed=seed) for seed in (0, 1)]
    expected = [run(block, torch_dtype, rows=rows) for block in blocks]
    streamed = []
    for block in blocks:
        left = [template(module, leaf) for _, module, leaf in parameters(block)]
        pinned = [
            {part: tensor.cpu().pin_memory() for part, tensor in parts(module, leaf).items()}
            for _, module, leaf in parameters(block)
        ]
        slots = [[{part: t.to(DEVICE) for part, t in p.items()} for p in pinned] for _slot in range(2)]
        bound = [[a for t, p in zip(left, slot, strict=True) for a in t.bindings(p)] for slot in slots]
        streamed.append((pinned, slots, bound, [a for t in left for a in t.empty()]))
    for sweep in range(3):
        for turn, block in enumerate(blocks):
            pinned, slots, bound, empty = streamed[turn]
            slot = slots[sweep % 2]
            for source, target in zip(pinned, slot, strict=True):
                for part, tensor in source.items():
                    target[part].copy_(tensor, non_blocking=True)
            bind(bound[sweep % 2])
            assert torch.equal(run(block, torch_dtype, rows=rows), expected[turn])
            bind(empty)
            for target in slot:
                for tensor in target.values():
                    tensor.view(torch.uint8).fill_(0xFF) if tensor.ndim else tensor.fill_(float("nan"))


@pytest.mark.parametrize("held_on", [DEVICE, "cpu"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_block_moves_between_gpu_and_cpu_without_loss(name: str, dtype: str, held_on: str) -> None:
    """Where a GPU computes it the bytes may be in RAM: those of a block that streams."""
    torch_dtype = getattr(torch, dtype)
    block = block_of(name, torch_dtype, DEVICE)
    expected = run(block, torch_dtype)
    before = everything(block)
    move(block, held_on)
    arrange(block, "cpu")
    move(block, "cpu")
    on_cpu = run(block, torch_dtype, "cpu")
    assert torch.nn.functional.cosine_similarity(
        on_cpu.flatten().float(), expected.cpu().flatten().float(), dim=0
    ) > (0.99)
    arrange(block, DEVICE)
    move(block, DEVICE)
    after = everything(block)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(run(block, torch_dtype), expected)


def everything(block: Any) -> dict[str, Any]:
    return {
        f"{name}/{part}": tensor.cpu().clone().contiguous().view(-1).view(torch.uint8)
        for name, module, leaf in parameters(block)
        for part, tensor in parts(module, leaf).items()
    }


def move(block: Any, device: str) -> None:
    for _, module, leaf in list(parameters(block)):
        moved = {part: tensor.to(device) for part, tensor in parts(module, leaf).items()}
        bind(template(module, leaf).bindings(moved))


class Elsewhere(TorchDispatchMode):
    """Remembers what made tensors that are not on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in tree_leaves(made)):
            self.operators.append(str(operator))
        return made


def test_int8_packs_weights_where_they_are() -> None:
    block, _ = prepared_block("int8", torch.bfloat16)
    weight = torch.randn(256, 512, device=DEVICE) / 16
    expected = Int8Params(weight.cpu().bfloat16(), requires_grad=False, has_fp16_weights=False).to(DEVICE)
    with Elsewhere() as elsewhere:
        pack_block(block, {"down_proj.weight": weight}, DEVICE)
    assert elsewhere.operators == []
    found = parts(block.down_proj, "weight")
    assert torch.equal(found[""], expected.data)
    assert torch.equal(found["SCB"], expected.SCB)


@pytest.mark.parametrize("name", METHODS)
def test_a_block_for_the_cpu_can_be_packed_by_the_gpu(name: str) -> None:
    block = block_of(name, torch.bfloat16, DEVICE, compute="cpu")
    move(block, "cpu")
    found = run(block, torch.bfloat16, "cpu").flatten().float()
    reference = run(block_of(name, torch.bfloat16, "cpu"), torch.bfloat16, "cpu").flatten().float()
    assert torch.nn.functional.cosine_similarity(found, reference, dim=0) > 0.99
