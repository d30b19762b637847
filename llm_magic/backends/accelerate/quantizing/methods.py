"""The ways in which linear layers are packed: which there are, and where each of them can be computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_magic.backends.accelerate.quantizing import libraries
from llm_magic.errors import OptionError, PlanError
from llm_magic.options import AS_NUMBERS

BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit formats."""


@dataclass(frozen=True)
class Method:
    """A way in which linear layers are packed.

    Every method can be offloaded: its parts are plain tensors, which travel as they are.

    Attributes
    ----------
    name
        As in ``--quantize NAME``.
    library
        Module that packs and computes; nothing for floats that are taken from checkpoints, and that nobody packs here.
    bits
        Of one weight, without its share of the statistics.
    devices
        Types of torch devices that can compute with it.
    """

    name: str
    library: str
    bits: int
    devices: tuple[str, ...] = ("cpu", "cuda", "xpu", "mps")


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("nf4", "bitsandbytes", 4),
        Method("fp4", "bitsandbytes", 4),
        Method("int8", "bitsandbytes", 8),
        Method("int4", "optimum.quanto", 4),
        Method("int2", "optimum.quanto", 2),
        Method("float8", "optimum.quanto", 8, ("cpu", "cuda", "xpu")),
        Method("quanto-int8", "optimum.quanto", 8),
    )
}
_PUBLISHED: Mapping[str, Method] = {
    method.name: method for method in (Method("mxfp4", "", 4), Method("fp8", "", 8, ("cpu", "cuda", "xpu")))
}
"""Those of checkpoints that are kept as they are; nothing here packs weights so."""


def find_method(name: str, option: str = "--quantize") -> Method:
    """The method of this name, for an option; ``int8`` is quanto's where only that library is installed.

    Raises
    ------
    OptionError
        When there is no such method, or its library is not installed.
    """
    choose = f"Choose one of {', '.join(METHODS)}."
    if name in _PUBLISHED:
        raise OptionError(
            f"{name} is what some checkpoints are published in; nothing here packs weights so.", choose
        )
    if name not in METHODS:
        raise OptionError(f"{name!r} is no way to pack weights.", choose)
    method = METHODS[name]
    if name == "int8" and not libraries.installed(method.library) and libraries.installed("optimum.quanto"):
        return METHODS["quanto-int8"]
    libraries.require(method.library, f"{option} {name} needs {method.library}, which")
    return method


def method_of(name: str) -> Method:
    """The method of this name by which layers are packed, or were before, when their checkpoint was made.

    Raises
    ------
    OptionError
        As `find_method`.
    """
    return _PUBLISHED[name] if name in _PUBLISHED else find_method(name)


def has_gpu_kernel(name: str) -> bool:
    """Whether what multiplies weights of a method with a token on a GPU is installed; ``mxfp4`` does without it, slowly."""
    return name != "mxfp4" or libraries.installed("bitsandbytes")


def refuse_devices(name: str, devices: set[str]) -> None:
    """Refuse, before anything is loaded, a placement that computes where the method cannot.

    Parameters
    ----------
    devices
        Torch device names of the placement's ``compute``, such as ``{"cuda:0", "cpu"}``.

    Raises
    ------
    PlanError
        With the device, and the methods that can.
    """
    for device in sorted(devices):
        kind = device.partition(":")[0]
        if kind not in method_of(name).devices:
            able = [method.name for method in METHODS.values() if kind in method.devices]
            able = [AS_NUMBERS] if name in _PUBLISHED else able
            raise PlanError(
                f"{name} weights cannot be computed on {device}.",
                f"Use --quantize {' or '.join(able)}." if able else "Leave out --quantize.",
            )
