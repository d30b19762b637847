"""What LLVM's builder lacks for kernels: loops and vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.compiler import I32, I64, POINTER, VOID

I8, I16, F32 = ir.IntType(8), ir.IntType(16), ir.FloatType()

_SIZES = {"i8": 1, "i16": 2, "half": 2, "i32": 4, "float": 4, "i64": 8}


def at(builder: ir.IRBuilder, start: Any, index: Any, kind: Any) -> Any:
    """Pointer to element ``index`` of an array of ``kind``."""
    return builder.gep(start, [index], source_etype=kind)


def loaded(builder: ir.IRBuilder, start: Any, index: Any, kind: Any) -> Any:
    """Element ``index`` of an array; as a vector where ``kind`` is one, from any address."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    instruction = builder.load(at(builder, start, index, element), typ=kind)
    instruction.align = _SIZES[str(element)]
    return instruction


def stored(builder: ir.IRBuilder, value: Any, start: Any, index: Any) -> None:
    """Write an element, or a vector of elements, from ``index`` on."""
    kind = value.type
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    instruction = builder.store(value, at(builder, start, index, element))
    instruction.align = _SIZES[str(element)]


@contextmanager
def loop(builder: ir.IRBuilder, start: Any, stop: Any) -> Iterator[Any]:
    """Do what follows for every number from ``start`` to ``stop``, which is not among them."""
    function = builder.function
    with builder.goto_entry_block():
        counter = builder.alloca(I64)
    builder.store(start, counter)
    head, body, end = (function.append_basic_block(name) for name in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.load(counter, typ=I64)
    builder.cbranch(builder.icmp_signed("<", number, stop), body, end)
    builder.position_at_end(body)
    yield number
    builder.store(builder.add(number, I64(1)), counter)
    builder.branch(head)
    builder.position_at_end(end)


def variable(builder: ir.IRBuilder, kind: Any) -> Any:
    """Room for a value that changes."""
    with builder.goto_entry_block():
        return builder.alloca(kind)


def vector(kind: Any, count: int) -> ir.VectorType:
    """``count`` values of a kind."""
    return ir.VectorType(kind, count)


def constants(kind: Any, values: Sequence[int | float]) -> ir.Constant:
    """A vector of these."""
    return ir.Constant(vector(kind, len(values)), [ir.Constant(kind, value) for value in values])


def same(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector whose elements are all ``value``."""
    return constants(kind.element, [value] * kind.count)


def spread(builder: ir.IRBuilder, values: Sequence[Any], count: int) -> Any:
    """A vector of ``count`` elements, in which each of some values fills an equal part."""
    some = together(builder, values, len(values))
    each = count // len(values)
    return shuffled(builder, some, some, [index // each for index in range(count)])


def shuffled(builder: ir.IRBuilder, first: Any, second: Any, places: Sequence[int]) -> Any:
    """Elements of two vectors, as if they were one, by their places."""
    return builder.shuffle_vector(first, second, constants(I32, places))


def intrinsic(module: ir.Module, name: str, result: Any, *arguments: Any) -> ir.Function:
    """An instruction, or a few, that LLVM has under a name."""
    known = module.globals.get(name)
    return known if known is not None else ir.Function(module, ir.FunctionType(result, arguments), name)


def multiplied_and_added(
    module: ir.Module, builder: ir.IRBuilder, first: Any, second: Any, third: Any
) -> Any:
    """``first * second + third``, rounded once."""
    kind = first.type
    return builder.call(
        intrinsic(module, f"llvm.fma.v{kind.count}f32", kind, kind, kind, kind), [first, second, third]
    )


_NOTHING = 1e-30


def or_nothing(builder: ir.IRBuilder, factor: Any) -> Any:
    """What is left of numbers; where that is next to nothing it is none: processors are slow with the smallest numbers."""
    is_less = builder.fcmp_ordered("<", factor, ir.Constant(F32, _NOTHING))
    return builder.select(is_less, ir.Constant(F32, 0.0), factor)


def total(module: ir.Module, builder: ir.IRBuilder, values: Any) -> Any:
    """The sum of a vector of floats."""
    kind = values.type
    add = intrinsic(module, f"llvm.vector.reduce.fadd.v{kind.count}f32", F32, F32, kind)
    return builder.call(add, [ir.Constant(F32, -0.0), values], fastmath=("reassoc",))


def totals(builder: ir.IRBuilder, vectors: Sequence[Any]) -> list[Any]:
    """The sums of the elements of each of some vectors of floats, as elements of vectors.

    Halves are added to each other, those of two vectors in one instruction: whatever else there is, a sum has the same
    bits. The elements beyond the last vector's sum mean nothing.
    """
    size = vectors[0].type.count
    while size > 1:
        pairs = [(vectors[i], vectors[min(i + 1, len(vectors) - 1)]) for i in range(0, len(vectors), 2)]
        starts = range(0, vectors[0].type.count * min(2, len(vectors)), size)
        low = [start + i for start in starts for i in range(size // 2)]
        high = [place + size // 2 for place in low]
        vectors = [
            builder.fadd(shuffled(builder, *pair, low), shuffled(builder, *pair, high)) for pair in pairs
        ]
        size //= 2
    return list(vectors)


def together(builder: ir.IRBuilder, values: Sequence[Any], count: int) -> Any:
    """A vector of ``count`` elements, of which some values are the first."""
    result = ir.Constant(vector(values[0].type, count), ir.Undefined)
    for index, value in enumerate(values):
        result = builder.insert_element(result, value, I32(index))
    return result


def least(builder: ir.IRBuilder, first: Any, second: Any) -> Any:
    """The smaller one of two integers."""
    return builder.select(builder.icmp_signed("<", first, second), first, second)


def greatest(builder: ir.IRBuilder, first: Any, second: Any) -> Any:
    """The greater one of two integers."""
    return builder.select(builder.icmp_signed(">", first, second), first, second)


def fetched(module: ir.Module, builder: ir.IRBuilder, pointer: Any) -> None:
    """Have the memory there brought to the L2 cache, for a read that comes soon.

    Not to the L1 cache: that can wait for fewer lines at a time, and is full of tokens.
    """
    prefetch = intrinsic(module, "llvm.prefetch.p0", VOID, POINTER, I32, I32, I32)
    builder.call(prefetch, [pointer, I32(0), I32(2), I32(1)])


def stored_kind(dtype: str) -> Any:
    """What numbers of a torch dtype are in memory: ``"float32"``, ``"float16"``; as integers ``"bfloat16"`` and ``"uint8"``.

    The last are exponents of 2, more by 127 than is meant (E8M0).
    """
    return {"float32": F32, "float16": ir.HalfType(), "bfloat16": I16, "uint8": I8}[dtype]


def as_floats(builder: ir.IRBuilder, numbers: Any, dtype: str) -> Any:
    """The float32 of numbers, or of one, as they were in memory."""
    if dtype == "float32":
        return numbers
    if dtype == "float16":
        return builder.fpext(numbers, _like(numbers, F32))
    words = _like(numbers, I32)
    by = 23 if dtype == "uint8" else 16  # to where a float32 has its exponent, or its first half
    return builder.bitcast(builder.shl(builder.zext(numbers, words), _all(words, by)), _like(numbers, F32))


def from_floats(builder: ir.IRBuilder, numbers: Any, dtype: str) -> Any:
    """Numbers, or one, to be written: rounded to the nearest, to the even one between two; not for NaNs."""
    if dtype == "float32":
        return numbers
    if dtype == "float16":
        return builder.fptrunc(numbers, _like(numbers, ir.HalfType()))
    words = _like(numbers, I32)
    bits = builder.bitcast(numbers, words)
    odd = builder.and_(builder.lshr(bits, _all(words, 16)), _all(words, 1))
    rounded = builder.add(builder.add(bits, _all(words, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _all(words, 16)), _like(numbers, I16))


def _like(numbers: Any, kind: Any) -> Any:
    return vector(kind, numbers.type.count) if isinstance(numbers.type, ir.VectorType) else kind


def _all(kind: Any, value: int) -> Any:
    return same(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)
