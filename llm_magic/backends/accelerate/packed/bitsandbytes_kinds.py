"""How parameters of bitsandbytes come apart, of 4 bits and of 8."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llm_magic.backends.accelerate.packed.kinds import Kind
from llm_magic.backends.accelerate.packed.templates import Assignment, Parts, Template
from llm_magic.backends.accelerate.packed.weights import floats_of_rows


class FourBitKind(Kind):
    """Four bits, and statistics that may be packed themselves."""

    def tensors(self, module: Any, name: str) -> Parts:
        parameter = module._parameters[name]
        state = _state(module, parameter)
        found = {"": parameter.data, "absmax": state.absmax}
        if state.nested:
            found |= {"offset": state.offset, "state2.absmax": state.state2.absmax}
        return found

    def template(self, module: Any, name: str) -> Template:
        parameter = module._parameters[name]
        state = copy.copy(_state(module, parameter))
        tensors = self.shapes(module, name)
        state.absmax = state.offset = None  # bytes: they travel
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax = None
        options = {
            key: getattr(parameter, key)
            for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        return _FourBitTemplate(module, name, tensors, state, options)


def _state(module: Any, parameter: Any) -> Any:
    # The library keeps it in both places, and looks in the module when the parameter has lost it.
    state = (
        parameter.quant_state if parameter.quant_state is not None else getattr(module, "quant_state", None)
    )
    if state is None:
        raise ValueError("This 4-bit weight was not packed yet.")
    return state


@dataclass(frozen=True)
class _FourBitTemplate(Template):
    state: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def on(self, device: Any) -> Template:
        state = copy.copy(self.state)
        state.code = _constant(state.code, device)
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.code = _constant(state.state2.code, device)
        return replace(self, state=state)

    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        import torch

        count, (rows, columns) = len(stacks[""]), self.state.shape
        if self.state.nested or rows * columns % self.state.blocksize:
            return super().unpacked(stacks, dtype)
        numbers = torch.ops.bitsandbytes.dequantize_4bit.default(  # as if they were one
            stacks[""].reshape(-1, 1),
            stacks["absmax"].flatten(),
            self.state.blocksize,
            self.state.quant_type,
            (count * rows, columns),
            dtype,
        )
        return numbers.view(count, rows, columns)

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        from bitsandbytes.nn import Params4bit

        device = parts[""].device
        state = copy.copy(self.state)
        state.absmax, state.code = parts["absmax"], _constant(state.code, device)
        if state.nested:
            state.offset, inner = parts["offset"], copy.copy(state.state2)
            inner.absmax, inner.code = parts["state2.absmax"], _constant(inner.code, device)
            state.state2 = inner
        packed = Params4bit(
            parts[""],
            requires_grad=False,
            quant_state=state,
            module=self.module,
            bnb_quantized=True,
            **self.options,
        )
        return [
            (self.module._parameters, self.name, packed),
            (self.module.__dict__, "quant_state", state),
            # Or its forward would look for a new order of the weight, and put it elsewhere.
            (self.module.__dict__, "support_avx512bf16_for_cpu", False),
        ]


def _constant(table: Any, device: Any) -> Any:
    # Kept when the rest goes: whoever makes a template of an empty parameter needs it again.
    return table if device.type == "meta" else table.to(device)


class EightBitKind(Kind):
    """Eight bits, and a scale for each row."""

    def tensors(self, module: Any, name: str) -> Parts:
        parameter = module._parameters[name]
        # The first forward moves them from the weight to the module's state.
        scales = parameter.SCB if parameter.SCB is not None else module.state.SCB
        if scales is None:
            raise ValueError("This 8-bit weight was not packed yet.")
        return {"": parameter.data, "SCB": scales}

    def template(self, module: Any, name: str) -> Template:
        return _EightBitTemplate(module, name, self.shapes(module, name))


@dataclass(frozen=True)
class _EightBitTemplate(Template):
    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        return floats_of_rows(stacks[""], stacks["SCB"], dtype)

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        from bitsandbytes.nn import Int8Params

        state = self.module.state.__dict__
        # Where a forward expects them from the second one on; it then moves nothing.
        packed = Int8Params(parts[""], requires_grad=False, has_fp16_weights=False, SCB=parts["SCB"])
        return [
            (self.module._parameters, self.name, packed),
            (state, "CB", parts[""]),
            (state, "SCB", parts["SCB"]),
        ]
