"""Layouts and machines made by hand, for the tests of plans and views."""

from __future__ import annotations

from dataclasses import replace

from llm_magic.machine import Device, Link, Machine
from llm_magic.model import Block, CacheCost, ModelLayout, TensorInfo
from llm_magic.units import GIB, MIB


def tensor(name: str, elements: int, dtype: str = "bfloat16") -> TensorInfo:
    return TensorInfo(name, (elements,), dtype, elements * (4 if dtype == "float32" else 2))


def llama(
    name: str = "toy",
    *,
    layers: int = 4,
    layer_elements: int = 50 * MIB,
    embed_elements: int = 20 * MIB,
    tied: bool = False,
    kv_per_token: int = 1024,
    hidden: int = 64,
    intermediate: int = 256,
    vocab: int = 1000,
    context: int = 4096,
    dtype: str = "bfloat16",
    experts: int = 0,
    active: int = 0,
    layer_tensors: int = 9,
) -> ModelLayout:
    """A decoder-only model: embedding, equal layers, norm, head (which may share the embedding)."""
    embed, head = "model.embed_tokens", "lm_head"
    each = layer_elements // layer_tensors
    sizes = [each] * (layer_tensors - 1) + [layer_elements - each * (layer_tensors - 1)]
    width = 4 if dtype == "float32" else 2
    blocks = [
        Block(
            embed,
            "embed",
            "embedding",
            (tensor(f"{embed}.weight", embed_elements, dtype),),
            tied_to=(head,) if tied else (),
            looks_up=not tied,
        )
    ]
    for i in range(layers):
        tensors = tuple(tensor(f"model.layers.{i}.part.{k}", n, dtype) for k, n in enumerate(sizes))
        blocks.append(
            Block(
                f"model.layers.{i}",
                f"layers.{i}",
                "decoder",
                tensors,
                cache=CacheCost(kv_per_token),
                experts=experts,
                expert_bytes=layer_elements * width * 9 // 10 if experts else 0,
                active_experts=active,
            )
        )
    blocks.append(Block("model.norm", "norm", "norm", (tensor("model.norm.weight", hidden, dtype),)))
    own = () if tied else (tensor("lm_head.weight", embed_elements, dtype),)
    blocks.append(Block(head, "head", "head", own, tied_to=(embed,) if tied else ()))
    return ModelLayout(name, "LlamaForCausalLM", tuple(blocks), dtype, context, hidden, intermediate, vocab)


def starter() -> ModelLayout:
    """The shape of SmolLM2-135M: 30 layers of 3,540,096 parameters, a tied embedding of 28,311,552."""
    return llama(
        "SmolLM2-135M-Instruct",
        layers=30,
        layer_elements=3_540_096,
        embed_elements=49152 * 576,
        tied=True,
        kv_per_token=2 * 3 * 64 * 2,
        hidden=576,
        intermediate=1536,
        vocab=49152,
        context=8192,
    )


def qwen32b() -> ModelLayout:
    """The shape of a 32B model: 64 layers of 487 M parameters."""
    return llama(
        "Qwen3-32B",
        layers=64,
        layer_elements=487_600_000,
        embed_elements=151936 * 5120,
        kv_per_token=2 * 8 * 128 * 2,
        hidden=5120,
        intermediate=25600,
        vocab=151936,
        context=40960,
    )


def llama8b() -> ModelLayout:
    """The shape of an 8B model, 32 layers of 218 M parameters, whose speeds were measured on an H100."""
    return llama(
        "Llama-3.1-8B",
        layers=32,
        layer_elements=218_112_000,
        embed_elements=128256 * 4096,
        kv_per_token=2 * 8 * 128 * 2,
        hidden=4096,
        intermediate=14336,
        vocab=128256,
        context=131072,
    )


def packed(layout: ModelLayout, method: str = "nf4", bits: float = 4.5, columns: int = 4096) -> ModelLayout:
    """The same model with its layers' matrices packed: logical shapes, ``bits`` a weight with a scale of 32 for each 64."""

    def pack(info: TensorInfo) -> TensorInfo:
        shape = (info.shape[0] // columns, columns)
        return replace(info, shape=shape, dtype="uint8", bytes=round(info.shape[0] * bits / 8))

    def packed_block(block: Block) -> Block:
        tensors, experts = tuple(map(pack, block.tensors)), round(block.expert_bytes * bits / 16)
        return replace(block, tensors=tensors, expert_bytes=experts)

    blocks = tuple(packed_block(b) if b.kind == "decoder" else b for b in layout.blocks)
    return replace(layout, blocks=blocks, quantization=method)


def llama405b() -> ModelLayout:
    """The shape of a 405B model: 126 layers of 3.2 B parameters."""
    return llama(
        "Llama-3.1-405B-Instruct",
        layers=126,
        layer_elements=3_187_703_808,
        embed_elements=128256 * 16384,
        kv_per_token=2 * 8 * 128 * 2,
        hidden=16384,
        intermediate=53248,
        vocab=128256,
        context=131072,
    )


def moe30b() -> ModelLayout:
    """The shape of a 30B mixture of 128 experts, 8 of them active."""
    return llama(
        "Qwen3-30B-A3B",
        layers=48,
        layer_elements=623_000_000,
        embed_elements=151936 * 2048,
        kv_per_token=2 * 4 * 128 * 2,
        hidden=2048,
        intermediate=768,
        vocab=151936,
        context=40960,
        experts=128,
        active=8,
        layer_tensors=10,
    )


def gpu(
    index: int, total: int, free: int | None = None, *, name: str = "RTX 4090", read: float = 1.0e12
) -> Device:
    return Device(
        f"cuda:{index}",
        "gpu",
        name,
        total,
        total if free is None else free,
        read_bytes_per_s=read,
        flops=1.6e14,
    )


def ram(total: int, free: int | None = None, *, read: float = 2.0e10, unified: bool = False) -> Device:
    free = total if free is None else free
    return Device("cpu", "cpu", "DDR5", total, free, read_bytes_per_s=read, flops=2.0e11, unified=unified)


def disk(total: int, free: int | None = None, *, read: float = 8.0e8) -> Device:
    return Device("disk", "disk", "NVMe SSD", total, total if free is None else free, read_bytes_per_s=read)


def machine(*devices: Device, bus: float = 2.51e10, described: bool = True) -> Machine:
    links = [Link("disk", "cpu", d.read_bytes_per_s, d.name) for d in devices if d.kind == "disk"]
    for d in devices:
        if d.kind == "gpu" and not d.unified:
            links += [Link("cpu", d.id, bus, "PCIe 4"), Link(d.id, "cpu", bus, "PCIe 4")]
    return Machine("test machine", devices, tuple(links), described)


def h100() -> Machine:
    """The machine of the measured figures: 16 cores, PCIe 5, a slow disk."""
    device = replace(gpu(0, 80 * GIB, name="H100", read=3.107e12), flops=6.0e14)
    memory = replace(ram(256 * GIB, read=6.0e10), flops=3.0e12)
    return machine(device, memory, disk(2000 * GIB, read=8.3e8), bus=5.47e10)


def cramped(usable: int) -> Machine:
    """No GPU, and RAM of which ``usable`` bytes are free after the reserve: no page cache beside a plan."""
    total = 8 * GIB
    return machine(ram(total, usable + 512 * MIB + total * 3 // 100), disk(500 * GIB, 120 * GIB))


def laptop() -> Machine:
    return machine(ram(8 * GIB, 6 * GIB), disk(500 * GIB, 120 * GIB))


def workstation() -> Machine:
    return machine(
        gpu(0, 24 * GIB, 23 * GIB), ram(64 * GIB, 40 * GIB), disk(1000 * GIB, 412 * GIB, read=6.8e9)
    )


def four_gpus() -> Machine:
    gpus = [gpu(i, 24 * GIB) for i in range(4)]
    return machine(*gpus, ram(256 * GIB, 240 * GIB), disk(4000 * GIB, read=6.8e9))


def eight_gpus() -> Machine:
    gpus = [gpu(i, 80 * GIB, name="H100", read=3.1e12) for i in range(8)]
    return machine(*gpus, ram(1024 * GIB, 960 * GIB), disk(8000 * GIB, read=6.8e9), bus=5.0e10)


def mac() -> Machine:
    mps = Device("mps", "gpu", "M4 Max", 36 * GIB, 30 * GIB, 4.0e11, 1.4e13, unified=True)
    return machine(
        mps, ram(48 * GIB, 34 * GIB, read=2.0e11, unified=True), disk(1000 * GIB, 300 * GIB, read=5e9)
    )
