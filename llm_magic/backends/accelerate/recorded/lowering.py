"""torch's operations as loops of compiled functions, as far as they are small ones on floats.

What is not among them torch computes itself. Rounding is torch's: every operation rounds its result to its dtype,
and computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llm_magic.backends.accelerate.kernels.steps import Fold, Loop, Operand
from llm_magic.backends.accelerate.recorded.recording import Node, View

Step = Loop | Fold

_FLOATS = ("float32", "float16", "bfloat16")

_OF_ONE = {
    "aten.neg.default": "negate",
    "aten.abs.default": "absolute",
    "aten.sqrt.default": "root",
    "aten.rsqrt.default": "reciprocal_root",
    "aten.reciprocal.default": "reciprocal",
    "aten.exp.default": "exp",
    "aten.sigmoid.default": "sigmoid",
    "aten.silu.default": "silu",
    "aten.tanh.default": "tanh",
    "aten.relu.default": "relu",
    "aten.clone.default": "same",
    "aten._to_copy.default": "same",
}
_OF_TWO = {
    "aten.mul.Tensor": ("multiply", "multiply_number"),
    "aten.div.Tensor": ("divide", "divide_number"),
    "aten.maximum.default": ("larger", "at_least"),
    "aten.minimum.default": ("smaller", "at_most"),
}
_POWERS = {2: "square", 3: "cube", 0.5: "root", -0.5: "reciprocal_root", -1: "reciprocal"}
_FOLDS = {"aten.mean.dim": "sum", "aten.sum.dim_IntList": "sum", "aten.amax.default": "max"}
_LAYOUT_WORDS = ("dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format")


def plain_name(node: Node) -> str:
    """The operation's, without the mark of one that changes its first tensor."""
    name = str(node.name)
    return name if node.changes is None else name.replace("_.", ".", 1)


class Temporaries:
    """Numbers for what exists between two steps of one operation, and how much room that takes."""

    def __init__(self, first: int) -> None:
        self._first = first
        self.shapes: dict[int, tuple[int, ...]] = {}

    def new(self, shape: Sequence[int]) -> View:
        """Room for numbers of float32."""
        import torch

        base = self._first + len(self.shapes)
        self.shapes[base] = tuple(shape)
        return View(base, tuple(shape), row_major(shape), 0, torch.float32)


def lowered(node: Node, temporaries: Temporaries) -> list[Step] | None:
    """The steps of an operation, with numbers of bases as buffers; ``None`` where torch is to compute it."""
    if node.kind != "op":
        return None
    name, kwargs = plain_name(node), dict(node.kwargs)
    tensors = [each for each in _flat((node.args, node.outputs)) if isinstance(each, View)]
    if not all(_dtype(each) in _FLOATS for each in tensors):
        return None
    lower = _LOWERINGS.get(name)
    try:
        return lower(_Lowering(node, temporaries), *node.args, **kwargs) if lower else None
    except _NotOursError:
        return None


class _NotOursError(Exception):
    pass


class _Lowering:
    def __init__(self, node: Node, temporaries: Temporaries) -> None:
        self.node, self.name = node, plain_name(node)
        # What changes its first tensor may change a part of it.
        self.out: View = node.outputs[0] if node.changes is None else node.args[0]
        self._temporaries = temporaries

    def one(self, value: Any, **words: Any) -> list[Step]:
        if not words.keys() <= set(_LAYOUT_WORDS) or words.get("device") not in (None, _cpu()):
            raise _NotOursError
        return [self.loop(_OF_ONE[self.name], (), self.out, value)]

    def two(self, left: Any, right: Any) -> list[Step]:
        of_tensors, of_number = _OF_TWO[self.name]
        self._refuse_if_rounded_first(left)
        if isinstance(right, View):
            return [self.loop(of_tensors, (), self.out, left, right)]
        return [self.loop(of_number, (_number(right),), self.out, left)]

    def add(self, left: Any, right: Any, alpha: float = 1) -> list[Step]:
        is_sum = not self.name.startswith("aten.sub")
        if alpha != 1:  # torch rounds such products now in one way, now in another
            raise _NotOursError
        if isinstance(right, View):
            self._refuse_if_rounded_first(left, right)
            return [self.loop("add" if is_sum else "subtract", (), self.out, left, right)]
        number = self._rounded(right)
        return [self.loop("add_number", (number if is_sum else -number,), self.out, left)]

    def subtract_from(self, value: Any, number: Any, alpha: float = 1) -> list[Step]:
        if alpha != 1:
            raise _NotOursError
        return [self.loop("subtract_from", (self._rounded(number),), self.out, value)]

    def power(self, value: Any, exponent: Any) -> list[Step]:
        if exponent not in _POWERS:
            raise _NotOursError
        if exponent == 3 and _dtype(self.out) == "bfloat16":  # torch rounds the square, too
            square, third = ("square", (value,)), ("multiply", (self.out, value))
            return [self.loop(name, (), self.out, *values) for name, values in (square, third)]
        return [self.loop(_POWERS[exponent], (), self.out, value)]

    def softplus(self, value: Any, beta: float = 1, threshold: float = 20) -> list[Step]:
        if (beta, threshold) != (1, 20):
            raise _NotOursError
        return [self.loop("softplus", (), self.out, value)]

    def clamp(self, value: Any, least: Any = None, most: Any = None) -> list[Step]:
        limits = [
            (name, limit) for name, limit in (("at_least", least), ("at_most", most)) if limit is not None
        ]
        steps: list[Step] = []
        for name, limit in limits:
            steps.append(self.loop(name, (_number(limit),), self.out, value))
            value = self.out
        return steps

    def copied(self, target: Any, source: Any, non_blocking: bool = False) -> list[Step]:  # noqa: ARG002 - torch's order
        return [self.loop("same", (), self.out, source)]

    def reshaped(self, value: Any, shape: Any) -> list[Step]:  # noqa: ARG002 - torch's order
        """Of what lies side by side: the end of a ``reshape`` that copies."""
        if value.stride != row_major(value.shape):
            raise _NotOursError
        return [self.loop("same", (), self.out, replace(value, shape=self.out.shape, stride=self.out.stride))]

    def gelu(self, value: Any, approximate: str = "none") -> list[Step]:
        return [self.loop("gelu" if approximate == "none" else "gelu_tanh", (), self.out, value)]

    def fold(self, value: Any, dims: Any = (), keepdim: bool = False, dtype: Any = None) -> list[Step]:  # noqa: ARG002 - torch's order
        dims = dims or () if isinstance(dims, tuple | None) else (dims,)
        return [self.folded(_FOLDS[self.name], self.out, value, dims, is_mean="mean" in self.name)]

    def softmax(self, value: Any, dim: int, half_to_float: bool = False) -> list[Step]:  # noqa: ARG002 - torch's order
        rows = (*value.shape[:dim], 1, *value.shape[dim:][1:])
        largest, total = self._temporaries.new(rows), self._temporaries.new(rows)
        powers = self._temporaries.new(value.shape)
        return [
            self.folded("max", largest, value, (dim,)),
            self.loop("subtract", (), powers, value, largest),
            self.loop("exp", (), powers, powers),
            self.folded("sum", total, powers, (dim,)),
            self.loop("divide", (), self.out, powers, total),
        ]

    def layer_norm(self, value: Any, shape: Any, weight: Any, bias: Any, eps: float) -> list[Step]:
        dims = tuple(range(len(value.shape) - len(shape), len(value.shape)))
        _, mean, scale = self.node.outputs
        centre, factor = self._temporaries.new(mean.shape), self._temporaries.new(scale.shape)
        centred, squares = self._temporaries.new(value.shape), self._temporaries.new(value.shape)
        return [
            self.folded("sum", centre, value, dims, is_mean=True),
            self.loop("subtract", (), centred, value, centre),
            self.loop("square", (), squares, centred),
            *self._scaled(squares, factor, dims, eps),
            *self._times_weights(centred, factor, weight, bias),
            self.loop("same", (), mean, centre),
            self.loop("same", (), scale, factor),
        ]

    def rms_norm(self, value: Any, shape: Any, weight: Any, eps: Any) -> list[Step]:
        dims = tuple(range(len(value.shape) - len(shape), len(value.shape)))
        _, scale = self.node.outputs
        factor, squares = self._temporaries.new(scale.shape), self._temporaries.new(value.shape)
        if eps is None:
            raise _NotOursError
        return [
            self.loop("square", (), squares, value),
            *self._scaled(squares, factor, dims, eps),
            *self._times_weights(value, factor, weight, None),
            self.loop("same", (), scale, factor),
        ]

    def cat(self, tensors: Any, dim: int = 0) -> list[Step]:
        steps: list[Step] = []
        dim, start = dim % len(self.out.shape), 0
        for each in tensors:
            if len(each.shape) != len(self.out.shape):  # an empty one that torch lets pass
                raise _NotOursError
            steps.append(self.loop("same", (), self._slice(dim, start, each.shape[dim]), each))
            start += each.shape[dim]
        return steps

    def stack(self, tensors: Any, dim: int = 0) -> list[Step]:
        dim %= len(self.out.shape)
        steps: list[Step] = []
        for number, each in enumerate(tensors):
            shape = (*each.shape[:dim], 1, *each.shape[dim:])
            stride = (*each.stride[:dim], 0, *each.stride[dim:])
            widened = View(each.base, shape, stride, each.offset, each.dtype)
            steps.append(self.loop("same", (), self._slice(dim, number, 1), widened))
        return steps

    def _scaled(self, squares: View, scale: View, dims: tuple[int, ...], eps: float) -> list[Step]:
        return [
            self.folded("sum", scale, squares, dims, is_mean=True),
            self.loop("add_number", (_number(eps),), scale, scale),
            self.loop("reciprocal_root", (), scale, scale),
        ]

    def _times_weights(self, value: View, scale: View, weight: Any, bias: Any) -> list[Step]:
        found = self._temporaries.new(value.shape)
        steps: list[Step] = [self.loop("multiply", (), found, value, scale)]
        if weight is not None:
            steps.append(self.loop("multiply", (), found, found, weight))
        if bias is not None:
            steps.append(self.loop("add", (), found, found, bias))
        return [*steps, self.loop("same", (), self.out, found)]

    def _rounded(self, value: Any) -> float:
        """A number that is added: torch has it in the dtype of the result first."""
        import torch

        return float(torch.tensor(_number(value), dtype=self.out.dtype, device=_cpu()))

    def _refuse_if_rounded_first(self, *values: Any) -> None:
        """A lone number of another dtype does not decide that of the result: torch has it in that first."""
        if any(isinstance(v, View) and not v.shape and v.dtype != self.out.dtype for v in values):
            raise _NotOursError

    def _slice(self, dim: int, start: int, size: int) -> View:
        out = self.out
        shape = (*out.shape[:dim], size, *out.shape[dim + 1 :])
        return View(out.base, shape, out.stride, out.offset + start * out.stride[dim], out.dtype)

    def loop(self, function: str, numbers: tuple[float, ...], result: View, *inputs: Any) -> Loop:
        if not all(isinstance(each, View) for each in inputs):
            raise _NotOursError
        sizes = result.shape
        return Loop(
            function, numbers, sizes, _operand(result, sizes), tuple(_operand(each, sizes) for each in inputs)
        )

    def folded(
        self, function: str, result: View, value: View, dims: Iterable[int], *, is_mean: bool = False
    ) -> Fold:
        rank = len(value.shape)
        gone = sorted(dim % rank for dim in dims) or list(range(rank))
        stays = [dim for dim in range(rank) if dim not in gone]
        count = 1
        for dim in gone:
            count *= value.shape[dim]
        kept = len(result.shape) == rank
        strides = tuple(result.stride[dim] for dim in stays) if kept else result.stride
        source = Operand(
            value.base, value.offset, tuple(value.stride[dim] for dim in (*stays, *gone)), _dtype(value)
        )
        sizes = tuple(value.shape[dim] for dim in stays)
        target = Operand(result.base, result.offset, strides, _dtype(result))
        folded = tuple(value.shape[dim] for dim in gone)
        return Fold(function, float(count) if is_mean else 1.0, sizes, folded, target, source)


_LOWERINGS: dict[str, Callable[..., list[Step]]] = {
    **dict.fromkeys(_OF_ONE, _Lowering.one),
    **dict.fromkeys(_OF_TWO, _Lowering.two),
    **dict.fromkeys(_FOLDS, _Lowering.fold),
    **dict.fromkeys(
        ("aten.add.Tensor", "aten.sub.Tensor", "aten.add.Scalar", "aten.sub.Scalar"), _Lowering.add
    ),
    "aten.rsub.Scalar": _Lowering.subtract_from,
    "aten.pow.Tensor_Scalar": _Lowering.power,
    "aten.softplus.default": _Lowering.softplus,
    "aten.clamp.default": _Lowering.clamp,
    "aten._unsafe_view.default": _Lowering.reshaped,
    "aten.copy.default": _Lowering.copied,
    "aten.gelu.default": _Lowering.gelu,
    "aten._softmax.default": _Lowering.softmax,
    "aten.native_layer_norm.default": _Lowering.layer_norm,
    "aten._fused_rms_norm.default": _Lowering.rms_norm,
    "aten.cat.default": _Lowering.cat,
    "aten.stack.default": _Lowering.stack,
}


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _operand(view: View, sizes: Sequence[int]) -> Operand:
    """A tensor spread to ``sizes``."""
    missing = len(sizes) - len(view.shape)
    strides = [0] * missing + [
        0 if have == 1 else stride for have, stride in zip(view.shape, view.stride, strict=True)
    ]
    return Operand(view.base, view.offset, tuple(strides), _dtype(view))


def _number(value: Any) -> float:
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise _NotOursError


def _dtype(view: View) -> str:
    return str(view.dtype).removeprefix("torch.")


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value
