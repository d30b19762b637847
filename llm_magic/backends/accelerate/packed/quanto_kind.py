"""How parameters of optimum.quanto come apart, and get the order that a device's kernel reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.packed import int4_orders, tinygemm
from llm_magic.backends.accelerate.packed.guests import as_a_guest, guest_class, is_a_guest
from llm_magic.backends.accelerate.packed.kinds import Ordered, parameter_of
from llm_magic.backends.accelerate.packed.quanto_integers import is_in_bytes, packed_now, torch_packed
from llm_magic.backends.accelerate.packed.templates import Assignment, Parts, Template, bind


class QuantoKind(Ordered):
    """A tensor subclass, whose tensors may be such again."""

    def is_needed(self, module: Any, name: str) -> bool:
        return bool(module._parameters[name].qtype.name == "qint4")

    def tensors(self, module: Any, name: str) -> Parts:
        return dict(_leaves(module._parameters[name], ""))

    def template(self, module: Any, name: str) -> Template:
        tensors = self.shapes(module, name)
        return _QuantoTemplate(module, name, tensors, _shell(module._parameters[name]))

    def arrange(self, module: Any, name: str, device: Any, fresh: bool) -> None:
        from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor as TinyGemm

        weight, target = module._parameters[name], None
        if isinstance(weight, TinyGemm):
            if not tinygemm.has_kernel(device):
                target = tinygemm.as_integers(weight)
            elif int4_orders.is_for_cuda(weight._data._data) != (device.type == "cuda"):
                target = tinygemm.in_other_order(weight)
        elif fresh and tinygemm.fits(weight) and tinygemm.has_kernel(device):
            target = tinygemm.ordered(weight, device)
        elif fresh and is_in_bytes(weight):
            target = packed_now(weight)
        if target is not None:
            module._parameters[name] = parameter_of(target)
            bind(self.template(module, name).bindings(self.parts(module, name)))


def _leaves(tensor: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    import torch

    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if type(inner) is torch.Tensor:
            yield prefix + name, inner
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


@dataclass(frozen=True)
class _Shell:
    """A tensor subclass without its tensors: what rebuilds it, and the shells of what is inside."""

    kind: Any
    meta: Mapping[str, Any]
    inner: Mapping[str, _Shell | None]

    def fill(self, parts: Mapping[str, Any], prefix: str = "") -> Any:
        tensors = {
            name: parts[prefix + name] if shell is None else shell.fill(parts, f"{prefix}{name}.")
            for name, shell in self.inner.items()
        }
        return self.kind.__tensor_unflatten__(tensors, dict(self.meta), None, None)


def _shell(tensor: Any) -> _Shell:
    import torch
    from optimum.quanto.tensor.packed import PackedTensor

    names, meta = tensor.__tensor_flatten__()
    kind = torch_packed() if type(tensor) is PackedTensor else type(tensor)
    if isinstance(tensor, guest_class()):
        kind = kind.__base__  # it is none where it lives
    tensors = {name: getattr(tensor, name) for name in names}
    inner = {name: None if type(part) is torch.Tensor else _shell(part) for name, part in tensors.items()}
    return _Shell(kind, meta, inner)


@dataclass(frozen=True)
class _QuantoTemplate(Template):
    shell: _Shell | None = None

    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        if set(stacks) != {"_data", "_scale"}:
            return super().unpacked(stacks, dtype)
        return stacks["_data"].to(dtype) * stacks["_scale"]

    def weight(self, parts: Mapping[str, Any]) -> Any:
        assert self.shell is not None  # no parameter, which cannot be made of these in inference mode
        made = self.shell.fill(parts)
        return as_a_guest(made) if is_a_guest(made) else made

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        return [(self.module._parameters, self.name, parameter_of(self.weight(parts)))]
