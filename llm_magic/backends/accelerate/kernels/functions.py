"""Functions of float32, of one number or of a vector of them, as a few instructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import F32, intrinsic, same, vector
from llm_magic.backends.accelerate.kernels.compiler import I32

_LOG_FACTORS = (
    *(-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
"""Of the polynomial for a logarithm, behind its first."""


class Functions:
    """What can be said of numbers in one function that is being written."""

    def __init__(self, module: ir.Module, builder: ir.IRBuilder) -> None:
        self._module, self._builder = module, builder

    def apply(self, name: str, numbers: Sequence[float], values: Sequence[Any]) -> Any:
        """One of `NAMES` of some values, with constants of its own."""
        return _FUNCTIONS[name](self, *values, *numbers)

    def constant(self, value: float, like: Any) -> Any:
        """A number, or a vector that has it everywhere."""
        kind = like.type
        return same(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)

    def same(self, value: Any) -> Any:
        return value

    def add(self, left: Any, right: Any) -> Any:
        return self._builder.fadd(left, right)

    def subtract(self, left: Any, right: Any) -> Any:
        return self._builder.fsub(left, right)

    def subtract_from(self, value: Any, number: float) -> Any:
        return self._builder.fsub(self.constant(number, value), value)

    def multiply(self, left: Any, right: Any) -> Any:
        return self._builder.fmul(left, right)

    def divide(self, left: Any, right: Any) -> Any:
        return self._builder.fdiv(left, right)

    def add_number(self, value: Any, number: float) -> Any:
        return self._builder.fadd(value, self.constant(number, value))

    def multiply_number(self, value: Any, number: float) -> Any:
        return self._times(value, number)

    def divide_number(self, value: Any, number: float) -> Any:
        return self._builder.fdiv(value, self.constant(number, value))

    def negate(self, value: Any) -> Any:
        return self._builder.fneg(value)

    def absolute(self, value: Any) -> Any:
        return self._called("fabs", value)

    def larger(self, left: Any, right: Any) -> Any:
        """What is no number is none however it is compared."""
        return self._chosen(self._builder.fcmp_ordered(">", left, right), left, right)

    def smaller(self, left: Any, right: Any) -> Any:
        return self._chosen(self._builder.fcmp_ordered("<", left, right), left, right)

    def at_least(self, value: Any, least: float) -> Any:
        limit = self.constant(least, value)
        return self._builder.select(self._builder.fcmp_ordered("<", value, limit), limit, value)

    def at_most(self, value: Any, most: float) -> Any:
        limit = self.constant(most, value)
        return self._builder.select(self._builder.fcmp_ordered(">", value, limit), limit, value)

    def root(self, value: Any) -> Any:
        return self._called("sqrt", value)

    def reciprocal(self, value: Any) -> Any:
        return self._builder.fdiv(self.constant(1.0, value), value)

    def reciprocal_root(self, value: Any) -> Any:
        return self.reciprocal(self.root(value))

    def square(self, value: Any) -> Any:
        return self._builder.fmul(value, value)

    def cube(self, value: Any) -> Any:
        return self._builder.fmul(self.square(value), value)

    def exp(self, value: Any) -> Any:
        """Powers of two, times a polynomial on half of the logarithm of 2 to either side; off by 2 units of the last place."""
        builder = self._builder
        clamped = self._called(
            "minnum", self._called("maxnum", value, self.constant(-87.5, value)), self.constant(88.5, value)
        )
        power = self._called("rint", self._times(clamped, math.log2(math.e)))
        rest = self._fused(power, self.constant(-0.693359375, value), clamped)
        rest = self._fused(power, self.constant(2.12194440e-4, value), rest)
        series = self.constant(1 / 5040, value)
        for divisor in (720, 120, 24, 6, 2, 1, 1):
            series = self._fused(series, rest, self.constant(1 / divisor, value))
        words = _integers(value)
        bits = builder.shl(builder.fptosi(power, words), _whole(words, 23))
        scaled = builder.bitcast(builder.add(builder.bitcast(series, words), bits), value.type)
        small = builder.fcmp_ordered("<", value, self.constant(-87.5, value))
        large = builder.fcmp_ordered(">", value, self.constant(88.5, value))
        scaled = builder.select(small, self.constant(0.0, value), scaled)
        scaled = builder.select(large, self.constant(math.inf, value), scaled)
        return builder.select(builder.fcmp_unordered("uno", value, value), value, scaled)

    def softplus(self, value: Any) -> Any:
        """As torch's: beyond 20 the number itself."""
        power = self.exp(value)
        near = self.add_number(power, 1.0)
        # What was rounded away from 1 + power is missed by the logarithm as by the difference.
        exact = self.divide(self.multiply(self._log(near), power), self.add_number(near, -1.0))
        one = self.constant(1.0, value)
        found = self._builder.select(self._builder.fcmp_ordered("==", near, one), power, exact)
        is_large = self._builder.fcmp_ordered(">", value, self.constant(20.0, value))
        return self._builder.select(is_large, value, found)

    def sigmoid(self, value: Any) -> Any:
        return self.reciprocal(self.add_number(self.exp(self.negate(value)), 1.0))

    def silu(self, value: Any) -> Any:
        return self.divide(value, self.add_number(self.exp(self.negate(value)), 1.0))

    def relu(self, value: Any) -> Any:
        return self.at_least(value, 0.0)

    def tanh(self, value: Any) -> Any:
        """By an exponential, near 0 by its series."""
        size = self.absolute(value)
        power = self.exp(self._times(size, -2.0))
        far = self.divide(self.subtract_from(power, 1.0), self.add_number(power, 1.0))
        squared = self.square(value)
        near = self.constant(-17 / 315, value)
        for factor in (2 / 15, -1 / 3, 1.0):
            near = self._fused(near, squared, self.constant(factor, value))
        is_near = self._builder.fcmp_ordered("<", size, self.constant(0.1, value))
        found = self._builder.select(is_near, self._builder.fmul(near, size), far)
        return self._called("copysign", found, value)

    def gelu(self, value: Any) -> Any:
        """By the error function, of Abramowitz and Stegun, 7.1.26: off by 1.5e-7."""
        size = self._times(self.absolute(value), math.sqrt(0.5))
        part = self.reciprocal(self.add_number(self._times(size, 0.3275911), 1.0))
        series = self.constant(1.061405429, value)
        for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            series = self._fused(series, part, self.constant(factor, value))
        tail = self.multiply(self.multiply(series, part), self.exp(self.negate(self.square(size))))
        error = self._called("copysign", self.subtract_from(tail, 1.0), value)
        return self.multiply(self._times(value, 0.5), self.add_number(error, 1.0))

    def gelu_tanh(self, value: Any) -> Any:
        inner = self._fused(self._times(self.cube(value), 0.044715), self.constant(1.0, value), value)
        curve = self.tanh(self._times(inner, math.sqrt(2 / math.pi)))
        return self.multiply(self._times(value, 0.5), self.add_number(curve, 1.0))

    def _log(self, value: Any) -> Any:
        """Of a number from 1 to 2 to the 126th: of its power of two, and the series of what is over it, by the polynomial
        of Cephes' ``logf`` (S. L. Moshier, 1992).
        """
        builder, words = self._builder, _integers(value)
        bits = builder.bitcast(value, words)
        exponent = builder.sub(builder.lshr(bits, _whole(words, 23)), _whole(words, 127))
        mantissa = builder.or_(builder.and_(bits, _whole(words, 0x007FFFFF)), _whole(words, 0x3F800000))
        part = builder.bitcast(mantissa, value.type)
        is_high = builder.fcmp_ordered(">", part, self.constant(math.sqrt(2.0), value))
        part = builder.select(is_high, self._times(part, 0.5), part)
        power = builder.sitofp(exponent, value.type)
        power = builder.select(is_high, self.add_number(power, 1.0), power)
        rest = self.add_number(part, -1.0)
        series = self.constant(7.0376836292e-2, value)
        for factor in _LOG_FACTORS:
            series = self._fused(series, rest, self.constant(factor, value))
        square = self.square(rest)
        tail = self.multiply(self.multiply(series, rest), square)
        tail = self._fused(power, self.constant(-2.12194440e-4, value), tail)
        tail = self._fused(square, self.constant(-0.5, value), tail)
        return self._fused(power, self.constant(0.693359375, value), self.add(rest, tail))

    def _chosen(self, is_left: Any, left: Any, right: Any) -> Any:
        is_none = self._builder.fcmp_unordered("uno", left, left)
        return self._builder.select(self._builder.or_(is_left, is_none), left, right)

    def _times(self, value: Any, factor: float) -> Any:
        return value if factor == 1 else self._builder.fmul(value, self.constant(factor, value))

    def _fused(self, first: Any, second: Any, third: Any) -> Any:
        return self._called("fma", first, second, third)

    def _called(self, name: str, *values: Any) -> Any:
        kind = values[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        known = intrinsic(self._module, f"llvm.{name}.{suffix}", kind, *[kind] * len(values))
        return self._builder.call(known, values)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: function
    for name, function in vars(Functions).items()
    if callable(function) and not name.startswith("_")
}


def _integers(value: Any) -> Any:
    kind = value.type
    return vector(I32, kind.count) if isinstance(kind, ir.VectorType) else I32


def _whole(kind: Any, value: int) -> Any:
    return same(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


__all__ = ["F32", "Functions"]
