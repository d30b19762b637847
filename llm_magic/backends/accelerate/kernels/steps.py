"""What `elementwise` compiles, as facts; without LLVM, which may not be there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operand:
    """Numbers in a buffer.

    Attributes
    ----------
    buffer
        Its number.
    offset, strides
        In elements.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """

    buffer: int
    offset: int
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Loop:
    """A function of the numbers at the same place of each input.

    Attributes
    ----------
    function, numbers
        Its name in `functions.Functions`, and what else it takes.
    sizes
        Of the result; strides of inputs are 0 where they are spread.
    """

    function: str
    numbers: tuple[float, ...]
    sizes: tuple[int, ...]
    result: Operand
    inputs: tuple[Operand, ...]


@dataclass(frozen=True)
class Fold:
    """The sum of the numbers along some directions, or the largest of them.

    Attributes
    ----------
    function
        ``"sum"`` or ``"max"``.
    divisor
        Of the sum.
    sizes, folded
        Of the result; of the directions that go. Strides of the input are those of both.
    """

    function: str
    divisor: float
    sizes: tuple[int, ...]
    folded: tuple[int, ...]
    result: Operand
    input: Operand
