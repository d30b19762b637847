"""Weights in floats of 4 or 8 bits, some of which share a scale, as makers of models publish them.

=========  ====================================================  =======================================
method     entries                                               scales
=========  ====================================================  =======================================
``mxfp4``  floats of 4 bits (E2M1), uint8 ``[out, in / 2]``,     exponents of 2, more by 127 (E8M0),
           the first of two in the low half                      uint8 ``[out, in / 32]``
``fp8``    floats of 8 bits (E4M3), as uint8 ``[out, in]``       float32 ``[out, in / group]``
=========  ====================================================  =======================================

They need no library. The CPU reads them as they lie; elsewhere they become numbers first, but for the product of a
token with ``mxfp4``, for which bitsandbytes has a kernel that takes any table of 16 numbers.

Sources: OCP Microscaling Formats (MX) Specification, version 1.0; DeepSeek-V3 Technical Report, section 3.3.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llm_magic.backends.accelerate.kernels.cpu_products import MXFP4_NUMBERS
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.packed.prepacked_stacks import MXFP4_GROUP
from llm_magic.units import MIB

_AT_A_TIME = 64 * MIB
"""Of numbers that a layer has at a time, of some of its rows."""


@dataclass(frozen=True)
class Form:
    """How the entries of a matrix lie, and what of them shares a scale.

    Attributes
    ----------
    method
        ``"mxfp4"`` or ``"fp8"``.
    rows, columns
        ``(out, in)``.
    group
        Columns that share a scale.
    """

    method: str
    rows: int
    columns: int
    group: int

    @property
    def bytes(self) -> int:
        """Of a matrix, its scales included."""
        groups = self.rows * self.columns // self.group
        count = self.rows * self.columns
        return count // 2 + groups if self.method == "mxfp4" else count + 4 * groups

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries and scales without bytes."""
        is_four, groups = self.method == "mxfp4", self.columns // self.group
        columns, of_scales = (self.columns // 2, torch.uint8) if is_four else (self.columns, torch.float32)
        return (
            torch.empty(self.rows, columns, dtype=torch.uint8, device="meta"),
            torch.empty(self.rows, groups, dtype=of_scales, device="meta"),
        )

    def numbers(self, data: Any, scales: Any, dtype: torch.dtype) -> Any:
        """What entries ``[..., bytes]`` and scales ``[..., groups]`` stand for: ``[..., in]``."""
        found: Any
        if self.method == "mxfp4":
            found = torch.nn.functional.embedding(data.int(), _pairs(data.device, dtype)).flatten(-2)
        else:
            found = data.view(torch.float8_e4m3fn).to(dtype)
        found.unflatten(-1, (-1, self.group)).mul_(self.factors(scales).unsqueeze(-1))
        return found

    def factors(self, scales: Any) -> Any:
        """Scales as float32."""
        return (scales.int() << 23).view(torch.float32) if self.method == "mxfp4" else scales


class ScaledFloats(torch.nn.Parameter):
    """The packed weight of a linear layer: its entries are the parameter.

    Attributes
    ----------
    scales, form
        The rest of it.
    """

    scales: torch.Tensor
    form: Form

    def __new__(cls, data: Any, scales: Any, form: Form) -> ScaledFloats:
        """The tensors are neither copied nor moved."""
        made: ScaledFloats = torch.Tensor._make_subclass(cls, data, False)
        made.scales, made.form = scales, form
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaledFloats:
        """As of other parameters."""
        if id(self) not in memo:
            memo[id(self)] = ScaledFloats(self.entries.clone(), self.scales.clone(), self.form)
        made: ScaledFloats = memo[id(self)]
        return made

    @property
    def entries(self) -> torch.Tensor:
        """As torch's own tensor."""
        return self.detach().as_subclass(torch.Tensor)


class ScaledLinear(torch.nn.Linear):
    """A linear layer whose weight is `ScaledFloats`, once it has one."""

    def __init__(self, like: torch.nn.Linear, method: str, group: int) -> None:
        """In place of a layer without bytes; ``group`` is 0 where all of a row shares a scale."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight, self.bias = like.weight, like.bias
        self.form = Form(method, self.out_features, self.in_features, group or self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  as torch names it
        """As torch's layer: states ``[..., in]``, answers ``[..., out]``."""
        outputs: torch.Tensor = product(input, self.weight)
        return outputs if self.bias is None else outputs + self.bias


def product(states: Any, weight: Any) -> Any:
    """States ``[..., in]`` times `ScaledFloats`: ``[..., out]``."""
    form: Form = weight.form
    entries, scales = weight.entries, weight.scales
    table = _table_of_kernel(states) if form.method == "mxfp4" and states.numel() == form.columns else None
    if table is not None:
        return _by_bitsandbytes(states, entries, form.factors(scales), form, table)
    step = max(1, _AT_A_TIME // (form.columns * states.dtype.itemsize))
    parts = zip(entries.split(step), scales.split(step), strict=True)
    outputs = [torch.nn.functional.linear(states, form.numbers(*part, states.dtype)) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


# ------------------------------------------------------------------------------------------- a GPU's kernel


def _table_of_kernel(states: Any) -> Any:
    """What bitsandbytes' kernel is to look numbers up in; ``None`` where it does not multiply right, or nobody knows.

    It says of no table but its own that it takes it. So it is tried once on each GPU, where the host may wait for that.
    """
    key = (states.device, states.dtype)
    if states.device.type != _KIND or (is_looked_at() and not torch.compiler.is_compiling()):
        return None
    if key not in _TABLES and "bitsandbytes" in sys.modules and not is_looked_at():
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        _TABLES[key] = _tried(*key)
    return _TABLES.get(key)


_KIND = "cuda"
"""Type of the devices that it is for."""
_TABLES: dict[tuple[torch.device, torch.dtype], Any] = {}
"""What was found."""


def _tried(device: torch.device, dtype: torch.dtype) -> Any:
    form = Form("mxfp4", 64, 256, MXFP4_GROUP)
    count = form.rows * form.columns // 2
    entries = (torch.arange(count, device=device) * 37 % 251).to(torch.uint8).view(form.rows, -1)
    scales = (torch.arange(count // 16, device=device) % 7 + 124).to(torch.uint8).view(form.rows, -1)
    states = torch.arange(form.columns, device=device).remainder(13).sub(6).to(dtype).view(1, -1)
    with torch.inference_mode(mode=False):
        table = torch.tensor(MXFP4_NUMBERS, dtype=torch.float32, device=device)
    try:
        found = _by_bitsandbytes(states, entries, form.factors(scales), form, table)
    except torch.OutOfMemoryError:  # says nothing of it
        raise
    except (RuntimeError, ValueError, AttributeError):  # an older one, or one without kernels for this GPU
        return None
    expected = torch.nn.functional.linear(states, form.numbers(entries, scales, dtype))
    is_right = bool(torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.5))
    return table if is_right else None


def _by_bitsandbytes(states: Any, entries: Any, scales: Any, form: Form, table: Any) -> Any:
    """A token's product, by a kernel that takes the high half of a byte for the first: so neighbours change places."""
    multiply: Any = torch.ops.bitsandbytes.gemv_4bit.default
    turned = states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    shape = (form.rows, form.columns)
    return multiply(turned, entries.reshape(-1, 1), shape, scales.flatten(), table, form.group)


def _pairs(device: torch.device, dtype: torch.dtype) -> Any:
    """The two numbers of every byte ``[256, 2]``."""
    return _made_pairs(device, dtype) if is_looked_at() else _kept_pairs(device, dtype)


def _made_pairs(device: torch.device, dtype: torch.dtype) -> Any:
    pairs = [(MXFP4_NUMBERS[byte & 15], MXFP4_NUMBERS[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=dtype, device=device)


@cache
def _kept_pairs(device: torch.device, dtype: torch.dtype) -> Any:
    with torch.inference_mode(mode=False):
        return _made_pairs(device, dtype)
