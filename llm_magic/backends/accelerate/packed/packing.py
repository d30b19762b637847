"""One parameter and the plain tensors that it is made of.

A block travels as bytes in one flat buffer, so every parameter in it must come apart into plain
tensors and be put together again around views of another buffer. A plain weight is its own single
part; a packed one (bitsandbytes, optimum.quanto, scaled floats) has its data and its statistics. What is
left when the parts are taken away is a ``Template``: shapes, dtypes, code tables, classes. It makes the
assignments that bind given tensors into the module, once for every buffer; a sweep then only runs
those assignments, so that nothing is packed, copied or allocated while tokens are made.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol, runtime_checkable

from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights
from llm_magic.backends.accelerate.packed import int4_orders
from llm_magic.planning.packed import INT4_GROUPS

Parts = dict[str, Any]
"""Plain contiguous tensors by the name of what they are in their parameter; ``""`` is the data."""

_AT_A_TIME = 1 << 22
"""Weights that are put into another order at a time."""

_BYTE = 8
"""Bits that quanto's integers have which came from a checkpoint, until `arrange` packs them."""

Assignment = tuple[dict[str, Any], str, object]
"""``(mapping, key, value)``: binding is ``mapping[key] = value``."""


@dataclass(frozen=True)
class Template(ABC):
    """A parameter without its bytes.

    Attributes
    ----------
    module, name
        The parameter is ``module.name``.
    tensors
        Shape and torch dtype of every part, in the order of ``parts``.
    """

    module: Any
    name: str
    tensors: Mapping[str, tuple[tuple[int, ...], Any]]

    @property
    def bytes(self) -> int:
        """Bytes of all parts, without padding between them."""
        total = 0
        for shape, dtype in self.tensors.values():
            count = dtype.itemsize
            for extent in shape:
                count *= extent
            total += count
        return total

    @abstractmethod
    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        """What to assign so that the module computes with ``parts``, which are neither copied nor moved.

        The parts must have the shapes and dtypes of ``tensors`` and lie on one device.
        """

    def on(self, device: Any) -> Template:  # noqa: ARG002
        """The same with what else it holds on ``device``: nothing is copied when a weight is made there then."""
        return self

    def weight(self, parts: Mapping[str, Any]) -> Any:
        """What ``parts`` make, without putting it into its module."""
        return next(value for _, key, value in self.bindings(parts) if key == self.name)

    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        """Several weights as numbers of ``dtype`` ``[n, out, in]``; ``stacks`` are their parts ``[n, ...]``.

        Their bytes must lie in the order that GPUs read.
        """
        import torch

        count = len(next(iter(stacks.values())))
        alone = ({part: stack[i] for part, stack in stacks.items()} for i in range(count))
        return torch.stack([_numbers(self.weight(parts)).to(dtype) for parts in alone])

    def empty(self) -> list[Assignment]:
        """What to assign so that the module holds no bytes: the same parameter on the meta device."""
        import torch

        return self.bindings(
            {
                part: torch.empty(shape, dtype=dtype, device="meta")
                for part, (shape, dtype) in self.tensors.items()
            }
        )


def parts(module: Any, name: str) -> Parts:
    """The plain tensors of ``module.name``; contiguous, and sharing its memory where it is.

    ==================  =========================================================================
    plain               ``""``
    bitsandbytes 4-bit  ``""``, ``absmax``; with packed statistics also ``offset``, ``state2.absmax``
    bitsandbytes 8-bit  ``""`` and ``SCB``
    optimum.quanto      the inner tensors: ``_data`` (or ``_data._data``), ``_scale``, ``_shift``, …
    scaled floats       ``""`` and ``scales``
    ==================  =========================================================================

    Raises
    ------
    ValueError
        When the parameter is of a packed kind and was not packed yet, or of an unknown kind.
    """
    return {part: _plain(tensor) for part, tensor in _kind(module, name).parts(module, name).items()}


def template(module: Any, name: str) -> Template:
    """What is left of ``module.name`` without its bytes.

    Raises
    ------
    ValueError
        As ``parts``.
    """
    return _kind(module, name).template(module, name)


def multiplied(tokens: Any, packed: Any) -> Any:
    """``tokens`` ``[..., in]`` times a packed weight ``(out, in)``, by the kernels of its library.

    As its linear layer computes; but 8-bit integers of bitsandbytes become floats first, where that layer
    multiplies large activations apart, for which it asks the host.
    """
    import torch

    state = getattr(packed, "quant_state", None)
    if state is not None:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(tokens, packed, quant_state=state)
    if hasattr(packed, "form"):
        return scaled_floats().product(tokens, packed)
    if type(packed).__name__ == "Int8Params":
        packed = _floats(packed.data, packed.SCB, tokens.dtype)
    return torch.nn.functional.linear(tokens, packed)


def packed_weights(packed: Any) -> PackedWeights | None:
    """A packed weight as our kernels for the CPU take it; ``None`` where they do not know its kind."""
    if (state := getattr(packed, "quant_state", None)) is not None:
        rows, columns = state.shape
        if state.nested:
            return None
        return PackedWeights(state.quant_type, packed, state.absmax, None, rows, columns, state.blocksize)
    if type(packed).__name__ == "Int8Params":
        rows, columns = packed.shape
        return PackedWeights("int8", packed, packed.SCB, None, rows, columns, factor=1 / 127)
    if (form := getattr(packed, "form", None)) is not None:
        kind, group = _KINDS_OF_FLOATS[form.method], form.group if form.group < form.columns else 0
        return PackedWeights(kind, packed, packed.scales, None, form.rows, form.columns, group)
    return _packed_by_quanto(packed) if hasattr(packed, "qtype") else None


def _packed_by_quanto(packed: Any) -> PackedWeights | None:
    kind, (rows, columns) = _QUANTO_KINDS.get(packed.qtype.name), packed.shape
    if kind is None or packed.axis != 0:
        return None
    if hasattr(packed, "_scale_shift"):
        data, group, block = packed._data._data, packed._group_size, int4_orders.block_in_halves()
        is_read = block and not int4_orders.is_for_cuda(data)
        of_rows = packed._scale_shift
        return (
            PackedWeights(kind, data, of_rows, None, rows, columns, group, block=block) if is_read else None
        )
    if kind in ("int8", "float8"):
        return PackedWeights(kind, packed._data, packed._scale, None, rows, columns)
    if rows % (8 // packed.qtype.bits):  # then the parts that share bytes begin within a row
        return None
    data, group = getattr(packed._data, "_data", packed._data), packed._group_size or columns
    return PackedWeights(kind, data, packed._scale, packed._shift, rows, columns, group)


_KINDS_OF_FLOATS = {"mxfp4": "mxfp4", "fp8": "float8"}
_QUANTO_KINDS = {"qint8": "int8", "qfloat8_e4m3fn": "float8", "qint4": "int4", "qint2": "int2"}


def _numbers(packed: Any) -> Any:
    state = getattr(packed, "quant_state", None)
    if state is None:
        return _tinygemm_numbers(packed) if hasattr(packed, "_scale_shift") else packed.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, state)


def bind(assignments: list[Assignment]) -> None:
    """Run assignments: dictionary writes only."""
    for mapping, key, value in assignments:
        mapping[key] = value


def parameters(block: Any) -> Iterator[tuple[str, Any, str]]:
    """``(dotted name, owner, leaf)`` of every parameter of a block; a shared one once."""
    seen: set[int] = set()
    for path, module in block.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{leaf}" if path else leaf), module, leaf


def arrange(block: Any, device: Any, *, fresh: bool = False) -> None:
    """Put the packed parameters of ``block`` into the order that the kernels of ``device`` read.

    Values and number of bytes stay the same. One kernel wants an order of its own: torch's for 4-bit
    quanto in bfloat16, whose CPU and CUDA orders differ. Do it when another kind of device is to
    compute the block, never in a sweep. The parameters must hold their bytes; new tensors replace
    those whose order changes. They are in RAM when a GPU's kernel reads one of the orders, and on
    ``device`` when the weights are fresh.

    Parameters
    ----------
    device
        The torch device that will compute the block.
    fresh
        The weights were packed just now, and may still take a kernel's own statistics: quanto's
        are rounded once more for it.
    """
    for _, module, leaf in list(parameters(block)):
        if leaf in module._parameters:  # parts of a stack may have changed with the first of them
            arrange_one(module, leaf, device, fresh=fresh)


def arrange_one(module: Any, name: str, device: Any, *, fresh: bool = False) -> None:
    """As `arrange`, for ``module.name`` alone."""
    import torch

    kind = _kind(module, name)
    if isinstance(kind, _Ordered):
        kind.arrange(module, name, torch.device(device), fresh)


def has_order(module: Any, name: str) -> bool:
    """Whether some devices want the bytes of ``module.name`` in an order of their own."""
    kind = _kind(module, name)
    return isinstance(kind, _Ordered) and kind.is_needed(module, name)


# ------------------------------------------------------------------------------- kinds of parameters


class _Kind(ABC):
    """How one library keeps a parameter."""

    @abstractmethod
    def parts(self, module: Any, name: str) -> Parts: ...

    @abstractmethod
    def template(self, module: Any, name: str) -> Template: ...


class _Ordered(_Kind):
    """A kind whose bytes some devices want in an order of their own."""

    @abstractmethod
    def is_needed(self, module: Any, name: str) -> bool:
        """Whether this parameter is of that sort, on this computer."""

    @abstractmethod
    def arrange(self, module: Any, name: str, device: Any, fresh: bool) -> None: ...


def _kind(module: Any, name: str) -> _Kind:
    import torch

    parameter = module._parameters[name]
    if isinstance(module, Stacked):
        return _StackKind()
    # Whoever holds a packed parameter has imported its library: ours to look at, not to import.
    if (library := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(parameter, library.nn.Params4bit):
            return _FourBitKind()
        if isinstance(parameter, library.nn.Int8Params):
            return _EightBitKind()
    if (library := sys.modules.get("optimum.quanto")) is not None and isinstance(parameter, library.QTensor):
        return _QuantoKind()
    if isinstance(parameter, scaled_floats().ScaledFloats):
        return _ScaledKind()
    if type(parameter) not in (torch.nn.Parameter, torch.Tensor):
        raise ValueError(f"{name} is a {type(parameter).__name__}, whose bytes nobody here can take apart.")
    return _PlainKind()


def _plain(tensor: Any) -> Any:
    """The tensor itself, without a subclass and without gaps."""
    import torch

    data = tensor.detach() if type(tensor) is torch.Tensor else tensor.data.as_subclass(torch.Tensor)
    return data.contiguous()


def _shapes(tensors: Parts) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in tensors.items()}


class _PlainKind(_Kind):
    def parts(self, module: Any, name: str) -> Parts:
        return {"": module._parameters[name]}

    def template(self, module: Any, name: str) -> Template:
        return _PlainTemplate(module, name, _shapes(self.parts(module, name)))


@dataclass(frozen=True)
class _PlainTemplate(Template):
    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        return [(self.module._parameters, self.name, _parameter(parts[""]))]


# ----------------------------------------------------------------------- stacks of packed matrices


@runtime_checkable
class Stacked(Protocol):
    """A module whose parameters are the parts of packed matrices, stacked.

    Attributes
    ----------
    linear
        A packed layer of such a matrix, without bytes.
    template
        What is left of one of the matrices, as its bytes lie now.
    known
        What was made of the parameters; to be forgotten with them.
    """

    linear: Any
    template: Template | None
    known: Any

    def arrange(self, device: Any) -> None:
        """Put all matrices into the order that the kernels of ``device`` read; nothing when they are."""


class _StackKind(_Ordered):
    def is_needed(self, module: Any, _name: str) -> bool:
        return has_order(module.linear, "weight")

    def parts(self, module: Any, name: str) -> Parts:
        return {"": module._parameters[name]}

    def template(self, module: Any, name: str) -> Template:
        return _StackTemplate(module, name, _shapes(self.parts(module, name)), module.template)

    def arrange(self, module: Any, name: str, device: Any, _fresh: bool) -> None:
        if name == next(iter(module._parameters)):  # all parts at once
            module.arrange(device)


@dataclass(frozen=True)
class _StackTemplate(Template):
    matrix: Template

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        return [
            (self.module._parameters, self.name, _parameter(parts[""])),
            (self.module.__dict__, "template", self.matrix.on(parts[""].device)),
            (self.module.__dict__, "known", None),
        ]


def _parameter(data: Any) -> Any:
    import torch

    return torch.nn.Parameter(data, requires_grad=False)


# ------------------------------------------------------------------------------------ scaled floats


def scaled_floats() -> Any:
    """The module of that name, whose classes are torch's."""
    from llm_magic.backends.accelerate.packed import scaled_floats

    return scaled_floats


class _ScaledKind(_Kind):
    def parts(self, module: Any, name: str) -> Parts:
        weight = module._parameters[name]
        return {"": weight.entries, "scales": weight.scales}

    def template(self, module: Any, name: str) -> Template:
        shapes = _shapes(self.parts(module, name))
        return _ScaledTemplate(module, name, shapes, module._parameters[name].form)


@dataclass(frozen=True)
class _ScaledTemplate(Template):
    form: Any = None

    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        return self.form.numbers(stacks[""], stacks["scales"], dtype)

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        made = scaled_floats().ScaledFloats(parts[""], parts["scales"], self.form)
        return [(self.module._parameters, self.name, made)]


# ------------------------------------------------------------------------------- bitsandbytes, 4 bits


class _FourBitKind(_Kind):
    def parts(self, module: Any, name: str) -> Parts:
        parameter = module._parameters[name]
        state = _state(module, parameter)
        found = {"": parameter.data, "absmax": state.absmax}
        if state.nested:
            found |= {"offset": state.offset, "state2.absmax": state.state2.absmax}
        return found

    def template(self, module: Any, name: str) -> Template:
        parameter = module._parameters[name]
        state = copy.copy(_state(module, parameter))
        tensors = _shapes(self.parts(module, name))
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


# ------------------------------------------------------------------------------- bitsandbytes, 8 bits


class _EightBitKind(_Kind):
    def parts(self, module: Any, name: str) -> Parts:
        parameter = module._parameters[name]
        # The first forward moves them from the weight to the module's state.
        scales = parameter.SCB if parameter.SCB is not None else module.state.SCB
        if scales is None:
            raise ValueError("This 8-bit weight was not packed yet.")
        return {"": parameter.data, "SCB": scales}

    def template(self, module: Any, name: str) -> Template:
        return _EightBitTemplate(module, name, _shapes(self.parts(module, name)))


@dataclass(frozen=True)
class _EightBitTemplate(Template):
    def unpacked(self, stacks: Mapping[str, Any], dtype: Any) -> Any:
        return _floats(stacks[""], stacks["SCB"], dtype)

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


def _floats(integers: Any, scales: Any, dtype: Any) -> Any:
    """What 8-bit rows stand for, whose largest numbers are the ``scales``."""
    return integers.to(dtype) * (scales / 127).to(dtype).unsqueeze(-1)


# ----------------------------------------------------------------------------------- optimum.quanto


class _QuantoKind(_Ordered):
    def is_needed(self, module: Any, name: str) -> bool:
        return bool(module._parameters[name].qtype.name == "qint4")

    def parts(self, module: Any, name: str) -> Parts:
        return dict(_leaves(module._parameters[name], ""))

    def template(self, module: Any, name: str) -> Template:
        tensors = _shapes(self.parts(module, name))
        return _QuantoTemplate(module, name, tensors, _shell(module._parameters[name]))

    def arrange(self, module: Any, name: str, device: Any, fresh: bool) -> None:
        from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor as TinyGemm

        weight, target = module._parameters[name], None
        if isinstance(weight, TinyGemm):
            if not _has_tinygemm(device):
                target = _as_integers(weight)
            elif int4_orders.is_for_cuda(weight._data._data) != (device.type == "cuda"):
                target = _in_other_order(weight)
        elif fresh and _fits_tinygemm(weight) and _has_tinygemm(device):
            target = _for_tinygemm(weight, device)
        elif fresh and _is_in_bytes(weight):
            target = _packed_now(weight)
        if target is not None:
            module._parameters[name] = _parameter(target)
            bind(template(module, name).bindings(parts(module, name)))


def in_bytes(integers: Any) -> Any:
    """Small integers (uint8, groups by columns) for a weight of quanto, which `arrange` puts where they belong."""
    from optimum.quanto.tensor.packed import PackedTensor

    return PackedTensor(integers, _BYTE, integers.size(), integers.stride())


def _is_in_bytes(weight: Any) -> bool:
    return getattr(getattr(weight, "_data", None), "_bits", 0) == _BYTE


def _packed_now(weight: Any) -> Any:
    from optimum.quanto.tensor.packed import PackedTensor

    weight._data = PackedTensor.pack(_unpacked(weight._data), weight.qtype.bits)
    weight._shift = weight._shift.to(weight.dtype)
    return weight


def _fits_tinygemm(weight: Any) -> bool:
    """Whether torch's 4-bit kernel takes it, whose rows come in 16s on CPUs.

    What quanto has packed goes by its rule, groups of 128; other groups are of a checkpoint, with an exact shift.
    """
    import torch
    from optimum.quanto import WeightQBitsTensor, qint4

    if not isinstance(weight, WeightQBitsTensor) or weight.qtype != qint4 or weight.ndim != 2:
        return False
    rows, columns = weight.shape
    groups = INT4_GROUPS if _is_in_bytes(weight) else (128,)
    grouped = weight._group_size in groups and weight.axis == 0 and not rows % 16 and not columns % 32
    return bool(grouped and weight.dtype == torch.bfloat16)


def _has_tinygemm(device: Any) -> bool:
    import torch

    if device.type != "cuda":
        return bool(device.type == "cpu")
    return bool(torch.version.cuda) and bool(torch.cuda.get_device_capability(device) >= (8, 0))


def _rows_at_a_time(columns: int) -> int:
    return 64 * max(1, _AT_A_TIME // (64 * columns))  # every order has its blocks of rows end there


def _for_tinygemm(weight: Any, device: Any) -> Any:
    """The weight as torch's kernel takes it; some rows at a time, because on a GPU they are put in order as int32."""
    import torch

    rows, columns = weight.shape
    groups, step = columns // weight._group_size, _rows_at_a_time(columns)
    plain = _unpacked(weight._data).view(rows, columns)
    data, statistics = [], []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data.append(_in_order(plain[start:stop].to(device)))
        of_rows = slice(start * groups, stop * groups)
        scale, shift = (
            each[of_rows].to(device).float().view(-1, groups) for each in (weight._scale, weight._shift)
        )
        # In place of what stands for zero the kernel wants the number in the middle, which is rounded here.
        statistics.append(torch.stack((scale, 8 * scale - shift), -1).to(weight.dtype))
    held = torch.cat(statistics).transpose(0, 1).contiguous()  # [groups, rows, 2]
    return _tinygemm(weight, _tinygemm_packed(weight, torch.cat(data)), held)


def _in_order(plain: Any) -> Any:
    """Integers in the order of the kernel of their device."""
    if plain.device.type == "cpu":
        return int4_orders.to_cpu(plain)
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor

    return TinyGemmPackedTensor.pack(plain)._data


def _in_other_order(weight: Any) -> Any:
    """A weight of torch's kernel for CUDA as that for CPUs reads it, or the other way round."""
    data = int4_orders.reordered(weight._data._data, weight.shape[1])
    # Quanto's own .to() would round the statistics again; they have one format everywhere.
    return _tinygemm(weight, _tinygemm_packed(weight, data), weight._scale_shift.to(data.device))


def _as_integers(weight: Any) -> Any:
    """A weight of torch's kernel as quanto packs integers, for devices that have no such kernel."""
    packed = _tinygemm_packed(weight, weight._data._data)
    plain = int4_orders.integers(packed._data, weight.shape[1])
    packed.unpack = lambda: plain
    return _tinygemm(weight, packed, weight._scale_shift).weight_qbits_tensor()


def _tinygemm_numbers(weight: Any) -> Any:
    """What a weight of torch's kernel stands for; quanto would compile an extension to tell."""
    rows, columns = weight.shape
    integers = int4_orders.integers(weight._data._data, columns).view(rows, -1, weight._group_size)
    scales, middles = weight._scale_shift.transpose(0, 1).unsqueeze(-2).unbind(-1)  # [rows, groups, 1]
    numbers = integers.to(scales.dtype)
    return numbers.sub_(8).mul_(scales).add_(middles).view(rows, columns)  # a large one is there once


def _tinygemm(weight: Any, data: Any, statistics: Any) -> Any:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    shape = (weight.size(), weight.stride())
    return TinyGemmWeightQBitsTensor(weight.qtype, weight.axis, weight._group_size, *shape, data, statistics)


def _tinygemm_packed(weight: Any, data: Any) -> Any:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor

    return TinyGemmPackedTensor(data, weight.size(), weight.stride())


def _unpacked(packed: Any) -> Any:
    """Quanto's integers, one in a byte: row blocks that share bytes, the first in the lowest bits."""
    import torch

    bits, mask = packed._bits, (1 << packed._bits) - 1
    if bits == _BYTE:
        return packed._data
    blocks = [packed._data >> shift & mask for shift in range(0, 8, bits)]
    return torch.cat(blocks)[: packed.shape[0]]


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
    kind = _torch_packed() if type(tensor) is PackedTensor else type(tensor)
    if isinstance(tensor, _guest_class()):
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
        return _as_a_guest(made) if _is_a_guest(made) else made

    def bindings(self, parts: Mapping[str, Any]) -> list[Assignment]:
        return [(self.module._parameters, self.name, _parameter(self.weight(parts)))]


def _is_a_guest(weight: Any) -> bool:
    """Whether it is in the order of torch's kernel for CPUs, and on a device: for a prompt, from RAM."""
    return hasattr(weight, "_scale_shift") and not (
        weight.device.type in ("cpu", "meta") or int4_orders.is_for_cuda(weight._data._data)
    )


def _as_a_guest(weight: Any) -> Any:
    shape = (weight.size(), weight.stride())
    return _guest_class()(
        weight.qtype, weight.axis, weight._group_size, *shape, weight._data, weight._scale_shift
    )


@cache
def _guest_class() -> Any:
    """A weight of torch's kernel for CPUs where another device multiplies with it: it becomes numbers first.

    For the many tokens of a prompt that is quick, and the bytes in RAM stay as they are.
    """
    import torch
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    class Guest(TinyGemmWeightQBitsTensor):  # type: ignore[misc]  # its library has no types
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.nn.functional.linear:
                return super().__torch_function__(func, types, args, kwargs)

            def linear(inputs: Any, weight: Any, bias: Any = None) -> Any:
                return torch.nn.functional.linear(inputs, _tinygemm_numbers(weight), bias)

            return linear(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(op, types, args, kwargs)
            return _as_a_guest(result) if _is_a_guest(result) else result

    return Guest


@cache
def _torch_packed() -> Any:
    """Quanto's packed 2- and 4-bit integers, unpacked by torch's operators.

    Quanto unpacks by an extension that it compiles at the first use: a minute with a compiler, an
    error without one, for the same few shifts.
    """
    from optimum.quanto.tensor.packed import PackedTensor

    class TorchPacked(PackedTensor):  # type: ignore[misc]  # its library has no types
        @staticmethod
        def __new__(cls: Any, *args: Any, **options: Any) -> Any:
            return PackedTensor.__new__(cls, *args, **options)

        def unpack(self) -> Any:
            return _unpacked(self)

        @staticmethod
        def __tensor_unflatten__(tensors: Any, meta: Any, size: Any, stride: Any) -> Any:
            return _rewrapped(PackedTensor.__tensor_unflatten__(tensors, meta, size, stride))

        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(op, types, args, kwargs)
            return _rewrapped(result) if isinstance(result, PackedTensor) else result

    def _rewrapped(packed: Any) -> Any:
        return TorchPacked(packed._data, packed._bits, packed.size(), packed.stride())

    return TorchPacked
