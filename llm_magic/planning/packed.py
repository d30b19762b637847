"""What unpacking leaves of a device's read speed, by the kernel that computes with the packed weights."""

from __future__ import annotations

from dataclasses import replace

from llm_magic.machine import Device
from llm_magic.model import ModelLayout
from llm_magic.units import MIB

ON_CPU = {
    "nf4": (0.55, 0.07, 0.035),
    "fp4": (0.55, 0.07, 0.035),
    "int8": (0.2, 0.17, 0.09),
    "quanto-int8": (0.9, 0.8, 0.8),
    "quanto-int8 unpacked": (0.06, 0.06, 0.06),
    "int4": (0.6, 0.5, 0.5),
    "int4 unpacked": (0.05, 0.04, 0.04),
    "int2": (0.012, 0.012, 0.012),
    "float8": (0.013, 0.013, 0.013),
}
"""Packed bytes per second of a CPU's matrix-vector product, as a share of what it reads in 16 bits.

With AVX-512 for bfloat16, with AVX-512, with less: measured with one thread of a Xeon that has AMX, its
libraries held to the fewer instructions, on layers of 2,048 by 5,632. More threads share the bandwidth
of the RAM, which limits those that unpack first, too: they write 2 bytes a weight and read them again.
"""
_BY_ONE_THREAD_BYTES_PER_S = 0.45e9
"""What bitsandbytes' 4-bit formats reach without its library for CPUs, however many cores there are."""

ON_GPU = {
    "nf4": 0.42,
    "fp4": 0.42,
    "int8": 0.42,
    "quanto-int8": 0.2,
    "quanto-int8 unpacked": 0.2,
    "int4": 0.4,
    "int4 unpacked": 0.035,
    "int2": 0.02,
    "float8": 0.11,
}
"""The same of a GPU.

nf4 is measured: 3.7 GB in 2.8 ms on an H100 that reads 3,107 GB/s. Where all is unpacked first, for every
token, it is the packed byte's share of what is read and written then: 1 of 5 bytes a weight for 8-bit
integers (integers, their products with the scales, these again), 1 of 9 for floats, one half of 15 for
4-bit integers. The other numbers are those of the kernel that is most like it.
"""
_SOMEHOW = 0.1

UNPACKED_EXPERTS_BYTES = 64 * MIB
"""Of packed experts that a GPU unpacks at a time for many tokens, or one of them if it is larger."""

_AS_LARGE = {"float8": "quanto-int8", "int8": "quanto-int8", "nf4": "int4", "fp4": "int4"}
_MUCH_QUICKER = 4


def kernel_of(layout: ModelLayout) -> str:
    """The method that packs the layers, and in a word what is particular about how they are computed.

    torch's kernels for quanto's integers take bfloat16 alone, and that for 4 bits groups of 128 weights.
    """
    method = layout.quantization
    if method in ("quanto-int8", "int4") and layout.dtype != "bfloat16":
        return f"{method} unpacked"
    if method == "int4" and layout.hidden_size % 128:
        return "int4 unpacked"
    if method in ("nf4", "fp4") and layout.details.get("unpacked_by_one_thread"):
        return f"{method} by one thread"
    return method


def share_of(kernel: str, device: Device) -> float:
    """Packed bytes that a device gets through in a second, as a share of what it reads."""
    if device.kind == "cpu":
        if kernel.endswith("by one thread") and device.read_bytes_per_s:
            return min(1.0, _BY_ONE_THREAD_BYTES_PER_S / device.read_bytes_per_s)
        shares = ON_CPU.get(kernel.removesuffix(" by one thread"))
        return shares[_instructions(device)] if shares else _SOMEHOW
    if kernel == "int4" and not _has_tensor_cores_for_it(device):
        kernel = "int4 unpacked"
    return ON_GPU.get(kernel.removesuffix(" by one thread"), _SOMEHOW)


def quicker_method(layout: ModelLayout, cpu: Device) -> str:
    """A method that packs into as many bytes and that this CPU computes several times as fast; empty: none."""
    other = _AS_LARGE.get(layout.quantization)
    if other is None:
        return ""
    known = cpu if cpu.capability else replace(cpu, capability="avx512_bf16")
    share, its = (share_of(kernel_of(each), known) for each in (layout, replace(layout, quantization=other)))
    return other if its > _MUCH_QUICKER * share else ""


def _instructions(cpu: Device) -> int:
    """Column of `ON_CPU`; the last where nobody knows, because most computers have no AVX-512."""
    return {"avx512_bf16": 0, "avx512": 1}.get(cpu.capability, 2)


def _has_tensor_cores_for_it(gpu: Device) -> bool:
    """Whether torch's 4-bit kernel runs there: NVIDIA's from compute capability 8.0 on."""
    major = gpu.capability.partition(".")[0]
    return gpu.id.startswith("cuda") and (not gpu.capability or (major.isdecimal() and int(major) >= 8))
