"""The placement map: every tier at one scale, every block in its tier, and all blocks in model order.

Colour, pattern and text say the same thing, so the map reads without any one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from llm_magic.plan import DeviceUse, Placement, Plan
from llm_magic.planning.costs import unified_pool
from llm_magic.text.safe_html import escape_text
from llm_magic.units import format_bandwidth, format_bytes, format_rate
from llm_magic.views import theme
from llm_magic.views.report import LiveMap, Report
from llm_magic.views.words import (
    computes_on_gpu,
    device_title,
    grouped,
    headline,
    kind_of,
    on_device,
    percents,
    placement_words,
    processor,
    processor_words,
    verdict,
    way_bytes,
    wrapped,
)

__all__ = ["map_report", "placement_bar", "placement_words", "processor_words"]

_PURPOSES = ("split", "kept", "draft", "slots", "kv_cache", "activations", "buffers")
_NAMES = {
    "split": "layers without their experts",
    "kept": "kept from the disk",
    "draft": "draft model",
    "slots": "slots",
    "kv_cache": "KV cache",
    "activations": "activations",
    "buffers": "buffers",
    "spare": "free",
    "beyond": "free, beyond the limit",
    "reserve": "kept in reserve",
    "other": "other programs",
}
_GLYPHS = {
    "weights": "█",
    "split": "▇",
    "kept": "■",
    "draft": "◆",
    "slots": "░",
    "kv_cache": "▓",
    "activations": "▒",
    "buffers": "▪",
    "spare": "·",
    "beyond": " ",
    "reserve": "-",
    "other": "/",
}
_WHOLE_UP_TO = 3.0  # a tier larger than this many times the largest plan is cut off
_TEXT_CELLS = 56
_STRIP_CELLS = 66
_BAR_PIXELS = 600  # of the widest bar in a 1000-pixel cell, to know which labels fit

Memory = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class _Tier:
    """One bar: its device, what is planned there, and how much of it is drawn."""

    use: DeviceUse
    kind: str
    name: str
    blocks: tuple[Placement, ...]
    is_whole: bool

    @property
    def parts(self) -> Iterator[tuple[str, int]]:
        """Purpose and bytes of all that is drawn after the blocks."""
        use = self.use
        yield from ((purpose, getattr(use, purpose)) for purpose in _PURPOSES)
        if not self.is_whole:
            return
        room = max(0, use.total - use.planned - use.reserve - use.other)
        spare = min(room, max(0, use.spare))
        yield from (("spare", spare), ("beyond", room - spare))
        yield from (("reserve", use.reserve), ("other", use.other))

    @property
    def shown_bytes(self) -> int:
        """What the bar's width stands for."""
        if not self.is_whole:
            return max(1, self.use.planned)
        use = self.use
        return max(1, use.total, use.planned + use.reserve + use.other)


def map_report(
    plan: Plan, memory: Memory | None = None, live: LiveMap | None = None, note: str = ""
) -> Report:
    """What ``%llm map`` shows.

    Parameters
    ----------
    memory
        Device -> purpose -> bytes as measured in a loaded model, shown beside what was planned.
    live
        What a front end may put over it.
    note
        A line above it.
    """
    tiers = _tiers(plan)
    text, html = _text(plan, tiers, memory or {}), _html(plan, tiers, memory or {})
    if note:
        text, html = f"{note}\n{text}", theme.frame(f"<b>{escape_text(note)}</b>") + html
    return Report(text, html, live)


def placement_bar(plan: Plan) -> tuple[str, str]:
    """One line for status cards and footers: a small bar and words, as text and as HTML."""
    shares, words = percents(way_bytes(plan)), placement_words(plan)
    glyphs = {"gpu": "█", "looked-up": "▄", "ram-streamed": "▓", "ram": "▒", "kept": "■", "disk": "░"}
    glyphs |= {} if computes_on_gpu(plan) else {"ram": "▓"}
    text = "".join(glyphs[kind] * count for kind, count in percents_of(shares, 20).items())
    parts = "".join(
        f'<span style="display:block;width:{share}%;{theme.fill(kind)}"></span>'
        for kind, share in shares.items()
    )
    html = (
        f'<span style="display:inline-flex;width:160px;height:10px;vertical-align:middle;overflow:hidden;'
        f'border-radius:3px;margin-right:8px">{parts}</span>'
        f'<span style="font-variant-numeric:tabular-nums">{escape_text(words)}</span>'
    )
    return f"[{text}] {words}", html


def percents_of(shares: Mapping[str, int], cells: int) -> dict[str, int]:
    """Shares in percent as whole cells of a bar that add up, at least one each."""
    counts = {kind: max(1, share * cells // 100) for kind, share in shares.items()}
    if counts:
        counts[max(shares, key=lambda kind: shares[kind])] += cells - sum(counts.values())
    return counts


# --- Geometry that text and HTML share


def _tiers(plan: Plan) -> tuple[_Tier, ...]:
    """Tiers to draw, fastest first: all GPUs, and RAM and disk where something is planned there."""
    tiers = []
    for use in plan.uses:
        device = plan.machine.device(use.device)
        if not use.planned and device.kind != "gpu":
            continue
        whole = is_drawn_whole(plan, use)
        blocks = tuple(place for place in plan.placements if place.home == use.device and place.block.bytes)
        unified = ", unified memory" if device.unified else ""
        free = "" if whole else f", {format_bytes(device.free_bytes)} free"
        name = f"{device.name}{unified} · {format_bytes(use.total)}{free}"
        tiers.append(_Tier(use, device.kind, name, blocks, whole))
    return tuple(tiers)


def is_drawn_whole(plan: Plan, use: DeviceUse) -> bool:
    """Whether a device's bar shows all of it: no disk, nothing much larger than what is planned anywhere."""
    largest = max(other.planned for other in plan.uses)
    device = plan.machine.device(use.device)
    shared = {device.id for device in unified_pool(plan.machine)}
    counted_above = device.kind == "cpu" and device.id in shared and len(shared & _names(plan)) > 1
    return use.total <= _WHOLE_UP_TO * largest and device.kind != "disk" and not counted_above


def _names(plan: Plan) -> set[str]:
    return {use.device for use in plan.uses if use.planned}


def _arrival(plan: Plan, tier: _Tier) -> str:
    """What leaves this tier for every token, and over what: ``"5.4 GiB to cuda:0 for every token · link 25 GB/s"``."""
    source = tier.use.device
    moves = {
        target: size
        for (start, target), size in plan.forecast.bytes_per_token.items()
        if start == source and target != source
    }
    if not moves:
        return ""
    links = [plan.machine.bytes_per_s(source, "cpu" if tier.kind == "disk" else target) for target in moves]
    speed = max(links) or (plan.machine.device("disk").read_bytes_per_s if tier.kind == "disk" else 0)
    where = f"{len(moves)} GPUs" if len(moves) > 1 else device_title(next(iter(moves)))
    name = "links" if len(moves) > 1 and tier.kind != "disk" else "link"
    over = f" · {name} {format_bandwidth(speed)}" if speed else ""
    return f"{format_bytes(sum(moves.values()))} to {where} for every token{over}"


def _counts(tier: _Tier, memory: Memory, *, mapped: bool) -> tuple[str, str]:
    """What is planned, and what is left or lacks; with what a loaded model uses now."""
    use = tier.use
    if use.spare < 0:
        left = f"lacks {format_bytes(-use.spare)}"
    elif tier.kind == "disk":
        left = _reads(tier, mapped=mapped)
    else:
        left = f"{format_bytes(use.spare)} spare"
    now = sum(memory.get(use.device, {}).values())
    return format_bytes(use.planned), f"{left} · now {format_bytes(now)}" if now else left


def _reads(disk: _Tier, *, mapped: bool) -> str:
    """How blocks on a disk are used."""
    ways = {place.way for place in disk.blocks} - {"idle"}
    if not ways:
        return "not read"
    if ways == {"looked-up"}:
        return "looked up in its files"
    return "used in the page cache" if mapped else "read from its files"


def _strip_rows(plan: Plan) -> list[tuple[Placement, ...]]:
    """All blocks in model order, in rows of equal length."""
    places = plan.placements
    rows = -(-len(places) // _STRIP_CELLS)
    each = -(-len(places) // rows)
    return [places[i : i + each] for i in range(0, len(places), each)]


def _sign(plan: Plan, place: Placement) -> str:
    """One sign for what happens to a block.

    The GPU's number, ``L`` (looked up), ``S`` (split), ``R``, ``C`` (by the CPU), ``D``, ``K`` (kept), or ``–``
    for nothing.
    """
    if place.way == "idle":
        return "–"
    if place.way == "looked-up":
        return "L"
    if place.is_split:
        return "S"
    if place.home == "disk":
        return "K" if place.kept else "D"
    if place.home == "cpu":
        return "C" if place.way == "cpu" and computes_on_gpu(plan) else "R"
    index = [gpu.id for gpu in plan.machine.gpus].index(place.home)
    return str(index) if index < 10 else chr(ord("a") + index - 10)


def _signs(plan: Plan) -> dict[str, str]:
    """Sign -> what it stands for, fastest first."""
    streams = any(place.way == "streamed" for place in plan.placements)
    names = {"C": "RAM, by the CPU", "K": "Disk, kept in RAM", "R": "RAM, streamed" if streams else "RAM"}
    names |= {"S": "experts by the CPU, the rest by a GPU"}
    names |= {"L": _looked_up_words(plan), "–": _idle_words(plan)}
    order, fast = [use.device for use in plan.uses], {"looked-up": 0, "split": 1, "streamed": 2}
    places = sorted(plan.placements, key=lambda p: (order.index(p.home), fast.get(p.way, len(fast))))
    places.sort(key=lambda place: place.way == "idle")
    return {(sign := _sign(plan, p)): names.get(sign) or device_title(p.home) for p in places}


def _looked_up_words(plan: Plan) -> str:
    """Where tables are of which rows are looked up: ``"RAM, looked up"``."""
    homes = {place.home for place in plan.placements if place.way == "looked-up"}
    return f"{'RAM and disk' if len(homes) > 1 else device_title(''.join(homes))}, looked up"


def _idle_words(plan: Plan) -> str:
    """What is not used, and where that is: ``"not used for text, in RAM"``."""
    homes = dict.fromkeys(on_device(place.home) for place in plan.placements if place.way == "idle")
    return f"not used for text, {' and '.join(homes)}"


# --- Text


def _text(plan: Plan, tiers: Sequence[_Tier], memory: Memory) -> str:
    name, facts = headline(plan)
    return "\n".join(
        [
            wrapped(f"{name}  {facts}"),
            wrapped(" · ".join([verdict(plan), *_speeds(plan)])),
            *(wrapped(f"✗ {problem}") for problem in plan.problems),
            *(wrapped(f"→ {remedy}") for remedy in plan.remedies[:1]),
            "",
            *_text_tiers(plan, tiers, memory),
            "",
            *_text_strip(plan),
            "",
            _text_legend(tiers),
        ]
    )


def _speeds(plan: Plan) -> list[str]:
    if not plan.forecast.decode_tps:
        return ["forecast unknown"]
    return [f"forecast {format_rate(plan.forecast.decode_tps)}", f"bound by {plan.forecast.bound_by}"]


def _text_tiers(plan: Plan, tiers: Sequence[_Tier], memory: Memory) -> Iterator[str]:
    scale = max(tier.shown_bytes for tier in tiers)
    width = max(len(device_title(tier.use.device)) for tier in tiers)
    for tier in tiers:
        arrival = _arrival(plan, tier)
        if arrival:
            yield f"{'↑':>{width}}  {arrival}"
        bar = _text_bar(tier, scale)
        planned, left = _counts(tier, memory, mapped=plan.mapped)
        yield f"{device_title(tier.use.device):<{width}}  {bar}  {planned}"
        yield f"{'':<{width}}  {left} · {tier.name}"


def _text_bar(tier: _Tier, scale: int) -> str:
    """Cells in proportion, cut at running totals so that rounding never adds up."""
    text, passed = "", 0
    for purpose, size in [("weights", tier.use.weights), *tier.parts]:
        start, passed = _cell(passed, scale), passed + size
        text += _GLYPHS[purpose] * max(_cell(passed, scale) - start, 0)
    edge = "]" if tier.is_whole else " …"
    return f"[{text}{edge}".ljust(_TEXT_CELLS + 3)


def _cell(size: int, scale: int) -> int:
    return round(size * _TEXT_CELLS / scale)


def _text_strip(plan: Plan) -> Iterator[str]:
    """One sign a block in model order, then each sign with the numbers of its layers."""
    signs = _signs(plan)
    key = "; ".join(f"{sign} {words}" for sign, words in signs.items())
    yield wrapped(f"blocks in model order: {key}")
    for row in _strip_rows(plan):
        yield f"  {''.join(_sign(plan, place) for place in row)}"
    for sign, words in signs.items():
        labels = grouped(place.block.label for place in plan.placements if _sign(plan, place) == sign)
        yield wrapped(f"  {words}: {', '.join(labels)}", "    ")


def _text_legend(tiers: Sequence[_Tier]) -> str:
    shown = dict.fromkeys(purpose for tier in tiers for purpose, size in tier.parts if size)
    names = [f"{_GLYPHS[purpose]} {_NAMES[purpose]}" for purpose in shown if purpose != "beyond"]
    return wrapped("   ".join([f"{_GLYPHS['weights']} weights", *names]), "")


# --- HTML


def _html(plan: Plan, tiers: Sequence[_Tier], memory: Memory) -> str:
    name, facts = headline(plan)
    chips = theme.chip(verdict(plan), theme.GOOD if plan.fits else theme.BAD)
    chips += "".join(theme.chip(words) for words in [placement_words(plan), *_speeds(plan)])
    scale = max(tier.shown_bytes for tier in tiers)
    problems = "".join(
        f'<div style="color:{theme.BAD_TEXT};margin:2px 0">✗ {escape_text(problem)}</div>'
        for problem in plan.problems
    )
    problems += "".join(
        f'<div style="margin:2px 0">→ {escape_text(remedy)}</div>' for remedy in plan.remedies[:1]
    )
    rows = "".join(_html_link(plan, tier) + _html_tier(plan, tier, scale, memory) for tier in tiers)
    return theme.frame(
        f'{theme.title(name, facts)}<div style="margin-bottom:8px">{chips}</div>{problems}{rows}'
        f"{_html_strip(plan)}{_html_legend(plan, tiers)}"
    )


def _row(left: str, middle: str, right: str) -> str:
    return (
        '<div style="display:flex;align-items:center;gap:12px">'
        f'<div style="width:150px;flex-shrink:0">{left}</div>'
        f'<div style="flex-grow:1;min-width:0">{middle}</div>'
        f'<div style="width:132px;flex-shrink:0;text-align:right;font-variant-numeric:tabular-nums">{right}</div></div>'
    )


def _html_tier(plan: Plan, tier: _Tier, scale: int, memory: Memory) -> str:
    planned, left = _counts(tier, memory, mapped=plan.mapped)
    lacks = theme.BAD_TEXT if tier.use.spare < 0 else theme.MUTED
    name = (
        f"<b>{escape_text(device_title(tier.use.device))}</b>"
        f'<div style="color:{theme.MUTED};font-size:12px;line-height:1.25">{escape_text(tier.name)}</div>'
    )
    counts = f'<b>{planned}</b><div style="color:{lacks};font-size:12px;line-height:1.25">{escape_text(left)}</div>'
    return f'<div style="margin:2px 0">{_row(name, _html_bar(plan, tier, scale), counts)}</div>'


def _html_bar(plan: Plan, tier: _Tier, scale: int) -> str:
    """The blocks in model order, then everything else, in true proportion."""
    whole = tier.shown_bytes
    labelled = all(_has_room(place, scale) for place in tier.blocks)
    cells = [_html_block(plan, place, whole, scale, labelled=labelled) for place in tier.blocks]
    for purpose, size in tier.parts:
        if size:
            cells.append(_html_part(tier, purpose, size, whole, scale))
    edge = theme.BAD if tier.use.spare < 0 else theme.LINE
    open_end = "" if tier.is_whole else ";border-right:2px dotted"
    bar = (
        f'<div style="display:flex;flex-shrink:0;width:{100 * whole / scale:.3f}%;height:40px;min-width:4px;'
        f"box-sizing:border-box;border:1px solid {edge}{open_end};border-radius:5px;overflow:hidden"
        f'">{"".join(cells)}</div>'
    )
    more = "" if tier.is_whole else f'<span style="width:0;padding-left:4px;color:{theme.MUTED}">…</span>'
    end = _html_end(tier, scale) if tier.is_whole and whole > tier.use.total else ""
    return f'<div style="padding-right:18px"><div style="display:flex;align-items:center;position:relative">{bar}{more}{end}</div></div>'


def _html_end(tier: _Tier, scale: int) -> str:
    """Where the device ends, across a bar that runs past it."""
    return (
        f'<span title="{escape(device_title(tier.use.device))} ends here: {format_bytes(tier.use.total)}" '
        f'style="position:absolute;left:{100 * tier.use.total / scale:.3f}%;top:-3px;height:46px;width:0;'
        f'border-left:3px solid {theme.BAD_TEXT}"></span>'
    )


def _has_room(place: Placement, scale: int) -> bool:
    """Whether a block is wide enough for its number; a tier shows all numbers or none."""
    return place.home_bytes / scale * _BAR_PIXELS >= 6 * len(_index(place)) + 3 or not _is_layer(place)


def _html_block(plan: Plan, place: Placement, whole: int, scale: int, *, labelled: bool) -> str:
    pixels = place.home_bytes / scale * _BAR_PIXELS
    label = _index(place) if labelled and pixels >= 6 * len(_index(place)) + 3 else ""
    gap = f";box-shadow:inset -1px 0 0 {theme.PAGE}" if pixels >= 4 else ""
    return _segment(
        100 * place.home_bytes / whole, theme.fill(kind_of(place)) + gap, _tooltip(plan, place), label
    )


def _index(place: Placement) -> str:
    """``"19"`` of ``"layers.19"``; other labels as they are."""
    return place.block.label.rpartition(".")[2]


def _is_layer(place: Placement) -> bool:
    return place.block.kind in ("encoder", "decoder")


def _html_part(tier: _Tier, purpose: str, size: int, whole: int, scale: int) -> str:
    words = {
        "split": "split",
        "kept": "kept",
        "draft": "draft",
        "kv_cache": "KV",
        "activations": "act",
        "slots": "slot",
        "spare": "free",
        "other": "other",
    }
    fits = size / scale * _BAR_PIXELS >= 7 * len(words.get(purpose, "")) + 4
    label = words.get(purpose, "") if fits else ""
    fill = theme.fill("free" if purpose in ("spare", "beyond") else purpose)
    if purpose in ("spare", "other"):
        fill += f";color:{theme.MUTED}"
    if purpose == "beyond":
        fill += f";border-left:2px solid {theme.TEXT}"
        label = "beyond the limit" if size / scale * _BAR_PIXELS > 110 else ""
        fill += f";color:{theme.MUTED}"
    tip = f"{_NAMES[purpose]}: {format_bytes(size)} {on_device(tier.use.device)}"
    return _segment(100 * size / whole, fill, tip, label)


def _segment(percent: float, fill: str, tip: str, label: str) -> str:
    return (
        f'<span title="{escape(tip)}" style="display:block;flex-shrink:0;width:{percent:.3f}%;color:#fff;'
        f"font-size:10px;line-height:38px;text-align:center;overflow:hidden;white-space:nowrap;"
        f'box-sizing:border-box;{fill}">{escape_text(label)}</span>'
    )


def _tooltip(plan: Plan, place: Placement) -> str:
    """``"layers.19 · 950.0 MiB · bfloat16 · in RAM, streams to cuda:0 · KV cache 32.0 MiB"``."""
    block = place.block
    dtypes = sorted({tensor.dtype for tensor in block.tensors}) or [plan.layout.dtype]
    where = f"{on_device(place.home)}, {_does(plan, place)}{_visits(plan, place)}"
    cache = plan.workload.cache_bytes(block)
    tied = f"shares tensors with {', '.join(block.tied_to)}" if block.tied_to else ""
    facts = [
        block.label,
        format_bytes(block.bytes),
        ", ".join(dtypes),
        where,
        *([f"{block.active_experts} of {block.experts} experts a token"] if block.experts else []),
        *([f"KV cache {format_bytes(cache)} {on_device(place.compute)}"] if cache else []),
        *([tied] if tied else []),
    ]
    return " · ".join(facts)


def _does(plan: Plan, place: Placement) -> str:
    """What happens to a block in every sweep: ``"streams to cuda:0"``."""
    target = processor(place.compute)
    kept = "a copy stays in RAM"
    return {
        "idle": "not used for text",
        "looked-up": f"rows are looked up for {target}",
        "split": f"experts computed by the CPU, the rest by {target}",
        "kept": f"{kept}, computed by the CPU"
        if place.compute == "cpu"
        else f"{kept} and streams to {target}",
        "read": "used in the page cache by the CPU" if plan.mapped else f"read for {target} every time",
        "cpu": "computed by the CPU",
        "streamed": f"streams to {target}",
        "resident": "computes there",
    }[place.way]


def _visits(plan: Plan, place: Placement) -> str:
    if not place.prefill:
        return ""
    verb = "; experts stream" if place.is_split else "; streams"
    return f"{verb} to {place.prefill} for {plan.long_sweep} tokens or more at once"


def _html_link(plan: Plan, tier: _Tier) -> str:
    arrival = _arrival(plan, tier)
    if not arrival:
        return ""
    words = (
        f'<div style="color:{theme.MUTED};font-size:12px;border-left:2px dashed {theme.LINE};padding:4px 10px;'
        f'margin-left:24px">↑ {escape_text(arrival)}</div>'
    )
    return _row("", words, "")


def _html_strip(plan: Plan) -> str:
    """Every block in model order with the sign of its home, and numbers under every tenth layer."""
    rows = _strip_rows(plan)
    widest = len(rows[0])
    parts = [f'<div style="color:{theme.MUTED};font-size:12px;margin:12px 0 3px">blocks in model order</div>']
    for row in rows:
        width = f"{100 * len(row) / widest:.3f}%"
        cells = "".join(_html_cell(plan, place) for place in row)
        ticks = "".join(_html_tick(place) for place in row)
        parts.append(f'<div style="display:flex;gap:1px;width:{width}">{cells}</div>')
        parts.append(
            f'<div style="display:flex;gap:1px;width:{width};color:{theme.MUTED};font-size:10px;line-height:14px;'
            f'margin-bottom:3px">{ticks}</div>'
        )
    return "".join(parts)


def _html_cell(plan: Plan, place: Placement) -> str:
    return (
        f'<span title="{escape(_tooltip(plan, place))}" style="display:block;flex:1 1 0;min-width:0;height:24px;'
        f"border-radius:2px;color:#fff;font-size:9px;line-height:24px;text-align:center;overflow:hidden;"
        f'{theme.fill(kind_of(place))}">{_sign(plan, place)}</span>'
    )


def _html_tick(place: Placement) -> str:
    """A number for every tenth layer, a name for what is no layer; labels may run over their neighbours."""
    family, _, index = place.block.label.rpartition(".")
    text = index if family and index.isdecimal() and int(index) % 10 == 0 else ""
    return (
        '<span style="display:block;flex:1 1 0;min-width:0;text-align:center;white-space:nowrap">'
        f"{escape_text(text)}</span>"
    )


def _html_legend(plan: Plan, tiers: Sequence[_Tier]) -> str:
    paints = {
        "gpu": "on the GPU, computes there",
        "looked-up": "rows are looked up where they are",
        "ram": "in RAM, computed by the CPU",
        "ram-streamed": "in RAM, streamed",
        "kept": "on disk, with a copy in RAM",
        "disk": "on disk, used in the page cache" if plan.mapped else "on disk, read every time",
        "idle": "not used for text",
    }
    used = {kind_of(place) for place in plan.placements}
    entries = [(theme.fill(paint), words) for paint, words in paints.items() if paint in used]
    shown = dict.fromkeys(purpose for tier in tiers for purpose, size in tier.parts if size)
    shown = {purpose: None for purpose in shown if purpose not in ("spare", "beyond") and purpose not in used}
    entries += [(theme.fill(purpose), _NAMES[purpose]) for purpose in shown]
    signs = " · ".join(f"{sign} = {words}" for sign, words in _signs(plan).items())
    swatch = (
        "display:inline-block;width:13px;height:13px;border-radius:2px;vertical-align:-2px;margin-right:5px"
    )
    items = "".join(
        f'<span style="margin-right:14px;white-space:nowrap"><span style="{swatch};{fill}"></span>{escape_text(words)}</span> '
        for fill, words in entries
    )
    style = f"color:{theme.MUTED};font-size:12px;margin-top:6px;line-height:1.7"
    return f'<div style="{style}">{items}<span style="white-space:nowrap">{escape_text(signs)}</span></div>'
