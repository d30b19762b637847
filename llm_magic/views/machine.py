"""The machine as a picture: devices with their memory, the links between them, and how fast bytes move.

GPUs stand above, RAM in the middle, the disk below: weights that do not fit climb from there.
``≈`` marks what is assumed and not measured.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

from llm_magic.machine import Device, Link, Machine
from llm_magic.text.safe_html import escape_text
from llm_magic.units import MIB, format_bandwidth, format_bytes, format_flops
from llm_magic.views.report import LiveMachine, Report
from llm_magic.views.table import table_report

_BAR_CELLS = 12
_WORTH_SAYING_BYTES = 64 * MIB
_TITLES = {"gpu": "GPU", "cpu": "RAM", "disk": "Disk", "npu": "NPU"}


def machine_report(machine: Machine, live: LiveMachine | None = None) -> Report:
    """Devices, what is free on them, and their links, with the date or the source of every speed.

    ``live`` is what a front end may put over it.
    """
    return Report(_text(machine), _html(machine), live)


# --- What both pictures say


@dataclass(frozen=True)
class _Arrow:
    """One link, or all links of a kind where there are many: its ends, its speed, its bus."""

    source: str
    target: str
    speed: str
    name: str
    both_ways: bool = False

    @property
    def label(self) -> str:
        return f"{self.source} {'↔' if self.both_ways else '→'} {self.target}"


def _arrows(machine: Machine, source_kind: str, target_kind: str) -> list[_Arrow]:
    """Links from one kind of device to another; one arrow for all where there are more than two."""
    kinds = {device.id: device.kind for device in machine.devices}
    links = [k for k in machine.links if (kinds[k.source], kinds[k.target]) == (source_kind, target_kind)]
    if len(links) <= 2:
        return [_Arrow(k.source, k.target, _speed_text(_link_speed(k), k.assumed), k.name) for k in links]
    names = {link.name for link in links}
    return [
        _Arrow(
            _end(source_kind, source_kind == target_kind),
            _end(target_kind, source_kind == target_kind),
            _speed_text(_range(links), any(link.assumed for link in links)),
            names.pop() if len(names) == 1 else "",
        )
    ]


def _end(kind: str, among_themselves: bool) -> str:
    if kind != "gpu":
        return kind
    return "GPU" if among_themselves else "each GPU"


def _range(links: list[Link]) -> str:
    slow, fast = (format_bandwidth(pick(k.bytes_per_s for k in links)) for pick in (min, max))
    return slow if slow == fast else f"{slow} – {fast}"


def _link_speed(link: Link) -> str:
    return format_bandwidth(link.bytes_per_s)


def _speed_text(speed: str, assumed: bool) -> str:
    return f"≈ {speed}" if assumed else speed


def _all_arrows(machine: Machine) -> list[_Arrow]:
    """Every arrow, opposite ones of the same speed as one."""
    roles = [
        ("gpu", "gpu"),
        ("cpu", "gpu"),
        ("gpu", "cpu"),
        ("disk", "cpu"),
        ("disk", "gpu"),
        ("cpu", "disk"),
    ]
    made: list[_Arrow] = []
    for arrow in (arrow for role in roles for arrow in _arrows(machine, *role)):
        back = _Arrow(arrow.target, arrow.source, arrow.speed, arrow.name)
        if back in made:
            made[made.index(back)] = _Arrow(back.source, back.target, back.speed, back.name, both_ways=True)
        else:
            made.append(_with_itself(arrow))
    return made


def _with_itself(arrow: _Arrow) -> _Arrow:
    """Links among all GPUs go both ways."""
    return _Arrow(arrow.source, arrow.target, arrow.speed, arrow.name, both_ways=arrow.source == arrow.target)


def _provenance(machine: Machine) -> str:
    """``"measured 2026-11-22"``, ``"described in a file"`` or ``"assumed"``."""
    dates = sorted({d.measured_on for d in machine.devices} | {k.measured_on for k in machine.links})
    measured = [date for date in dates if date]
    when = f"measured {' to '.join(dict.fromkeys((measured[0], measured[-1])))}" if measured else ""
    if machine.described:
        return f"described in a file, {when}" if when else "described in a file"
    return when or "assumed"


def _reads(device: Device) -> str:
    if not device.read_bytes_per_s:
        return ""
    return _speed_text(format_bandwidth(device.read_bytes_per_s), "read" in device.assumed)


def _computes(device: Device) -> str:
    return _speed_text(format_flops(device.flops), "flops" in device.assumed) if device.flops else ""


def _free(device: Device) -> str:
    return _speed_text(format_bytes(device.free_bytes), "free" in device.assumed)


def _total(device: Device) -> str:
    return _speed_text(format_bytes(device.total_bytes), "total" in device.assumed)


def _notes(machine: Machine) -> Iterator[str]:
    for device in machine.gpus:
        if device.other_bytes >= _WORTH_SAYING_BYTES and not device.unified:
            yield f"Other programs hold {format_bytes(device.other_bytes)} of {device.id}."
        if device.unified:
            yield f"{device.id} and cpu share one memory: moving weights from one to the other frees nothing."
    if not machine.gpus:
        yield "No GPU: models compute on the CPU, from RAM and disk."
    for device in machine.devices:
        if device.kind == "npu":
            yield f"{device.id} ({device.name}) is named only: no backend here computes on it."
    if "≈" in "".join(_assumed_texts(machine)):
        sources = sorted({d.method for d in machine.devices if d.method and "read" in d.assumed})
        source = f" ({', '.join(sources)})" if sources else ""
        again = "" if machine.described else " %llm machine --measure measures."
        yield f"≈ is assumed, not measured{source}.{again}"


def _assumed_texts(machine: Machine) -> Iterator[str]:
    for device in machine.devices:
        yield from (_reads(device), _computes(device), _free(device), _total(device))
    yield from (arrow.speed for arrow in _all_arrows(machine))


# --- Terminal


def _text(machine: Machine) -> str:
    columns = ("device", "what it is", "used", "free", "total", "reads", "computes")
    rows = [
        (device.id, device.name, _bar_text(device), *_room_text(device), _reads(device), _computes(device))
        for device in machine.devices
    ]
    parts = [f"{machine.name} · {_provenance(machine)}", table_report(columns, rows).text]
    arrows = _all_arrows(machine)
    if arrows:
        links = [(arrow.label, arrow.speed, arrow.name) for arrow in arrows]
        parts.append(table_report(("link", "speed", "over"), links).text)
    notes = "\n".join(_notes(machine))
    return "\n\n".join([*parts, notes] if notes else parts)


def _room_text(device: Device) -> tuple[str, str]:
    return (_free(device), _total(device)) if device.total_bytes else ("", "")


def _bar_text(device: Device) -> str:
    """``███▒▒░░░``: used, used by other programs, free."""
    if not device.total_bytes:
        return ""
    used = round(_BAR_CELLS * device.used_bytes / device.total_bytes)
    other = min(used, round(_BAR_CELLS * device.other_bytes / device.total_bytes))
    return "█" * (used - other) + "▒" * other + "░" * (_BAR_CELLS - used)


# --- Notebook

_TEXT = "var(--jp-ui-font-color1,inherit)"
_ACCENTS = {
    "gpu": "var(--jp-success-color1,#43a047)",
    "cpu": "var(--jp-brand-color1,#1e88e5)",
    "disk": "var(--jp-warn-color1,#f57c00)",
    "npu": "var(--jp-info-color1,#00acc1)",
}
_FRAME = (
    f"font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:13px;line-height:1.45;color:{_TEXT};"
    "max-width:860px;padding:4px 0"
)
_MUTED = "opacity:.72;font-size:12px"
_CODE = "font-family:var(--jp-code-font-family,ui-monospace,monospace);font-weight:600"
_ROW = "display:flex;flex-wrap:wrap;gap:8px"
_PILL = (
    "display:inline-block;border:1px solid rgba(127,127,127,.4);border-radius:10px;padding:0 9px;margin:3px;"
    "font-size:12px;white-space:nowrap"
)


def _html(machine: Machine) -> str:
    """Rows of device boxes, and between two rows what moves from one to the other."""
    rows = [
        _devices_html(machine, ("gpu",)),
        _among_gpus_html(machine),
        _between_html(machine, "cpu", "gpu"),
        _devices_html(machine, ("cpu", "npu")),
        _between_html(machine, "disk", "cpu"),
        _devices_html(machine, ("disk",)),
        _legend_html(machine),
    ]
    title = _div(
        f'<strong style="font-size:14px">{escape_text(machine.name)}</strong> '
        f'<span style="{_MUTED}"> · {escape_text(_provenance(machine))}</span>',
        "margin-bottom:6px",
    )
    return _div(title + "".join(rows), _FRAME)


def _devices_html(machine: Machine, kinds: tuple[str, ...]) -> str:
    cards = [_card_html(device) for device in machine.devices if device.kind in kinds]
    return _div("".join(cards), _ROW) if cards else ""


def _card_html(device: Device) -> str:
    accent = _ACCENTS[device.kind]
    flex = "flex:0 1 190px" if device.kind == "npu" else "flex:1 1 190px"
    body = _div(
        f'<span style="{_CODE}">{escape_text(device.id)}</span> '
        f'<span style="{_MUTED}">{_TITLES[device.kind]}</span> &ensp;{escape_text(device.name)}',
        "overflow-wrap:anywhere",
    )
    if device.total_bytes:
        body += _bar_html(device, accent) + _room_html(device)
    body += _div(" ".join(_phrase(words) for words in _speeds(device)), _MUTED)
    return _div(
        body,
        f"{flex};min-width:150px;box-sizing:border-box;border:1px solid rgba(127,127,127,.35);"
        f"border-left:4px solid {accent};border-radius:6px;padding:7px 11px 8px;background:rgba(127,127,127,.05)",
    )


def _speeds(device: Device) -> Iterator[str]:
    if device.kind == "npu":
        yield "not used by a backend here"
    if device.read_bytes_per_s:
        yield f"reads {_reads(device)}"
    if device.flops:
        yield f"computes {_computes(device)}"


def _room_html(device: Device) -> str:
    """Free and total in words; who holds the rest."""
    free = f"<strong>{escape_text(_free(device))}</strong> free of {escape_text(_total(device))}"
    used = _used(device)
    return _div(free + (f' &ensp;<span style="{_MUTED}">{escape_text(used)}</span>' if used else ""))


def _used(device: Device) -> str:
    if device.used_bytes < _WORTH_SAYING_BYTES:
        return ""
    used, other = format_bytes(device.used_bytes), format_bytes(device.other_bytes)
    if device.other_bytes < _WORTH_SAYING_BYTES:
        return f"{used} used"
    return (
        f"{used} used by other programs" if used == other else f"{used} used, {other} of it by other programs"
    )


def _phrase(words: str) -> str:
    """Words that stay together when a line wraps."""
    return f'<span style="white-space:nowrap;margin-right:1em">{escape_text(words)}</span>'


def _bar_html(device: Device, accent: str) -> str:
    """Used solid, by other programs hatched, free empty: told apart without colour too."""
    other = 100 * device.other_bytes / device.total_bytes
    own = max(0.0, 100 * device.used_bytes / device.total_bytes - other)
    hatched = f"repeating-linear-gradient(135deg,{accent} 0,{accent} 3px,transparent 3px,transparent 6px)"
    label = f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"
    parts = _div("", f"width:{own:.2f}%;background:{accent}") + _div(
        "", f"width:{other:.2f}%;background:{hatched}"
    )
    return (
        f'<div role="img" aria-label="{html.escape(label)}" style="display:flex;height:11px;margin:6px 0 4px;'
        'border-radius:5px;overflow:hidden;border:1px solid rgba(127,127,127,.45);background:rgba(127,127,127,.13)">'
        f"{parts}</div>"
    )


def _among_gpus_html(machine: Machine) -> str:
    arrows = [arrow for arrow in _all_arrows(machine) if _is_among_gpus(machine, arrow)]
    return _pills_html([f"{arrow.label}  {arrow.speed}", arrow.name] for arrow in arrows)


def _is_among_gpus(machine: Machine, arrow: _Arrow) -> bool:
    gpus = {device.id for device in machine.gpus} | {"GPU"}
    return arrow.source in gpus and arrow.target in gpus


def _between_html(machine: Machine, below: str, above: str) -> str:
    """What moves up from one row to the other, and down."""
    if above == "gpu" and any(device.unified for device in machine.gpus):
        return _pills_html([["one memory, shared by GPU and CPU"]])
    up, down = _arrows(machine, below, above), _arrows(machine, above, below)
    downs = {arrow.source: arrow for arrow in down}
    several = len(up) > 1
    return _pills_html(_up_and_down(arrow, downs.get(arrow.target), several) for arrow in up)


def _up_and_down(up: _Arrow, down: _Arrow | None, several: bool) -> list[str]:
    end = f"{up.target}: " if several or up.target == "each GPU" else ""
    speeds = f"{end}↑ {up.speed}" + (f"  ↓ {down.speed}" if down else "")
    return [speeds, up.name]


def _pills_html(pills: Iterator[list[str]] | list[list[str]]) -> str:
    made = [
        f'<span style="{_PILL}">{escape_text(" · ".join(filter(None, words))).replace("  ", "&ensp;")}</span>'
        for words in pills
    ]
    return _div(" ".join(made), "text-align:center;margin:2px 0") if made else ""


def _legend_html(machine: Machine) -> str:
    notes = "".join(_div(escape_text(note)) for note in _notes(machine))
    return _div(_div(_swatches()) + notes, f"margin-top:7px;{_MUTED}")


def _swatches() -> str:
    grey = "currentColor"
    box = "display:inline-block;width:18px;height:9px;border-radius:2px;border:1px solid rgba(127,127,127,.6);margin-right:5px"
    hatched = f"repeating-linear-gradient(135deg,{grey} 0,{grey} 2px,transparent 2px,transparent 5px)"
    looks = ((grey, "used"), (hatched, "used by other programs"), ("transparent", "free"))
    return " &ensp; ".join(f'<span style="{box};background:{look}"></span>{name}' for look, name in looks)


def _div(content: str, style: str = "") -> str:
    return f'<div style="{style}">{content}</div>' if style else f"<div>{content}</div>"
