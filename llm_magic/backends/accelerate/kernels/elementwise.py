"""Small operations on the states of some tokens, one after the other in one function.

What such operations take is not their arithmetic, nor memory, for the caches hold all of it: it is the way to
each of them. So each is a loop of its own here, which reads and writes what torch's would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    as_floats,
    from_floats,
    loaded,
    loop,
    same,
    stored,
    stored_kind,
    total,
    variable,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, WORK, compiled, word
from llm_magic.backends.accelerate.kernels.functions import Functions
from llm_magic.backends.accelerate.kernels.steps import Fold, Loop, Operand

_WIDTH = 16  # numbers of a vector: two or four of the processor's where its own are shorter


def elementwise(steps: Sequence[Loop | Fold]) -> Callable[[Any], None]:
    """Compile some steps.

    Returns
    -------
    callable
        Of the address of 64-bit words: the addresses of the buffers.

    Raises
    ------
    RuntimeError
        When LLVM finds a mistake.
    """
    module = ir.Module()
    run = ir.Function(module, WORK, "run")
    writer = _Writer(module, ir.IRBuilder(run.append_basic_block()), run.args[0])
    for step in steps:
        if isinstance(step, Loop):
            writer.loop(step)
        else:
            writer.fold(step)
    writer.builder.ret_void()
    return compiled(module, run.name, effort=0)  # they are vectors already, and others wait


class _Writer:
    def __init__(self, module: ir.Module, builder: ir.IRBuilder, words: Any) -> None:
        self.module, self.builder, self.words = module, builder, words
        self._functions = Functions(module, builder)

    def loop(self, step: Loop) -> None:
        """A vector at a time, as far as there are whole ones; then one number at a time."""
        operands = [step.result, *step.inputs]
        sizes, strides = merged(step.sizes, [operand.strides for operand in operands])
        inner = [each[-1] for each in strides]
        width = _WIDTH if inner[0] == 1 and set(inner) <= {0, 1} else 1
        whole = sizes[-1] // width
        with self._places(sizes[:-1], [each[:-1] for each in strides], operands) as places:
            for start, count, wide in ((0, whole, width), (whole * width, sizes[-1] % width, 1)):
                if count:
                    with loop(self.builder, I64(0), I64(count)) as number:
                        index = self.builder.add(self.builder.mul(number, I64(wide)), I64(start))
                        self._apply(
                            step, self._moved(places, inner, index), [wide if each else 1 for each in inner]
                        )

    def _apply(self, step: Loop, places: Sequence[Any], widths: Sequence[int]) -> None:
        """Some numbers of the result, of as many of each input, or of one for all."""
        operands = zip(step.inputs, places[1:], widths[1:], strict=True)
        values = [self._read(operand, place, width, widths[0]) for operand, place, width in operands]
        self._write(step.result, places[0], self._functions.apply(step.function, step.numbers, values))

    def fold(self, step: Fold) -> None:
        """A vector of sums at a time where numbers lie side by side, then the sum of these."""
        outer = len(step.sizes)
        folded, (strides,) = merged(step.folded, [step.input.strides[outer:]])
        outside = [step.result.strides, step.input.strides[:outer]]
        builder, width = self.builder, _WIDTH if strides[-1] == 1 and folded[-1] % _WIDTH == 0 else 1
        kind = vector(F32, width) if width > 1 else F32
        held = variable(builder, kind)
        with self._places(step.sizes, outside, [step.result, step.input]) as (target, source):
            first = 0.0 if step.function == "sum" else float("-inf")
            builder.store(same(kind, first) if width > 1 else ir.Constant(F32, first), held)
            with (
                self._places(folded[:-1], [strides[:-1]], [step.input], [source]) as (row,),
                loop(builder, I64(0), I64(folded[-1] // width)) as number,
            ):
                place = builder.add(row, builder.mul(number, I64(width * strides[-1])))
                value = self._read(step.input, place, width, width)
                builder.store(self._folded(step.function, builder.load(held, typ=kind), value), held)
            value = builder.load(held, typ=kind)
            value = self._whole(step.function, value) if width > 1 else value
            self._write(step.result, target, builder.fdiv(value, ir.Constant(F32, step.divisor)))

    def _folded(self, function: str, before: Any, value: Any) -> Any:
        return self._functions.apply("add" if function == "sum" else "larger", (), (before, value))

    def _whole(self, function: str, values: Any) -> Any:
        if function == "sum":
            return total(self.module, self.builder, values)
        parts = [self.builder.extract_element(values, I64(i)) for i in range(values.type.count)]
        largest = parts[0]
        for part in parts[1:]:
            largest = self._folded(function, largest, part)
        return largest

    @contextmanager
    def _places(
        self,
        sizes: Sequence[int],
        strides: Sequence[Sequence[int]],
        operands: Sequence[Operand],
        starts: Sequence[Any] = (),
    ) -> Iterator[list[Any]]:
        """Where each operand is, for every index of some directions."""
        builder = self.builder
        places = list(starts) or [I64(operand.offset) for operand in operands]
        if not sizes:
            yield places
            return
        with loop(builder, I64(0), I64(sizes[0])) as number:
            inner = self._moved(places, [each[0] for each in strides], number)
            with self._places(sizes[1:], [each[1:] for each in strides], operands, inner) as found:
                yield found

    def _moved(self, places: Sequence[Any], strides: Sequence[int], index: Any) -> list[Any]:
        builder = self.builder
        return [
            builder.add(place, builder.mul(index, I64(stride)))
            for place, stride in zip(places, strides, strict=True)
        ]

    def _write(self, operand: Operand, place: Any, value: Any) -> None:
        stored(self.builder, from_floats(self.builder, value, operand.dtype), self._start(operand), place)

    def _read(self, operand: Operand, place: Any, width: int, wanted: int) -> Any:
        kind = stored_kind(operand.dtype)
        value = loaded(self.builder, self._start(operand), place, vector(kind, width) if width > 1 else kind)
        value = as_floats(self.builder, value, operand.dtype)
        return self._spread(value, wanted) if width < wanted else value

    def _spread(self, value: Any, width: int) -> Any:
        kind = vector(F32, width)
        some = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I64(0))
        return self.builder.shuffle_vector(
            some, some, ir.Constant(vector(ir.IntType(32), width), [0] * width)
        )

    def _start(self, operand: Operand) -> Any:
        return word(self.builder, self.words, operand.buffer, POINTER)


def merged(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The same places by as few directions as can be; always at least one."""
    found_sizes: list[int] = []
    found: list[list[int]] = [[] for _ in strides]
    for number, size in enumerate(sizes):
        if size == 1:
            continue
        here = [each[number] for each in strides]
        if found_sizes and all(mine[-1] == stride * size for mine, stride in zip(found, here, strict=True)):
            found_sizes[-1] *= size
            for mine, stride in zip(found, here, strict=True):
                mine[-1] = stride
            continue
        found_sizes.append(size)
        for mine, stride in zip(found, here, strict=True):
            mine.append(stride)
    return (found_sizes, found) if found_sizes else ([1], [[1] for _ in strides])
