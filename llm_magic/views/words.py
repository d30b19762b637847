"""A placement in a few words, the same in every view: shares of the tiers, names of devices."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping

from llm_magic.plan import Placement, Plan
from llm_magic.units import format_bytes, format_rate

COLUMNS = 80  # of a terminal; text is broken to fit
TIERS = {"gpu": "GPU", "cpu": "RAM", "disk": "disk"}
_KINDS = {
    "gpu": "GPU",
    "looked-up": "looked up",
    "ram-streamed": "RAM streamed",
    "ram": "RAM on the CPU",
    "kept": "disk kept in RAM",
    "disk": "disk",
}
_KIND_OF_WAY = {
    "resident": "gpu",
    "looked-up": "looked-up",
    "streamed": "ram-streamed",
    "split": "ram",
    "cpu": "ram",
    "kept": "kept",
    "read": "disk",
    "idle": "idle",
}


def tier_bytes(plan: Plan) -> dict[str, int]:
    """Kind of device (``"gpu"``, ``"cpu"``, ``"disk"``) -> bytes of weights that live there and are used.

    A table of which rows are looked up counts where it computes: nothing of a token's work is elsewhere.
    """
    found = Counter[str]()
    for place in plan.placements:
        if place.block.is_idle:
            continue
        device = place.compute if place.is_looked_up else place.home
        found[plan.machine.device(device).kind] += place.home_bytes
        found["gpu"] += place.rest_bytes
    return {kind: found[kind] for kind in TIERS if found[kind]}


def way_bytes(plan: Plan) -> dict[str, int]:
    """What happens to blocks that are used (``kind_of``) -> bytes of weights, fastest first."""
    found = Counter[str]()
    for place in plan.placements:
        found[kind_of(place)] += place.home_bytes
        found["gpu"] += place.rest_bytes
    return {kind: found[kind] for kind in _KINDS if found[kind]}


def kind_of(place: Placement) -> str:
    """One word for where a block lives and how it is used, the name of its colour.

    ``"gpu"``, ``"looked-up"`` (a table in RAM or on disk), ``"ram-streamed"``, ``"ram"`` (the CPU computes
    it, or its experts), ``"kept"`` (on disk, with a copy in RAM), ``"disk"`` or ``"idle"`` (not used, wherever it is).
    """
    return _KIND_OF_WAY[place.way]


def computes_on_gpu(plan: Plan) -> bool:
    """Whether a GPU works beside the CPU, or alone."""
    return any(place.compute != "cpu" for place in plan.placements)


def placement_words(plan: Plan) -> str:
    """Where the weights live: ``"60 % GPU · 25 % RAM streamed · 15 % RAM on the CPU"``, ``"60 % RAM · 40 % disk"``."""
    names = _KINDS | ({} if computes_on_gpu(plan) else {"ram": "RAM"})
    return " · ".join(f"{share} % {names[kind]}" for kind, share in percents(way_bytes(plan)).items())


def processor_words(plan: Plan) -> str:
    """The same as a PROCESSOR column shows it: ``"48%/52% CPU/GPU"``."""
    names = {"disk": "disk", "cpu": "CPU", "gpu": "GPU"}
    shares = percents(tier_bytes(plan))
    kinds = [kind for kind in names if kind in shares]
    return f"{'/'.join(f'{shares[k]}%' for k in kinds)} {'/'.join(names[k] for k in kinds)}"


def moved_bytes(plan: Plan) -> int:
    """Bytes that travel to where they are used, for one sweep that decodes."""
    moves = plan.forecast.bytes_per_token.items()
    return sum(size for (source, target), size in moves if source != target)


def share_words(share: float) -> str:
    """``0.94`` as ``"94 %"``."""
    return f"{100 * share:.0f} %"


def percents(sizes: Mapping[str, int]) -> dict[str, int]:
    """Whole percents that add up to 100, by largest remainder; what is there shows at least 1 %."""
    total = sum(sizes.values())
    if not total:
        return {}
    exact = {name: 100 * size / total for name, size in sizes.items()}
    shares = {name: max(1, int(share)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: int(exact[n]) - exact[n]):
        shares[name] += sum(shares.values()) < 100
    largest = max(shares, key=lambda n: exact[n])
    shares[largest] += 100 - sum(shares.values())
    return shares


def headline(plan: Plan) -> tuple[str, str]:
    """The model's name, and what it is."""
    layout = plan.layout
    count = len(layout.layers)
    experts = max((block.experts for block in layout.blocks), default=0)
    active = max((block.active_experts for block in layout.blocks), default=0)
    facts = [
        f"{layout.packing} in {layout.dtype}" if layout.packing else layout.dtype,
        format_bytes(layout.bytes),
        f"{count} layer{'s' * (count != 1)}",
        *([f"{experts} experts, {active} active"] if experts else []),
        f"context {plan.workload.context_length:,}",
    ]
    return layout.name, " · ".join(facts)


def verdict(plan: Plan) -> str:
    """``"✓ fits, 1.1 GiB to spare on cuda:0"`` or ``"✗ does not fit"``."""
    if not plan.fits:
        return "✗ does not fit"
    computing = {place.compute for place in plan.placements}
    tight = min((use for use in plan.uses if use.device in computing), key=lambda use: use.spare)
    return f"✓ fits, {format_bytes(tight.spare)} to spare {on_device(tight.device)}"


def on_device(device: str) -> str:
    """``"in RAM"``, ``"on disk"``, ``"on cuda:0"``."""
    return {"cpu": "in RAM", "disk": "on disk"}.get(device, f"on {device}")


def device_title(device: str) -> str:
    """``"RAM"``, ``"Disk"``, ``"cuda:0"``."""
    return {"cpu": "RAM", "disk": "Disk"}.get(device, device)


def processor(device: str) -> str:
    """Who computes: ``"the CPU"``, ``"cuda:0"``."""
    return "the CPU" if device == "cpu" else device


def speed_words(plan: Plan) -> str:
    """``"decode 9.8 tok/s · prefill 210 tok/s"``; ``"unknown"`` where a bandwidth is not known."""
    rates = (("decode", plan.forecast.decode_tps), ("prefill", plan.forecast.prefill_tps))
    return " · ".join(f"{name} {format_rate(rate) if rate else 'unknown'}" for name, rate in rates)


def ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0–2, 5"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("–".join(map(str, run)) for run in runs)


def grouped(labels: Iterable[str]) -> list[str]:
    """Labels of blocks, numbered ones as ranges: ``["embed", "layers.0–9"]``."""
    families: dict[str, list[int]] = {}
    for label in labels:
        family, _, index = label.rpartition(".")
        numbers = families.setdefault(family if index.isdecimal() else label, [])
        numbers += [int(index)] if index.isdecimal() else []
    return [f"{family}.{ranges(numbers)}" if numbers else family for family, numbers in families.items()]


def wrapped(text: str, indent: str = "  ") -> str:
    """A line of prose broken for a terminal of 80 columns, later lines indented."""
    return textwrap.fill(
        text, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
