"""What the CPU makes of weights: few tokens times the bytes as they lie, many times numbers.

bitsandbytes and quanto unpack a whole weight for every token, on most CPUs by slow code, where they
have no kernel for its format. Compiled ones (see `kernels`) take the formats of both, at about the speed of the RAM.
And most CPUs have no instructions for products in 16 bits: torch multiplies such weights with several
tokens several times as slowly as with numbers of 32 bits. Where they have some, torch does not reach the speed of
the RAM with few tokens either. The kernels need llvmlite; without it, or on a processor that they are not made for,
the libraries compute.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.kernels.words import ADDRESSES, HEAD_WORDS, TEAM
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.preparation import preparing

PLAIN = ("bfloat16", "float16", "float32")
"""Kinds of weights that are not packed. Of 32 bits kernels read routers alone: torch is quick with the others."""

MXFP4_NUMBERS = tuple(
    sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
"""What floats of 4 bits (E2M1) are, by their bits."""

_BITS = {"nf4": 4, "fp4": 4, "mxfp4": 4, "int4": 4, "int2": 2, "int8": 8, "float8": 8, "float32": 32}
"""Of a weight, without its share of a scale; 16 where it is not here."""
_CODED = ("nf4", "fp4", "mxfp4")
"""Kinds whose 4 bits are places in a table."""
_STARTS_LOW = ("mxfp4",)
"""Those that have the first of two in the low half of a byte."""

_TOGETHER, _TOGETHER_IN_BLOCKS, _TOGETHER_WITH_PLAIN = 4, 6, 8
"""Tokens that are multiplied with a weight at a time, about as long as RAM is waited for: numbers are made of packed ones.

The second where integers in blocks of rows are multiplied in bfloat16.
"""
_FEW, _FEW_WITHOUT_TILES = 12, 24
"""Up to so many are multiplied with the bytes of packed weights; the second where a processor has no tiles for numbers of
16 bits. Measured with AMX, and with AVX2 and avx512bf16 (Zen 4)."""
_FEW_PLAIN = {
    "bfloat16": (("amx-bf16", 8), ("avx512bf16", 16)),
    "float16": (("amx-fp16", 8), ("avx512fp16", 24)),
}
"""And with a matrix of 16 bits, on a processor that has instructions for them: the first of these that it has.

Measured with two cores each, matrices of 0.3 to 50 million weights. avx512bf16 alone (Zen 4): kernels were at the limit
of RAM with up to 8 tokens, where torch was at half of it, and quicker with 16. AMX (Sapphire Rapids): they took 0.65 to
0.9 of torch's time with one to 4 tokens, as long with 8, and 1.1 to 1.7 times as long with 16, for its tiles take those
at once. avx512fp16 there: 0.4 to 0.6 of torch's time with 2 to 8, 0.9 with 24. Not measured: tiles of float16, taken for
the same as those of bfloat16; ARM's instructions, whose products stay torch's.
"""
_FEW_WIDE = 8
"""And with a router's matrix of 32 bits."""
_UNPACKED_WEIGHTS = 1 << 22
"""That are numbers at a time, while many tokens are multiplied with them: they stay in the caches."""
_THE_ONLY = ctypes.c_int64(0)
"""The number of a matrix that is none of a stack."""
_OF_A_SHARE = 1 << 16
"""Weights of a share at least: some microseconds, for which it is worth to have another thread take it."""


@dataclass(frozen=True)
class PackedWeights:
    """One packed matrix, or several in a stack.

    Attributes
    ----------
    kind
        ``"nf4"``, ``"fp4"``, ``"mxfp4"``, ``"int8"``, ``"float8"``, ``"int4"`` or ``"int2"``; those of `PLAIN` are not
        packed at all.
    data, scales, shifts
        Contiguous tensors on the CPU; shifts of integers of 4 and 2 bits alone, scales of all that is packed. Scales of
        ``"mxfp4"`` are exponents of 2 in uint8, more by 127 than is meant.
    rows, columns
        Of a matrix: ``(out, in)``.
    group
        Weights that share a scale; 0 for a row.
    factor
        On the scales as they are.
    block
        Rows of a block, where integers of 4 bits lie in such; see `kernels.row_blocks`. Scales are beside middles then.
    """

    kind: str
    data: Any
    scales: Any
    shifts: Any
    rows: int
    columns: int
    group: int = 0
    factor: float = 1.0
    block: int = 0

    @cached_property
    def layout(self) -> Layout:
        """What a kernel must know of them."""
        scales = "float32" if self.scales is None else _name(self.scales.dtype)
        return Layout(self.kind, self.columns, self.group, self.factor, scales, self.block)


@dataclass(frozen=True)
class Layout:
    """How packed weights lie; as in `PackedWeights`, with the dtype of the scales."""

    kind: str
    columns: int
    group: int = 0
    factor: float = 1.0
    scales: str = "float32"
    block: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.columns, self.group, self.factor, self.scales, self.block))

    def __hash__(self) -> int:
        """Made once: a kernel is looked up for every product."""
        return self._hash


def is_there() -> bool:
    """Whether there are kernels for this processor."""
    return _kernel(Layout("int8", 64), "float32", 1) is not None


def are_read(dtype: str) -> bool:
    """Whether kernels read and write numbers of a dtype, by its name."""
    if dtype == "float16" and (_readers() is None or not _readers().has_float16()):
        return False
    return dtype in ("float32", "float16", "bfloat16") and is_there()


def multiplies_slowly(dtype: Any) -> bool:
    """Whether this CPU has no instructions for matrix products in a dtype of 16 bits, but kernels of ours."""
    return _readers() is not None and _quick_dtype(dtype) != dtype and is_there()


def few_tokens(dtype: Any) -> int:
    """Up to how many tokens bytes are quicker than numbers, which are made for all of them once."""
    has_wide = _quick_dtype(dtype).itemsize > 2  # bytes of a number
    has_dots_alone = "avx512bf16" in _instructions() and "amx-bf16" not in _instructions()
    return _FEW_WITHOUT_TILES if has_wide or has_dots_alone else _FEW


@cache
def few_plain_tokens(dtype: Any) -> int:
    """With up to how many tokens a plain matrix of 16 bits is multiplied by a kernel, not by torch; 0 for none at all.

    It depends on the processor alone, so that answers repeat.
    """
    if _name(dtype) not in _FEW_PLAIN or not is_there():
        return 0
    if multiplies_slowly(dtype):
        return few_tokens(dtype)
    return next((count for needed, count in _FEW_PLAIN[_name(dtype)] if needed in _instructions()), 0)


@cache
def few_routed_tokens(dtype: Any) -> int:
    """As `few_plain_tokens`, of a router's matrix, which may be of 32 bits as well."""
    import torch

    if dtype == torch.float32:
        return _FEW_WIDE if is_there() else 0
    return few_plain_tokens(dtype)


def most_by_bytes(kind: str, dtype: Any) -> int:
    """Up to how many tokens of a dtype are multiplied with the bytes of weights of a kind."""
    import torch

    return few_routed_tokens(getattr(torch, kind)) if kind in PLAIN else few_tokens(dtype)


def multiplied(tokens: Any, weights: PackedWeights) -> Any:
    """Tokens ``[..., in]`` times a matrix, ``[..., out]``; ``None`` where no kernel takes it."""
    if not _may_read(tokens, weights):
        return None
    if tokens.numel() <= few_tokens(tokens.dtype) * weights.columns:
        return _by_bytes(tokens, weights.layout, weights.rows, _addresses(weights))
    result = _by_numbers(tokens.reshape(-1, weights.columns).contiguous(), weights)
    return None if result is None else result.view(*tokens.shape[:-1], weights.rows)


def multiplied_plain(tokens: Any, matrix: Any) -> Any:
    """Tokens times a parameter ``[out, in]`` of 16 bits, in the same dtype; as `multiplied`."""
    dtype = matrix.dtype
    if tokens.dtype != dtype or not _may_be_multiplied(tokens, matrix):
        return None
    rows, columns = matrix.shape
    if tokens.numel() <= few_plain_tokens(dtype) * columns:
        return _by_bytes(tokens, _plain(dtype, columns), rows, (matrix.data_ptr(), 0, 0))
    if not multiplies_slowly(dtype):
        return None
    weights = PackedWeights(_name(dtype), matrix, None, None, rows, columns)
    result = _by_numbers(tokens.reshape(-1, columns).contiguous(), weights)
    return None if result is None else result.view(*tokens.shape[:-1], rows)


def multiplied_router(tokens: Any, matrix: Any, *, is_wide: bool) -> Any:
    """Few tokens times a router's parameter ``[out, in]``, in its dtype, or in float32 where they are wide; as `multiplied`."""
    import torch

    dtype = torch.float32 if is_wide else matrix.dtype
    if tokens.dtype != dtype or not _may_be_multiplied(tokens, matrix):
        return None
    rows, columns = matrix.shape
    if tokens.numel() > few_routed_tokens(matrix.dtype) * columns:
        return None
    return _by_bytes(tokens, _plain(matrix.dtype, columns), rows, (matrix.data_ptr(), 0, 0))


def multiplied_each(tokens: Any, weights: PackedWeights, matrices: Any) -> Any:
    """Each token ``[n, in]`` times ``k`` matrices of a stack, whose numbers are ``matrices`` (int64 ``[n * k]``).

    As `multiplied`, ``[n * k, out]``.
    """
    if not _may_read(tokens, weights):
        return None
    return _by_bytes(tokens, weights.layout, weights.rows, _addresses(weights), matrices)


def multiplied_each_plain(tokens: Any, stack: Any, matrices: Any) -> Any:
    """As `multiplied_each`, with a stack in the dtype of the tokens ``[count, out, in]``."""
    dtype = stack.dtype
    if tokens.dtype != dtype or not few_plain_tokens(dtype) or not _are_plain(stack, _STACK):
        return None
    _, rows, columns = stack.shape
    if tokens.shape[-1] != columns or not _may_be_read(tokens, stack):
        return None
    return _by_bytes(tokens, _plain(dtype, columns), rows, (stack.data_ptr(), 0, 0), matrices)


def plain_stack(stack: Any) -> PackedWeights | None:
    """The first matrix of a stack of 16 bits ``[count, out, in]``; ``None`` where no kernel multiplies with each of them."""
    if not (_are_plain(stack, _STACK) and stack.is_cpu and few_plain_tokens(stack.dtype)):
        return None
    return PackedWeights(_name(stack.dtype), stack, None, None, *stack.shape[1:])


_MATRIX, _STACK = 2, 3
"""Their dimensions."""


def _may_be_multiplied(tokens: Any, matrix: Any) -> bool:
    """Whether tokens fit a plain matrix, and both may be read."""
    is_such = _are_plain(matrix, _MATRIX) and tokens.shape[-1] == matrix.shape[-1]
    return is_such and _may_be_read(tokens, matrix)


def _are_plain(weights: Any, dimensions: int) -> bool:
    return are_numbers(weights) and weights.dim() == dimensions and bool(weights.is_contiguous())


def are_numbers(tensor: Any) -> bool:
    """Whether it is torch's own tensor: one of somebody else may have no bytes, or bytes that mean something else."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _may_read(tokens: Any, weights: PackedWeights) -> bool:
    """Whether all is there, in RAM, and nobody looks on: to differentiate, to trace."""
    if (weights.scales is None) != (weights.kind in PLAIN) or tokens.shape[-1] != weights.columns:
        return False
    return _may_be_read(tokens, weights.data, weights.scales, weights.shifts)


def _may_be_read(tokens: Any, *parts: Any) -> bool:
    import torch

    if is_looked_at() or not are_numbers(tokens) or not tokens.numel():
        return False
    needs_grad = torch.is_grad_enabled()
    for part in (tokens, *parts):  # a loop: it is asked for every product
        if part is not None and not (part.is_cpu and not (needs_grad and part.requires_grad)):
            return False
    return True


@dataclass(frozen=True)
class Products:
    """Products of some tokens with one matrix or several that lie alike, prepared: a call says where all of it is.

    Attributes
    ----------
    kernel
        Compiled for ``together`` tokens at a time.
    columns, rows
        Of each matrix: ``in``, and for each matrix ``out``.
    tokens, pairs, sharing
        How many, and with how many matrices of a stack they are multiplied, so many with the same ones; see
        `kernels.products.products`.
    blocks, together
        Of tokens for each pair, and their size: results have room for all of them, also where the last is not full.
    room_for_each
        Floats that a token takes where they are arranged before.
    """

    kernel: Callable[[Any], None]
    columns: int
    rows: tuple[int, ...]
    tokens: int
    pairs: int
    sharing: int
    blocks: int
    together: int
    room_for_each: int

    @cached_property
    def places(self) -> int:
        """Rows of tokens in each result; those beyond ``tokens`` mean nothing."""
        return self.pairs * self.blocks * self.together

    @cached_property
    def room(self) -> int:
        """Bytes that a call needs for tokens."""
        return 4 * self.places // self.sharing * self.room_for_each

    @cached_property
    def shares(self) -> int:
        """For how many threads it is worth."""
        return self.pairs * self.columns * sum(self.rows) // _OF_A_SHARE

    def bytes_of(self, kind: str) -> int:
        """What is read of weights of a kind."""
        return self.pairs * self.columns * sum(self.rows) * _BITS.get(kind, 16) // 8

    @cached_property
    def _constants(self) -> tuple[int, ...]:
        return self.tokens, self.columns, self.pairs, self.sharing, self.blocks, len(self.rows), self.shares

    @cached_property
    def _packed(self) -> tuple[Callable[..., bytes], Callable[[bytes], Any]]:
        """What makes bytes of words, and of these what a kernel takes: together quicker than ctypes alone."""
        count = HEAD_WORDS + (ADDRESSES + 1) * len(self.rows)
        return struct.Struct(f"={count}q").pack, (ctypes.c_int64 * count).from_buffer_copy

    def words(self, tokens: int, room: int, addresses: Sequence[int], matrices: int = 0) -> Any:
        """The argument of `run`: may be used again while nothing moves, by one thread at a time.

        Parameters
        ----------
        tokens
            Where they are, contiguous.
        room
            Where `room` bytes are.
        addresses
            For each matrix, where its data, scales, shifts and results ``[places, out]`` are; 0 for what it has not.
        matrices
            Where the numbers of the pairs' matrices are; 0 for the first of each stack.
        """
        pack, copied = self._packed
        matrices = matrices or ctypes.addressof(_THE_ONLY)
        return copied(pack(tokens, room, matrices, 0, *self._constants, *addresses, *self.rows))

    def run(self, words: Any) -> None:
        """Multiply."""
        words[TEAM] = team() if self.shares > 1 else 0
        self.kernel(words)


def prepared(layout: Layout, rows: tuple[int, ...], dtype: str, tokens: int) -> Products | None:
    """Products of so many tokens with a matrix for each of ``rows``; ``None`` where no kernel makes them."""
    return _prepared(layout, rows, dtype, tokens, 0)


def prepared_each(layout: Layout, rows: int, dtype: str, tokens: int, of_each: int) -> Products | None:
    """Products of each of so many tokens with ``of_each`` matrices of a stack; as `prepared`."""
    return _prepared(layout, (rows,), dtype, tokens, of_each)


@cache
def _prepared(
    layout: Layout, rows: tuple[int, ...], dtype: str, tokens: int, of_each: int
) -> Products | None:
    """Products of each token with ``of_each`` matrices of a stack; 0: of all of them with the only one."""
    if 0 in rows or (layout.block and any(count % layout.block for count in rows)):  # shares divide by them
        return None
    most = _most_together(layout, dtype)
    together = 1 if of_each else -(-tokens // -(-tokens // most))
    kernel = _kernel(layout, dtype, together)
    if kernel is None:
        return None
    room = _room_for_each(layout, dtype, together)
    if of_each:
        return Products(kernel, layout.columns, rows, tokens, tokens * of_each, of_each, 1, 1, room)
    return Products(kernel, layout.columns, rows, tokens, 1, 1, -(-tokens // together), together, room)


@cache
def summed_rows(layout: Layout, dtype: str) -> Callable[[Any], None] | None:
    """The kernel of `kernels.row_sums` for numbers of a dtype and matrices that lie so; ``None`` where there is none."""
    is_plain = layout.kind in PLAIN
    if _readers() is None or not are_read(dtype) or (is_plain and layout.kind != dtype):
        return None
    from llm_magic.backends.accelerate.kernels.row_sums import packed_row_sums, row_sums

    try:
        with preparing():
            if is_plain:
                return row_sums(layout.columns, dtype)
            reader = None if layout.block else _reader(layout, is_exact=dtype != "bfloat16")
            if reader is None or reader.rows > 1 or reader.has_shift or not are_read(layout.scales):
                return None
            return packed_row_sums(reader, layout.columns, dtype, layout.scales)
    except RuntimeError:  # LLVM's: it has no such instruction after all
        return None


def _most_together(layout: Layout, dtype: str) -> int:
    """Tokens that are multiplied at a time."""
    if layout.block:
        order = _order(layout, dtype)
        return _TOGETHER_IN_BLOCKS if order is not None and order.has_dots else _TOGETHER
    return _TOGETHER_WITH_PLAIN if layout.kind in PLAIN else _TOGETHER


def _by_bytes(
    tokens: Any, layout: Layout, rows: int, source: tuple[int, int, int], matrices: Any = None
) -> Any:
    """Tokens times a matrix, or each of them times some of ``matrices``; ``None`` where no kernel takes it.

    ``source`` are the addresses of data, scales and shifts.
    """
    import torch

    tokens, dtype, count = tokens.contiguous(), tokens.dtype, tokens.numel() // layout.columns
    matrices = None if matrices is None else matrices.contiguous()
    of_each = 0 if matrices is None else len(matrices) // count
    products = _prepared(layout, (rows,), _name(dtype), count, of_each)
    if products is None:
        return None
    shape = tokens.shape[:-1] if matrices is None else matrices.shape
    is_full = matrices is not None or products.places == count
    result = tokens.new_empty((*shape, rows) if is_full else (products.places, rows))
    room = torch.empty(products.room, dtype=torch.uint8, device="cpu") if products.room else None
    addresses = (*source, result.data_ptr())
    products.run(products.words(tokens.data_ptr(), address(room), addresses, address(matrices)))
    return result if is_full else result[:count].view(*shape, rows)


def _addresses(weights: PackedWeights) -> tuple[int, int, int]:
    return weights.data.data_ptr(), address(weights.scales), address(weights.shifts)


def _by_numbers(tokens: Any, weights: PackedWeights) -> Any:
    """Tokens times numbers of some rows at a time, in a dtype that this CPU multiplies fast; as `_by_bytes`."""
    import torch

    dtype = _quick_dtype(tokens.dtype)
    if _kernel(weights.layout, _name(dtype), 0) is None or (weights.block and weights.rows % weights.block):
        return None
    inputs, results = tokens.to(dtype), tokens.new_empty(len(tokens), weights.rows)
    if weights.block:
        step = max(1, _UNPACKED_WEIGHTS // weights.columns // weights.block) * weights.block
    else:
        step = weights.rows if weights.shifts is not None else max(1, _UNPACKED_WEIGHTS // weights.columns)
    numbers = torch.empty(min(step, weights.rows) * weights.columns, dtype=dtype, device="cpu")
    for start in range(0, weights.rows, step):
        rows = min(step, weights.rows - start)
        some = numbers[: rows * weights.columns]
        results[:, start : start + rows] = torch.mm(inputs, _unpacked(weights, start, some))
    return results


def unpack(weights: PackedWeights, dtype: Any) -> bool:
    """Make numbers of all packed weights as products with tokens of a dtype do, some at a time; whether a kernel does."""
    import torch

    inputs = torch.empty(0, weights.columns, dtype=dtype, device="cpu")
    return _by_numbers(inputs, weights) is not None


def numbers_of(weights: PackedWeights, dtype: Any) -> Any:
    """All numbers of packed weights, ``[out, in]``; ``None`` where no kernel unpacks them."""
    import torch

    if _kernel(weights.layout, _name(dtype), 0) is None or (weights.block and weights.rows % weights.block):
        return None
    room = torch.empty(weights.rows * weights.columns, dtype=dtype, device="cpu")
    return _unpacked(weights, 0, room).T.contiguous()


def _unpacked(weights: PackedWeights, start: int, numbers: Any) -> Any:
    """Numbers ``[in, out]`` of the rows from ``start`` on, as many as there is room for."""
    rows = numbers.numel() // weights.columns
    kernel = _kernel(weights.layout, _name(numbers.dtype), 0)
    assert kernel is not None
    unpack = Products(kernel, weights.columns, (rows,), 0, 1, 1, 0, 0, 0)
    if weights.block:
        addresses = (*_addresses(weights), numbers.data_ptr())
        unpack.run(unpack.words(start // weights.block, weights.rows, addresses))
        return numbers.view(weights.columns, rows)
    part = _rows_from(weights, start)
    unpack.run(unpack.words(0, 0, (*_addresses(part), numbers.data_ptr())))
    return numbers.view(rows, weights.columns).T


def _rows_from(weights: PackedWeights, start: int) -> PackedWeights:
    import torch

    of_a_row = weights.data.numel() // weights.rows
    data = weights.data.detach().as_subclass(torch.Tensor).view(-1)[start * of_a_row :]
    scales = weights.scales
    if scales is not None:
        scales = scales.view(-1)[start * (scales.numel() // weights.rows) :]
    return replace(weights, data=data, scales=scales)


def address(tensor: Any) -> int:
    """Where a tensor is; 0 for none."""
    return 0 if tensor is None else int(tensor.data_ptr())


@cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _plain(dtype: Any, columns: int) -> Layout:
    return Layout(_name(dtype), columns)


@cache
def _kernel(layout: Layout, dtype: str, together: int) -> Callable[[Any], None] | None:
    """The compiled kernel for so many tokens together; of none: what unpacks."""
    reader = _order(layout, dtype) if layout.block else _reader_of(layout, dtype, together)
    numbers = {"float32", "float16", "bfloat16"}
    if reader is None or dtype not in numbers or layout.scales not in numbers | {"uint8"}:
        return None
    if "float16" in (layout.kind, layout.scales, dtype) and not _readers().has_float16():
        return None
    return _compiled(reader, layout.scales, dtype, together)


@cache
def _compiled(reader: Any, scales: str, dtype: str, together: int) -> Callable[[Any], None] | None:
    # Not for every number of columns: those that are read alike share it.
    from llm_magic.backends.accelerate.kernels import products, row_blocks

    try:
        with preparing():
            if isinstance(reader, row_blocks.RowBlocks):
                if together:
                    return row_blocks.row_block_products(reader, together, dtype)
                return row_blocks.row_block_numbers(reader, dtype)
            if together:
                return products.products(reader, together, dtype, scales)
            return products.unpacking(reader, dtype, scales)
    except RuntimeError:  # LLVM's: it has no such instruction after all
        return None


def _room_for_each(layout: Layout, dtype: str, together: int) -> int:
    """Floats that a token takes where it is arranged for a kernel."""
    from llm_magic.backends.accelerate.kernels import products

    if layout.block:
        return int(_order(layout, dtype).floats_of_a_token(layout.columns))
    return layout.columns * products.needs_room(_reader_of(layout, dtype, together), together)


def _order(layout: Layout, dtype: str) -> Any:
    """How integers in blocks of rows are multiplied; ``None`` where no kernel does."""
    if _readers() is None or layout.columns % layout.group or layout.scales != "bfloat16":
        return None
    from llm_magic.backends.accelerate.kernels.row_blocks import row_blocks

    return row_blocks(layout.block, layout.group, dtype)


def _reader_of(layout: Layout, dtype: str, together: int) -> Any:
    """What reads weights to multiply them with so many tokens; with none, to unpack them."""
    if layout.kind == "float32" != dtype:
        return None
    if together and dtype == "bfloat16":
        reader = _dot_reader(layout)
        if reader is not None:
            return reader
    return _reader(layout, is_exact=dtype != "bfloat16")


@cache
def _dot_reader(layout: Layout) -> Any:
    """What multiplies weights with tokens in bfloat16, several at once; ``None``: this processor does not."""
    readers, kind = _readers(), layout.kind
    if readers is None:
        return None
    if kind == "bfloat16":
        return readers.pairs(layout.columns)
    if kind == "float8":
        return readers.float_dots(layout.columns, layout.group)
    if kind not in _CODED:
        return None
    return readers.code_dots(_table(kind), layout.group, layout.columns, starts_low=kind in _STARTS_LOW)


@cache
def _reader(layout: Layout, *, is_exact: bool) -> Any:
    readers = _readers()
    if readers is None:
        return None
    if layout.kind in _CODED:
        starts_low = layout.kind in _STARTS_LOW
        return readers.codes(
            _table(layout.kind), layout.group, layout.columns, is_exact=is_exact, starts_low=starts_low
        )
    if layout.kind in PLAIN:
        return readers.plain(layout.kind, layout.columns)
    if layout.kind in ("int4", "int2"):
        return readers.fractions(int(layout.kind[-1]), layout.group, layout.columns)
    if layout.kind == "int8":
        return readers.integers(layout.columns, layout.factor)
    return readers.floats(layout.columns, layout.group) if layout.kind == "float8" else None


@cache
def _readers() -> Any:
    """The module with ways to read packed weights; ``None`` without llvmlite, or with one that does not work."""
    if importlib.util.find_spec("llvmlite") is None:
        return None
    try:
        from llm_magic.backends.accelerate.kernels import numbers

        numbers.has_float16()  # asks LLVM for the first time
    except Exception:  # another llvmlite, or a part of it
        return None
    return numbers


@cache
def _table(kind: str) -> tuple[float, ...]:
    if kind == "mxfp4":
        return MXFP4_NUMBERS
    from bitsandbytes.functional import get_4bit_type

    return tuple(get_4bit_type(kind, device="cpu").tolist())


@cache
def _quick_dtype(dtype: Any) -> Any:
    """In which this CPU multiplies matrices fast: that of 16 bits only if it has instructions for it."""
    import torch

    needed = {torch.bfloat16: ("avx512bf16", "amx-bf16", "bf16"), torch.float16: ("avx512fp16", "amx-fp16")}
    has_it = dtype not in needed or not _instructions().isdisjoint(needed[dtype])
    return dtype if has_it else torch.float32


def _instructions() -> frozenset[str]:
    """What is known of this processor: nothing without llvmlite, or with one that does not work."""
    readers = _readers()
    return frozenset() if readers is None else readers.compiler.instructions()
