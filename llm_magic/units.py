"""Bytes, seconds and rates: read from what people type, written the way people read them."""

from __future__ import annotations

import re

from llm_magic.errors import OptionError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_FACTORS = {
    "": 1,
    "B": 1,
    "K": KIB,
    "KIB": KIB,
    "KB": 10**3,
    "M": MIB,
    "MIB": MIB,
    "MB": 10**6,
    "G": GIB,
    "GIB": GIB,
    "GB": 10**9,
    "T": TIB,
    "TIB": TIB,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``"10GiB"``, ``"1.5 GB"``, ``"512M"`` or ``"4096"``.

    ``KiB`` counts in 1024s, ``KB`` in 1000s, and a bare ``K`` is ``KiB``, as in llama.cpp.

    Raises
    ------
    OptionError
        When the text is no size, or its unit is unknown.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise OptionError(f"{text!r} is not a size.", "Write it like 10GiB, 512MiB or 1.5GB.")
    return int(float(match[1]) * factor)


def format_bytes(count: float) -> str:
    """``8589934592`` as ``"8.0 GiB"``: binary units, one decimal from MiB up."""
    sign, size = ("-" if count < 0 else ""), abs(count)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB)):
        if size >= factor * 0.9995:
            return f"{sign}{size / factor:.1f} {unit}"
    return f"{sign}{size / KIB:.0f} KiB" if size >= KIB else f"{sign}{size:.0f} B"


def exact_bytes(count: int) -> str:
    """``2147483648`` as ``"2GiB"``, as it is typed: the largest unit in which it is a whole number."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)


def format_bandwidth(bytes_per_s: float) -> str:
    """``25.1e9`` as ``"25.1 GB/s"``, ``1008e9`` as ``"1008 GB/s"``: decimal units, as buses and disks are sold."""
    if bytes_per_s >= 99.95e9:
        return f"{bytes_per_s / 1e9:.0f} GB/s"
    if bytes_per_s >= 0.9995e9:
        return f"{bytes_per_s / 1e9:.1f} GB/s"
    return f"{bytes_per_s / 1e6:.0f} MB/s"


def format_seconds(seconds: float) -> str:
    """``0.084`` as ``"84 ms"``, ``3.21`` as ``"3.2 s"``, ``75`` as ``"1 min 15 s"``."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_rate(tokens_per_s: float) -> str:
    """``31.42`` as ``"31.4 tok/s"``; three significant digits below 100."""
    if tokens_per_s >= 99.95:
        return f"{tokens_per_s:.0f} tok/s"
    return f"{tokens_per_s:.1f} tok/s" if tokens_per_s >= 0.995 else f"{tokens_per_s:.2f} tok/s"


def format_count(count: float) -> str:
    """``8030261248`` as ``"8.03 B"``: parameters and tokens."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= factor * 0.9995:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def format_flops(operations_per_s: float) -> str:
    """``165.2e12`` as ``"165 TFLOPS"``: dense floating-point operations per second."""
    for unit, factor in (("PFLOPS", 1e15), ("TFLOPS", 1e12)):
        if operations_per_s >= factor * 0.9995:
            return f"{operations_per_s / factor:.3g} {unit}"
    return f"{operations_per_s / 1e9:.0f} GFLOPS"
