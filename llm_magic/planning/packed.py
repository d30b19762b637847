"""What unpacking leaves of a device's read speed, by the kernel that computes with the packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm_magic.machine import Device
from llm_magic.model import ModelLayout
from llm_magic.units import MIB

Speeds = tuple[float, float, float]

ON_CPU: dict[str, Speeds] = {
    "nf4": (18.0e9, 8.0e9, 7.3e9),
    "fp4": (18.0e9, 8.0e9, 7.3e9),
    "int8": (18.0e9, 9.6e9, 9.6e9),
    "quanto-int8": (18.0e9, 9.6e9, 9.6e9),
    "float8": (18.0e9, 8.0e9, 5.5e9),
    "int4": (18.0e9, 12.0e9, 11.0e9),
    "int4 unpacked": (6.4e9, 6.4e9, 4.4e9),
    "int2": (3.6e9, 3.6e9, 2.2e9),
    "mxfp4": (16.0e9, 8.0e9, 7.3e9),
    "fp8": (18.0e9, 8.0e9, 5.5e9),
}
"""Packed bytes per second that one thread of a CPU multiplies with a token, by compiled kernels.

With AVX-512 for bfloat16, with AVX-512, with less: measured on a Xeon whose threads read 13 GB/s each in 16
bits, held to the fewer instructions, on layers of 2,048 by 5,632; int4, mxfp4, and what is 18, on an EPYC (Zen 4) whose
threads read 17 GB/s each, on layers of 4,096 by 4,096. What limits them is mostly how long RAM takes to answer;
several threads reach what it gives, see `_OF_READ`.
"""
BY_LIBRARIES: dict[str, Speeds] = {
    "nf4": (0.45e9, 0.45e9, 0.45e9),
    "fp4": (0.45e9, 0.45e9, 0.45e9),
    "int8": (2.6e9, 2.2e9, 1.2e9),
    "quanto-int8": (11.7e9, 10.4e9, 10.4e9),
    "quanto-int8 unpacked": (0.8e9, 0.8e9, 0.8e9),
    "float8": (0.17e9, 0.17e9, 0.17e9),
    "int4": (7.8e9, 6.5e9, 6.5e9),
    "int4 unpacked": (0.65e9, 0.5e9, 0.5e9),
    "int2": (0.16e9, 0.16e9, 0.16e9),
    "mxfp4": (0.08e9, 0.08e9, 0.08e9),
    "fp8": (0.1e9, 0.1e9, 0.1e9),
}
"""The same where there are no compiled kernels: weights become numbers first, for every token."""
_BY_A_THREAD = 13e9
"""Bytes per second that a thread of that Xeon reads; a CPU whose threads nobody counted has so many."""
_LIKE = {
    **dict.fromkeys(("nf4", "fp4", "mxfp4"), "mxfp4"),
    "int4": "int4",
    **dict.fromkeys(("int8", "quanto-int8"), "int8"),
    **dict.fromkeys(("float8", "fp8"), "float8"),
}
"""Whose speed tells that of others, where it was measured, in the proportion of the table.

Two threads of one core (Xeon with AMX) that read 31 GB/s in 16 bits: nf4 and fp4 22, mxfp4 17, int4 16, int8 26 and
float8 22 GB/s, so that the table's 16 to 18 for a thread are no more than half true there. What takes arithmetic is: int2 reached
6.8, two of the table's threads.
"""
_OF_READ = 0.9
"""Of what a CPU reads in 16 bits, what it reaches with packed weights at most."""

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
    "mxfp4": 0.3,
    "mxfp4 unpacked": 0.04,
    "fp8": 0.11,
}
"""The same of a GPU.

nf4 is measured: 3.7 GB in 2.8 ms on an H100 that reads 3,107 GB/s. Where all is unpacked first, for every
token, it is the packed byte's share of what is read and written then: 1 of 5 bytes a weight for 8-bit
integers (integers, their products with the scales, these again), 1 of 9 for floats, one half of 15 for
4-bit integers, and of 12 for 4-bit floats. The other numbers are those of the kernel that is most like it.
"""
_SOMEHOW = 0.1

UNPACKED_EXPERTS_BYTES = 64 * MIB
"""Of packed experts that a GPU unpacks at a time for many tokens, or one of them if it is larger."""

UNPACKED_HEAD_BYTES = 64 * MIB
"""Of a packed head that a GPU unpacks at a time where it has no kernel for the bytes."""

HEADS_IN_ROWS = ("nf4", "fp4", "int8", "quanto-int8", "float8")
"""Methods of whose heads that is some rows; of the others it is all."""

EXPERTS_IN_RUNS_BYTES = 16 * MIB
"""Packed experts up to this size come to a GPU in runs, for a prompt. A copy of a larger one takes longer than the
host needs for it, and those that are there already need not come.
"""

INT4_GROUPS = (32, 64, 128, 256)
"""Columns that share a scale, of which torch's kernel for 4 bits takes one."""

GUEST_PASSES = 54
"""Bytes that a GPU reads and writes for each one of int4 in the order of a CPU's kernel, which it makes numbers of: 10
for a weight until it is an integer of its own, 17 until it is multiplied.
"""

_MUCH_QUICKER = 4


@dataclass(frozen=True)
class Kernel:
    """What computes with packed weights.

    Attributes
    ----------
    name
        The method that packs, and in a word what is particular about how they are computed.
    is_compiled
        Whether there are compiled kernels for CPUs.
    """

    name: str = ""
    is_compiled: bool = True


def kernel_of(layout: ModelLayout) -> Kernel:
    """What computes the layers.

    torch's kernels for quanto's integers take bfloat16 alone, and that for 4 bits not all sizes of groups; quanto
    itself uses it for 128 weights.
    """
    return _kernel_of(layout, layout.quantization)


def head_kernel_of(layout: ModelLayout) -> Kernel:
    """What computes the head, where it is packed: none looks for large activations there."""
    method = layout.head_quantization
    return _kernel_of(layout, "quanto-int8" if method == "int8" else method)


def _kernel_of(layout: ModelLayout, method: str) -> Kernel:
    is_compiled = not layout.details.get("no_cpu_kernels")
    if method in ("quanto-int8", "int4") and layout.dtype != "bfloat16":
        method = f"{method} unpacked"
    group = layout.details.get("group", 0 if layout.hidden_size % 128 else 128)
    if method == "int4" and group not in INT4_GROUPS:
        method = "int4 unpacked"
    if "mxfp4" in (method, layout.expert_quantization) and layout.details.get("no_gpu_kernel"):
        method = "mxfp4 unpacked"
    return Kernel(method, is_compiled)


def share_of(kernel: Kernel, device: Device) -> float:
    """Packed bytes that a device gets through in a second, as a share of what it reads."""
    name = kernel.name
    if device.kind == "cpu":
        table = ON_CPU if kernel.is_compiled else BY_LIBRARIES
        name = name if name in table else name.removesuffix(" unpacked")
        return _share_of_cpu(name, table, device) if name in table else _SOMEHOW
    if name == "int4" and not _has_tensor_cores_for_it(device):
        name = "int4 unpacked"
    return ON_GPU.get(name, _SOMEHOW)


def _share_of_cpu(name: str, table: Mapping[str, Speeds], cpu: Device) -> float:
    column, read = _instructions(cpu), cpu.read_bytes_per_s
    by_a_thread = table[name][column]
    if not read:
        return by_a_thread / _BY_A_THREAD
    measured, like = dict(cpu.packed), _LIKE.get(name, "")
    like = "mxfp4" if like == "int4" and like not in measured else like
    if table is ON_CPU and measured.get(like):
        speed = by_a_thread / table[like][column] * measured[like]
    else:
        speed = by_a_thread * (cpu.threads or read / _BY_A_THREAD)
    share: float = min(_OF_READ, speed / read)
    return share


def numbers_per_s(kernel: Kernel, cpu: Device) -> float:
    """Packed bytes that a CPU makes numbers of in a second, for a prompt; 0 when nobody knows, or for a GPU."""
    name = kernel.name if kernel.name in ON_CPU else kernel.name.removesuffix(" unpacked")
    return dict(cpu.unpacked).get(_LIKE.get(name, ""), 0.0) if kernel.is_compiled else 0.0


def slow_on_cpu(layout: ModelLayout, cpu: Device) -> bool:
    """Whether the CPU computes these packed weights many times as slowly as it would with compiled kernels."""
    kernel = kernel_of(layout)
    return share_of(replace(kernel, is_compiled=True), cpu) > _MUCH_QUICKER * share_of(kernel, cpu)


def slow_on_gpu(layout: ModelLayout, gpu: Device) -> bool:
    """Whether a GPU computes these packed weights many times as slowly as those of nf4."""
    return ON_GPU["nf4"] > _MUCH_QUICKER * share_of(kernel_of(layout), gpu)


def _instructions(cpu: Device) -> int:
    """Column of the tables; the last where nobody knows, because most computers have no AVX-512."""
    return {"avx512_bf16": 0, "avx512": 1}.get(cpu.capability, 2)


def _has_tensor_cores_for_it(gpu: Device) -> bool:
    """Whether torch's 4-bit kernel runs there: NVIDIA's from compute capability 8.0 on."""
    major = gpu.capability.partition(".")[0]
    return gpu.id.startswith("cuda") and (not gpu.capability or (major.isdecimal() and int(major) >= 8))
