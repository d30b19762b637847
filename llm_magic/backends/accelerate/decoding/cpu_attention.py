"""Attention of a sweep's few tokens on the CPU, by a compiled kernel.

torch's kernel is made for prompts. For a token it is several times as slow as its keys and values are read, and
it knows neither capped scores nor sinks. What is compiled here (see `kernels.attention`) reads each key and value for
all query heads that share it. It needs llvmlite; without it, or for what it is not made for, others compute.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS

_SMALLEST_PART = 64
_FEW_PARTS = 32
_WIDEST = 1024
_ALONE = 1 << 16
"""Products of numbers for which one thread is quicker than several."""
_KEPT_BYTES = 16 << 20
"""Of room for what parts give, which a thread keeps for the next layer."""

_Scale = float | None
_Shape = tuple[int, ...]
_Mask = tuple[Any, _Shape, _Shape] | None


def attended(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
) -> Any:
    """Attention of up to `FEW_TOKENS` tokens, in float32, rounded once.

    Parameters
    ----------
    query
        ``[batch, heads, tokens, width]`` in bfloat16, float16 or float32, with any strides but for the last dimension,
        as keys and values.
    key, value
        ``[batch, key heads, places, width]``, where the key heads divide those of the query; values may be of another
        width. Both are multiples of 8.
    mask
        To be broadcast to ``[batch, heads, tokens, places]``: True for what is seen, or added to the scores.
    scale
        Of the scores; one by the root of the width by default.
    is_causal
        Without a mask, whether a token sees the places up to its own number, as torch has it.
    softcap
        Scores stay within plus and minus this.
    sinks
        ``[heads]``: a further score of every query, which gives nothing.

    Returns
    -------
    Tensor or None
        ``[batch, tokens, heads, value width]``, contiguous; ``None`` where the kernel does not take it. A token that
        sees nothing has 0, as with torch's kernels. Every answer is the same with any number of threads.
    """
    if not _may_read(query, key, value, mask, sinks):
        return None
    call = _call(
        query.dtype if query.dtype == key.dtype == value.dtype else None,
        (query.shape, query.stride()),
        (key.shape, key.stride()),
        (value.shape, value.stride()),
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        scale,
        is_causal,
        softcap,
        None if sinks is None else sinks.shape,
    )
    return None if call is None else call(query, key, value, mask, sinks)


def is_there() -> bool:
    """Whether there may be kernels for this processor: each is compiled when it is first needed."""
    return importlib.util.find_spec("llvmlite") is not None


def _may_read(query: Any, key: Any, value: Any, mask: Any, sinks: Any) -> bool:
    """Whether all is there, in RAM, and nobody looks on: to differentiate, to trace."""
    import torch

    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    needs_grad = torch.is_grad_enabled()
    for part in (query, key, value, mask, sinks):
        if part is None:
            continue
        if type(part) is not torch.Tensor and type(part) is not torch.nn.Parameter:
            return False
        if not part.is_cpu or (needs_grad and part.requires_grad):
            return False
    return True


class _Call:
    """A kernel, and what it is told of tensors of some shapes and strides."""

    def __init__(
        self,
        kernel: Callable[[Any], None],
        shape: Sequence[int],
        tail: Sequence[int],
        record: int,
        is_alone: bool,
    ) -> None:
        batch, heads, shared, tokens, _places, _part = shape[:6]
        self._kernel, self._is_alone = kernel, is_alone
        self._out = (batch, tokens, heads * shared, shape[6])
        parts = -(-shape[4] // shape[5])
        self._records = batch * heads * parts * shared * tokens * record * 4
        self._room = self._records + batch * heads * 8
        self._words = bytes((ctypes.c_int64 * _WORDS)(*[0] * 8, *shape[:6], *tail, 1))

    def __call__(self, query: Any, key: Any, value: Any, mask: Any, sinks: Any) -> Any:
        import torch

        threads = torch.get_num_threads()  # ask always: that is when a new thread learns of torch's setting
        out = query.new_empty(self._out)
        words = _Words.from_buffer_copy(self._words)
        words[0], words[1], words[2] = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if mask is not None:
            words[3] = mask.data_ptr()
        if sinks is not None:
            sinks = sinks.float().contiguous()
            words[4] = sinks.data_ptr()
        words[5] = out.data_ptr()
        room = _rooms.of(self._room)
        words[6] = start = room.data_ptr()
        words[7] = start + self._records
        if not self._is_alone:
            words[_WORDS - 1] = threads
        self._kernel(words)
        return out


class _Rooms(threading.local):
    """Memory that kernels work in, one for each of Python's threads."""

    kept: Any = None

    def of(self, size: int) -> Any:
        import torch

        kept = self.kept
        if kept is not None and kept.nbytes >= size:
            return kept
        made = torch.empty(size, dtype=torch.uint8)
        if size <= _KEPT_BYTES:
            self.kept = made
        return made


_rooms = _Rooms()
_WORDS = 34
_Words = ctypes.c_int64 * _WORDS


@lru_cache(maxsize=256)
def _call(
    dtype: Any,
    query: tuple[_Shape, _Shape],
    key: tuple[_Shape, _Shape],
    value: tuple[_Shape, _Shape],
    mask: _Mask,
    scale: float | None,
    is_causal: bool,
    softcap: float | None,
    sinks: _Shape | None,
) -> _Call | None:
    """What computes tensors like these; ``None`` where no kernel does."""
    if not (len(query[0]) == len(key[0]) == len(value[0]) == 4):
        return None
    (batch, heads, tokens, width), (_, key_heads, places, value_width) = query[0], value[0]
    if not (0 < tokens <= FEW_TOKENS and batch and heads and places and key_heads) or heads % key_heads:
        return None
    if tuple(key[0]) != (batch, key_heads, places, width) or value[0][0] != batch:
        return None
    if width % 8 or value_width % 8 or not 0 < width <= _WIDEST or not 0 < value_width <= _WIDEST:
        return None
    if any(strides[3] != 1 for _, strides in (query, key, value)) or (is_causal and mask is not None):
        return None
    masked = _broadcast(mask, (batch, heads, tokens, places))
    if masked is None or (sinks is not None and tuple(sinks) != (heads,)):
        return None
    shared = heads // key_heads
    name = str(dtype).removeprefix("torch.")
    kind = (name, width, value_width, _rows(shared * tokens), masked[0], bool(softcap), sinks is not None)
    kernel = _kernel(*kind)
    if kernel is None:
        return None
    out = (tokens * heads * value_width, value_width, heads * value_width)
    tail = (
        *(stride for _, strides in (query, key, value) for stride in strides[:3]),
        *masked[1],
        *out,
        _bits(width**-0.5 if scale is None else scale),
        _bits(softcap or 0.0),
        *((1, 1) if is_causal else (places, 0)),
    )
    shape = (batch, key_heads, shared, tokens, places, _part(places), value_width)
    is_alone = batch * heads * tokens * places * (width + value_width) < _ALONE
    return _Call(kernel, shape, tail, 16 + value_width, is_alone)


def _broadcast(mask: _Mask, shape: _Shape) -> tuple[str, _Shape] | None:
    """Kind and strides of a mask, of the first three dimensions; ``None`` where it does not fit."""
    if mask is None:
        return "", (0, 0, 0)
    dtype, own, strides = mask
    name, missing = str(dtype).removeprefix("torch."), len(shape) - len(own)
    if name not in ("bool", "float32", "float16", "bfloat16") or missing < 0:
        return None
    own, strides = (1,) * missing + tuple(own), (0,) * missing + tuple(strides)
    if own[3] != shape[3] or strides[3] != 1 or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
        return None
    return name, tuple(0 if size == 1 else stride for size, stride in zip(own[:3], strides[:3], strict=True))


def _rows(count: int) -> int:
    """Rows that a place is read for at a time: about as many each time."""
    from llm_magic.backends.accelerate.kernels.attention import MOST_ROWS

    return -(-count // -(-count // MOST_ROWS))


def _part(places: int) -> int:
    """Places of a part; by nothing else, so that a token's answer is the same beside others."""
    from llm_magic.backends.accelerate.kernels.attention import MOST_PLACES

    part = _SMALLEST_PART
    while part < MOST_PLACES and part * _FEW_PARTS < places:
        part *= 2
    return part


def _bits(number: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits


@cache
def _kernel(
    dtype: str, width: int, value_width: int, rows: int, mask: str, has_cap: bool, has_sinks: bool
) -> Callable[[Any], None] | None:
    """The compiled kernel; ``None`` where there is none for this processor, or this dtype."""
    if dtype not in ("float32", "float16", "bfloat16") or not is_there():
        return None
    try:
        from llm_magic.backends.accelerate.kernels import numbers
        from llm_magic.backends.accelerate.kernels.attention import Kind, attention

        if "float16" in (dtype, mask) and not numbers.has_float16():
            return None
        return attention(Kind(dtype, width, value_width, rows, mask, has_cap, has_sinks))
    except Exception:  # another llvmlite, or it has no such instruction after all
        return None
