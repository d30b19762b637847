"""What the CPU makes of weights: few tokens times the bytes as they lie, many times numbers.

bitsandbytes and quanto unpack a whole weight for every token, on most CPUs by slow code, where they
have no kernel for its format. Compiled ones (see `kernels`) take the formats of both, at about the speed of the RAM.
And most CPUs have no instructions for products in 16 bits: torch multiplies such weights with several
tokens several times as slowly as with numbers of 32 bits. The kernels
need llvmlite; without it, or on a processor that they are not made for, the libraries compute.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

PLAIN = ("bfloat16", "float16")
"""Kinds of weights that are not packed."""

_TOGETHER = 4
"""Tokens that are multiplied with a weight at a time: about as long as one of them takes."""
_FEW, _FEW_WITH_WIDE = 12, 24
"""Up to so many are multiplied with the bytes; the second where numbers are of 32 bits. Measured with AMX, and with AVX2."""
_UNPACKED_WEIGHTS = 1 << 22
"""That are numbers at a time, while many tokens are multiplied with them: they stay in the caches."""
_ALONE = 1 << 15
"""Weights for which one thread is quicker than several."""


@dataclass(frozen=True)
class PackedWeights:
    """One packed matrix, or several in a stack.

    Attributes
    ----------
    kind
        ``"nf4"``, ``"fp4"``, ``"int8"``, ``"float8"``, ``"int4"`` or ``"int2"``; ``"bfloat16"`` and ``"float16"`` are not
        packed at all.
    data, scales, shifts
        Contiguous tensors on the CPU; shifts of integers of 4 and 2 bits alone, scales of all that is packed.
    rows, columns
        Of a matrix: ``(out, in)``.
    group
        Weights that share a scale; 0 for a row.
    factor
        On the scales as they are.
    """

    kind: str
    data: Any
    scales: Any
    shifts: Any
    rows: int
    columns: int
    group: int = 0
    factor: float = 1.0

    @cached_property
    def layout(self) -> Layout:
        """What a kernel must know of them."""
        scales = "float32" if self.scales is None else _name(self.scales.dtype)
        return Layout(self.kind, self.columns, self.group, self.factor, scales)


@dataclass(frozen=True)
class Layout:
    """How packed weights lie; as in `PackedWeights`, with the dtype of the scales."""

    kind: str
    columns: int
    group: int = 0
    factor: float = 1.0
    scales: str = "float32"

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.columns, self.group, self.factor, self.scales))

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
    return _FEW if _quick_dtype(dtype).itemsize == 2 else _FEW_WITH_WIDE  # bytes of a number


def multiplied(tokens: Any, weights: PackedWeights) -> Any:
    """Tokens ``[..., in]`` times a matrix, ``[..., out]``; ``None`` where no kernel takes it."""
    if not _may_read(tokens, weights):
        return None
    flat = tokens.reshape(-1, weights.columns).contiguous()
    multiply = _by_bytes if len(flat) <= few_tokens(tokens.dtype) else _by_numbers
    result = multiply(flat, weights)
    return None if result is None else result.view(*tokens.shape[:-1], weights.rows)


def multiplied_each(tokens: Any, weights: PackedWeights, matrices: Any) -> Any:
    """Each token ``[n, in]`` times one matrix of a stack, whose numbers are ``matrices`` (int64 ``[n]``); as `multiplied`."""
    return _by_bytes(tokens.contiguous(), weights, matrices) if _may_read(tokens, weights) else None


def _may_read(tokens: Any, weights: PackedWeights) -> bool:
    """Whether all is there, in RAM, and nobody looks on: to differentiate, to trace."""
    import torch

    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if type(tokens) not in (torch.Tensor, torch.nn.Parameter) or not tokens.numel():
        return False
    if (weights.scales is None) != (weights.kind in PLAIN):
        return False
    needs_grad = torch.is_grad_enabled()
    for part in (
        tokens,
        weights.data,
        weights.scales,
        weights.shifts,
    ):  # a loop: it is asked for every product
        if part is not None and not (part.is_cpu and not (needs_grad and part.requires_grad)):
            return False
    return True


def _by_bytes(tokens: Any, weights: PackedWeights, matrices: Any = None) -> Any:
    """Tokens times a matrix, or each of them times one of ``matrices``; ``None`` where no kernel takes it."""
    import torch

    count = tokens.shape[0]
    pairs = 1 if matrices is None else count
    blocks = -(-count // pairs // _TOGETHER)
    together = -(-count // pairs // blocks)
    kernel = _kernel(weights.layout, _name(tokens.dtype), together)
    if kernel is None:
        return None
    places = pairs * blocks * together  # the last of them may be empty
    results = tokens.new_empty(places, weights.rows)
    inputs = (tokens, torch.empty(places, weights.columns))
    matrices = _only() if matrices is None else matrices
    _run(kernel, weights, results, inputs=inputs, pairs=pairs, matrices=matrices, blocks=blocks)
    return results if places == count else results[:count]


def _by_numbers(tokens: Any, weights: PackedWeights) -> Any:
    """Tokens times numbers of some rows at a time, in a dtype that this CPU multiplies fast; as `_by_bytes`."""
    import torch

    dtype = _quick_dtype(tokens.dtype)
    if _kernel(weights.layout, _name(dtype), 0) is None:
        return None
    inputs, results = tokens.to(dtype), tokens.new_empty(len(tokens), weights.rows)
    step = weights.rows if weights.shifts is not None else max(1, _UNPACKED_WEIGHTS // weights.columns)
    numbers = torch.empty(min(step, weights.rows), weights.columns, dtype=dtype)
    for start in range(0, weights.rows, step):
        some = numbers[: min(step, weights.rows - start)]
        _unpack(weights, start, some)
        results[:, start : start + len(some)] = torch.mm(inputs, some.T)
    return results


def _unpack(weights: PackedWeights, start: int, numbers: Any) -> None:
    """The numbers of the rows from ``start`` on."""
    import torch

    of_a_row = weights.data.numel() // weights.rows
    data = weights.data.detach().as_subclass(torch.Tensor).view(-1)[start * of_a_row :]
    scales = weights.scales
    if scales is not None:
        scales = scales.view(-1)[start * (scales.numel() // weights.rows) :]
    part = replace(weights, data=data, scales=scales, rows=len(numbers))
    kernel = _kernel(weights.layout, _name(numbers.dtype), 0)
    assert kernel is not None
    _run(kernel, part, numbers)


def _run(
    kernel: Callable[[Any], None],
    weights: PackedWeights,
    results: Any,
    *,
    inputs: tuple[Any, Any] = (None, None),
    pairs: int = 1,
    matrices: Any = None,
    blocks: int = 0,
) -> None:
    """Call a kernel; see `kernels.products.products` for its arguments."""
    import torch

    threads = torch.get_num_threads()  # ask always: that is when a new thread learns of torch's setting
    tokens, arranged = inputs
    kernel(
        _Words(
            _address(tokens),
            _address(arranged),
            _address(weights.data),
            _address(weights.scales),
            _address(weights.shifts),
            results.data_ptr(),
            0 if tokens is None else tokens.shape[0],
            weights.columns,
            weights.rows,
            pairs,
            _address(matrices),
            blocks,
            1 if pairs * weights.rows * weights.columns < _ALONE else threads,
        )
    )


_Words = ctypes.c_int64 * 13


def _address(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())


@cache
def _only() -> Any:
    """The number of the only matrix."""
    import torch

    return torch.zeros(1, dtype=torch.int64)


@cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _kernel(layout: Layout, dtype: str, together: int) -> Callable[[Any], None] | None:
    """The compiled kernel for so many tokens together; of none: what unpacks."""
    reader = _reader(layout, is_exact=dtype != "bfloat16")
    used = {layout.kind, layout.scales, dtype}
    is_known = reader is not None and {layout.scales, dtype} <= {"float32", "float16", "bfloat16"}
    if "float16" in used and not _readers().has_float16():
        return None
    return _compiled(reader, layout.scales, dtype, together) if is_known else None


@cache
def _compiled(reader: Any, scales: str, dtype: str, together: int) -> Callable[[Any], None] | None:
    # Not for every number of columns: those that are read alike share it.
    from llm_magic.backends.accelerate.kernels import products

    try:
        if together:
            return products.products(reader, together, dtype, scales)
        return products.unpacking(reader, dtype, scales)
    except RuntimeError:  # LLVM's: it has no such instruction after all
        return None


@cache
def _reader(layout: Layout, *, is_exact: bool) -> Any:
    readers = _readers()
    if readers is None:
        return None
    if layout.kind in ("nf4", "fp4"):
        return readers.codes(_table(layout.kind), layout.group, layout.columns, is_exact=is_exact)
    if layout.kind in PLAIN:
        return readers.halves(layout.kind, layout.columns)
    if layout.kind in ("int4", "int2"):
        return readers.fractions(int(layout.kind[-1]), layout.group, layout.columns)
    if layout.kind == "int8":
        return readers.integers(layout.columns, layout.factor)
    return readers.floats(layout.columns) if layout.kind == "float8" else None


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
    from bitsandbytes.functional import get_4bit_type

    return tuple(get_4bit_type(kind, device="cpu").tolist())


@cache
def _quick_dtype(dtype: Any) -> Any:
    """In which this CPU multiplies matrices fast: that of 16 bits only if it has instructions for it."""
    import torch

    from llm_magic.backends.accelerate.kernels.compiler import instructions

    needed = {torch.bfloat16: ("avx512bf16", "amx-bf16", "bf16"), torch.float16: ("avx512fp16", "amx-fp16")}
    has_it = dtype not in needed or not instructions().isdisjoint(needed[dtype])
    return dtype if has_it else torch.float32
