"""``%llm bench``: what this machine can do, what the loaded model does, and forecasts that know both."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from llm_magic.arguments import completes
from llm_magic.calibration import Calibration, Comparison
from llm_magic.hookspecs import Command
from llm_magic.machine import Device, Machine
from llm_magic.session import Session
from llm_magic.units import format_bandwidth, format_flops, format_rate, format_seconds
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack, table_report
from llm_magic.views.words import TIERS, device_title, share_words

_OFF = 0.15  # of what was measured; a forecast further off is worth a word


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine-only", action="store_true", help="leave the loaded model out")
    completes(
        parser.add_argument("-m", "--model", default="", metavar="NAME", help="one of the loaded models"),
        "model",
    )


def _run(session: Session, found: argparse.Namespace) -> Report:
    calibration = session.bench(found.model, found.machine_only)
    ceilings = table_report(("LIMIT OF THE MACHINE", "MEASURED", "HOW"), list(_ceilings(calibration.machine)))
    if calibration.speed is None:
        hint = "" if session.models else "With a model loaded, %llm bench measures its sweeps too."
        return stack(ceilings, line_report(hint))
    return stack(ceilings, _gap(), _forecasts(calibration), _gap(), _sweeps(calibration))


def _ceilings(machine: Machine) -> Iterator[list[str]]:
    for device in machine.devices:
        if device.read_bytes_per_s and device.kind != "disk":
            speed = format_bandwidth(device.read_bytes_per_s)
            yield _row(f"{device_title(device.id)}, read", speed, "read" in device.assumed, device.method)
        if device.beside_bytes_per_s:
            speed, how = format_bandwidth(device.beside_bytes_per_s), "while copies to GPUs run"
            yield _row(f"{device_title(device.id)}, read beside the bus", speed, False, how)
        if device.flops:
            name = "CPU" if device.kind == "cpu" else device.id
            yield _row(
                f"{name}, compute", format_flops(device.flops), "flops" in device.assumed, device.method
            )
    for link in machine.links:
        route = " → ".join(TIERS.get(end, end) for end in (link.source, link.target))
        how = _disk_method(machine, link.source) or link.name
        yield _row(route, format_bandwidth(link.bytes_per_s), link.assumed, how)
        if link.beside_bytes_per_s:
            speed = format_bandwidth(link.beside_bytes_per_s)
            yield _row(f"{route}, beside the CPU", speed, False, "while the CPU reads")


def _disk_method(machine: Machine, source: str) -> str:
    device: Device = machine.device(source)
    return f"{device.name}, {device.method}" if device.kind == "disk" and device.method else ""


def _row(what: str, value: str, is_assumed: bool, how: str) -> list[str]:
    return [what, f"≈ {value}" if is_assumed else value, f"assumed: {how}" if is_assumed else how]


def _forecasts(calibration: Calibration) -> Report:
    rows = [
        [
            c.what,
            _held(c.before_tps, c.measured_tps),
            format_rate(c.measured_tps),
            _held(c.after_tps, c.measured_tps),
        ]
        for c in calibration.comparisons
    ]
    headers = (calibration.name, "FORECAST BEFORE", "MEASURED", "FORECAST NOW")
    return table_report(headers, rows, _verdict(calibration.comparisons, calibration.others))


def _verdict(comparisons: tuple[Comparison, ...], others: float) -> str:
    if others:
        return (
            f"Other programs took {share_words(others)} of the processor meanwhile, and plans are made with what "
            "they left: measure again when they have ended."
        )
    off = [c.what for c in comparisons if abs(c.after_tps / c.measured_tps - 1) > _OFF]
    if off:
        return (
            f"The forecast of {' and '.join(off)} is still far off: close other programs and measure again."
        )
    return "Plans on this computer are made with these figures from now on."


def _held(forecast_tps: float, measured_tps: float) -> str:
    """``"25.0 tok/s (-20 %)"``: a forecast, and how far it is from what was measured."""
    if not forecast_tps:
        return "unknown"
    return f"{format_rate(forecast_tps)} ({100 * (forecast_tps / measured_tps - 1):+.0f} %)"


def _sweeps(calibration: Calibration) -> Report:
    speed = calibration.speed
    if speed is None or not speed.verify_s:
        return Report("")
    rows = [
        [str(tokens), format_seconds(seconds), format_rate(tokens / seconds)]
        for tokens, seconds in sorted(speed.verify_s.items())
    ]
    return table_report(("TOKENS OF A SWEEP", "TIME", "IF ALL ARE KEPT"), rows)


def _gap() -> Report:
    return Report("", "<br>")


BENCH = Command(
    "bench",
    "measure this machine and the loaded model, in under 30 seconds",
    _run,
    _add_arguments,
    ("%llm bench", "%llm bench --machine-only"),
)
