"""The two orders that torch's 4-bit kernels read a weight in, and the way from one to the other.

Each is a permutation of half bytes. CUDA's puts eight of them into a word, as the lanes of a tensor core
take them; the CPU's depends on its instruction set, so torch is asked for it. Quanto knows no way back
but a product with the identity: of as many operations as columns for each weight, beside a matrix of
columns by columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_AT_A_TIME = 1 << 22
"""Weights that are put into another order at a time; each takes several bytes meanwhile."""

_ROWS = 64
"""Blocks of rows of every order end where this many do."""

_K_TILES = 2
"""Inner tiles of columns, of 16 each, as quanto asks torch for them: one word a lane."""


def is_for_cuda(ordered: Any) -> bool:
    """Whether a weight lies in CUDA's order, wherever its bytes are."""
    import torch

    return bool(ordered.dtype == torch.int32)


def integers(ordered: Any, columns: int) -> Any:
    """The plain integers (uint8, rows by columns) of a weight in either order, where it lies."""
    import torch

    per_row = 8 if is_for_cuda(ordered) else 1
    rows = len(ordered) * per_row
    plain = torch.empty(rows, columns, dtype=torch.uint8, device=ordered.device)
    back = _from_cuda if is_for_cuda(ordered) else _from_cpu
    for start, stop in _slices(rows, columns):
        plain[start:stop] = back(ordered[start // per_row : stop // per_row], columns)
    return plain


def reordered(ordered: Any, columns: int) -> Any:
    """The weight in the other order, in RAM: it either comes from there or goes there."""
    import torch

    per_row, to_cuda = (8, False) if is_for_cuda(ordered) else (1, True)
    rows = len(ordered) * per_row
    shape = (rows // 8, columns // 32, 32, 1) if to_cuda else (rows, columns // 2)
    result = torch.empty(shape, dtype=torch.int32 if to_cuda else torch.uint8)
    for start, stop in _slices(rows, columns):
        part = integers(ordered[start // per_row : stop // per_row], columns).cpu()
        to = slice(start // 8, stop // 8) if to_cuda else slice(start, stop)
        result[to] = _to_cuda(part) if to_cuda else to_cpu(part)
    return result


def _slices(rows: int, columns: int) -> list[tuple[int, int]]:
    step = _ROWS * max(1, _AT_A_TIME // (_ROWS * columns))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _from_cuda(words: Any, columns: int) -> Any:
    """Of 8 rows and 32 columns: a row is 4 lanes, and a lane has 2 columns in each 8, first those on the left."""
    import torch

    pairs = words.view(torch.uint8)
    halves = torch.stack((pairs & 15, pairs >> 4), -1)
    lanes = halves.view(-1, columns // 32, 8, 4, 2, 4)  # 8 rows, 4 lanes, left and right, 4 times 8 columns
    return lanes.permute(0, 2, 1, 5, 3, 4).reshape(-1, columns)


def _to_cuda(plain: Any) -> Any:
    import torch

    rows, columns = plain.shape
    lanes = plain.view(rows // 8, 8, columns // 32, 4, 4, 2).permute(0, 2, 1, 4, 5, 3)
    pairs = lanes.reshape(rows // 8, columns // 32, 32, 4, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)


def _from_cpu(packed: Any, columns: int) -> Any:
    """Blocks of rows, in each the columns one after the other; the last block may be smaller."""
    import torch

    block = _cpu_block()
    whole = len(packed) // block * block
    parts = [(packed[:whole], block), (packed[whole:], len(packed) - whole)]
    return torch.cat([_from_block(part, columns, rows) for part, rows in parts if len(part)])


def _from_block(packed: Any, columns: int, rows: int) -> Any:
    import torch

    pairs = packed.view(-1, columns, rows // 2).transpose(1, 2).contiguous()
    places = _cpu_places(rows, packed.device)
    return torch.cat((pairs & 15, pairs >> 4), 1).index_select(1, places).view(-1, columns)


def to_cpu(plain: Any) -> Any:
    """Plain integers (uint8, rows by columns) in the order of this CPU's kernel, as torch puts them, but quicker.

    torch wants them in 32 bits each, and takes them one by one.
    """
    import torch

    block, (rows, columns) = _cpu_block(), plain.shape
    whole = rows // block * block
    parts = [(plain[:whole], block), (plain[whole:], rows - whole)]
    return torch.cat([_to_block(part, columns, size) for part, size in parts if len(part)])


def _to_block(plain: Any, columns: int, rows: int) -> Any:
    # By whole rows: an index in brackets takes number by number, in twenty times as long.
    low, high = (plain.view(-1, rows, columns).index_select(1, half) for half in _cpu_halves(rows))
    return high.bitwise_left_shift_(4).bitwise_or_(low).transpose(1, 2).reshape(-1, columns // 2)


def _by_torch(plain: Any) -> Any:
    import torch

    return torch._convert_weight_to_int4pack_for_cpu(plain.to(torch.int32), _K_TILES)


@cache
def _cpu_block() -> int:
    """Rows that this CPU's kernel takes together: the fewest that stand before all others."""
    low, high = _cpu_rows(2 * _ROWS)
    sizes = (16, 32, _ROWS)
    return next(rows for rows in sizes if max(*low[: 16 * rows], *high[: 16 * rows]) < rows)


@cache
def block_in_halves() -> int:
    """Rows of a block, where this CPU's order has the first half of them in low halves of bytes; 0: it has not."""
    rows = _cpu_block()
    low, high = (half.tolist() for half in _cpu_halves(rows))
    return rows if [*low, *high] == list(range(rows)) else 0


@cache
def _cpu_places(rows: int, device: Any) -> Any:
    """Where each row of a block is in a column: by their bytes those in low halves, then those in high ones."""
    import torch

    return torch.cat(_cpu_halves(rows)).argsort().to(device)


@cache
def _cpu_halves(rows: int) -> tuple[Any, Any]:
    """The rows that the low halves of a column's bytes hold, and the high ones, in a block of so many rows."""
    import torch

    low, high = _cpu_rows(rows)
    first, second = (torch.tensor(half[: rows // 2], device="cpu") for half in (low, high))
    return first, second


def _cpu_rows(rows: int) -> tuple[list[int], list[int]]:
    """Whose halves, low and high, the bytes of 32 columns hold, told by numbers that stand in the rows."""
    import torch

    numbers = torch.arange(rows, device="cpu").unsqueeze(1).expand(rows, 16 * _K_TILES)
    ones, tens = (_by_torch(digits.contiguous()).view(-1) for digits in (numbers & 15, numbers >> 4))
    return ((ones & 15) + (tens << 4)).tolist(), ((ones >> 4) + (tens & 240)).tolist()
