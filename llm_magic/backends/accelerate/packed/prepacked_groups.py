"""Weights that were saved as integers, or as floats of 8 bits, groups of which share a scale.

Each format below stands for ``(q - zero) * scale``. Those of 4 bits have eight numbers in a word of 32 bits, the first
in its lowest bits.

=======================  ===================================================================================
GPTQ
``X.qweight``        int32 ``[in / 8, out]``
``X.qzeros``         int32 ``[groups, out / 8]``, less one in the first version of the format
``X.scales``         ``[groups, out]``
``X.g_idx``          int32 ``[in]``: the group of each column; those need not be neighbours (``desc_act``)
AWQ (GEMM)
``X.qweight``        int32 ``[in, out / 8]``, a word has columns 0, 2, 4, 6, 1, 3, 5, 7
``X.qzeros``         int32 ``[groups, out / 8]``, in the same order
``X.scales``         ``[groups, out]``
compressed-tensors
``X.weight_packed``  int32 ``[out, in / 8]``, more by half of their range
``X.weight``         or int8, or float8, ``[out, in]``
``X.weight_scale``   ``[out, groups]``, ``[out, 1]``, ``[1]``, or of blocks ``[out / m, in / n]``
``X.weight_zero_point``  as the weight: int32 ``[out / 8, groups]``, or one number each
``X.weight_g_idx``   as ``g_idx`` of GPTQ
fp8 of transformers
``X.weight``         float8 ``[out, in]``
``X.weight_scale_inv``  of blocks ``[out / m, in / n]``, or ``[1]``: factors all the same; exponents where uint8
===================  =======================================================================================

Sources: AutoGPTQ's ``QuantLinear``, AutoAWQ's ``WQLinear_GEMM``, compressed-tensors' ``pack_to_int32``, transformers'
``Fp8Dequantize``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.packed.prepacked import Prepacked, Tensor, damaged
from llm_magic.errors import SourceError

_AT_A_TIME = 1 << 22
"""Weights that become numbers at a time; each takes several bytes meanwhile."""

WORDS = ("qweight", "qzeros", "scales")
"""Parts of a layer of GPTQ or AWQ: its entries in words, their zeros in words, and its scales."""

_AWQ_PAIRS = ((0, 2), (4, 6), (1, 3), (5, 7))
"""The columns that each byte of a word of AWQ has in its low half and in its high one."""


@dataclass(frozen=True)
class Groups:
    """A matrix: its entries, and what each group of them shares.

    Attributes
    ----------
    entries
        ``[out, in]``: uint8 of 4 bits, int8, or float8.
    scales
        float32 ``[out, groups]``.
    zeros
        The entry that stands for zero, float32 ``[out, groups]``; ``None`` where that is 0 itself.
    group_of
        The group of each column ``[in]``; ``None`` where as many neighbours each are one.
    """

    entries: Any
    scales: Any
    zeros: Any = None
    group_of: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        rows, columns = self.entries.shape
        return int(rows), int(columns)

    def numbers(self, dtype: Any) -> Any:
        """What it stands for ``[out, in]``, in ``dtype``; some rows at a time, because they are float32 first."""
        rows, columns = self.shape
        found, step = self.entries.new_empty(rows, columns, dtype=dtype), max(1, _AT_A_TIME // columns)
        for start in range(0, rows, step):
            found[start : start + step] = self._numbers(slice(start, start + step))
        return found

    def _numbers(self, of_rows: slice) -> Any:
        entries, scales = self.entries[of_rows].float(), self.scales[of_rows]
        (rows, columns), count = entries.shape, scales.shape[1]
        zeros = None if self.zeros is None else self.zeros[of_rows]
        if self.group_of is not None:
            scales, zeros = (each if each is None else each[:, self.group_of] for each in (scales, zeros))
        else:
            entries = entries.view(rows, count, columns // count)
            scales, zeros = (each if each is None else each.unsqueeze(-1) for each in (scales, zeros))
        return (entries if zeros is None else entries.sub_(zeros)).mul_(scales).view(rows, columns)


_OF_WRONG_PARTS = (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError)
"""What reading raises where a file has other shapes and dtypes than it should."""

Reader = Callable[[Tensor, str, Any], Groups]
"""``(tensor, layer, device)``: reads the weight of the layer that has this name in the files."""


@dataclass(frozen=True)
class PackedInGroups(Prepacked):
    """What other libraries have packed, taken as optimum-quanto or bitsandbytes would hold it.

    Attributes
    ----------
    read
        Of its format.
    """

    read: Reader

    def numbers(self, device: Any, index: int = 0) -> Any:
        import torch

        rows = [groups.numbers(self.dtype) for groups in self._read(index, device)]
        if len({each.shape[1] for each in rows}) > 1:
            raise damaged(self.matrices[index][0])
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def groups(self, device: Any, index: int = 0) -> Groups:
        """A matrix as it is in the files.

        Raises
        ------
        SourceError
            When parts do not belong together.
        """
        import torch

        found = self._read(index, device)
        kinds = {(each.entries.dtype, each.shape[1], each.scales.shape[1]) for each in found}
        if len(kinds) > 1:
            raise damaged(self.matrices[index][0])
        if any(each.group_of is not None for each in found):
            raise SourceError(
                f"The packed weight {self.matrices[index][0]} has its columns in an order of which config.json says nothing.",
                "Pack the model anew, with --quantize int8, nf4 or another method.",
            )
        if len(found) == 1:
            return found[0]
        zeros = [torch.zeros_like(each.scales) if each.zeros is None else each.zeros for each in found]
        return Groups(
            torch.cat([each.entries for each in found]),
            torch.cat([each.scales for each in found]),
            torch.cat(zeros) if any(each.zeros is not None for each in found) else None,
        )

    def _read(self, index: int, device: Any) -> list[Groups]:
        found = []
        for name in self.matrices[index]:
            try:
                groups = self.read(self.tensor, name.removesuffix(".weight"), device)
                are_parts = _belong_together(groups)
            except _OF_WRONG_PARTS:
                raise damaged(name) from None
            if not are_parts:
                raise damaged(name)
            found.append(groups)
        return found


def _belong_together(groups: Groups) -> bool:
    (rows, columns), shape = groups.shape, tuple(groups.scales.shape)
    if len(shape) != 2 or shape[0] != rows or not shape[1] or not columns:
        return False
    if groups.zeros is not None and tuple(groups.zeros.shape) != shape:
        return False
    if groups.group_of is None:
        return not columns % shape[1]
    group_of = groups.group_of
    return len(group_of) == columns and bool(((group_of >= 0) & (group_of < shape[1])).all())


# ------------------------------------------------------------------------------------------- the formats


def read_gptq(
    find: Tensor, layer: str, device: Any, *, is_first_version: bool, bits: int = 0, group: int = 0
) -> Groups:
    """GPTQ of 4 or 8 bits, which the shapes tell.

    Parameters
    ----------
    is_first_version
        Whether zeros are less by one.
    bits
        Of an entry, where all layers have as many.
    group
        Columns of a group, where all layers have as many; the last one of a row may have fewer.
    """
    words, zero_words, scales = _read(find, device, *(f"{layer}.{part}" for part in WORDS))
    own = 32 * zero_words.shape[1] // scales.shape[1]
    if bits not in (0, own):
        raise ValueError(own)
    if is_first_version:  # as it was subtracted: from words, where a zero takes one from its neighbour
        zero_words = zero_words + (0x11111111 if own == 4 else 0x01010101)
    entries, zeros = _entries(words.T, own), _entries(zero_words, own)
    order = _order(find(f"{layer}.g_idx"), device, entries.shape[1], len(scales))
    if order is None:
        order = _uneven(group, device, entries.shape[1], len(scales))
    return Groups(entries, scales.T.float(), zeros.T.float(), order)


def read_awq(find: Tensor, layer: str, device: Any, *, group: int = 0) -> Groups:
    """AWQ of 4 bits, in the order of its GEMM kernels; ``group`` is as for `read_gptq`."""
    words, zero_words, scales = _read(find, device, *(f"{layer}.{part}" for part in WORDS))
    entries, zeros = (_awq_columns(each) for each in (words, zero_words))
    order = _uneven(group, device, entries.shape[1], len(scales))
    return Groups(entries, scales.T.float(), zeros.float(), order)


def _awq_columns(words: Any) -> Any:
    """AWQ's words ``[n, out / 8]`` as numbers ``[out, n]``."""
    import torch

    if words.dtype != torch.int32:
        raise ValueError(words.dtype)
    pairs = words.T.reshape(-1).view(torch.uint8).view(words.shape[1], -1, 4)  # [out / 8, n, 4]
    numbers = pairs.new_empty(len(pairs), 8, pairs.shape[1])
    for pair, (low, high) in zip(pairs.unbind(-1), _AWQ_PAIRS, strict=True):
        numbers[:, low], numbers[:, high] = pair & 15, pair >> 4
    return numbers.flatten(0, 1)


def read_compressed(
    find: Tensor, layer: str, device: Any, *, bits: int, is_symmetric: bool, block: tuple[int, int] | None
) -> Groups:
    """compressed-tensors, as words or as one number each.

    Parameters
    ----------
    bits
        Of an entry in words.
    is_symmetric
        Whether there are no zeros.
    block
        Rows and columns that share a scale, where it is not columns of one row.
    """
    import torch

    entries, middle = _compressed_entries(find, layer, device, bits)
    rows, columns = entries.shape
    (held,) = _read(find, device, f"{layer}.weight_scale")
    scales, zeros = _by_row(held, rows, block), None
    if not is_symmetric:
        (held,) = _read(find, device, f"{layer}.weight_zero_point")
        held = (
            _entries(held.T, bits)[:, :rows].T.float() if held.dtype == torch.int32 else held.float() + middle
        )
        zeros = _by_row(held, rows, block)
    elif middle:
        zeros = torch.full_like(scales, middle)
    if block is None:
        order = _order(find(f"{layer}.weight_g_idx"), device, columns, scales.shape[1])
    else:
        order = _order_of_blocks(block, device, entries)
    return Groups(entries, scales, zeros, order)


def read_fp8(find: Tensor, layer: str, device: Any, *, block: tuple[int, int] | None) -> Groups:
    """Floats of 8 bits as transformers calls their parts; ``block`` is as for `read_compressed`."""
    import torch

    entries, held = _read(find, device, f"{layer}.weight", f"{layer}.weight_scale_inv")
    if entries.dtype != torch.float8_e4m3fn:
        raise TypeError
    block = None if held.numel() == 1 else block
    scales = _by_row(held.float().sub(127).exp2() if held.dtype == torch.uint8 else held, len(entries), block)
    return Groups(entries.to(device, copy=True), scales, None, _order_of_blocks(block, device, entries))


def _order_of_blocks(block: tuple[int, int] | None, device: Any, entries: Any) -> Any:
    """The group of each column, where the last block is smaller than the others."""
    import torch

    columns = entries.shape[1]
    return torch.arange(columns, device=device) // block[1] if block and columns % block[1] else None


def _compressed_entries(find: Tensor, layer: str, device: Any, bits: int) -> tuple[Any, int]:
    """Entries ``[out, in]``, and what they are more than is meant."""
    import torch

    if (words := find(f"{layer}.weight_packed")) is None:
        entries = find(f"{layer}.weight")
        if entries is None or entries.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise TypeError
        return entries.to(device, copy=True), 0  # what comes from a file may be pages of it
    (shape,) = _read(find, "cpu", f"{layer}.weight_shape")
    if shape.shape != (2,):
        raise ValueError
    rows, columns = shape.tolist()
    if words.shape != (rows, -(-columns * bits // 32)):
        raise ValueError(columns)
    entries = _entries(words.to(device), bits)[:, :columns].contiguous()
    return entries, 1 << (bits - 1)


def _read(find: Tensor, device: Any, *names: str) -> list[Any]:
    found = [find(name) for name in names]
    if any(tensor is None for tensor in found):
        raise LookupError
    return [tensor.to(device) for tensor in found]


def _entries(words: Any, bits: int) -> Any:
    """The numbers in the words ``[..., n]`` of 32 bits, uint8 ``[..., n * 32 / bits]``, the lowest first."""
    import torch

    if words.dtype != torch.int32 or bits not in (4, 8):
        raise ValueError(bits)
    pairs = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)
    return pairs if bits == 8 else torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def _by_row(values: Any, rows: int, block: tuple[int, int] | None) -> Any:
    """What groups share, float32 ``[out, groups]``, of one for each row, for all rows, or for blocks of them."""
    values = values.float().reshape(-1, 1) if values.dim() < 2 else values.float()
    if block is not None:
        if len(values) != -(-rows // block[0]):
            raise ValueError(len(values))
        values = values.repeat_interleave(min(rows, block[0]), 0)[:rows]
    return values.expand(rows, -1)


def _uneven(group: int, device: Any, columns: int, count: int) -> Any:
    """The group of each column, if the last one is smaller than the others."""
    import torch

    if not group or not columns % group or count != -(-columns // group):
        return None
    return torch.arange(columns, device=device) // group


def _order(group_of: Any, device: Any, columns: int, count: int) -> Any:
    """The group of each column, if those of one are no neighbours."""
    import torch

    if group_of is None:
        return None
    group_of = group_of.to(device).long()
    usual = torch.arange(columns, device=device) // (columns // count)
    return None if torch.equal(group_of, usual) else group_of
