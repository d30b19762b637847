"""What a machine without a GPU can measure: the starter model, and random ones where that is too small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.models import placement, words
from benchmarks.protocol import TIMEOUT_S, Contender, Group, once, run_group
from benchmarks.report import (
    BANDWIDTH,
    COPIED,
    DECODE,
    FIRST,
    PER_SWEEP,
    PREFILL,
    SECONDS,
    TOTAL,
    Figure,
    Report,
)
from llm_magic.units import format_bytes

STORY = (
    "The lighthouse stood at the end of a narrow spit of land, and the keeper had lived in it for thirty "
    "years. Every evening he climbed the stairs, lit the lamp and wrote a line into the log: the wind, the "
    "clouds, the ships that passed. One morning in October he found a bottle between the rocks. It was green, "
    "and there was a letter in it. He carried it up to his room, put it on the table, and"
)
RECIPE = (
    "Boil two litres of water with a spoon of salt. Add four hundred grams of pasta and stir. Cook it for nine "
    "minutes. Meanwhile heat three spoons of oil in a pan, add two cloves of garlic and a small red pepper, and "
    "fry them for one minute. Drain the pasta, keep a cup of the water, and mix everything in the pan."
)
REPEAT = f"{RECIPE}\n\n" * 3 + "Boil two litres of water"
"""A text that repeats itself: the model goes on with it once more."""

EMBEDDING = "model.embed_tokens"
MAKING_S = 900.0
"""For a model: 16 GB take their time on a slow disk."""
PLACEMENTS = {"all in RAM": 0.0, "half of the layers on disk": 0.5, "all layers on disk": 1.0}


@dataclass(frozen=True)
class Setup:
    """What groups are run with.

    ``folder`` is for models that are made, and found again; ``tokens`` the length of answers; ``timeout_s`` is
    for each of them.
    """

    report: Report
    folder: Path
    repeats: int
    tokens: int
    large: bool = False
    timeout_s: float = TIMEOUT_S

    def run(self, name: str, contenders: list[Contender], repeats: int | None = None) -> Group:
        """Measure a group."""
        return run_group(
            name, contenders, repeats or self.repeats, timeout_s=self.timeout_s, keep=self.report.keep
        )

    def made(self, what: str, **changes: object) -> str:
        """The path of a model, which is made when it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made = once("models", {}, timeout_s=MAKING_S, what=what, folder=str(self.folder), **changes)
        return str(made["path"])

    @property
    def starter(self) -> str:
        """Its folder."""
        return self.made("starter")


def placements(setup: Setup) -> None:
    """The starter in RAM, half on disk and all on disk, beside stock Accelerate and llama.cpp."""
    folder, case = setup.starter, {"prompt": STORY, "tokens": setup.tokens}
    contenders = []
    for where, share in PLACEMENTS.items():
        device_map = placement(folder, "cpu", "disk", share)
        contenders += [
            Contender(f"llm_magic, {where}", "engine", {"source": folder, "device_map": device_map}, case),
            Contender(f"stock Accelerate, {where}", "accelerate", _stock(folder, device_map), case),
        ]
    contenders += _llama_cpp(setup, case)
    group = setup.run("placements", contenders)
    mine, stock = ([f"{who}, {where}" for where in PLACEMENTS] for who in ("llm_magic", "stock Accelerate"))
    setup.report.add(
        group,
        "SmolLM2-135M-Instruct, bf16 (llama.cpp: as named), files warm, no speculation",
        [DECODE, PREFILL, FIRST],
        reference=mine[0],
        same_answers=[mine, [mine[0], stock[0]]],
    )
    _note_placements(setup, group, mine, stock)


def _note_placements(setup: Setup, group: Group, mine: list[str], stock: list[str]) -> None:
    note, half, everything = setup.report.note, 1, 2
    note(
        Figure("CPU, half of the layers on disk, warm: of all in RAM", group.ratio(mine[half], mine[0]), 0.85)
    )
    note(Figure("  stock Accelerate: of its own all in RAM", group.ratio(stock[half], stock[0])))
    note(Figure("CPU, all layers on disk, warm: of all in RAM", group.ratio(mine[everything], mine[0])))
    for index, where in enumerate(PLACEMENTS):
        note(Figure(f"CPU, {where}: times stock Accelerate", group.ratio(mine[index], stock[index])))
    note(
        Figure(
            "CPU, all in RAM: of llama.cpp in bf16", group.ratio(mine[0], "llama.cpp, bf16 GGUF, all in RAM")
        )
    )


def _llama_cpp(setup: Setup, case: Mapping[str, object]) -> list[Contender]:
    if find_spec("llama_cpp") is None:
        setup.report.skip("llama.cpp (llama-cpp-python is not installed)")
        return []
    from llm_magic.backends.accelerate.source.sources import find_starter

    files = {
        "llama.cpp, bf16 GGUF, all in RAM": setup.made("starter.bf16.gguf"),
        "llama.cpp, Q4_1 GGUF, all in RAM": str(find_starter()),
    }
    return [Contender(name, "llama.cpp", {"path": path}, case) for name, path in files.items()]


LOOKUP = {
    "all in RAM": {"share": 0.0},
    "all layers on disk, page cache": {"share": 1.0},
    "all layers on disk, least RAM": {"share": 1.0, "least_ram": True},
}


def lookup(setup: Setup) -> None:
    """Prompt lookup on a text that repeats itself, with and without.

    The engine proposes unasked where blocks travel; elsewhere it is asked to.
    """
    folder, case = setup.starter, {"prompt": REPEAT, "tokens": setup.tokens}
    contenders = []
    for where, how in LOOKUP.items():
        least_ram = bool(how.get("least_ram"))
        device_map = placement(folder, "cpu", "disk", how["share"])
        options = {"source": folder, "device_map": device_map, "least_ram": least_ram}
        contenders += [
            Contender(f"{where}, no speculation", "engine", options, case),
            Contender(
                f"{where}, prompt lookup", "engine", options, {**case, "lookup": None if least_ram else 16}
            ),
        ]
    group = setup.run("lookup", contenders)
    setup.report.add(
        group,
        "Prompt lookup on a text that repeats its prompt (SmolLM2-135M-Instruct, files warm)",
        [DECODE, PER_SWEEP, PREFILL],
        same_answers=[[each.name for each in contenders]],
    )
    for where in LOOKUP:
        ratio = group.ratio(f"{where}, prompt lookup", f"{where}, no speculation")
        setup.report.note(Figure(f"CPU, {where}: prompt lookup, of the rate without", ratio, 2.0))


def packed(setup: Setup) -> None:
    """nf4 and int8 in RAM and on disk."""
    if find_spec("bitsandbytes") is None:
        setup.report.skip("packed weights (bitsandbytes is not installed)")
        return
    folder = setup.starter
    case = {"prompt": STORY, "tokens": max(8, setup.tokens // 2)}
    in_ram, on_disk = (placement(folder, "cpu", "disk", share) for share in (0.0, 1.0))
    contenders = [Contender("bf16, all in RAM", "engine", {"source": folder, "device_map": in_ram}, case)]
    for method in ("nf4", "int8"):
        for where, device_map in (("all in RAM", in_ram), ("all layers on disk", on_disk)):
            options = {"source": folder, "device_map": device_map, "quantize": method}
            contenders.append(Contender(f"{method}, {where}", "engine", options, case))
        stock = {"folder": folder, "device_map": {"": "cpu"}, "quantize": method}
        contenders.append(Contender(f"stock {method}, all in RAM", "accelerate", stock, case))
    group = setup.run("packed", contenders)
    same = [[f"{method}, all in RAM", f"{method}, all layers on disk"] for method in ("nf4", "int8")]
    setup.report.add(
        group,
        "Packed by bitsandbytes (SmolLM2-135M-Instruct, files warm, no speculation)",
        [DECODE, PREFILL],
        reference="bf16, all in RAM",
        same_answers=same,
    )
    for (in_memory, read), method in zip(same, ("nf4", "int8"), strict=True):
        setup.report.note(
            Figure(f"CPU, {method} on disk, warm: of {method} in RAM", group.ratio(read, in_memory))
        )


def billion(setup: Setup) -> None:
    """A Llama of a billion weights in RAM, in bf16 and in 4 bits, beside stock Accelerate and llama.cpp."""
    folder = setup.made("llama-1b")
    case = {"prompt": words(256, 32000), "tokens": setup.tokens}
    in_ram = placement(folder, "cpu")
    contenders = [
        Contender("bf16", "engine", _ours(folder, in_ram, 512), case),
        Contender("stock Accelerate, bf16", "accelerate", _stock(folder, in_ram), case),
    ]
    for library, method in (("bitsandbytes", "nf4"), ("optimum.quanto", "int4")):
        if find_spec(library.partition(".")[0]) is None:
            setup.report.skip(f"{method} ({library} is not installed)")
            continue
        ours = _ours(folder, in_ram, 512) | {"quantize": method}
        contenders.append(Contender(method, "engine", ours, case))
        contenders.append(Contender(f"{method}, head int8", "engine", ours | {"quantize_head": "int8"}, case))
        stock = {"folder": folder, "device_map": {"": "cpu"}, "quantize": method}
        if method == "nf4":
            contenders.append(Contender(f"stock Accelerate, {method}", "accelerate", stock, case))
    if find_spec("llama_cpp") is None:
        setup.report.skip("llama.cpp (llama-cpp-python is not installed)")
    else:
        for name, file in (("bf16", "llama-1b.gguf"), ("Q4_0", "llama-1b.q4_0.gguf")):
            contenders.append(Contender(f"llama.cpp, {name}", "llama.cpp", {"path": setup.made(file)}, case))
    group = setup.run("billion", contenders)
    title = "Random Llama of 0.8 billion weights, all in RAM, 256 tokens of prompt (llama.cpp: head in 6 bits with Q4_0)"
    setup.report.add(group, title, [DECODE, PREFILL], reference="bf16")
    for mine, theirs in (
        ("bf16", "stock Accelerate, bf16"),
        ("nf4", "stock Accelerate, nf4"),
        ("bf16", "llama.cpp, bf16"),
        ("int4", "llama.cpp, Q4_0"),
        ("nf4", "llama.cpp, Q4_0"),
        ("nf4, head int8", "llama.cpp, Q4_0"),
        ("int4, head int8", "llama.cpp, Q4_0"),
    ):
        for what, title in (("decode_tps", "decode"), ("prefill_tps", "prefill")):
            ratio = group.ratio(mine, theirs, what)
            setup.report.note(Figure(f"CPU, {mine} in RAM, {title}: times {theirs}", ratio))


def beside(setup: Setup) -> None:
    """A Llama of a billion weights beside a program that keeps a core busy, and alone."""
    folder = setup.made("llama-1b")
    case = {"prompt": words(64, 32000), "tokens": setup.tokens}
    in_ram = placement(folder, "cpu")
    ours = _ours(folder, in_ram, 512)
    who = [
        Contender("bf16", "engine", ours, case),
        Contender("stock Accelerate, bf16", "accelerate", _stock(folder, in_ram), case),
    ]
    if find_spec("bitsandbytes") is not None:
        who.append(Contender("nf4", "engine", ours | {"quantize": "nf4"}, case))
    if find_spec("llama_cpp") is None:
        setup.report.skip("llama.cpp (llama-cpp-python is not installed)")
    else:
        setup.made("llama-1b.gguf")  # which it packs
        packed = {"path": setup.made("llama-1b.q4_0.gguf")}
        who.append(Contender("llama.cpp, Q4_0", "llama.cpp", packed, case))
    contenders = [
        replace(each, name=f"{each.name}{words_of}", case={**case, "beside": busy})
        for each in who
        for busy, words_of in ((0, ""), (1, ", beside a busy process"))
    ]
    group = setup.run("beside", contenders)
    title = "Random Llama of 0.8 billion weights, all in RAM, alone and beside a process that takes a core"
    setup.report.add(group, title, [DECODE, PREFILL], reference="bf16")
    for each in who:
        kept = group.ratio(f"{each.name}, beside a busy process", each.name)
        setup.report.note(Figure(f"CPU, {each.name}: beside a busy process, of alone", kept))


def screens(setup: Setup) -> None:
    """What showing an answer takes."""
    options = {"source": "starter"}
    asked = {"prompt": STORY, "tokens": setup.tokens}
    contenders = [
        Contender(name, "session", options, {"case": case, **asked})
        for name, case in (
            ("engine alone", "bare"),
            ("session, text and footer", "text"),
            ("session, notebook and footer", "notebook"),
            ("session, live views and footer", "live"),
        )
    ]
    group = setup.run("screens", contenders, repeats=3 * setup.repeats)
    setup.report.add(
        group, "What the screen costs (SmolLM2-135M-Instruct, all in RAM)", [TOTAL], reference="engine alone"
    )
    for each in contenders[1:]:
        ratio = group.paired(each.name, "engine alone", "total_s")
        percent = None if ratio is None else 100 * (ratio - 1)
        setup.report.note(Figure(f"{each.name}: percent of an answer's time", percent, 2.0, at_most=True))


def moves(setup: Setup) -> None:
    """Half of the layers to the disk and back, the model loaded."""
    whole, half = (placement(setup.starter, "cpu", "disk", share) for share in (0.0, 0.5))
    options = {"source": "starter"}
    contenders = [
        Contender("half of the layers RAM → disk", "session", options, {"case": "move", "device_map": half}),
        Contender("and back", "session", options, {"case": "move", "device_map": whole}),
    ]
    group = setup.run("moves", contenders)
    setup.report.add(group, "Moving blocks of a loaded model (SmolLM2-135M-Instruct)", [SECONDS, COPIED])


def experts(setup: Setup) -> None:
    """A mixture of experts, all of its layers on disk and no RAM to keep them: what a token fetches."""
    folder = setup.made("mixture")
    case = {"prompt": words(32, 32000), "tokens": setup.tokens}
    options = {
        "source": folder,
        "device_map": placement(folder, "cpu", "disk", 1.0),
        "least_ram": True,
        "context": 256,
    }
    in_ram = {"source": folder, "device_map": placement(folder, "cpu"), "context": 256}
    contenders = [
        Contender("all in RAM", "engine", in_ram, case),
        Contender("all layers on disk, least RAM, cold", "engine", options, {**case, "cold": True}),
    ]
    group = setup.run("experts", contenders)
    fetched = replace(COPIED, title="read per token", what="read_bytes_per_sweep")
    setup.report.add(
        group,
        "Random Qwen3-MoE, 8 layers, 4 of 32 experts a token, 450 MB in bf16",
        [DECODE, fetched],
        same_answers=[[each.name for each in contenders]],
    )
    layers = group.median("all layers on disk, least RAM, cold", "read_bytes_per_sweep")
    whole = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) - 2 * 512 * 32000
    share = layers / whole if layers else None
    setup.report.note(
        Figure("CPU, experts on disk: bytes read per token, of the layers' bytes", share, 0.5, at_most=True)
    )


def packed_experts(setup: Setup) -> None:
    """A mixture whose experts are packed too; stock loading leaves them as they are."""
    folder = setup.made("wide-mixture")
    case = {"prompt": words(256, 32000), "tokens": setup.tokens}
    in_ram, on_disk = (placement(folder, "cpu", "disk", share) for share in (0.0, 1.0))
    plain = Contender("bf16, all in RAM", "engine", _ours(folder, in_ram, 512), case)
    contenders = [plain]
    for library, method in (("bitsandbytes", "nf4"), ("optimum.quanto", "int4")):
        if find_spec(library.partition(".")[0]) is None:
            setup.report.skip(f"{method} experts ({library} is not installed)")
            continue
        for where, device_map in (("all in RAM", in_ram), ("all layers on disk", on_disk)):
            options = _ours(folder, device_map, 512) | {"quantize": method}
            contenders.append(Contender(f"{method}, {where}", "engine", options, case))
    contenders.append(Contender("stock bf16, all in RAM", "accelerate", _stock(folder, in_ram), case))
    if find_spec("bitsandbytes") is not None:
        stock = {"folder": folder, "device_map": {"": "cpu"}, "quantize": "nf4"}
        contenders.append(Contender("stock nf4, all in RAM", "accelerate", stock, case))
    group = setup.run("packed experts", contenders)
    title = "Random Qwen3-MoE, 2 layers of 2,048, 8 of 64 experts a token, 1.4 GB in bf16, files warm"
    setup.report.add(group, title, [DECODE, PREFILL], reference=plain.name)
    for each in contenders[1:]:
        ratio = group.ratio(each.name, plain.name)
        setup.report.note(Figure(f"CPU, experts, {each.name}: of bf16 in RAM", ratio))


def tables(setup: Setup) -> None:
    """An untied embedding on disk, where its rows are looked up, beside all in RAM."""
    folder = setup.made("wide-vocabulary")
    in_ram = placement(folder, "cpu")
    on_disk = {**in_ram, EMBEDDING: "disk"}
    case = {"prompt": words(256, 128256), "tokens": setup.tokens}
    contenders = [
        Contender("llm_magic, all in RAM", "engine", _ours(folder, in_ram, 512), case),
        Contender("llm_magic, embedding on disk", "engine", _ours(folder, on_disk, 512), case),
        Contender("stock Accelerate, embedding on disk", "accelerate", _stock(folder, on_disk), case),
    ]
    group = setup.run("tables", contenders)
    mine = [each.name for each in contenders[:2]]
    title = "Random Llama, 8 layers, an untied embedding of 263 MB, bf16, prompt of 256"
    setup.report.add(group, title, [DECODE, PREFILL, FIRST], reference=mine[0], same_answers=[mine])
    setup.report.note(
        Figure("CPU, embedding on disk, warm: of all in RAM", group.ratio(mine[1], mine[0]), 0.97)
    )


def disk(setup: Setup) -> None:
    """A model of 1.6 GB on disk, cold, against what the disk gives; and warm."""
    if not setup.large:
        setup.report.skip("cold disk (writes 1.6 GB: --large)")
        return
    folder = setup.made("llama-1b")
    prompt = words(16, 32000)
    # Apart: a file that another contender has mapped cannot be dropped from the page cache.
    _cold_disk(setup, folder, {"prompt": prompt, "tokens": 5, "cold": True})
    _warm_disk(setup, folder, {"prompt": prompt, "tokens": 8})


def _cold_disk(setup: Setup, folder: str, case: Mapping[str, object]) -> None:
    device_map = placement(folder, "cpu", "disk", 1.0)
    ceiling, ours, stock = "the disk itself", "llm_magic, least RAM", "stock Accelerate"
    contenders = [
        Contender(ceiling, "disk", {"folder": folder}),
        Contender(ours, "engine", {**_ours(folder, device_map), "least_ram": True}, case),
        Contender(stock, "accelerate", _stock(folder, device_map), case),
    ]
    group = setup.run("cold disk", contenders)
    title = "Random Llama, 0.8 B parameters in bf16, all layers on disk, cold"
    setup.report.add(group, title, [DECODE, FIRST, BANDWIDTH])
    limit, rate = group.median(ceiling, "bytes_per_s"), group.median(ours)
    moved = group.series[ours].last("moved_bytes")
    share = rate * moved / limit if rate and limit and moved else None
    read, note = f"{format_bytes(moved)} a token" if moved else "", setup.report.note
    note(Figure("CPU, blocks on disk, cold: of the measured disk limit", share, 0.9, note=read))
    note(Figure("CPU, all layers on disk, cold: times stock Accelerate", group.ratio(ours, stock)))


def _warm_disk(setup: Setup, folder: str, case: Mapping[str, object]) -> None:
    device_map = placement(folder, "cpu", "disk", 1.0)
    mapped, stock, in_ram = "llm_magic, page cache", "stock Accelerate", "llm_magic, all in RAM"
    contenders = [
        Contender(mapped, "engine", _ours(folder, device_map), case),
        Contender(stock, "accelerate", _stock(folder, device_map), {**case, "tokens": 5}),
        Contender(in_ram, "engine", _ours(folder, placement(folder, "cpu")), case),
    ]
    group = setup.run("warm disk", contenders)
    title = "Random Llama, 0.8 B parameters in bf16, all layers on disk, warm"
    setup.report.add(group, title, [DECODE, FIRST])
    note = setup.report.note
    note(Figure("CPU, all layers on disk, warm, 1.6 GB: of all in RAM", group.ratio(mapped, in_ram)))
    note(Figure("CPU, all layers on disk, warm, 1.6 GB: times stock Accelerate", group.ratio(mapped, stock)))


def _ours(folder: str, device_map: Mapping[str, str], context: int = 256) -> dict[str, object]:
    return {"source": folder, "device_map": dict(device_map), "context": context}


def _stock(folder: str, device_map: Mapping[str, str]) -> dict[str, object]:
    return {"folder": folder, "device_map": dict(device_map)}


GROUPS: dict[str, Callable[[Setup], None]] = {
    "placements": placements,
    "lookup": lookup,
    "packed": packed,
    "billion": billion,
    "beside": beside,
    "screens": screens,
    "moves": moves,
    "experts": experts,
    "packed-experts": packed_experts,
    "tables": tables,
    "disk": disk,
}
