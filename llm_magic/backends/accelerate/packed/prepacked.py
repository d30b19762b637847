"""Weights that bitsandbytes has packed before they were saved, in its names for their parts.

==========================================  ==============================================================
4 bits
``X.weight``                                uint8 ``[n / 2, 1]``, or the same bytes in another dtype
``X.weight.absmax``                         float32 scales; or uint8, where they are packed themselves
``X.weight.nested_absmax``, ``…_quant_map``  how the scales are packed
``X.weight.quant_state.bitsandbytes__nf4``  JSON in bytes: shape, block, dtype, …
8 bits
``X.weight``, ``X.SCB``                     int8 ``[out, in]``, and the largest number of each row, float32
==========================================  ==============================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.errors import SourceError

STATE = ".quant_state.bitsandbytes__"
"""What follows the name of a weight of 4 bits; the method follows."""
FOUR_BIT_PARTS = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
"""What follows it besides."""

Tensor = Callable[[str], Any]
"""A tensor of the checkpoint by its name."""


@dataclass(frozen=True)
class Prepacked(ABC):
    """A matrix, or a stack of them, as the files of a checkpoint hold it.

    Attributes
    ----------
    method
        As which of ``METHODS`` it is taken; nothing where it is unpacked, and packed anew.
    matrices
        For each matrix the names of the weights whose rows it consists of, one below the other.
    tensor
        Gets what has a name.
    dtype
        torch dtype in which they are computed.
    """

    method: str
    matrices: Sequence[Sequence[str]]
    tensor: Tensor
    dtype: Any

    @abstractmethod
    def numbers(self, device: Any, index: int = 0) -> Any:
        """What a matrix stands for ``[out, in]``.

        Raises
        ------
        SourceError
            When the parts do not belong together, or are packed in a way that nothing here reads.
        """


@dataclass(frozen=True)
class PackedByBitsAndBytes(Prepacked):
    """What bitsandbytes has packed, in ``"nf4"``, ``"fp4"`` or ``"int8"``.

    Attributes
    ----------
    block
        Weights that share a scale, of 4 bits.
    """

    block: int

    def parts(self, index: int, device: Any) -> tuple[Any, Any, tuple[int, int]]:
        """Data and scales of a matrix on ``device``, as the library's layers hold them, and its shape ``(out, in)``.

        Raises
        ------
        SourceError
            When the parts do not belong together, or are packed in a way that nothing here computes with.
        """
        import torch

        read = self._eight_bits if self.method == "int8" else self._four_bits
        found = [read(name, device) for name in self.matrices[index]]
        if len({columns for _, _, (_, columns) in found}) > 1:
            raise damaged(self.matrices[index][0])
        data, scales = torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
        return data, scales, (sum(rows for _, _, (rows, _) in found), found[0][2][1])

    def numbers(self, device: Any, index: int = 0) -> Any:
        import torch

        data, scales, shape = self.parts(index, device)
        if self.method == "int8":
            return (data * (scales / 127).unsqueeze(-1)).to(self.dtype)
        unpack: Any = torch.ops.bitsandbytes.dequantize_4bit.default
        # In rows of a block: the library's kernel for CPUs takes a scale for no part of another row.
        rows = (scales.numel(), self.block)
        return unpack(data, scales, self.block, self.method, rows, self.dtype).view(shape)

    def _eight_bits(self, name: str, device: Any) -> tuple[Any, Any, tuple[int, int]]:
        import torch

        data, scales = self.tensor(name), self.tensor(f"{name.removesuffix('weight')}SCB")
        if data.dtype != torch.int8 or data.dim() != 2 or scales.shape != data.shape[:1]:
            raise damaged(name)
        return data.to(device), scales.to(device, torch.float32), (data.shape[0], data.shape[1])

    def _four_bits(self, name: str, device: Any) -> tuple[Any, Any, tuple[int, int]]:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_blockwise, get_4bit_type

        wanted = ["absmax", "quant_map", f"{STATE[1:]}{self.method}"]
        held = {part: self.tensor(f"{name}.{part}") for part in wanted}
        if held["absmax"].dtype == torch.uint8:
            held |= {part: self.tensor(f"{name}.{part}") for part in ("nested_absmax", "nested_quant_map")}
        try:
            state = QuantState.from_dict(held, device=torch.device(device))
            rows, columns = (int(extent) for extent in state.shape)
        except Exception:  # it is made of what the file says
            raise damaged(name) from None
        if state.blocksize != self.block or not torch.allclose(
            state.code, get_4bit_type(self.method, device=device), atol=1e-6
        ):
            raise SourceError(
                f"{name} is packed in an unusual way (blocks of {state.blocksize}).",
                "Load the original model, with --quantize.",
            )
        scales = state.absmax
        if state.nested:
            _check_nested(name, scales, state.state2)
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        data = self.tensor(name).to(device).contiguous().view(torch.uint8).reshape(-1, 1)
        if rows * columns != 2 * len(data) or rows * columns != self.block * scales.numel():
            raise damaged(name)
        return data, scales.float().reshape(-1), (rows, columns)


def _check_nested(name: str, scales: Any, state: Any) -> None:
    """The library's code reads as much as these say."""
    import torch

    table, own = state.code, state.absmax
    is_whole = isinstance(state.blocksize, int) and state.blocksize > 0
    if not is_whole or table.numel() != 256 or table.dtype != torch.float32 or own.dtype != torch.float32:
        raise damaged(name)
    if own.numel() != -(-scales.numel() // state.blocksize):
        raise damaged(name)


def damaged(name: str) -> SourceError:
    """What to say of a packed weight whose parts contradict each other."""
    return SourceError(
        f"The parts of the packed weight {name} do not belong together.", "Download the model again."
    )
