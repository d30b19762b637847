"""The plan as a report: whether it fits, bytes by purpose and device, how fast, what to know, the same in Python."""

from __future__ import annotations

from collections.abc import Sequence

from llm_magic.plan import DeviceUse, Plan
from llm_magic.text.safe_html import escape_text
from llm_magic.units import format_bytes, format_count, format_rate
from llm_magic.views import theme
from llm_magic.views.python import python_of
from llm_magic.views.report import Report
from llm_magic.views.words import (
    COLUMNS,
    device_title,
    headline,
    placement_words,
    speed_words,
    verdict,
    wrapped,
)

_PURPOSES = ("weights", "split", "kept", "draft", "kv_cache", "activations", "slots", "buffers")
_NAMES = {"weights": "weights", "kv_cache": "KV cache", "activations": "activations", "slots": "slots"}
_NAMES |= {
    "split": "split",
    "kept": "kept",
    "draft": "draft",
    "buffers": "buffers",
    "planned": "planned",
    "limit": "of",
    "spare": "spare",
}


def plan_report(plan: Plan) -> Report:
    """What ``%llm plan`` shows."""
    return Report(_text(plan), _html(plan))


def warnings_report(plan: Plan) -> Report:
    """What to know about a plan that fits, alone: for under a load."""
    if not plan.warnings:
        return Report("")
    notes = "".join(_note("!", warning, theme.CARE) for warning in plan.warnings)
    return Report("\n".join(wrapped(f"! {warning}") for warning in plan.warnings), theme.frame(notes))


def _text(plan: Plan) -> str:
    name, facts = headline(plan)
    table = _text_table(_table(plan))
    notes = [*(f"✗ {problem}" for problem in plan.problems), *(f"→ {remedy}" for remedy in plan.remedies)]
    notes = [wrapped(note) for note in [*notes, *(f"! {warning}" for warning in plan.warnings)]]
    python = [f"    {line}".rstrip() for line in python_of(plan).splitlines()]
    parts = [
        [
            wrapped(f"{name}  {facts}"),
            wrapped(f"{verdict(plan)} · placed by {plan.policy}: {placement_words(plan)}"),
        ],
        table,
        [wrapped(line, " " * 11) for line in [*_forecast(plan), _model(plan)]],
        notes,
        ["The same with plain transformers:", *python],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _text_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table, the other way round where only that fits a terminal."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    shown = min((rows, turned), key=lambda table: (_width(table) > COLUMNS, table is turned))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) - 2 <= COLUMNS else " "
    return [gap.join(_aligned(row, widths)).rstrip() for row in shown]


def _width(rows: list[list[str]]) -> int:
    """Columns of a table with one space between cells."""
    return sum(max(map(len, column)) + 1 for column in zip(*rows, strict=True)) - 1


def _table(plan: Plan) -> list[list[str]]:
    """Bytes by purpose and device, with its head; purposes that no device has are left out."""
    columns = [key for key in _PURPOSES if any(getattr(use, key) for use in plan.uses)]
    keys = [*columns, "planned", "limit", "spare"]
    return [
        ["", *(_NAMES[key] for key in keys)],
        *([device_title(use.device), *(_cell(use, key) for key in keys)] for use in _shown(plan)),
    ]


def _shown(plan: Plan) -> list[DeviceUse]:
    return [use for use in plan.uses if use.planned or use.device != "disk"]


def _cell(use: DeviceUse, key: str) -> str:
    size: int = getattr(use, key)
    if use.device == "disk" and key in ("limit", "spare") and use.spare >= 0:
        return "–"  # its blocks are read from files that are there already
    return format_bytes(size) if size or key in ("limit", "spare", "planned") else "–"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if not i else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _forecast(plan: Plan) -> list[str]:
    moved = [
        f"{format_bytes(size)} {device_title(source)} → {device_title(target)}"
        for (source, target), size in plan.forecast.bytes_per_token.items()
        if source != target
    ]
    read = [
        f"{format_bytes(size)} read by {'the CPU' if source == 'cpu' else source}"
        for (source, target), size in plan.forecast.bytes_per_token.items()
        if source == target
    ]
    bound = f" · bound by {plan.forecast.bound_by}" if plan.forecast.decode_tps else ""
    if plan.forecast.limit_tps:
        bound += f" · the hardware's limit is {format_rate(plan.forecast.limit_tps)}"
    return [
        f"forecast   {speed_words(plan)}{bound}",
        f"each token {', '.join(moved + read)}",
        *_long_prompts(plan),
    ]


def _long_prompts(plan: Plan) -> list[str]:
    """From where on the CPU's blocks stream as well, if they do."""
    devices = dict.fromkeys(place.prefill for place in plan.placements if place.prefill)
    if not devices:
        return []
    at_a_time = min(plan.workload.prefill_tokens, plan.workload.context_length)
    what = "experts" if all(place.is_split for place in plan.placements if place.prefill) else "blocks"
    return [
        f"prompts    of {plan.long_sweep} tokens or more: the CPU's {what} stream to {', '.join(devices)} too, "
        f"for {at_a_time:,} tokens at a time"
    ]


def _model(plan: Plan) -> str:
    """What the model is, whatever its placement."""
    layout = plan.layout
    experts = max(layout.blocks, key=lambda block: block.experts)
    facts = [f"{format_count(layout.parameters)} parameters", f"size class {layout.size_class}"]
    if layout.is_mixture_of_experts:
        facts.append(f"{experts.active_experts} of {experts.experts} experts a token")
    if layout.context_length:
        facts.append(f"made for {layout.context_length:,} tokens")
    facts.append("chat template" if layout.has_chat_template else "no chat template")
    return f"{'model':<11}{' · '.join([*facts, *([layout.license] if layout.license else [])])}"


def _html(plan: Plan) -> str:
    name, facts = headline(plan)
    chips = theme.chip(verdict(plan), theme.GOOD if plan.fits else theme.BAD)
    chips += theme.chip(f"placed by {plan.policy}: {placement_words(plan)}")
    notes = [_note("✗", problem, theme.BAD) for problem in plan.problems]
    notes += [_note("→", remedy, theme.GOOD) for remedy in plan.remedies]
    notes += [_note("!", warning, theme.CARE) for warning in plan.warnings]
    speeds = "".join(_labelled(line) for line in (*_forecast(plan), _model(plan)))
    return theme.frame(
        f'{theme.title(name, facts)}<div style="margin-bottom:6px">{chips}</div>{_html_table(plan)}'
        f'<div style="margin:8px 0">{speeds}</div>{"".join(notes)}{_html_python(plan)}'
    )


def _html_table(plan: Plan) -> str:
    head, *rows = _table(plan)
    cell = "padding:3px 14px 3px 0;text-align:right;font-variant-numeric:tabular-nums;border:none"
    line = f"border-top:1px solid {theme.LINE}"
    top = "".join(
        f'<th style="{cell};color:{theme.MUTED};font-weight:400">{escape_text(c)}</th>' for c in head
    )
    body = ""
    for use, row in zip(_shown(plan), rows, strict=True):
        lacks = f";color:{theme.BAD_TEXT};font-weight:600" if use.spare < 0 else ""
        cells = [f'<th style="{cell};text-align:left;{line}">{escape_text(row[0])}</th>']
        cells += [f'<td style="{cell};{line}">{escape_text(c)}</td>' for c in row[1:-1]]
        cells.append(f'<td style="{cell};{line}{lacks}">{escape_text(row[-1])}</td>')
        body += f'<tr style="background:none">{"".join(cells)}</tr>'
    style = "border-collapse:collapse;margin:0;font-size:13px;border:none"
    return f'<table style="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _labelled(line: str) -> str:
    label, rest = line[:10].strip(), line[10:].strip()
    return f'<div><span style="color:{theme.MUTED}">{escape_text(label)}</span> {escape_text(rest)}</div>'


def _note(mark: str, text: str, colour: str) -> str:
    return (
        f'<div style="margin:3px 0;padding-left:8px;border-left:3px solid {colour}">'
        f"<b>{mark}</b> {escape_text(text)}</div>"
    )


def _html_python(plan: Plan) -> str:
    code = escape_text(python_of(plan))
    style = (
        f"margin:6px 0 0;padding:8px 10px;background:{theme.CARD};font:12px/1.5 {theme.CODE};overflow-x:auto"
    )
    return (
        f'<details style="margin-top:8px"><summary style="color:{theme.MUTED};cursor:pointer">'
        f'The same with plain transformers</summary><pre style="{style};color:{theme.TEXT}">{code}</pre></details>'
    )
