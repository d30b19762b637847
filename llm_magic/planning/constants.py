"""What the cost model assumes beside measured bandwidths: overheads of a layer, shares of a peak.

The defaults come from measurements on other machines, and on this one where it was measured how long a
layer takes, and what CPU and buses reach together. `planning/fitting.py` replaces them by what a loaded model was measured to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from llm_magic.machine import Device, Machine
from llm_magic.model import ModelLayout
from llm_magic.planning.packed import kernel_of, numbers_per_s
from llm_magic.units import MIB

AHEAD_BYTES = 256 * MIB
"""Weights of layers that the CPU computes in one call: for some hundredths of a second, in which nobody can interrupt."""

_WITH_STATES, _PACKED, _RECURRENT = 0.95, 0.6, 0.6
"""Of the speed of products and of the rest of a prompt together.

The second where weights are unpacked for it, and nobody knows how fast; the last of layers with recurrent states. Measured
(Xeon with AMX): 0.9 to 1.05 with Llama layers of 576 to 4,096 and 512 to 2,048 tokens, 0.53 to 0.7 of the products alone with
packed weights, 0.53 to 0.61 with layers of Qwen3.5; Gemma 3's, with twice as many norms, reach 0.6. Experts, with few tokens
for each, reach a third and less: nothing is known of them.
"""


def _between(least: float, most: float, default: float) -> Any:
    return field(default=default, metadata={"least": least, "most": most})


@dataclass(frozen=True)
class Constants:
    """Overheads and efficiencies of one machine.

    Attributes
    ----------
    cpu_layer_s, gpu_layer_s
        Seconds of Python and launches for one eager transformers layer. On a CPU they come on top of
        the reads (30 layers of 7 MB on two cores: 23 ms, 9 more than the reads), on a GPU kernels are
        queued ahead and the longer one counts (32 layers on an H100: 34 ms).
    captured_layer_s
        Seconds of a captured layer beyond the read of its weights: norms, rotary embedding, residuals
        (32 layers and a head of 15.0 GB on an H100 that reads 3,107 GB/s: 9.3 ms, 4.5 more than the
        reads; divided by 32). An eager layer has the same, beside its launches.
    cpu_share, gpu_share
        Of the measured read speed, what the layers reach.
    cpu_beside_bus
        Of its read speed, what the CPU keeps while copies run and their driver takes cores (measured on
        an 8-channel Xeon: 42–46 of 52–72 GB/s; two channels keep less).
    packed_cpu_share, packed_gpu_share
        Factors on what the kernel that computes with packed weights reaches (see `packed.share_of`).
    bus_share, disk_share
        Of the measured bandwidth, what pipelined copies and reads reach (96–100 % of the bus).
    page_cache_share
        Of the CPU's read speed, what it reaches on blocks that it uses in the page cache.
    dram_factor
        All that RAM gives to CPU and buses together, as a multiple of what the faster one reaches
        alone (measured: 92–99 GB/s beside 52–67 alone).
    cpu_prefill, gpu_prefill
        Of the measured operations per second, what the matrix products of a prefill reach; of a CPU of which it is
        known what else layers do with a prompt, of the speed of both.
    """

    cpu_layer_s: float = _between(0.0, 20e-3, 0.3e-3)
    gpu_layer_s: float = _between(0.05e-3, 20e-3, 1.0e-3)
    captured_layer_s: float = _between(0.0, 5e-3, 0.14e-3)
    cpu_share: float = _between(0.05, 2.0, 1.0)
    gpu_share: float = _between(0.05, 2.0, 1.0)
    cpu_beside_bus: float = _between(0.1, 1.0, 0.7)
    packed_cpu_share: float = _between(0.02, 20.0, 1.0)
    packed_gpu_share: float = _between(0.02, 20.0, 1.0)
    bus_share: float = _between(0.3, 1.2, 0.97)
    disk_share: float = _between(0.1, 4.0, 0.9)
    page_cache_share: float = _between(0.05, 2.0, 0.9)
    dram_factor: float = _between(1.0, 8.0, 2.0)
    cpu_prefill: float = _between(0.02, 2.0, 0.4)
    gpu_prefill: float = _between(0.02, 2.0, 0.5)

    def to_json(self) -> dict[str, float]:
        """Name -> value, to be written to a file."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @staticmethod
    def of(machine: Machine, layout: ModelLayout | None = None) -> Constants:
        """The defaults, with what was measured of layers on the machine's devices, and of devices together.

        Parameters
        ----------
        layout
            Whose layers they are; ``None`` for such as are computed when they are called.
        """
        constants = Constants()
        gpu_s = max((gpu.layer_s for gpu in machine.gpus), default=0.0)
        if gpu_s:
            constants = constants.changed("gpu_layer_s", gpu_s)
        if machine.has("cpu"):
            constants = _of_cpu(constants, machine.device("cpu"), layout)
        return _of_both(constants, machine)

    @staticmethod
    def from_json(data: object, otherwise: Constants | None = None) -> Constants:
        """What ``to_json`` wrote; ``otherwise`` for everything that is missing or is no sane number."""
        otherwise = otherwise or Constants()
        if not isinstance(data, Mapping):
            return otherwise
        sane = {name: value for name, value in data.items() if _is_sane(name, value)}
        return replace(otherwise, **sane)

    def changed(self, name: str, value: float) -> Constants:
        """These constants with one of them set, within its sane range."""
        least, most = limits(name)
        return replace(self, **{name: min(max(value, least), most)})


def _of_cpu(constants: Constants, cpu: Device, layout: ModelLayout | None) -> Constants:
    """With what was measured of its layers."""
    if cpu.layer_s:
        layer_s = cpu.layer_s if layout is None else _layer_s(cpu, layout)
        constants = constants.changed("cpu_layer_s", layer_s)
    has_experts = layout is not None and any(block.experts for block in layout.layers)
    if cpu.state_s and not has_experts:
        constants = constants.changed("cpu_prefill", _prefill(cpu, layout))
    return constants


def _prefill(cpu: Device, layout: ModelLayout | None) -> float:
    if layout is None:
        return _WITH_STATES
    if layout.details.get("keeps_states"):
        return _RECURRENT
    is_known = not layout.quantization or numbers_per_s(kernel_of(layout), cpu)
    return _WITH_STATES if is_known else _PACKED


def _layer_s(cpu: Device, layout: ModelLayout) -> float:
    """A layer's overhead where some that follow one another are one call, of which the first one waits for Python.

    That is not for layers with recurrent states, or with masks of several kinds; and kernels make that call.
    """
    one_by_one = any(layout.details.get(why) for why in ("keeps_states", "eager", "no_cpu_kernels"))
    if not cpu.ahead_s or one_by_one or len({block.cache.window for block in layout.layers}) > 1:
        return cpu.layer_s
    largest = max((block.bytes_per_token for block in layout.layers), default=0)
    together = max(1, min(AHEAD_BYTES // max(1, largest), len(layout.layers)))
    return cpu.ahead_s + max(0.0, cpu.layer_s - cpu.ahead_s) / together


def _of_both(constants: Constants, machine: Machine) -> Constants:
    """With what the CPU and the buses were measured to reach at once."""
    cpu = machine.device("cpu") if machine.has("cpu") else None
    buses = [link for link in machine.links if link.source == "cpu" and link.beside_bytes_per_s]
    if cpu is None or not (cpu.read_bytes_per_s and cpu.beside_bytes_per_s and buses):
        return constants
    together = cpu.beside_bytes_per_s + sum(bus.beside_bytes_per_s for bus in buses)
    fastest = max(cpu.read_bytes_per_s, *(bus.bytes_per_s for bus in buses))
    constants = constants.changed("cpu_beside_bus", cpu.beside_bytes_per_s / cpu.read_bytes_per_s)
    return constants.changed("dram_factor", together / fastest)


_FIELDS: dict[str, Field[Any]] = {each.name: each for each in fields(Constants)}


def limits(name: str) -> tuple[float, float]:
    """The least and the most that a constant may be."""
    return _FIELDS[name].metadata["least"], _FIELDS[name].metadata["most"]


def _is_sane(name: object, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(name, str) or name not in _FIELDS or not is_number:
        return False
    least, most = limits(name)
    return bool(least <= value <= most)  # NaN is not
