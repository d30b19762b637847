"""Attention of a sweep's few tokens on the CPU, by a compiled kernel.

torch's kernel is made for prompts. For a token it is several times as slow as its keys and values are read, and
it knows neither capped scores nor sinks. What is compiled here (see `kernels.attention`) reads each key and value for
all query heads that share it. It needs llvmlite; without it, or for what it is not made for, others compute.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.preparation import preparing

_SMALLEST_PART, _LARGEST_PART, _FEW_PARTS = 64, 1024, 32
_MOST_ROWS, _WIDEST = 4, 1024
_ALONE = 1 << 16
"""Products of numbers for which one thread is quicker than several."""
_KEPT_BYTES, _MOST_ROOMS = 16 << 20, 4
"""Of room that is kept for the next layer, and how often: for calls side by side."""

_ADDRESSES, _HEAD_OF_RECORD = 8, 16
_TEAM, _REST = 33, 35
WORDS, QUERY, OUT = 39, 0, 5
_Words = ctypes.c_int64 * WORDS
"""See `kernels.attention.attention`."""

_Shape = tuple[int, ...]
Lies = tuple[_Shape, _Shape]
"""How a tensor lies: its shape and strides."""
_FLOATS = ("float32", "float16", "bfloat16")


class _Like(NamedTuple):
    """What a kernel, and the numbers that it is told, depend on: of each tensor its shape and strides."""

    dtype: Any
    query: tuple[_Shape, _Shape]
    key: tuple[_Shape, _Shape]
    value: tuple[_Shape, _Shape]
    mask: tuple[Any, _Shape, _Shape] | None
    scale: float | None
    is_causal: bool
    softcap: float | None
    sinks: tuple[Any, _Shape] | None
    rest: tuple[_Shape, _Shape] | None


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
    rest_of_key: Any = None,
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
    rest_of_key
        As ``key``, where only the first numbers of each key are there: the others.

    Returns
    -------
    Tensor or None
        ``[batch, tokens, heads, value width]``, contiguous; ``None`` where the kernel does not take it. A token that
        sees nothing has 0, as with torch's kernels. Every answer is the same with any number of threads.
    """
    if not _may_read(query, key, value, mask, sinks, rest_of_key):
        return None
    sinks = None if sinks is None else sinks.contiguous()
    has_one = query.dtype == key.dtype == value.dtype and (
        rest_of_key is None or rest_of_key.dtype == key.dtype
    )
    like = _Like(
        query.dtype if has_one else None,
        (query.shape, query.stride()),
        (key.shape, key.stride()),
        (value.shape, value.stride()),
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        scale,
        is_causal,
        softcap,
        _dtype_and_shape(sinks),
        None if rest_of_key is None else (rest_of_key.shape, rest_of_key.stride()),
    )
    call = _call(like)
    return None if call is None else call((query, key, value), mask, sinks, rest_of_key)


def is_there() -> bool:
    """Whether there may be kernels for this processor: each is compiled when it is first needed.

    Without vectors for products there are none: the fused operations would be calls of a library, which is slow.
    """
    return cpu_products.is_there() and _may_probe_stacks()


@cache
def _may_probe_stacks() -> bool:
    """Whether a function of Windows that needs more than a page of stack finds what it calls then: LLVM ends the process if not."""
    if sys.platform != "win32":
        return True
    import llvmlite.binding as llvm

    return llvm.address_of_symbol("__chkstk") is not None


def _may_read(*tensors: Any) -> bool:
    """Whether all is there, in RAM, and nobody looks on: to differentiate, to trace."""
    import torch

    if is_looked_at():
        return False
    needs_grad = torch.is_grad_enabled()
    for part in tensors:
        if part is None:
            continue
        if type(part) is not torch.Tensor and type(part) is not torch.nn.Parameter:
            return False
        if not part.is_cpu or (needs_grad and part.requires_grad):
            return False
    return True


def call_for(
    dtype: Any,
    lie: tuple[Lies, Lies, Lies],
    mask: Any,
    scale: float | None,
    *,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
    rest_of_key: Lies | None = None,
) -> Call | None:
    """What computes for query, keys and values that lie so; other arguments and ``None`` as those of `attended`."""
    of_mask = None if mask is None else (mask.dtype, mask.shape, mask.stride())
    return _call(_Like(dtype, *lie, of_mask, scale, is_causal, softcap, _dtype_and_shape(sinks), rest_of_key))


def _dtype_and_shape(tensor: Any) -> tuple[Any, _Shape] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape)


class Call:
    """A kernel, and what it is told of tensors like some.

    Attributes
    ----------
    kernel
        Of the address of words; see `kernels.attention.attention`.
    numbers
        Those behind the first addresses.
    room
        Bytes for what parts give.
    """

    def __init__(self, kernel: Callable[[Any], None], like: _Like, mask: _Shape) -> None:
        (batch, heads, tokens, width), (_, key_heads, places, value_width) = like.query[0], like.value[0]
        part = _part(places)
        self.kernel = kernel
        self._is_alone = batch * heads * tokens * places * (width + value_width) < _ALONE
        self._out = (batch, tokens, heads, value_width)
        self._records = 4 * batch * heads * tokens * -(-places // part) * (_HEAD_OF_RECORD + value_width)
        self.room = self._records + 8 * batch * key_heads
        scale = width**-0.5 if like.scale is None else like.scale
        words = (
            *(0,) * _ADDRESSES,
            *(batch, key_heads, heads // key_heads, tokens, places, part),
            *(stride for _, strides in (like.query, like.key, like.value) for stride in strides[:3]),
            *mask,
            *(tokens * heads * value_width, value_width, heads * value_width),
            *(_bits(scale), _bits(like.softcap or 0.0)),
            *((1, 1) if like.is_causal else (places, 0)),
            *(0, batch * key_heads * -(-places // part)),
            *(0, *(like.rest[1][:3] if like.rest else (0, 0, 0))),
        )
        self._words, self.numbers = bytes(_Words(*words)), words[_ADDRESSES:]

    def __call__(self, states: tuple[Any, Any, Any], mask: Any, sinks: Any, rest: Any) -> Any:
        query, key, value = states
        out = query.new_empty(self._out)
        words = _Words.from_buffer_copy(self._words)
        words[0], words[1], words[2] = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if mask is not None:
            words[3] = mask.data_ptr()
        if sinks is not None:
            words[4] = sinks.data_ptr()
        if rest is not None:
            words[_REST] = rest.data_ptr()
        words[5] = out.data_ptr()
        room = taken_room(self.room)
        words[6] = start = room.data_ptr()
        words[7] = start + self._records
        if not self._is_alone:
            words[_TEAM] = team()
        self.kernel(words)
        leave_room(room)
        return out

    def tell(self, array: Any, first: int, tensors: tuple[Any, Any, Any, Any, Any], room: Any) -> None:
        """Put into words, from the first one on, all but where query and results are.

        ``tensors`` are keys, values, mask, sinks and the rest of the keys, with ``None`` for what there is not; sinks lie
        side by side.
        """
        key, value, *others = tensors
        start = room.data_ptr()
        array[first + _ADDRESSES : first + WORDS] = self.numbers
        array[first + 1], array[first + 2] = key.data_ptr(), value.data_ptr()
        array[first + 3], array[first + 4], array[first + _REST] = map(cpu_products.address, others)
        array[first + 6], array[first + 7] = start, start + self._records
        if not self._is_alone:
            array[first + _TEAM] = team()


def taken_room(size: int) -> Any:
    """Memory for what the parts give: what another call has left, if that is enough."""
    import torch

    try:
        room = _rooms.pop()  # nobody else has it then
    except IndexError:
        room = None
    return torch.empty(size, dtype=torch.uint8, device="cpu") if room is None or room.nbytes < size else room


def leave_room(room: Any) -> None:
    """Give it back."""
    if len(_rooms) < _MOST_ROOMS and room.nbytes <= _KEPT_BYTES:
        _rooms.append(room)


_rooms: list[Any] = []
"""Of no thread: one that ends while Python does may not free a tensor."""


@lru_cache(maxsize=256)
def _call(like: _Like) -> Call | None:
    """What computes tensors like these; ``None`` where no kernel does."""
    if not (_fit(like) and is_there()):
        return None
    mask = _broadcast(like)
    if mask is None:
        return None
    heads, tokens, width = like.query[0][1:]
    rows = heads // like.key[0][1] * tokens
    kernel = _kernel(
        (_name(like.dtype), width, like.value[0][3], _rows(rows)),
        mask[0],
        has_cap=bool(like.softcap),
        sinks=_name(like.sinks[0]) if like.sinks else "",
        rest=like.rest[0][3] if like.rest else 0,
    )
    return None if kernel is None else Call(kernel, like, mask[1])


def _fit(like: _Like) -> bool:
    """Whether query, keys, values and sinks are what `attended` takes."""
    rest = () if like.rest is None else (like.rest,)
    tensors = (like.query, like.key, like.value, *rest)
    if any(len(shape) != 4 or strides[3] != 1 or 0 in shape for shape, strides in tensors):
        return False
    (batch, heads, tokens, width), (_, key_heads, places, value_width) = like.query[0], like.value[0]
    parts = [shape for shape, _ in (like.key, *rest)]
    return (
        _name(like.dtype) in _FLOATS
        and tokens <= FEW_TOKENS
        and heads % key_heads == 0
        and all(tuple(shape[:3]) == (batch, key_heads, places) for shape in parts)
        and sum(shape[3] for shape in parts) == width
        and like.value[0][0] == batch
        and all(size % 8 == 0 and size <= _WIDEST for size in (width, value_width, parts[-1][3]))
        and not (like.is_causal and like.mask is not None)
        and (like.sinks is None or (_name(like.sinks[0]) in _FLOATS and tuple(like.sinks[1]) == (heads,)))
    )


def _broadcast(like: _Like) -> tuple[str, _Shape] | None:
    """Kind and strides of a mask, of the first three dimensions; ``None`` where it does not fit."""
    if like.mask is None:
        return "", (0, 0, 0)
    dtype, own, strides = like.mask
    shape = (*like.query[0][:3], like.key[0][2])
    missing = len(shape) - len(own)
    if _name(dtype) not in ("bool", *_FLOATS) or missing < 0:
        return None
    own, strides = (1,) * missing + tuple(own), (0,) * missing + tuple(strides)
    if own[3] != shape[3] or strides[3] != 1 or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
        return None
    return _name(dtype), tuple(
        0 if size == 1 else stride for size, stride in zip(own[:3], strides[:3], strict=True)
    )


def _rows(count: int) -> int:
    """Rows that a place is read for at a time: about as many each time."""
    return -(-count // -(-count // _MOST_ROWS))


def _part(places: int) -> int:
    """Places of a part; by nothing else, so that a token's answer is the same beside others."""
    part = _SMALLEST_PART
    while part < _LARGEST_PART and part * _FEW_PARTS < places:
        part *= 2
    return part


def _bits(number: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits


@cache
def _kernel(
    sizes: tuple[str, int, int, int], mask: str, *, has_cap: bool, sinks: str, rest: int
) -> Callable[[Any], None] | None:
    """The compiled kernel; ``None`` where there is none for this processor, or this dtype."""
    try:
        from llm_magic.backends.accelerate.kernels import numbers
        from llm_magic.backends.accelerate.kernels.attention import Kind, attention

        if "float16" in (sizes[0], mask, sinks) and not numbers.has_float16():
            return None
        with preparing():
            return attention(Kind(*sizes, mask, has_cap, sinks, rest))
    except Exception:  # another llvmlite, or it has no such instruction after all
        return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
